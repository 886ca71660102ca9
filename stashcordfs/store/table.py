"""A pack's table, before compression and sealing: chunks, references, file notes, the head.

Pure encoding. Numbers are LEB128 without superfluous bytes, so that a table has one encoding only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stashcordfs.errors import ObjectCorrupt
from stashcordfs.store.numbers import Reader, put_numbers
from stashcordfs.types import ChunkId, ChunkRef, Ino, ObjectId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_WHOLE = 1
_HAS_HEAD = 2
_CHUNK_ID_BYTES = 32
_HASH_BYTES = 32
_MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class Reference:
    """A block that refers to a chunk: of this pack, or, by deduplication, of another one.

    `sequence` orders the references of one block: the highest is its newest content.
    """

    ino: Ino
    index: int
    sequence: int
    chunk_id: ChunkId
    valid_length: int


@dataclass(frozen=True, slots=True)
class FileNote:
    """What a file was called and how large it was when the pack was made."""

    ino: Ino
    parent: Ino
    name: bytes
    size: int
    mode: int


@dataclass(frozen=True, slots=True)
class Head:
    """The newest segment when the pack was made."""

    number: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Table:
    """`whole` is false when notes were left out for want of room."""

    chunks: list[ChunkRef]
    references: Sequence[Reference] = ()
    files: Sequence[FileNote] = ()
    head: Head | None = None
    whole: bool = True


def encode(table: Table) -> bytes:
    """The table's bytes."""
    out = bytearray()
    out.append((_WHOLE if table.whole else 0) | (_HAS_HEAD if table.head else 0))
    if table.head:
        put_numbers(out, table.head.number)
        out += table.head.digest
    put_numbers(out, len(table.chunks), len(table.references), len(table.files))
    for ref in table.chunks:
        out += ref.chunk_id
        put_numbers(out, ref.codec, ref.length, ref.plain_length)
    places = _places(table.chunks)
    for reference in table.references:
        place = places.get(reference.chunk_id, 0)
        put_numbers(out, reference.ino, reference.index, reference.sequence, reference.valid_length)
        put_numbers(out, place)
        if not place:
            out += reference.chunk_id
    for note in table.files:
        put_numbers(out, note.ino, note.parent, note.size, note.mode, len(note.name))
        out += note.name
    return bytes(out)


def decode(data: bytes, *, pack: ObjectId, epoch: int, first_offset: int) -> Table:
    """Read a table; ObjectCorrupt on anything that `encode` would not have written."""
    reader = Reader(data, "a pack's table")
    flags = reader.take(1)[0]
    if flags & ~(_WHOLE | _HAS_HEAD):
        raise ObjectCorrupt("a pack's table has unknown flags; update this program")
    head = Head(reader.number(), reader.take(_HASH_BYTES)) if flags & _HAS_HEAD else None
    counts = (reader.number(), reader.number(), reader.number())
    if sum(counts) > len(data):
        raise ObjectCorrupt("a pack's table claims more entries than it has bytes")
    chunks: list[ChunkRef] = []
    offset = first_offset
    for number in range(counts[0]):
        chunk_id = ChunkId(reader.take(_CHUNK_ID_BYTES))
        codec, length, plain = reader.number(), reader.number(), reader.number()
        chunks.append(ChunkRef(chunk_id, pack, epoch, number, offset, length, plain, codec))
        offset += length
    places = _places(chunks)
    references = [_reference(reader, chunks, places) for _ in range(counts[1])]
    files = [_note(reader) for _ in range(counts[2])]
    if not reader.at_end():
        raise ObjectCorrupt("a pack's table has bytes after its end")
    return Table(chunks, references, files, head, bool(flags & _WHOLE))


def _places(chunks: Sequence[ChunkRef]) -> dict[ChunkId, int]:
    """How references name the pack's own chunks; of two with one id, the last."""
    return {ref.chunk_id: place for place, ref in enumerate(chunks, 1)}


def _reference(
    reader: Reader, chunks: Sequence[ChunkRef], places: Mapping[ChunkId, int]
) -> Reference:
    ino, index, sequence, valid = (reader.number() for _ in range(4))
    place = reader.number()
    if place > len(chunks):
        raise ObjectCorrupt("a pack's table refers to a chunk that it does not list")
    chunk_id = chunks[place - 1].chunk_id if place else ChunkId(reader.take(_CHUNK_ID_BYTES))
    if places.get(chunk_id, 0) != place:
        raise ObjectCorrupt("a pack's table names one of its chunks in another way than it must")
    return Reference(Ino(ino), index, sequence, chunk_id, valid)


def _note(reader: Reader) -> FileNote:
    ino, parent, size, mode, length = (reader.number() for _ in range(5))
    if not 1 <= length <= _MAX_NAME_BYTES:
        raise ObjectCorrupt("a pack's table has a file name of an impossible length")
    return FileNote(Ino(ino), Ino(parent), reader.take(length), size, mode)
