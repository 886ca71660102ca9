"""Checkpoints: a copy of the journal as one compressed stream, cut into sealed parts.

The manifest names the parts and counts only with them; it is posted last. Copying the journal and
making one out of a copy is `journal.snapshot`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stashcordfs.errors import ObjectCorrupt
from stashcordfs.store.numbers import Reader, put_numbers
from stashcordfs.store.sealed import DIGEST_BYTES
from stashcordfs.store.sealing import expand_some, new_compressor, new_decompressor
from stashcordfs.types import ObjectId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

_ID_BYTES = 16
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """One part: its object, its size in bytes as it is stored, and the SHA-256 of that."""

    object_id: ObjectId
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is a copy of: all changes up to `last_change`.

    `head_number` and `head_digest` are of the newest segment that it holds wholly (0 and the
    genesis when there is none); the one after it continues the chain. `plain_bytes` is the
    copy's size.
    """

    number: int
    writer_epoch: int
    schema_version: int
    made_ns: int
    last_change: int
    head_number: int
    head_digest: bytes
    plain_bytes: int
    parts: Sequence[Part]


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's body."""
    out = bytearray()
    put_numbers(
        out,
        manifest.number,
        manifest.writer_epoch,
        manifest.schema_version,
        manifest.made_ns,
        manifest.last_change,
        manifest.head_number,
    )
    out += manifest.head_digest
    put_numbers(out, manifest.plain_bytes, len(manifest.parts))
    for part in manifest.parts:
        out += part.object_id
        put_numbers(out, part.size)
        out += part.digest
    return bytes(out)


def decode_manifest(body: bytes) -> Manifest:
    """Read a body; ObjectCorrupt when it is none."""
    reader = Reader(body, "a checkpoint's manifest")
    number, epoch, schema_version, made_ns, last_change, head = (reader.number() for _ in range(6))
    digest = reader.take(DIGEST_BYTES)
    plain_bytes = reader.number()
    parts = [
        Part(ObjectId(reader.take(_ID_BYTES)), reader.number(), reader.take(DIGEST_BYTES))
        for _ in range(reader.count())
    ]
    reader.end()
    return Manifest(
        number, epoch, schema_version, made_ns, last_change, head, digest, plain_bytes, parts
    )


def compressed(path: Path, part_bytes: int) -> Iterator[bytes]:
    """A file as one Zstandard frame, in pieces of at most `part_bytes`. For a thread."""
    packer = new_compressor()
    piece = bytearray()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            piece += packer.compress(data)
            while len(piece) >= part_bytes:
                yield bytes(piece[:part_bytes])
                del piece[:part_bytes]
    piece += packer.flush()
    while piece:
        yield bytes(piece[:part_bytes])
        del piece[:part_bytes]


def expand_to(path: Path, pieces: Iterable[bytes], plain_bytes: int) -> None:
    """Write the file that `compressed` has read. ObjectCorrupt when it is another size."""
    unpacker = new_decompressor()
    left = plain_bytes
    with path.open("wb") as file:
        for piece in pieces:
            data = piece
            while data or not (unpacker.needs_input or unpacker.eof):
                if unpacker.eof:
                    raise ObjectCorrupt("a checkpoint goes on after its end")
                plain = expand_some(unpacker, data, _READ_BYTES)
                data = b""
                left -= len(plain)
                if left < 0:
                    raise ObjectCorrupt("a checkpoint is longer than it says")
                file.write(plain)
    if left or not unpacker.eof or unpacker.unused_data:
        raise ObjectCorrupt("a checkpoint is not of the length that it says")
