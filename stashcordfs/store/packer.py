"""Filling one message: packs of different sizes, as many bytes as the limits in force allow.

A chunk is compressed, then placed (its size is known now), then sealed for its place, which its
associated data names. What does not fit into the first pack goes into the next; the request's own
limit is shared by all. The table's growth is counted with every chunk, at its upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from stashcordfs.crypto.keys import KIND_PACK, object_filename
from stashcordfs.errors import StoreError
from stashcordfs.store import pack as fmt
from stashcordfs.types import ChunkId, ChunkRef, Ino, Limits, ObjectId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stashcordfs.crypto.keys import VolumeKeys

_REQUEST_BYTES = 2048  # multipart framing and payload_json, upper bound
_FILE_BYTES = 512  # one part's headers and its entry in payload_json
_INLINE_BYTES = 64 << 10  # sealed on the loop: a thread hop costs more
_SMALLEST = 4096


@dataclass(slots=True)
class _OpenPack:
    object_id: ObjectId
    head: bytes
    end: int
    table_bytes: int = 0
    parts: list[bytes] = field(default_factory=list)
    chunks: list[ChunkRef] = field(default_factory=list)
    inos: set[Ino] = field(default_factory=set)

    @property
    def size(self) -> int:
        return self.end + self.table_bytes + fmt.FIXED_BYTES - fmt.HEADER.size


class RequestBuilder:
    """Fills one message. Use once: `add` until it refuses or `full`, then `finish`."""

    def __init__(self, keys: VolumeKeys, limits: Limits, *, compress: bool = True) -> None:
        """`limits` are those in force now."""
        self._keys = keys
        self._limits = limits
        self._compress = compress
        self._packs: list[_OpenPack] = []
        self._where: dict[ChunkId, _OpenPack] = {}

    @property
    def size(self) -> int:
        """Bytes of the request so far, at most."""
        return _REQUEST_BYTES + sum(p.size + _FILE_BYTES for p in self._packs)

    @property
    def full(self) -> bool:
        """Whether hardly anything more can fit."""
        return self.size + _SMALLEST > self._limits.max_request_bytes

    async def add(self, key: tuple[Ino, int], data: bytes, chunk_id: ChunkId) -> bool:
        """Seal a block into one of the packs. False: it does not fit, nothing was added."""
        if self.full:
            return False
        packed, codec = (data, fmt.CODEC_RAW) if not self._compress else await self._pack(data)
        length = len(packed) + fmt.TAG_BYTES
        into = self._place(key[0], length)
        if into is None:
            return False
        epoch = self._keys.current_epoch
        ref = ChunkRef(
            chunk_id, into.object_id, epoch, len(into.chunks), into.end, length, len(data), codec
        )
        # The place is taken before the thread hop, so that nobody else can take it.
        into.chunks.append(ref)
        into.end += length
        into.table_bytes += self._growth(into, key[0])
        into.inos.add(key[0])
        self._where[chunk_id] = into
        if length <= _INLINE_BYTES:
            sealed = fmt.seal_chunk(self._keys, ref, packed)
        else:
            sealed = await trio.to_thread.run_sync(fmt.seal_chunk, self._keys, ref, packed)
        into.parts.append(sealed)
        return True

    def refer(self, key: tuple[Ino, int]) -> bool:
        """Count a reference to a chunk that is known already. False: the table has no room."""
        if not self._packs:
            return True  # nothing is sent: there is no table
        growth = self._growth(self._packs[0], key[0])
        if not self._fits(self._packs[0], growth):
            return False
        self._packs[0].table_bytes += growth
        self._packs[0].inos.add(key[0])
        return True

    @staticmethod
    async def _pack(data: bytes) -> tuple[bytes, int]:
        if len(data) <= _INLINE_BYTES:
            return fmt.compress(data)
        return await trio.to_thread.run_sync(fmt.compress, data)

    @staticmethod
    def _growth(into: _OpenPack, ino: Ino) -> int:
        names = 0 if ino in into.inos else fmt.FILE_ROW_BYTES
        return fmt.CHUNK_ROW_BYTES + fmt.REFERENCE_ROW_BYTES + names

    def _fits(self, into: _OpenPack, more: int) -> bool:
        return (
            into.size + more <= self._limits.max_attachment_bytes
            and self.size + more <= self._limits.max_request_bytes
        )

    def _place(self, ino: Ino, length: int) -> _OpenPack | None:
        for into in self._packs:
            if self._fits(into, length + self._growth(into, ino)):
                return into
        if len(self._packs) >= self._limits.max_attachments:
            return None
        object_id = self._keys.new_object_id(KIND_PACK, 0)
        head = fmt.header(self._keys, self._keys.current_epoch, object_id)
        fresh = _OpenPack(object_id, head, fmt.HEADER.size)
        self._packs.append(fresh)
        if self._fits(fresh, length + self._growth(fresh, ino)):
            return fresh
        self._packs.pop()
        if not self._packs:
            raise StoreError(
                f"a block of {length} sealed bytes does not fit into a message: "
                "the attachment limit is too low for this volume's block size"
            )
        return None

    async def finish(
        self, references: Sequence[fmt.Reference], files: Sequence[fmt.FileNote]
    ) -> list[fmt.FinishedPack]:
        """Seal the tables, open everything once, and hand the packs over."""
        by_pack: dict[ObjectId, list[fmt.Reference]] = {p.object_id: [] for p in self._packs}
        for reference in references:
            into = self._where.get(reference.chunk_id, self._packs[0])
            by_pack[into.object_id].append(reference)
        finished = []
        for opened in self._packs:
            refs = by_pack[opened.object_id]
            inos = {r.ino for r in refs}
            notes = [f for f in files if f.ino in inos]
            finished.append(await trio.to_thread.run_sync(self._finish, opened, refs, notes))
        return finished

    def _finish(
        self, opened: _OpenPack, refs: list[fmt.Reference], notes: list[fmt.FileNote]
    ) -> fmt.FinishedPack:
        room = opened.table_bytes + fmt.FIXED_BYTES
        notes = _names_that_fit(notes, room - len(opened.chunks) * fmt.CHUNK_ROW_BYTES
                                - len(refs) * fmt.REFERENCE_ROW_BYTES)  # fmt: skip
        tail = fmt.seal_table(self._keys, opened.head, opened.chunks, refs, notes)
        parts = (opened.head, *opened.parts, tail)
        fmt.verify_pack(self._keys, b"".join(parts))
        return fmt.FinishedPack(
            opened.object_id,
            self._keys.current_epoch,
            object_filename(opened.object_id),
            parts,
            sum(map(len, parts)),
            tuple(opened.chunks),
        )


def _names_that_fit(notes: list[fmt.FileNote], room: int) -> list[fmt.FileNote]:
    """One name a file was counted; of a file with many hard links, more go only where they fit."""
    kept = []
    for note in notes:
        room -= fmt.FILE_ROW_BYTES - 255 + len(note.name)
        if room < 0:
            break
        kept.append(note)
    return kept
