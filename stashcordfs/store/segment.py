"""Segments: numbered, chained pieces of the journal's changes; and the claim of a writer.

Pure encoding of the bodies that `store.sealed` seals. A segment names its predecessor by the
SHA-256 of its bytes; the first one names the volume itself (`genesis`).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from stashcordfs.errors import ObjectCorrupt
from stashcordfs.store.numbers import Reader, put_numbers
from stashcordfs.store.sealed import DIGEST_BYTES
from stashcordfs.types import Ino

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stashcordfs.store.record import VolumeRecord

_COMPLETE = 1
_WRITER_BYTES = 16
_MAX_HOST_BYTES = 255


@dataclass(frozen=True, slots=True)
class Change:
    """What one group of operations has changed: a row of the journal's `changes`."""

    id: int
    made_ns: int
    changeset: bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of changes. `complete`: nothing else was to tell at its cut, and `dirty` is in it.

    `dirty` are the blocks (inode, index) that only the writer's machine had then, in order.
    """

    number: int
    writer_epoch: int
    schema_version: int
    made_ns: int
    previous: bytes
    changes: Sequence[Change]
    dirty: Sequence[tuple[Ino, int]] = ()
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Claim:
    """A writer's word that the volume is his from the head (number, digest) on."""

    writer: bytes
    writer_epoch: int
    head_number: int
    head_digest: bytes
    made_ns: int
    host: str = ""


def genesis(record: VolumeRecord) -> bytes:
    """What the first segment is chained to: the facts of mkfs's record that never change."""
    fixed = record.volume + record.created.to_bytes(8, "big") + record.block_size.to_bytes(8, "big")
    return sha256(b"genesis\0" + fixed).digest()


def encode_segment(segment: Segment) -> bytes:
    """The segment's body."""
    out = bytearray()
    put_numbers(out, _COMPLETE if segment.complete else 0)
    put_numbers(out, segment.number, segment.writer_epoch, segment.schema_version, segment.made_ns)
    out += segment.previous
    first = segment.changes[0].id if segment.changes else 0
    put_numbers(out, first, len(segment.changes))
    for at, change in enumerate(segment.changes):
        if change.id != first + at:
            raise ValueError("a segment's changes are a run without gaps")
        put_numbers(out, change.made_ns, len(change.changeset))
        out += change.changeset
    put_numbers(out, len(segment.dirty))
    before = 0
    for ino, index in segment.dirty:
        put_numbers(out, ino - before, index)
        before = ino
    return bytes(out)


def decode_segment(body: bytes) -> Segment:
    """Read a body; ObjectCorrupt on anything that `encode_segment` would not have written."""
    reader = Reader(body, "a segment")
    flags = reader.number()
    if flags & ~_COMPLETE:
        raise ObjectCorrupt("a segment has unknown flags; update this program")
    number, epoch, schema_version, made_ns = (reader.number() for _ in range(4))
    previous = reader.take(DIGEST_BYTES)
    first = reader.number()
    changes = []
    for at in range(reader.count()):
        change_ns, length = reader.number(), reader.number()
        changes.append(Change(first + at, change_ns, reader.take(length)))
    dirty: list[tuple[Ino, int]] = []
    ino = 0
    for _ in range(reader.count()):
        ino += reader.number()
        dirty.append((Ino(ino), reader.number()))
    reader.end()
    if (first == 0) != (not changes) or ino >= 1 << 63:
        raise ObjectCorrupt("a segment has impossible numbers")
    complete = bool(flags & _COMPLETE)
    return Segment(number, epoch, schema_version, made_ns, previous, changes, dirty, complete)


def encode_claim(claim: Claim) -> bytes:
    """The claim's body."""
    out = bytearray(claim.writer)
    put_numbers(out, claim.writer_epoch, claim.head_number)
    out += claim.head_digest
    host = claim.host.encode()[:_MAX_HOST_BYTES].decode(errors="ignore").encode()
    put_numbers(out, claim.made_ns, len(host))
    return bytes(out + host)


def decode_claim(body: bytes) -> Claim:
    """Read a body; ObjectCorrupt when it is none."""
    reader = Reader(body, "a claim")
    writer = reader.take(_WRITER_BYTES)
    epoch, head = reader.number(), reader.number()
    digest = reader.take(DIGEST_BYTES)
    made_ns, length = reader.number(), reader.number()
    try:
        host = reader.take(length).decode()
    except UnicodeDecodeError as error:
        raise ObjectCorrupt("a claim names its machine badly") from error
    reader.end()
    return Claim(writer, epoch, head, digest, made_ns, host)
