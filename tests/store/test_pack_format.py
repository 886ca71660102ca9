from __future__ import annotations

import os
from dataclasses import replace

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from stashcordfs.crypto.keys import KIND_PACK, VolumeKeys
from stashcordfs.errors import CryptoError, ObjectCorrupt
from stashcordfs.store import pack as packs
from stashcordfs.store import sealing, table
from stashcordfs.store.pack import FileNote, Head, PackBuilder, Reference, SealedInput
from stashcordfs.store.packer import RequestBuilder
from stashcordfs.types import ChunkId, Ino, Limits, ObjectId

VOLUME = bytes(range(16))
MASTER = bytes(range(32, 64))
KEYS = VolumeKeys(VOLUME, {0: MASTER})
FIXED = ObjectId(bytes(range(160, 176)))
NAMES = [FileNote(Ino(7), Ino(1), "naïve name".encode(), 12, 0o100644)]


def build(*blocks: bytes, refs=(), files=(), head=None, oid=None) -> packs.FinishedPack:
    builder = PackBuilder(KEYS, oid or KEYS.new_object_id(KIND_PACK, 1), 1 << 24)
    for data in blocks:
        squeezed, codec = sealing.squeeze(data)
        builder.add(SealedInput(squeezed, codec, len(data), KEYS.chunk_id(data)))
    return builder.finish(refs, files, head=head)


def joined(pack: packs.FinishedPack) -> bytes:
    return b"".join(pack.parts)


def test_the_known_pack_of_the_format_document() -> None:
    pack = build(b"hello", oid=FIXED)
    assert joined(pack).hex() == (
        "0101000000000000a0a1a2a3a4a5a6a7a8a9aaabacadaeafa4093db843dab76dd8cd4f2af948e5db"
        "d17941cfa154e247c216bf35306302e3d1bde8b9e5b7a36b929c75e85caa197a91648cc9d0d7c296"
        "4410b214bd2accb388f82f3753cc73597a17c201000000000000002700000037"
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(st.binary(max_size=3000), st.builds(bytes, st.integers(0, 9000))), max_size=8
    ),
    st.lists(st.tuples(*[st.integers(0, (1 << 64) - 1)] * 4), max_size=5),
)
def test_what_is_packed_is_read_back(blocks: list[bytes], rows: list[tuple[int, ...]]) -> None:
    ids = [KEYS.chunk_id(data) for data in blocks] + [ChunkId(bytes(32))]
    refs = [Reference(Ino(a), b, c, ids[n % len(ids)], d) for n, (a, b, c, d) in enumerate(rows)]
    head = Head(9, bytes(range(32))) if rows else None
    pack = build(*blocks, refs=refs, files=NAMES, head=head)
    read = packs.open_pack(KEYS, pack.object_id, joined(pack))
    assert read == table.Table(pack.chunks, refs, NAMES, head, whole=True)
    for ref, data in zip(pack.chunks, blocks, strict=True):
        sealed = joined(pack)[ref.offset : ref.offset + ref.length]
        assert packs.open_chunk(KEYS, ref, sealed) == data


def test_every_flipped_bit_of_a_pack_is_noticed() -> None:
    pack = build(b"a" * 200, b"hello", refs=[Reference(Ino(7), 0, 1, ChunkId(bytes(32)), 5)])
    data = joined(pack)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(ObjectCorrupt):
            packs.open_pack(KEYS, pack.object_id, bytes(changed))


def test_every_truncation_and_every_extension_is_noticed() -> None:
    pack = build(b"hello", os.urandom(50))
    data = joined(pack)
    for cut in range(len(data)):
        with pytest.raises(ObjectCorrupt):
            packs.open_pack(KEYS, pack.object_id, data[:cut])
    for longer in (data + b"\0", b"\0" + data):
        with pytest.raises(ObjectCorrupt):
            packs.open_pack(KEYS, pack.object_id, longer)


def test_a_pack_under_another_name_volume_or_epoch_is_refused() -> None:
    pack = build(b"hello")
    with pytest.raises(ObjectCorrupt, match="another name"):
        packs.open_pack(KEYS, FIXED, joined(pack))
    for other in (VolumeKeys(bytes(16), {0: MASTER}), VolumeKeys(VOLUME, {1: MASTER})):
        with pytest.raises(ObjectCorrupt):
            packs.open_pack(other, pack.object_id, joined(pack))


def test_a_chunk_opens_in_its_own_place_only() -> None:
    pack = build(b"one", b"two", b"x" * 500)
    other = build(b"one")
    one, two, _ = pack.chunks
    sealed = pack.parts[1]
    assert packs.open_chunk(KEYS, one, sealed) == b"one"
    for ref, piece in (
        (two, sealed),
        (one, pack.parts[2]),
        (other.chunks[0], sealed),
        (replace(one, number=1), sealed),
        (replace(one, number=1 << 40), sealed),
        (replace(one, number=-1), sealed),
        (replace(one, epoch=5), sealed),
        (replace(one, epoch=-1), sealed),
        (replace(one, codec=1), sealed),
        (replace(one, codec=900), sealed),
        (replace(one, plain_length=4), sealed),
        (replace(one, plain_length=1 << 40), sealed),
        (replace(one, chunk_id=two.chunk_id), sealed),
        (one, sealed[:-1]),
        (replace(one, length=3), sealed[:3]),
    ):
        with pytest.raises(ObjectCorrupt):
            packs.open_chunk(KEYS, ref, piece)


def seal_badly(
    squeezed: bytes, *, codec: int, plain_length: int, named: bytes
) -> tuple[packs.ChunkRef, bytes]:
    """What a holder of the key could write that is still not of the format."""
    builder = PackBuilder(KEYS, KEYS.new_object_id(KIND_PACK, 1), 1 << 20)
    ref = builder.add(SealedInput(squeezed, codec, plain_length, KEYS.chunk_id(named)))
    return ref, builder._parts[1]


def test_a_decompression_bomb_and_other_lies_are_bounded() -> None:
    bomb = sealing.zstd.compress(bytes(50_000_000))
    for squeezed, codec, length, named in (
        (bomb, 1, 1000, b""),
        (bomb[:-3], 1, 50_000_000, b""),
        (bomb + b"more", 1, 50_000_000, b""),
        (b"no zstd at all", 1, 14, b""),
        (b"abc", 7, 3, b"abc"),
        (b"abc", 0, 4, b"abc"),
        (b"abc", 0, 3, b"abd"),
    ):
        ref, sealed = seal_badly(squeezed, codec=codec, plain_length=length, named=named)
        with pytest.raises(ObjectCorrupt):
            packs.open_chunk(KEYS, ref, sealed)


@given(st.binary(max_size=300))
def test_hostile_tables_raise_nothing_but_object_corrupt(data: bytes) -> None:
    try:
        read = table.decode(data, pack=FIXED, epoch=0, first_offset=24)
    except ObjectCorrupt:
        return
    assert table.encode(read) == data or any(
        ref.chunk_id in {c.chunk_id for c in read.chunks} for ref in read.references
    )


def test_tables_have_one_encoding() -> None:
    good = table.encode(table.Table([], [], NAMES))
    parts = {"pack": FIXED, "epoch": 0, "first_offset": 24}
    assert list(table.decode(good, **parts).files) == NAMES
    for bad in (
        good + b"\0",
        b"\x80" + good[1:],
        good[:1] + b"\x80\x00" + good[2:],
        b"\x01\xff\xff\xff\xff\x0f\0\0",
        b"\x01\x00\x00\x01" + b"\xff" * 11,
        b"\x01\x00\x01\x00\x01\x01\x01\x01\x05",
        b"\x01\x00\x00\x01\x01\x01\x01\x01\x00",
    ):
        with pytest.raises(ObjectCorrupt):
            table.decode(bad, **parts)
    with pytest.raises(ValueError, match="64 bits"):
        table.encode(table.Table([], [], [replace(NAMES[0], size=-1)]))


def test_a_pack_is_finished_once_and_never_overfilled() -> None:
    builder = PackBuilder(KEYS, KEYS.new_object_id(KIND_PACK, 1), 4000)
    assert not builder.fits(4000)
    builder.add(SealedInput(b"x", 0, 1, KEYS.chunk_id(b"x")))
    names = [replace(NAMES[0], name=os.urandom(255)) for _ in range(100)]
    refs = [Reference(Ino(n), 0, n, ChunkId(os.urandom(32)), 9) for n in range(500)]
    done = builder.finish(refs, names)
    assert done.size <= 4000
    read = packs.open_pack(KEYS, done.object_id, joined(done))
    assert not read.whole
    assert len(read.references) < 500
    with pytest.raises(ValueError, match="once"):
        builder.finish([], [])
    over = PackBuilder(KEYS, KEYS.new_object_id(KIND_PACK, 1), 100)
    over.add(SealedInput(bytes(99), 0, 99, KEYS.chunk_id(b"")))
    with pytest.raises(ValueError, match="beyond"):
        over.finish([], [])


def test_a_finished_pack_is_checked_before_it_is_sent() -> None:
    pack = build(b"hello", b"world")
    for bad in (
        replace(pack, size=pack.size + 1),
        replace(pack, chunks=pack.chunks[:1]),
        replace(pack, parts=[pack.parts[0], pack.parts[2], pack.parts[1], *pack.parts[3:]]),
    ):
        with pytest.raises(ObjectCorrupt):
            packs.verify_pack(KEYS, bad)


def test_compression_is_kept_only_where_it_helps() -> None:
    noise = os.urandom(200_000)
    assert sealing.squeeze(noise) == (noise, sealing.CODEC_PLAIN)
    assert sealing.squeeze(bytes(200_000))[1] == sealing.CODEC_ZSTD
    assert sealing.squeeze(bytes(200_000), compress=False)[1] == sealing.CODEC_PLAIN
    assert sealing.squeeze(bytes(10)) == (bytes(10), sealing.CODEC_PLAIN)


async def test_many_are_sealed_and_opened_in_threads() -> None:
    blocks = [bytes([n]) * 3000 for n in range(5)]
    sealed = await sealing.seal_many(KEYS, FIXED, blocks, first=2)
    refs = [
        packs.ChunkRef(KEYS.chunk_id(data), FIXED, 0, n + 2, 0, len(piece), len(data), codec)
        for n, (data, (piece, codec)) in enumerate(zip(blocks, sealed, strict=True))
    ]
    items = [(ref, piece) for ref, (piece, _) in zip(refs, sealed, strict=True)]
    assert await sealing.open_many(KEYS, items) == blocks
    with pytest.raises(ObjectCorrupt):
        await sealing.open_many(KEYS, [*items, (refs[0], items[1][1])])


async def fill(size: int, limits: Limits, *, top_up: bool = True) -> list[packs.FinishedPack]:
    builder = RequestBuilder(KEYS, limits, number=1)
    refs, files = [], []
    while not builder.full:
        data = os.urandom(size)
        chunk_id = KEYS.chunk_id(data)
        if await builder.add((1, len(refs)), data, chunk_id):
            ino = Ino(len(refs) + 2)
            refs.append(Reference(ino, 0, len(refs), chunk_id, size))
            files.append(FileNote(ino, Ino(1), b"a file of usual name %d.py" % ino, size, 0o100644))
        elif top_up and size > 1024:
            size //= 2
        else:
            break
    done = await builder.finish(refs, files)
    for pack in done:
        assert pack.size <= limits.max_attachment_bytes
        read = packs.open_pack(KEYS, pack.object_id, joined(pack))
        assert read.whole
        assert len(read.references) == len(pack.chunks)
        assert KEYS.read_object_id(pack.object_id)[0] == KIND_PACK
    assert sum(p.size for p in done) + 1024 + 512 * len(done) <= limits.max_request_bytes
    return done


@pytest.mark.parametrize("size", [1 << 20, 100_000, 4096])
async def test_a_request_is_filled_to_96_percent(size: int) -> None:
    done = await fill(size, Limits(), top_up=False)
    assert len(done) == 2
    assert sum(pack.size for pack in done) >= 0.96 * (25 << 20)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(10 << 20, 10, 25 << 20),
        Limits(100 << 20, 10, 3 << 20),
        Limits(1 << 20, 2, 25 << 20),
        Limits(30_000, 3, 80_000),
    ],
)
async def test_all_limits_are_kept(limits: Limits) -> None:
    done = await fill(9000, limits)
    assert 1 <= len(done) <= limits.max_attachments


async def test_a_block_twice_is_packed_once_and_nothing_makes_no_pack() -> None:
    builder = RequestBuilder(KEYS, Limits())
    assert await builder.finish([], []) == []
    data = bytes(100_000)
    for _ in range(3):
        assert await builder.add("key", data, KEYS.chunk_id(data))
    foreign = Reference(Ino(3), 0, 1, ChunkId(bytes(32)), 4)
    (done,) = await builder.finish([foreign], NAMES)
    assert len(done.chunks) == 1
    assert packs.open_pack(KEYS, done.object_id, joined(done)).references == [foreign]


async def test_a_block_too_large_for_the_limits_is_refused() -> None:
    for limits in (Limits(5000, 10, 1 << 20), Limits(1 << 20, 10, 5000), Limits(1 << 20, 0)):
        builder = RequestBuilder(KEYS, limits)
        data = os.urandom(20_000)
        assert not await builder.add("key", data, KEYS.chunk_id(data))
        assert await builder.finish([], []) == []
    assert trio.lowlevel.in_trio_task()


def test_crypto_errors_of_keys_do_not_pass_as_such() -> None:
    with pytest.raises(CryptoError):
        KEYS.object_key(4, FIXED, b"pack")


def test_a_chunk_of_the_pack_is_named_in_one_way() -> None:
    pack = build(b"hello")
    [ref] = pack.chunks
    mine = Reference(Ino(7), 0, 1, ref.chunk_id, 5)
    plain = table.encode(table.Table(pack.chunks, [mine]))
    assert plain[-1:] == b"\1"
    by_id = plain[:-1] + b"\0" + ref.chunk_id
    with pytest.raises(ObjectCorrupt, match="another way"):
        table.decode(by_id, pack=pack.object_id, epoch=0, first_offset=24)
