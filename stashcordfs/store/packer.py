"""Filling one message: several packs of different sizes, up to the limits in force.

The request is the scarce thing, not the byte. A block is compressed first, then given a place, then
encrypted, because its key and nonce belong to the place. What does not fit is refused, and the
caller may offer smaller blocks to top up. No I/O.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

from stashcordfs.crypto.keys import KIND_PACK, NUMBER_BITS
from stashcordfs.store.pack import (
    ENTRY_RESERVE_BYTES,
    HEADER,
    TABLE_RESERVE_BYTES,
    TRAILER,
    FinishedPack,
    PackBuilder,
    SealedInput,
)
from stashcordfs.store.sealing import INLINE_BYTES, TAG_BYTES, squeeze, threads
from stashcordfs.types import Limits

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.store.pack import FileNote, Head, Reference
    from stashcordfs.types import ChunkId

_ENVELOPE_BYTES = 1024  # the multipart body around the files
_ENVELOPE_FILE_BYTES = 512
_NEW_PACK_BYTES = HEADER.size + TABLE_RESERVE_BYTES + TRAILER.size
_LEAST_CHUNK_BYTES = 1024  # a message without room for this is full
_GOOD_FILL = 0.96  # from here on the first block that does not fit ends the message


def least_limits(block_bytes: int) -> Limits:
    """The smallest limits under which any block of this size still fits into a message."""
    pack = block_bytes + TAG_BYTES + ENTRY_RESERVE_BYTES + _NEW_PACK_BYTES
    return Limits(pack, 1, pack + _ENVELOPE_FILE_BYTES + 2 * _ENVELOPE_BYTES)


class RequestBuilder:
    """The packs of one message. `number` orders packs by name: milliseconds by default."""

    def __init__(
        self,
        keys: VolumeKeys,
        limits: Limits,
        *,
        compress: bool = True,
        number: int | None = None,
    ) -> None:
        """Start empty."""
        millis = time.time_ns() // 1_000_000 if number is None else number
        self._number = millis & ((1 << NUMBER_BITS) - 1)
        self._keys = keys
        self._limits = limits
        self._compress = compress
        self._packs: list[PackBuilder] = []
        self._place: dict[ChunkId, int] = {}
        self._refused = False

    @property
    def used_bytes(self) -> int:
        """What the message takes so far, with everything that is reserved."""
        files = _ENVELOPE_FILE_BYTES * len(self._packs)
        return _ENVELOPE_BYTES + files + sum(pack.expected_bytes for pack in self._packs)

    @property
    def full(self) -> bool:
        """Whether trying further blocks is not worth it."""
        limit = self._limits.max_request_bytes
        used = self.used_bytes
        return used > limit - _LEAST_CHUNK_BYTES or (self._refused and used >= _GOOD_FILL * limit)

    async def add(self, key: Hashable, data: bytes, chunk_id: ChunkId) -> bool:
        """Place a block. False: it does not fit and was not added. `key` is the caller's own."""
        del key  # blocks are told apart by their content
        if chunk_id in self._place:
            return True
        if len(data) <= INLINE_BYTES:
            squeezed, codec = squeeze(data, compress=self._compress)
        else:
            squeezed, codec = await trio.to_thread.run_sync(self._squeeze, data, limiter=threads())
        at = self._find(len(squeezed) + TAG_BYTES)
        if at is None:
            self._refused = True
            return False
        self._packs[at].add(SealedInput(squeezed, codec, len(data), chunk_id))
        self._place[chunk_id] = at
        return True

    async def finish(
        self,
        refs: Sequence[Reference],
        files: Sequence[FileNote],
        *,
        head: Head | None = None,
    ) -> list[FinishedPack]:
        """Close the packs, each with the references to its own chunks, and open them once."""
        return await trio.to_thread.run_sync(self._finish, refs, files, head, limiter=threads())

    def _squeeze(self, data: bytes) -> tuple[bytes, int]:
        return squeeze(data, compress=self._compress)

    def _find(self, sealed_length: int) -> int | None:
        room = self._limits.max_request_bytes - self.used_bytes
        more = sealed_length + ENTRY_RESERVE_BYTES
        if more > room:
            return None
        for at, pack in enumerate(self._packs):
            if pack.fits(sealed_length):
                return at
        fresh = more + _NEW_PACK_BYTES
        if len(self._packs) >= self._limits.max_attachments:
            return None
        if fresh + _ENVELOPE_FILE_BYTES > room - (0 if self._packs else _ENVELOPE_BYTES):
            return None
        if fresh > self._limits.max_attachment_bytes:
            return None
        self._packs.append(self._new_pack())
        return len(self._packs) - 1

    def _new_pack(self) -> PackBuilder:
        number = (self._number + len(self._packs)) & ((1 << NUMBER_BITS) - 1)
        object_id = self._keys.new_object_id(KIND_PACK, number)
        return PackBuilder(self._keys, object_id, self._limits.max_attachment_bytes)

    def _finish(
        self, refs: Sequence[Reference], files: Sequence[FileNote], head: Head | None
    ) -> list[FinishedPack]:
        if not self._packs:
            return []
        last = len(self._packs) - 1
        own: list[list[Reference]] = [[] for _ in self._packs]
        home: dict[int, int] = {}
        for ref in refs:
            at = self._place.get(ref.chunk_id, last)
            own[at].append(ref)
            home.setdefault(ref.ino, at)
        notes: list[list[FileNote]] = [[] for _ in self._packs]
        for note in files:
            notes[home.get(note.ino, last)].append(note)
        finished = []
        room = self._limits.max_request_bytes - self.used_bytes
        for at, pack in enumerate(self._packs):
            expected = pack.expected_bytes
            done = pack.finish(own[at], notes[at], head=head, max_bytes=expected + max(room, 0))
            room += expected - done.size
            finished.append(done)
        return finished
