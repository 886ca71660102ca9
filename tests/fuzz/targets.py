"""What is fuzzed: the readers of all that Discord gives back. No fuzzer is imported here.

Each target takes any bytes. It may refuse them (ObjectCorrupt, CryptoError), nothing else; what it
reads must be what the writer would have written. As everything is sealed, most bytes would be
refused at once: so bytes are also sealed rightly first, as only a faulty writer could.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stashcordfs.crypto.keys import KIND_PACK, KIND_SEGMENT, VolumeKeys
from stashcordfs.crypto.slots import Argon2Cost, Older, Slot, SlotSet
from stashcordfs.errors import CryptoError, ObjectCorrupt
from stashcordfs.store import pack, record, sealed, sealing, table
from stashcordfs.store.checkpoint import (
    Manifest,
    Part,
    compressed,
    decode_manifest,
    encode_manifest,
    expand_to,
)
from stashcordfs.store.pack import FileNote, Head, PackBuilder, Reference, SealedInput
from stashcordfs.store.segment import (
    Change,
    Claim,
    Segment,
    decode_claim,
    decode_segment,
    encode_claim,
    encode_segment,
)
from stashcordfs.types import ChunkId, Ino, ObjectId

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = VolumeKeys(bytes(16), {0: bytes(range(32))})
ID = ObjectId(bytes(range(160, 176)))
REFUSED = (ObjectCorrupt, CryptoError)
_PLAIN = struct.Struct(">I")


def fuzz_pack(data: bytes) -> None:
    """A whole pack as it is."""
    pack.open_pack(KEYS, ID, data)


def fuzz_sealed_table(data: bytes) -> None:
    """Two bytes: how long the chunks are; a codec; a plain length; then the table's own bytes."""
    if len(data) < 7:
        return
    body, codec = bytes(int.from_bytes(data[:2], "big")), data[2]
    (plain_length,) = _PLAIN.unpack_from(data, 3)
    header = pack.HEADER.pack(1, KIND_PACK, 0, 0, ID)
    size = len(header) + len(body) + len(data) - 7 + pack.TAG_BYTES + pack.TRAILER.size
    trailer = pack.TRAILER.pack(codec, plain_length, len(data) - 7 + pack.TAG_BYTES)
    aad = pack._table_aad(KEYS, header, size, trailer)
    table_sealed = AESGCM(KEYS.table_key(0, ID)).encrypt(bytes(12), data[7:], aad)
    whole = header + body + table_sealed + trailer
    read = pack.read_table(KEYS, ID, header, whole, len(whole))
    assert sum(ref.length for ref in read.chunks) == len(body)


def fuzz_table(data: bytes) -> None:
    """A table in clear: what is read must be written the same."""
    read = table.decode(data, pack=ID, epoch=0, first_offset=pack.HEADER.size)
    assert table.encode(read) == data


def fuzz_segment(data: bytes) -> None:
    """A segment's body, or a claim's."""
    if data[:1] == b"c":
        assert encode_claim(decode_claim(data[1:])) == data[1:]
    else:
        assert encode_segment(decode_segment(data[1:])) == data[1:]


def fuzz_sealed(data: bytes) -> None:
    """An object of the journal channel as it is, or with its body, codec and length sealed."""
    if data[:1] == b"r" or len(data) < 6:
        sealed.open_object(KEYS, KIND_SEGMENT, ID, data[1:])
        return
    codec, (plain_length,) = data[1], _PLAIN.unpack_from(data, 2)
    head = sealed._HEADER.pack(sealed.VERSION, KIND_SEGMENT, 0, 0, ID)
    head += sealed._LENGTHS.pack(codec, plain_length)
    key = AESGCM(KEYS.object_key(0, ID, sealed._LABELS[KIND_SEGMENT]))
    body = key.encrypt(sealed._NONCE, data[6:], sealed._aad(KEYS, head))
    found = sealed.open_object(KEYS, KIND_SEGMENT, ID, head + body)
    assert len(found) == plain_length


def fuzz_checkpoint(data: bytes) -> None:
    """A manifest, or the parts of a checkpoint: a length, and a frame cut in two."""
    if data[:1] == b"m":
        assert encode_manifest(decode_manifest(data[1:])) == data[1:]
        return
    if len(data) < 4:
        return
    plain_bytes, cut = int.from_bytes(data[1:3], "big"), data[3]
    with tempfile.TemporaryDirectory(dir=_WORK) as folder:
        path = Path(folder) / "copy"
        expand_to(path, [data[4 : 4 + cut], data[4 + cut :]], plain_bytes)
        assert path.stat().st_size == plain_bytes


def fuzz_record(data: bytes) -> None:
    """The volume's record, which is in clear."""
    read = record.decode(data)
    assert record._canonical({**record._body(read), "mac": read.mac.hex()}) == data


_WORK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk would be what is tried
TARGETS: dict[str, Callable[[bytes], None]] = {
    "pack": fuzz_pack,
    "sealed-table": fuzz_sealed_table,
    "table": fuzz_table,
    "segment": fuzz_segment,
    "sealed": fuzz_sealed,
    "checkpoint": fuzz_checkpoint,
    "record": fuzz_record,
}


def is_refused(target: str, data: bytes) -> bool:
    """Whether the reader says no; anything else that goes wrong is raised."""
    try:
        TARGETS[target](data)
    except REFUSED:
        return True
    return False


def seeds(target: str) -> list[bytes]:
    """Sound inputs, from which a fuzzer goes on."""
    return _SEEDS[target]()


def _pack() -> pack.FinishedPack:
    builder = PackBuilder(KEYS, ID, 1 << 20)
    for data in (b"hello", b"a" * 2000):
        squeezed, codec = sealing.squeeze(data)
        builder.add(SealedInput(squeezed, codec, len(data), KEYS.chunk_id(data)))
    refs = [Reference(Ino(7), 0, 1, KEYS.chunk_id(b"hello"), 5)]
    refs.append(Reference(Ino(7), 3, 300, ChunkId(bytes(32)), 9))
    notes = [FileNote(Ino(7), Ino(1), b"name", 12, 0o100644)]
    return builder.finish(refs, notes, head=Head(9, bytes(range(32))))


def _table() -> bytes:
    whole = b"".join(_pack().parts)
    return table.encode(pack.open_pack(KEYS, ID, whole))


def _segments() -> list[bytes]:
    changes = [Change(5, 77, b"one"), Change(6, 78, b"two" * 50)]
    dirty = [(Ino(1 << 40 | 3), 0), (Ino(1 << 40 | 3), 9)]
    made = encode_segment(Segment(3, 1, 6, 1 << 60, bytes(32), changes, dirty))
    empty = encode_segment(Segment(4, 1, 6, 1, bytes(32), [], complete=False))
    claim = encode_claim(Claim(bytes(16), 2, 3, bytes(32), 99, "host"))
    return [b"s" + made, b"s" + empty, b"c" + claim]


def _checkpoints() -> list[bytes]:
    manifest = Manifest(2, 1, 6, 1 << 60, 99, 3, bytes(32), 5000, [Part(ID, 2000, bytes(32))] * 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain"
        path.write_bytes(b"journal" * 500)
        frame = b"".join(compressed(path, 1 << 20))
    return [b"m" + encode_manifest(manifest), b"p" + (3500).to_bytes(2, "big") + b"\x0a" + frame]


def _sealed() -> list[bytes]:
    found = [b"r" + sealed.seal_object(KEYS, KIND_SEGMENT, 1, b"body").data]
    for body in (b"body", b"long" * 1000):
        squeezed, codec = sealing.squeeze(body)
        found.append(b"s" + bytes([codec]) + _PLAIN.pack(len(body)) + squeezed)
    return found


def _records() -> list[bytes]:
    slots = (
        Slot("1", "passphrase", bytes(16), bytes(12), bytes(48), Argon2Cost()),
        Slot("2", "recovery", bytes(16), bytes(12), bytes(48), None),
    )
    older = (Older(0, 1, bytes(12), bytes(48)),)
    made = [
        record.VolumeRecord(KEYS.volume, 1 << 20, SlotSet(KEYS.volume, epoch, slots, some), 1234)
        for epoch, some in ((0, ()), (1, older))
    ]
    return [record.encode(each, KEYS) for each in made]


def _sealed_tables() -> list[bytes]:
    whole, plain = _pack(), _table()
    body = whole.size - pack.HEADER.size - pack.TRAILER.size - len(whole.parts[-2])
    squeezed, codec = sealing.squeeze(plain)
    found = [(0, b"\0\0\0\0"), (codec, squeezed), (0, plain)]
    return [
        body.to_bytes(2, "big") + bytes([c]) + _PLAIN.pack(len(plain)) + data for c, data in found
    ]


_SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "pack": lambda: [b"".join(_pack().parts)],
    "sealed-table": _sealed_tables,
    "table": lambda: [_table()],
    "segment": _segments,
    "sealed": _sealed,
    "checkpoint": _checkpoints,
    "record": _records,
}
