"""Pack v1: many sealed chunks back to back, then a sealed table of them.

Strict on reading: what is not exactly of the format raises ObjectCorrupt. A finished pack is parsed
and opened once before it is handed out. The bytes are described in docs/format.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stashcordfs.crypto.keys import object_filename
from stashcordfs.errors import CryptoError, ObjectCorrupt
from stashcordfs.store import table as tables
from stashcordfs.store.sealing import (
    CODEC_PLAIN,
    CODEC_ZSTD,
    TAG_BYTES,
    VERSION,
    encrypt_chunk,
    expand,
    open_chunk,
    squeeze,
)
from stashcordfs.store.table import FileNote, Head, Reference, Table
from stashcordfs.types import ChunkId, ChunkRef, ObjectId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stashcordfs.crypto.keys import VolumeKeys

__all__ = [
    "FileNote",
    "FinishedPack",
    "Head",
    "PackBuilder",
    "Reference",
    "SealedInput",
    "Table",
    "open_chunk",
    "open_pack",
    "read_table",
    "verify_pack",
]

HEADER = struct.Struct(">BBHI16s")  # version, kind, zero, epoch, object id
TRAILER = struct.Struct(">BxxxII")  # codec, plain length and sealed length of the table
MAX_PACK_BYTES = 1 << 31
TABLE_RESERVE_BYTES = 2048  # a table's fixed part, and room for long names
ENTRY_RESERVE_BYTES = 96  # a chunk's entry with one reference and a name of usual length
_KIND = 1
_NONCE = bytes(12)


@dataclass(frozen=True, slots=True)
class SealedInput:
    """A block ready to be encrypted: compressed where that helps, and named."""

    squeezed: bytes
    codec: int
    plain_length: int
    chunk_id: ChunkId

    @property
    def sealed_length(self) -> int:
        """What it takes within a pack, without its entry."""
        return len(self.squeezed) + TAG_BYTES


@dataclass(frozen=True, slots=True)
class FinishedPack:
    """A pack ready to be sent: `parts` back to back are its bytes."""

    object_id: ObjectId
    filename: str
    epoch: int
    parts: list[bytes]
    size: int
    chunks: list[ChunkRef]


class PackBuilder:
    """Fills one pack up to `max_bytes`. Not reusable: an id is never used for two contents."""

    def __init__(self, keys: VolumeKeys, object_id: ObjectId, max_bytes: int) -> None:
        """Start with the clear header."""
        self.object_id = object_id
        self.epoch = keys.current_epoch
        self.chunks: list[ChunkRef] = []
        self.body_bytes = HEADER.size
        self._keys = keys
        self._max_bytes = min(max_bytes, MAX_PACK_BYTES)
        self._header = HEADER.pack(VERSION, _KIND, 0, self.epoch, object_id)
        self._parts = [self._header]
        self._finished = False

    @property
    def expected_bytes(self) -> int:
        """The pack's size, with room reserved for the table."""
        entries = ENTRY_RESERVE_BYTES * len(self.chunks)
        return self.body_bytes + TABLE_RESERVE_BYTES + entries + TRAILER.size

    def fits(self, sealed_length: int) -> bool:
        """Whether a chunk of this length may still be added."""
        more = sealed_length + ENTRY_RESERVE_BYTES
        return self.expected_bytes + more <= self._max_bytes

    def add(self, item: SealedInput) -> ChunkRef:
        """Encrypt the chunk for the next place. The caller has asked `fits`."""
        number = len(self.chunks)
        sealed = encrypt_chunk(
            self._keys,
            self.object_id,
            number,
            item.squeezed,
            codec=item.codec,
            plain_length=item.plain_length,
            chunk_id=item.chunk_id,
            epoch=self.epoch,
        )
        ref = ChunkRef(
            item.chunk_id,
            self.object_id,
            self.epoch,
            number,
            self.body_bytes,
            len(sealed),
            item.plain_length,
            item.codec,
        )
        self._parts.append(sealed)
        self.chunks.append(ref)
        self.body_bytes += len(sealed)
        return ref

    def finish(
        self,
        refs: Sequence[Reference],
        files: Sequence[FileNote],
        *,
        head: Head | None = None,
        max_bytes: int | None = None,
    ) -> FinishedPack:
        """Append the table and open everything once. Notes that do not fit are left out.

        The journal's segments carry the same, so a note left out loses nothing; the table says so.
        """
        if self._finished:
            raise ValueError("a pack is finished once: its id stands for one content")
        self._finished = True
        limit = min(self._max_bytes, max_bytes or self._max_bytes)
        room = limit - self.body_bytes - TRAILER.size - TAG_BYTES
        squeezed, codec, plain_length = self._table_within(room, refs, files, head)
        sealed_length = len(squeezed) + TAG_BYTES
        size = self.body_bytes + sealed_length + TRAILER.size
        trailer = TRAILER.pack(codec, plain_length, sealed_length)
        key = AESGCM(self._keys.table_key(self.epoch, self.object_id))
        aad = _table_aad(self._keys, self._header, size, trailer)
        parts = [*self._parts, key.encrypt(_NONCE, squeezed, aad), trailer]
        pack = FinishedPack(
            self.object_id, object_filename(self.object_id), self.epoch, parts, size, self.chunks
        )
        verify_pack(self._keys, pack)
        return pack

    def _table_within(
        self,
        room: int,
        refs: Sequence[Reference],
        files: Sequence[FileNote],
        head: Head | None,
    ) -> tuple[bytes, int, int]:
        files, refs, whole = list(files), list(refs), True
        while True:
            plain = tables.encode(Table(self.chunks, refs, files, head, whole))
            squeezed, codec = squeeze(plain)
            if len(squeezed) <= room:
                return squeezed, codec, len(plain)
            if not files and not refs:
                raise ValueError("the pack was filled beyond its limit")
            whole = False
            if files:
                files = files[: len(files) // 2]
            else:
                refs = refs[: len(refs) // 2]


def read_table(
    keys: VolumeKeys, object_id: ObjectId, header: bytes, tail: bytes, size: int
) -> Table:
    """Open a pack's table from its first 24 bytes and a tail that holds at least the table.

    `tail` may start anywhere before the table; `table_bytes` tells from the last 12 bytes how much.
    """
    epoch = _check_header(header, object_id)
    need = table_bytes(tail, size)
    if need > len(tail):
        raise ObjectCorrupt("the tail does not hold the pack's table")
    sealed, trailer = tail[len(tail) - need : -TRAILER.size], tail[-TRAILER.size :]
    codec, plain_length, _ = TRAILER.unpack(trailer)
    try:
        key = AESGCM(keys.table_key(epoch, object_id))
        aad = _table_aad(keys, header[: HEADER.size], size, trailer)
        squeezed = key.decrypt(_NONCE, sealed, aad)
    except (InvalidTag, CryptoError) as error:
        raise ObjectCorrupt("a pack's table was changed since it was stored") from error
    table = tables.decode(
        expand(squeezed, codec, plain_length),
        pack=object_id,
        epoch=epoch,
        first_offset=HEADER.size,
    )
    end = HEADER.size + sum(ref.length for ref in table.chunks)
    if end + need != size:
        raise ObjectCorrupt("a pack's table does not account for the whole pack")
    return table


def table_bytes(tail: bytes, size: int) -> int:
    """How many bytes at the pack's end are table and trailer, read from the trailer."""
    if len(tail) < TRAILER.size or not HEADER.size + TRAILER.size <= size <= MAX_PACK_BYTES:
        raise ObjectCorrupt("a pack is too short, or too long, to be one")
    codec, _, sealed_length = TRAILER.unpack(tail[-TRAILER.size :])
    need = int(sealed_length) + TRAILER.size
    if codec not in (CODEC_PLAIN, CODEC_ZSTD) or not (
        TAG_BYTES + TRAILER.size <= need <= size - HEADER.size
    ):
        raise ObjectCorrupt("a pack's table has an impossible length or codec")
    return need


def open_pack(keys: VolumeKeys, object_id: ObjectId, data: bytes) -> Table:
    """Parse a whole pack and open every chunk in it. ObjectCorrupt on any deviation."""
    table = read_table(keys, object_id, data[: HEADER.size], data, len(data))
    view = memoryview(data)
    for ref in table.chunks:
        open_chunk(keys, ref, view[ref.offset : ref.offset + ref.length])
    return table


def verify_pack(keys: VolumeKeys, pack: FinishedPack) -> None:
    """Read a finished pack as a stranger would, before a byte leaves. ObjectCorrupt if not sound.

    Takes the parts as they are, so that no second copy of the pack is made.
    """
    if sum(map(len, pack.parts)) != pack.size:
        raise ObjectCorrupt("a finished pack is not of its own size")
    tail = b"".join(pack.parts[-2:])
    table = read_table(keys, pack.object_id, pack.parts[0], tail, pack.size)
    if table.chunks != pack.chunks:
        raise ObjectCorrupt("a finished pack's table is not what was packed")
    for ref, sealed in zip(table.chunks, pack.parts[1:-2], strict=True):
        open_chunk(keys, ref, sealed)


def _check_header(header: bytes, object_id: ObjectId) -> int:
    if len(header) < HEADER.size:
        raise ObjectCorrupt("a pack is shorter than its header")
    version, kind, zero, epoch, stated = HEADER.unpack(header[: HEADER.size])
    if version != VERSION or kind != _KIND or zero:
        raise ObjectCorrupt("not a pack of a version that this program reads")
    if stated != object_id:
        raise ObjectCorrupt("a pack bears another name than it was stored under")
    return int(epoch)


def _table_aad(keys: VolumeKeys, header: bytes, size: int, trailer: bytes) -> bytes:
    return b"table\0\0\0" + keys.volume + header + size.to_bytes(8, "big") + trailer
