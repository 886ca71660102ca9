"""Segments, claims, checkpoints and what seals them: one encoding, and nothing else is read."""

from __future__ import annotations

import dataclasses
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stashcordfs.crypto.keys import (
    KIND_CHECKPOINT,
    KIND_CLAIM,
    KIND_MANIFEST,
    KIND_PACK,
    KIND_SEGMENT,
    VolumeKeys,
)
from stashcordfs.crypto.slots import SlotSet
from stashcordfs.errors import ObjectCorrupt
from stashcordfs.store.checkpoint import (
    Manifest,
    Part,
    compressed,
    decode_manifest,
    encode_manifest,
    expand_to,
)
from stashcordfs.store.record import VolumeRecord
from stashcordfs.store.sealed import open_object, seal_object
from stashcordfs.store.segment import (
    Change,
    Claim,
    Segment,
    decode_claim,
    decode_segment,
    encode_claim,
    encode_segment,
    genesis,
)
from stashcordfs.types import Ino, ObjectId

KEYS = VolumeKeys(bytes(range(16)), {0: bytes(range(32)), 3: bytes(range(32, 64))})
KINDS = [KIND_SEGMENT, KIND_CHECKPOINT, KIND_MANIFEST, KIND_CLAIM]
NUMBERS = st.integers(0, (1 << 64) - 1)
DIGESTS = st.binary(min_size=32, max_size=32)


@st.composite
def segments(draw):
    first = draw(st.integers(1, 1 << 40))
    pairs = draw(st.lists(st.tuples(NUMBERS, st.binary(max_size=50)), max_size=5))
    changes = [Change(first + n, made, data) for n, (made, data) in enumerate(pairs)]
    blocks = st.tuples(st.integers(1, 1 << 60).map(Ino), st.integers(0, 1 << 40))
    dirty = sorted(draw(st.lists(blocks, max_size=5)))
    head = [draw(NUMBERS) for _ in range(4)]
    return Segment(*head, draw(DIGESTS), changes, dirty, draw(st.booleans()))


CLAIMS = st.builds(
    Claim, st.binary(min_size=16, max_size=16), NUMBERS, NUMBERS, DIGESTS, NUMBERS,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)  # fmt: skip
PARTS = st.builds(Part, st.binary(min_size=16, max_size=16).map(ObjectId), NUMBERS, DIGESTS)
MANIFESTS = st.builds(
    Manifest, *[NUMBERS] * 6, DIGESTS, NUMBERS, st.lists(PARTS, max_size=4)
)  # fmt: skip
CODECS = [
    (segments(), encode_segment, decode_segment),
    (CLAIMS, encode_claim, decode_claim),
    (MANIFESTS, encode_manifest, decode_manifest),
]


@given(st.data())
def test_what_is_written_is_read_and_has_one_encoding(data):
    values, encode, decode = data.draw(st.sampled_from(CODECS))
    value = data.draw(values)
    body = encode(value)
    assert decode(body) == value
    assert encode(decode(body)) == body


@given(st.data())
def test_other_bytes_are_refused_or_are_their_own_encoding(data):
    values, encode, decode = data.draw(st.sampled_from(CODECS))
    body = bytearray(encode(data.draw(values)))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] = data.draw(st.integers(0, 255))
    body += data.draw(st.binary(max_size=2))
    if data.draw(st.booleans()):
        del body[data.draw(st.integers(0, len(body) - 1)) :]
    try:
        value = decode(bytes(body))
    except ObjectCorrupt:
        return
    assert encode(value) == bytes(body)


@given(st.binary(max_size=300))
def test_no_bytes_crash_a_reader(body):
    for _, encode, decode in CODECS:
        try:
            assert encode(decode(body)) == body
        except ObjectCorrupt:
            continue


def test_a_gap_in_a_segments_changes_is_a_fault_of_the_writer():
    changes = [Change(1, 0, b""), Change(3, 0, b"")]
    with pytest.raises(ValueError, match="gaps"):
        encode_segment(Segment(1, 1, 4, 0, bytes(32), changes))


def test_a_long_host_name_is_cut_between_letters():
    claim = Claim(bytes(16), 1, 0, bytes(32), 0, "ä" * 200)
    assert decode_claim(encode_claim(claim)).host == "ä" * 127


# ---------------------------------------------------------------------- sealing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [b"", b"short", b"long" * 10_000])
def test_a_sealed_object_opens_as_what_it_was(kind, body):
    made = seal_object(KEYS, kind, 77, body)
    assert open_object(KEYS, kind, made.object_id, made.data) == body
    assert KEYS.read_object_id(made.object_id) == (kind, 77)
    assert made.digest == sha256(made.data).digest()
    assert (made.size, made.parts, made.chunks) == (len(made.data), [made.data], [])
    assert len(made.data) < 200


def test_no_two_objects_share_an_id():
    ids = {seal_object(KEYS, KIND_SEGMENT, 1, b"x").object_id for _ in range(50)}
    assert len(ids) == 50


@settings(deadline=None)
@given(st.data())
def test_every_changed_byte_of_a_sealed_object_is_noticed(data):
    made = seal_object(KEYS, data.draw(st.sampled_from(KINDS)), 5, b"body" * 30)
    damaged = bytearray(made.data)
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ObjectCorrupt):
        open_object(KEYS, made.kind, made.object_id, bytes(damaged))
    with pytest.raises(ObjectCorrupt):
        open_object(KEYS, made.kind, made.object_id, made.data[: at + 1 - 1])


def test_an_object_is_bound_to_its_kind_its_id_and_its_volume():
    made = seal_object(KEYS, KIND_SEGMENT, 5, b"body")
    other = KEYS.new_object_id(KIND_SEGMENT, 5)
    elsewhere = VolumeKeys(bytes(16), {0: bytes(range(32)), 3: bytes(range(32, 64))})
    for keys, kind, object_id in [
        (KEYS, KIND_CLAIM, made.object_id),
        (KEYS, KIND_PACK, made.object_id),
        (KEYS, KIND_SEGMENT, other),
        (elsewhere, KIND_SEGMENT, made.object_id),
    ]:
        with pytest.raises(ObjectCorrupt):
            open_object(keys, kind, object_id, made.data)


def test_the_genesis_is_of_what_never_changes_in_the_record():
    record = VolumeRecord(bytes(16), 1 << 20, SlotSet(bytes(16), 0, ()), 1234)
    later = dataclasses.replace(record, serial=9, settings={"x": 1})
    assert genesis(later) == genesis(record)
    for other in (
        dataclasses.replace(record, volume=b"v" * 16),
        dataclasses.replace(record, created=1235),
        dataclasses.replace(record, block_size=1 << 19),
    ):
        assert genesis(other) != genesis(record)


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("size", [0, 1, 100_000, 3_000_000])
@pytest.mark.parametrize("part_bytes", [1000, 1 << 20])
def test_a_file_comes_back_from_its_parts(tmp_path, size, part_bytes):
    data = (sha256(b"%d" % size).digest() * (size // 32 + 1))[:size]
    (tmp_path / "a").write_bytes(data)
    pieces = list(compressed(tmp_path / "a", part_bytes))
    assert max(map(len, pieces)) <= part_bytes
    expand_to(tmp_path / "b", pieces, size)
    assert (tmp_path / "b").read_bytes() == data


@pytest.mark.parametrize("change", ["less", "more", "tail", "missing", "flip"])
def test_a_stream_of_another_length_is_refused(tmp_path, change):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40_000)
    pieces, size = list(compressed(tmp_path / "a", 500)), 256 * 40_000
    if change == "less":
        size -= 1
    elif change == "more":
        size += 1
    elif change == "tail":
        pieces.append(b"x")
    elif change == "missing":
        pieces.pop()
    else:
        pieces[0] = b"\xff" + pieces[0][1:]
    with pytest.raises(ObjectCorrupt):
        expand_to(tmp_path / "b", pieces, size)
