"""The table of all blocks' states, and how a start finds it again on this machine.

`blocks.Blocks` is the one owner and changes states; here are the tables, what is asked of them,
and the rules for what an earlier run has left:

* after a killed process the local file and its marks are trusted, but never a hole: a page may have
  been marked and not yet written;
* after a power cut the journal's dirty rows are trusted, and nothing else that is only here.
"""

from __future__ import annotations

import errno
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from stashcordfs.errors import FsError
from stashcordfs.types import PAGE_BYTES, Ino
from stashcordfs.vfs.live import Dirty, Live
from stashcordfs.vfs.room import CacheLimits, Room

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from stashcordfs.cache import LocalFiles, Marks
    from stashcordfs.journal import Journal

log = logging.getLogger(__name__)

_VERSIONS_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 4096


def page_mask(first: int, last: int) -> int:
    """Bits `first` to `last` of a page bitmap."""
    return ((1 << (last - first + 1)) - 1) << first


def covers(pages: int, valid: int) -> bool:
    """Whether written pages leave nothing of a base of `valid` bytes."""
    need = page_mask(0, (valid - 1) // PAGE_BYTES) if valid else 0
    return pages & need == need


def clean_key(ino: int, index: int) -> int:
    """One integer for a block: cheaper than a tuple in a table of many thousands."""
    return ino << 32 | index


def rounded(length: int) -> int:
    """Bytes on disk."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


@dataclass(slots=True)
class Reap:
    """What may be destroyed after the next sync of the journal."""

    files: list[tuple[Ino, int]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


class BlockTable:
    """Which blocks are dirty, which clean. On the event loop; no method is for another thread."""

    def __init__(
        self,
        *,
        files: LocalFiles,
        marks: Marks,
        journal: Journal,
        block_bytes: int,
        limits: CacheLimits,
        clock: Callable[[], float],
    ) -> None:
        """Take the collaborators; `load` must run before anything else."""
        self.files = files
        self.journal = journal
        self.block_bytes = block_bytes
        self.room = Room(limits, free_bytes=files.free_bytes, evict=self.evict, clock=clock)
        self.live: dict[Ino, Live] = {}
        self.queue: OrderedDict[int, tuple[Live, int]] = OrderedDict()  # dirty, oldest first
        self.unsynced: set[Live] = set()
        self._marks = marks
        self._clock = clock
        self._clean: OrderedDict[int, int] = OrderedDict()
        self._generations: dict[Ino, int] = {}
        self._synced_sizes: dict[Ino, int] = {}
        self._version = 0
        self._version_end = 0
        self.reap = Reap()
        self.rotten = 0  # clean blocks that were not what their checksums say
        self.fill: Callable[[Live, int], Awaitable[None]] = self._no_fill
        self.on_dirty: Callable[[], None] = lambda: None  # a block became dirty

    @staticmethod
    async def _no_fill(live: Live, index: int) -> None:
        msg = f"no reader to fill block {index} of inode {live.ino}"
        raise FsError(errno.EIO, msg)

    async def evict(self, at_least: int) -> int:
        """Give back local space of clean blocks. Returns bytes freed."""
        raise NotImplementedError

    # ------------------------------------------------------------------ start

    async def load(self, *, power_lost: bool) -> None:
        """Take up what an earlier run left. `power_lost`: trust only what was synced."""
        self._generations = dict(await self.journal.local_generations())
        self._synced_sizes = dict(await self.journal.synced_sizes())
        on_disk, self.files.at_start = self.files.at_start, {}
        if power_lost:
            await self._load_synced(on_disk)
        else:
            await self._load_marked(on_disk)
        await self._load_clean(on_disk, trust=not power_lost)
        for key in on_disk.keys() - {live.key for live in self.live.values()}:
            self.files.remove(key)

    def _file_of(self, ino: Ino) -> tuple[Ino, int]:
        return (ino, self._generations.get(ino, 0))

    async def _load_marked(self, on_disk: dict[tuple[Ino, int], int]) -> None:
        marked = {clean_key(mark.ino, mark.index) for mark in self._marks}
        cached = {key async for key, _ in self._cached() if key in marked} if marked else set()
        nameless = []
        synced = await self.journal.all_dirty()
        rows = {(ino, index): version for ino, index, version, _ in synced}
        for mark in sorted(self._marks, key=lambda mark: mark.version, reverse=True):
            key = (mark.ino, mark.generation)
            live = await self.enter(mark.ino, required=False)
            if live is None:
                nameless.append(mark)
                continue
            if (
                mark.index in live.dirty  # a newer mark of the same block
                or key not in on_disk
                or live.generation != mark.generation
                or mark.index * self.block_bytes >= live.size
            ):
                self._marks.release(mark.slot)
                continue
            await self._adopt(
                live, mark.index, mark.slot, mark.pages,
                whole=clean_key(mark.ino, mark.index) in cached,
                synced=rows.get((mark.ino, mark.index), 0),
            )  # fmt: skip
        await self._lose_trashed({(mark.ino, mark.index) for mark in nameless} | rows.keys())
        for mark in nameless:
            self._marks.release(mark.slot)
        await self._lose_synced(synced, on_disk)
        self._forget_idle()

    async def _lose_trashed(self, blocks: Iterable[tuple[Ino, int]]) -> None:
        """What the trash does without, before what says so goes: another kill may come now."""
        await self.journal.lose_trashed(blocks, self.block_bytes)
        self.journal.commit()

    async def _lose_synced(
        self, rows: Iterable[tuple[Ino, int, int, int]], on_disk: dict[tuple[Ino, int], int]
    ) -> None:
        """Blocks (inode, index, version, pages) that were synced, and whose local file has gone.

        Somebody has removed it, or the disk has: we remove one after the journal has forgotten its
        blocks, and both are durable. Reading is an error, never zeros, a file cut short, or what
        Discord has of before.
        """
        for ino, index, version, pages in sorted(rows):
            live = await self.enter(ino, required=False)
            start = index * self.block_bytes
            if live is None or live.key in on_disk or start >= live.size or index in live.dirty:
                continue
            if not pages:  # a truncation has cut away what was synced
                await self.journal.drop_dirty(ino, [(index, version)])
                continue
            await self.journal.damage_block(ino, index, version, self.block_bytes)
            path = (await self.journal.told_path(ino)).decode(errors="backslashreplace")
            log.error("synced bytes at %d are gone with their local file path=%s", start, path)

    async def _load_synced(self, on_disk: dict[tuple[Ino, int], int]) -> None:
        for mark in list(self._marks):
            self._marks.release(mark.slot)
        await self._fall_back()
        rows = await self.journal.all_dirty()
        await self._lose_trashed({row[:2] for row in rows})
        await self._lose_synced(rows, on_disk)
        for ino, index, version, pages in rows:
            live = await self.enter(ino, required=False)
            if live is None or live.key not in on_disk or index * self.block_bytes >= live.size:
                await self.journal.drop_dirty(ino, [(index, version)])
                continue
            slot = self._marks.claim(
                ino, live.generation, index, await self._next_version(), pages=pages
            )
            await self._adopt(live, index, slot, pages, whole=False, synced=version)
        for live in [live for live in self.live.values() if live.dirty]:
            self._clear_unsynced(live)
        self._forget_idle()

    async def _fall_back(self) -> None:
        """Cut files at the size up to which their bytes were synced."""
        for ino, size in self._synced_sizes.items():
            found = await self.journal.getattr(ino)
            if found.size > size:
                await self.journal.truncate(ino, size, self.block_bytes, found.mtime_ns)
            await self.journal.size_synced(ino, size, whole=True)
        self._synced_sizes = {}

    async def _adopt(
        self, live: Live, index: int, slot: int, pages: int, *, whole: bool, synced: int
    ) -> None:
        entry = await self.journal.chunk_at(live.ino, index)
        valid = entry.valid_length if entry else 0
        now = self._clock()
        version = await self._next_version()
        if valid and not whole:
            pages &= self._written(live, index)
        dirty = Dirty(slot, version, pages, whole or covers(pages, valid), valid, now, now)
        dirty.synced = synced  # a row stands for these bytes: they must not go before it
        self._marks.update(slot, version, pages)
        # The size may be behind the last write by one group commit: what lies beyond it goes,
        # and what is missing up to it reads as zeros.
        self.files.resize(live.key, live.size)
        live.dirty[index] = dirty
        self.queue[clean_key(live.ino, index)] = (live, index)
        self.unsynced.add(live)
        self._charge(dirty)

    def _clear_unsynced(self, live: Live) -> None:
        """What no row names was not synced, or cut away: it must not show where zeros belong."""
        step = self.block_bytes // PAGE_BYTES
        for start, stop in self.files.data_ranges(live.key, 0, live.size):
            pages = range(start // PAGE_BYTES, -(-stop // PAGE_BYTES))
            for known, run in groupby(pages, lambda page: live.has_page(page, step)):
                if not known:
                    unknown = list(run)
                    at, length = unknown[0] * PAGE_BYTES, len(unknown) * PAGE_BYTES
                    self.files.punch(live.key, at, length)

    def _written(self, live: Live, index: int) -> int:
        """Pages of a block that the local file has bytes for: a marked hole was never written."""
        first = index * self.block_bytes
        pages = 0
        for start, stop in self.files.data_ranges(live.key, first, first + self.block_bytes):
            pages |= page_mask((start - first) // PAGE_BYTES, (stop - first - 1) // PAGE_BYTES)
        return pages

    async def _cached(self) -> AsyncIterator[tuple[int, int]]:
        """All rows of clean blocks, and of whole dirty ones, in order. They may be many."""
        after = -1
        while page := await self.journal.cached_page(after, _ROWS_AT_ONCE):
            for row in page:
                yield row
            after = page[-1][0]

    async def _load_clean(self, on_disk: dict[tuple[Ino, int], int], *, trust: bool) -> None:
        """Take up clean blocks, and their files out of `on_disk`."""
        owner, end = Ino(0), 0  # of the clean blocks that were found last
        async for key, length in self._cached():
            ino, index = Ino(key >> 32), key & 0xFFFFFFFF
            if ino != owner:
                await self._claim_file(owner, end, on_disk)
                owner, end = ino, 0
            if trust and self._is_dirty(ino, index):
                continue  # its row says that every byte is here, which marks cannot
            entry = await self.journal.chunk_at(ino, index) if trust and length else None
            there = on_disk.get(self._file_of(ino), 0)
            if (
                entry is None
                or entry.valid_length != length  # a row of what the block was before
                or there < index * self.block_bytes + length
            ):
                await self.journal.cached_remove([key])
            else:
                self._add_clean(key, length)
                end = max(end, index * self.block_bytes + length)
        await self._claim_file(owner, end, on_disk)

    async def _claim_file(self, ino: Ino, end: int, on_disk: dict[tuple[Ino, int], int]) -> None:
        """A file whose clean blocks end there stays; no end: it has none."""
        if not end:
            return
        there = on_disk.pop(self._file_of(ino))
        if ino not in self.live and there > end:
            await self._cut_local(ino, there)

    async def _cut_local(self, ino: Ino, there: int) -> None:
        """A local file ends no later than its inode: a killed process may have left it longer."""
        size = (await self.journal.getattr(ino)).size
        if size < there:
            self.files.resize(self._file_of(ino), size)

    def _add_clean(self, key: int, length: int) -> None:
        charge = rounded(length)
        self.room.used_bytes += charge - self._clean.get(key, 0)
        self._clean[key] = charge

    def _is_dirty(self, ino: Ino, index: int) -> bool:
        live = self.live.get(ino)
        return live is not None and index in live.dirty

    # ------------------------------------------------------------------ live inodes

    async def enter(self, ino: Ino, *, required: bool = True) -> Live | None:
        """The live inode, made from the journal when it is not in memory.

        Without one, or without a name: ENOENT if it is required, else None.
        """
        live = self.live.get(ino)
        if live is None:
            try:
                attributes = await self.journal.getattr(ino)
            except FsError:
                if required:
                    raise
                return None
            if not attributes.nlink and not required:
                return None  # in the trash: nothing of it is kept here
            synced = self._synced_sizes.pop(ino, attributes.size)
            live = Live(ino, attributes.size, self._generations.get(ino, 0), synced)
            self.live[ino] = live
        return live

    def leave(self, live: Live) -> None:
        """Drop it from memory if nothing needs it there."""
        if not (live.handles or live.dirty or live.size_changed) and not live.nameless:
            if self.live.get(live.ino) is live:  # it may have been left and entered anew
                del self.live[live.ino]
            self.unsynced.discard(live)

    def _forget_idle(self) -> None:
        for live in list(self.live.values()):
            self.leave(live)

    # ------------------------------------------------------------------ looking

    def present(self, live: Live, index: int, start: int = 0, stop: int | None = None) -> bool:
        """Whether bytes `start` to `stop` of the block can be read from the local file."""
        dirty = live.dirty.get(index)
        if dirty is None:
            key = clean_key(live.ino, index)
            if key in self._clean:
                self._clean.move_to_end(key)
                return True
            return False
        if dirty.whole:
            return True
        last = ((stop or self.block_bytes) - 1) // PAGE_BYTES
        need = page_mask(start // PAGE_BYTES, last)
        return dirty.pages & need == need

    def snapshot(self, live: Live, index: int) -> bytes:
        """A copy of the whole block, cut at the file's end. The block must be whole."""
        at = index * self.block_bytes
        return self.files.read(live.key, at, min(self.block_bytes, live.size - at))

    @property
    def clean_blocks(self) -> int:
        """How many blocks are cached and clean."""
        return len(self._clean)

    async def _next_version(self) -> int:
        if self._version >= self._version_end:
            self._version = await self.journal.reserve_versions(_VERSIONS_AT_ONCE)
            self._version_end = self._version + _VERSIONS_AT_ONCE
        self._version += 1
        return self._version

    def _charge(self, dirty: Dirty) -> None:
        # The base counts before it is here: sealing will merge it, and must not pass the cap then.
        charge = max(dirty.pages.bit_count() * PAGE_BYTES, rounded(dirty.base_valid))
        self.room.used_bytes += charge - dirty.charge
        self.room.dirty_bytes += charge - dirty.charge
        dirty.charge = charge
