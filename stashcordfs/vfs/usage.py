"""How much a volume holds, and how much it may: statfs and `max_size`.

Counted is what `du` counts: the bytes of files that are not holes, before compression and whether
or not other files have the same. So a hole costs nothing, and what a person sees adds up.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stashcordfs.errors import FsError
from stashcordfs.types import PAGE_BYTES
from stashcordfs.vfs.table import page_mask

if TYPE_CHECKING:
    from stashcordfs.journal import Journal
    from stashcordfs.vfs.live import Live
    from stashcordfs.vfs.table import BlockTable

_UNLIMITED_BYTES = 1 << 50
_FILES_FREE = 1 << 32
_NAME_MAX = 255


@dataclass(frozen=True, slots=True)
class StatFs:
    """What statfs tells. Bytes are in blocks of `block_bytes`."""

    block_bytes: int
    blocks: int
    free: int
    available: int
    files: int
    files_free: int
    name_max: int


def fresh_bytes(live: Live) -> int:
    """Bytes of a file that its chunk list does not count yet, in full pages."""
    return sum(d.pages.bit_count() * PAGE_BYTES for d in live.dirty.values() if not d.base_valid)


class Usage:
    """What is used, and whether more may be. On the event loop."""

    def __init__(self, *, journal: Journal, blocks: BlockTable, max_bytes: int) -> None:
        """`max_bytes`: 0 for no bound; it may change at any time."""
        self._journal = journal
        self._blocks = blocks
        self.max_bytes = max_bytes

    async def used_bytes(self) -> int:
        """What is stored, and what waits to be."""
        waiting = sum(fresh_bytes(live) for live in self._blocks.live.values() if live.dirty)
        return await self._journal.stored_bytes() + waiting

    async def require_any(self) -> None:
        """ENOSPC when the volume holds all that it may.

        Making a file asks, too: what is written to it would fail only as the kernel writes back,
        and not every program looks then.
        """
        if self.max_bytes and await self._is_beyond(1):
            raise FsError(errno.ENOSPC)

    async def require(self, live: Live, offset: int, length: int) -> None:
        """ENOSPC when a write would make the volume hold more than it may.

        Writing over what is there already is always allowed.
        """
        if self.max_bytes and await self._is_beyond(length):
            adding = await self._added(live, offset, length)
            if adding and await self._is_beyond(adding):
                raise FsError(errno.ENOSPC)

    async def _is_beyond(self, adding: int) -> bool:
        stored = await self._journal.stored_bytes() + adding
        if stored + self._blocks.room.dirty_bytes <= self.max_bytes:
            return False  # no less can be free: cheap while there is room
        return await self.used_bytes() + adding > self.max_bytes

    async def _added(self, live: Live, offset: int, length: int) -> int:
        """In full pages: those of the write that are neither stored nor waiting."""
        added = 0
        stop = offset + length
        while offset < stop:
            index, start = divmod(offset, self._blocks.block_bytes)
            end = min(start + stop - offset, self._blocks.block_bytes)
            dirty = live.dirty.get(index)
            base = dirty.base_valid if dirty else await self._journal.valid_length(live.ino, index)
            mask = page_mask(start // PAGE_BYTES, (end - 1) // PAGE_BYTES)
            known = (dirty.pages if dirty else 0) | (
                page_mask(0, (base - 1) // PAGE_BYTES) if base else 0
            )
            added += (mask & ~known).bit_count() * PAGE_BYTES
            offset += end - start
        return added

    async def statfs(self) -> StatFs:
        """Without a bound the free space is a number large enough: Discord names none."""
        used = await self.used_bytes()
        free = max(0, self.max_bytes - used) if self.max_bytes else _UNLIMITED_BYTES
        used_blocks = -(-used // PAGE_BYTES)
        free_blocks = free // PAGE_BYTES
        inodes, _ = await self._journal.usage()
        return StatFs(
            PAGE_BYTES,
            used_blocks + free_blocks,
            free_blocks,
            free_blocks,
            inodes + _FILES_FREE,
            _FILES_FREE,
            _NAME_MAX,
        )
