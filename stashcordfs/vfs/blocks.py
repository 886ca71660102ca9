"""A block's life, which has one owner: absent -> clean -> dirty(v) -> sealing(v) -> clean.

Rules that everything here keeps (docs/architecture.md, "A block's life"):

* What is written is marked first (`cache.marks`), with a version from one persistent counter.
* Snapshot, never lock: an upload copies a block; writes go on; the block becomes clean only if its
  version is still the one that was copied and the object is the same (a truncation replaces it).
* Nothing is destroyed before what replaces it is durable: `reap` names local files and marks that
  may go only after the next sync of the journal; eviction punches after the commit that forgets
  the block, and only blocks become clean whose commit is already on disk.

The journal's methods are awaited but do not suspend with the SQLite engine; where a block can
change under our feet (a network fetch), it is looked up again.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from stashcordfs.cache import agrees, sums_of, units_around
from stashcordfs.errors import LocalDiskError
from stashcordfs.types import PAGE_BYTES, Attributes, Ino
from stashcordfs.vfs.live import Dirty, Live
from stashcordfs.vfs.table import BlockTable, Reap, clean_key, covers, page_mask

if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = ["Blocks", "Reap", "Uploaded"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A block as it was copied for an upload: its version then, its bytes' count and checksums."""

    live: Live
    index: int
    dirty: Dirty
    version: int
    valid: int
    sums: bytes


class Blocks(BlockTable):
    """Owner of all blocks' states. Lives on the event loop; no method is for another thread."""

    # ------------------------------------------------------------------ reading

    async def read(self, live: Live, index: int, start: int, stop: int) -> bytes | None:
        """Bytes `start` to `stop` of a block; None when they are not all here. LocalDiskError.

        A clean block is checked: what has rotted, or cannot be read, is forgotten and thus fetched
        anew. Of a dirty block this machine has the only copy: there a fault is a fault.
        """
        if not self.present(live, index, start, stop):
            return None
        at = index * self.block_bytes
        if index in live.dirty:
            return self.files.read(live.key, at + start, stop - start)
        data = await self._read_clean(live, index, start, stop)
        if data is None:
            self.rotten += 1
            log.warning("cached block damaged, fetching anew ino=%d index=%d", live.ino, index)
            await self._forget_clean([clean_key(live.ino, index)])
            self.journal.commit()  # a write may follow, and must not find the block believed whole
        return data

    async def _read_clean(self, live: Live, index: int, start: int, stop: int) -> bytes | None:
        row = await self.journal.cached_sums(clean_key(live.ino, index))
        if row is None:
            return None
        length, sums = row
        if start >= length:
            return bytes(stop - start)
        first, last = units_around(start, min(stop, length), length)
        try:
            data = self.files.read(live.key, index * self.block_bytes + first, last - first)
        except LocalDiskError as error:
            log.warning("cached block unreadable: %s", error)
            return None
        if not agrees(data, first, sums):
            return None
        if first == start and last == stop:
            return data
        return data[start - first : stop - first].ljust(stop - start, b"\0")

    async def _forget_clean(self, keys: list[int]) -> None:
        for key in keys:
            self.room.used_bytes -= self._clean.pop(key, 0)
        await self.journal.cached_remove(keys)

    # ------------------------------------------------------------------ writing

    async def write(self, live: Live, offset: int, data: bytes) -> None:
        """Put bytes into the local file, marked first. Waits for room; ENOSPC if none comes."""
        await self.room.for_write(max(len(data), self.block_bytes))
        view = memoryview(data)
        while view:
            index, start = divmod(offset, self.block_bytes)
            length = min(len(view), self.block_bytes - start)
            await self._write_block(live, index, start, view[:length])
            offset += length
            view = view[length:]
            if offset > live.size:
                live.size = offset
                live.size_changed = True

    async def _write_block(self, live: Live, index: int, start: int, data: memoryview) -> None:
        stop = start + len(data)
        dirty = live.dirty.get(index)
        made = dirty is None
        if dirty is None:
            dirty = await self._make_dirty(live, index)
        if not dirty.whole and self._cuts_a_page(dirty, start, stop):
            await self.fill(live, index)
            dirty = live.dirty.get(index) or await self._make_dirty(live, index)
            made = False  # an upload may have copied it meanwhile
        pages = dirty.pages | page_mask(start // PAGE_BYTES, (stop - 1) // PAGE_BYTES)
        version = dirty.version if made else await self._next_version()
        before = dirty.pages
        self._marks.update(dirty.slot, version, pages)
        try:
            self.files.write(live.key, index * self.block_bytes + start, data)
        except LocalDiskError:
            if made and not dirty.base_valid:
                self._be_hole(live, index)
            elif not dirty.whole:  # what was not written must not count as data
                self._marks.update(dirty.slot, version, before)
            raise
        dirty.version = version
        dirty.pages = pages
        # Nothing of the base is left: it need not be fetched, and may even be lost.
        dirty.whole = dirty.whole or covers(pages, dirty.base_valid)
        dirty.changed_s = self._clock()
        self._charge(dirty)
        self.unsynced.add(live)

    def _be_hole(self, live: Live, index: int) -> None:
        """The first write into a hole has failed: it may lie beyond the end, and cannot be sent."""
        self._drop_dirty(live, index)
        with suppress(LocalDiskError):  # a part may have been written
            self.files.punch(live.key, index * self.block_bytes, self.block_bytes)

    def _cuts_a_page(self, dirty: Dirty, start: int, stop: int) -> bool:
        """Whether an edge of the write lies inside a page whose other bytes only the base has."""
        if start % PAGE_BYTES and not dirty.pages >> (start // PAGE_BYTES) & 1:
            return start // PAGE_BYTES * PAGE_BYTES < dirty.base_valid
        if stop % PAGE_BYTES and not dirty.pages >> (stop // PAGE_BYTES) & 1:
            return stop < dirty.base_valid
        return False

    async def _make_dirty(self, live: Live, index: int) -> Dirty:
        key = clean_key(live.ino, index)
        base = await self.journal.valid_length(live.ino, index)
        was_clean = self._clean.pop(key, None)
        if was_clean is not None:
            self.room.used_bytes -= was_clean
            # Its checksums end here: the upload's commit must not find them still in force, as a
            # process killed right after it would serve zeros beyond the old length.
            await self.journal.cached_add(key)
        version = await self._next_version()
        slot = self._marks.claim(live.ino, live.generation, index, version)
        now = self._clock()
        dirty = Dirty(slot, version, 0, was_clean is not None or not base, base, now, now)
        live.dirty[index] = dirty
        self.queue[key] = (live, index)
        self.on_dirty()
        if live.size:
            self.files.grow(live.key, live.size)  # a shorter local file would count as a fault
        if base:
            self._charge(dirty)
        return dirty

    async def carry_size(self, live: Live) -> None:
        """Write a size that has changed in memory to the journal's open group."""
        if live.size_changed and not live.gone:
            live.size_changed = False
            await self.journal.set_attributes(live.ino, size=live.size, synced=live.synced_size)

    # ------------------------------------------------------------------ base, fetch, clean

    async def merge_base(self, live: Live, index: int, plain: bytes) -> None:
        """Put the base's bytes beside what was written, so that the dirty block is whole."""
        dirty = live.dirty.get(index)
        if dirty is None or dirty.whole:
            return
        at = index * self.block_bytes
        plain = plain[: dirty.base_valid]
        for page in range(-(-len(plain) // PAGE_BYTES)):
            if not dirty.pages >> page & 1:
                start = page * PAGE_BYTES
                self.files.write(live.key, at + start, plain[start : start + PAGE_BYTES])
        dirty.whole = True
        await self.journal.cached_add(clean_key(live.ino, index))
        self._charge(dirty)

    async def add_clean(self, live: Live, index: int, plain: bytes, sums: bytes) -> bool:
        """Keep a fetched block, if there is room. It must still be what the journal says."""
        at = index * self.block_bytes
        length = max(0, min(len(plain), live.size - at))
        if not await self.room.for_clean(length):
            return False
        if length != len(plain):
            plain = plain[:length]
            sums = sums_of(plain)
        try:
            self.files.write(live.key, at, plain)
            self.files.grow(live.key, live.size)
        except LocalDiskError as error:
            log.warning("a fetched block is not kept: %s", error)
            return False
        key = clean_key(live.ino, index)
        self._add_clean(key, length)
        await self.journal.cached_add(key, length, sums)
        return True

    async def uploaded(self, items: Iterable[Uploaded]) -> None:
        """Blocks whose new chunk the journal refers to, durably."""
        for item in items:
            live, index, dirty = item.live, item.index, item.dirty
            version, valid = item.version, item.valid
            dirty.sealing = False
            if live.dirty.get(index) is not dirty:
                continue
            key = clean_key(live.ino, index)
            if dirty.version != version:
                dirty.base_valid, dirty.uploaded = valid, version
                dirty.since_s = dirty.changed_s
                self.queue.move_to_end(key)
                continue
            del live.dirty[index]
            self.queue.pop(key, None)
            self.room.used_bytes -= dirty.charge
            self.room.dirty_bytes -= dirty.charge
            if live.sync_failed is None:
                self._add_clean(key, valid)
                await self.journal.cached_add(key, valid, item.sums)
            else:  # what is here is in doubt
                await self.journal.cached_remove([key])
                if not live.dirty:
                    live.sync_failed = None  # Discord has all of it now
            self._marks.release(dirty.slot)
            if not live.dirty and not live.gone:
                live.synced_size = live.size
                await self.journal.size_synced(live.ino, live.size, whole=not live.size_changed)
            self.leave(live)
        self.room.progressed()

    async def renew(self, ino: Ino, index: int) -> bool:
        """Let a block whose chunk is lost be sent anew. False: no sound copy of it is here."""
        live = await self.enter(ino, required=False)
        if live is None:
            return False
        try:
            if index not in live.dirty and not await self._renew_clean(live, index):
                return False
            return live.dirty[index].whole
        finally:
            self.leave(live)

    async def _renew_clean(self, live: Live, index: int) -> bool:
        key = clean_key(live.ino, index)
        row = await self.journal.cached_sums(key)
        if key not in self._clean or row is None or not row[0]:
            return False
        if await self._read_clean(live, index, 0, row[0]) is None:
            await self._forget_clean([key])
            return False
        dirty = await self._make_dirty(live, index)
        dirty.pages = page_mask(0, (row[0] - 1) // PAGE_BYTES)  # so that an fsync covers all of it
        self._marks.update(dirty.slot, dirty.version, dirty.pages)
        self._charge(dirty)
        self.unsynced.add(live)
        return True

    # ------------------------------------------------------------------ destroying

    async def evict(self, at_least: int) -> int:
        """Give back local space of clean blocks, least recently used first. Returns bytes freed."""
        victims: list[int] = []
        freed = 0
        for key, charge in self._clean.items():
            if freed >= at_least:
                break
            victims.append(key)
            freed += charge
        if not victims:
            return 0
        # A row says "every byte is here": it must be gone from the journal before the bytes are.
        await self.journal.cached_remove(victims)
        self.journal.commit()
        for key in victims:
            self.room.used_bytes -= self._clean.pop(key)
            self._punch(Ino(key >> 32), key & 0xFFFFFFFF)
        return freed

    def _punch(self, ino: Ino, index: int) -> None:
        file = self._file_of(ino)
        try:
            if index == 0 and ino not in self.live and self.files.size(file) <= self.block_bytes:
                self.files.remove(file)
            else:
                self.files.punch(file, index * self.block_bytes, self.block_bytes)
        except LocalDiskError as error:
            log.warning("eviction failed ino=%d index=%d error=%s", ino, index, error)

    async def truncate(self, live: Live, size: int, now_ns: int) -> None:
        """Set the size; blocks beyond it are dropped, the one at the edge is cut."""
        if size >= live.size:
            await self._grow(live, size, now_ns)
            return
        synced = any(d.synced for i, d in live.dirty.items() if (i + 1) * self.block_bytes > size)
        await self.journal.truncate(live.ino, size, self.block_bytes, now_ns)
        live.size, live.size_changed = size, False
        live.synced_size = min(live.synced_size, size)
        live.lowest_size = min(live.lowest_size, size)
        cut = await self._forget_beyond(live, size)
        if live.dirty:
            self.unsynced.add(live)  # a sync under way knows the old size alone
        else:
            await self._all_synced(live)
        if size == 0:
            await self._new_generation(live)
        elif self.files.exists(live.key):
            self.journal.commit()
            if cut is not None:  # not before: a process killed in between must find all marked
                self._marks.update(cut.slot, cut.version, cut.pages)
            if synced:
                await self.journal.wal_sync()
            if self.files.size(live.key) > live.size:  # a write may have come in meanwhile
                self.files.resize(live.key, live.size)
        self.leave(live)
        self.room.progressed()

    async def _grow(self, live: Live, size: int, now_ns: int) -> None:
        """Zeros at the end, durable with the next sync, as an earlier cut of the local file is."""
        if live.dirty:
            await self.journal.size_synced(live.ino, live.synced_size, whole=False)
            self.unsynced.add(live)
        await self.journal.truncate(live.ino, size, self.block_bytes, now_ns)
        live.size, live.size_changed = size, False
        if not live.dirty:
            await self._all_synced(live)
        if live.dirty or self.files.exists(live.key):
            self.files.grow(live.key, size)
        self.leave(live)

    async def _all_synced(self, live: Live) -> None:
        """All there is is on Discord, or a hole: no older size may stand for it."""
        live.synced_size = live.size
        await self.journal.size_synced(live.ino, live.size, whole=True)

    async def _forget_beyond(self, live: Live, size: int) -> Dirty | None:
        """Drop blocks beyond the end. Returns the dirty one at the edge, not marked yet."""
        new = None
        edge, cut = divmod(size, self.block_bytes)
        for index in [i for i in live.dirty if i > edge or (i == edge and not cut)]:
            self._drop_dirty(live, index)
        if cut and (old := live.dirty.pop(edge, None)):
            pages = old.pages & page_mask(0, (cut - 1) // PAGE_BYTES)
            version = await self._next_version()
            new = Dirty(
                old.slot, version, pages, old.whole, min(old.base_valid, cut),
                old.since_s, self._clock(), old.charge, old.synced,
            )  # fmt: skip
            old.heir = new
            live.dirty[edge] = new
            self._charge(new)
        first = edge + bool(cut)
        await self._forget_clean(await self.journal.cached_beyond(live.ino, first))
        if cut and edge not in live.dirty:
            await self._cut_clean(live, edge, cut)
        return new

    async def _cut_clean(self, live: Live, index: int, length: int) -> None:
        """A clean block ends earlier now: its last checksum is of fewer bytes."""
        key = clean_key(live.ino, index)
        row = await self.journal.cached_sums(key)
        if key not in self._clean or row is None or row[0] <= length:
            return
        first, last = units_around(length - 1, length, length)
        data = await self._read_clean(live, index, first, last)
        if data is None:
            await self._forget_clean([key])
            return
        kept = row[1][: len(sums_of(bytes(first)))]
        self._add_clean(key, length)
        await self.journal.cached_add(key, length, kept + sums_of(data))

    def _drop_dirty(self, live: Live, index: int) -> None:
        dirty = live.dirty.pop(index)
        self.queue.pop(clean_key(live.ino, index), None)
        self.room.used_bytes -= dirty.charge
        self.room.dirty_bytes -= dirty.charge
        self.reap.slots.append(dirty.slot)

    async def _new_generation(self, live: Live) -> None:
        if not self.files.exists(live.key):
            return
        self.reap.files.append(live.key)
        live.generation = await self._next_version()
        self._generations[live.ino] = live.generation
        await self.journal.set_local_generation(live.ino, live.generation)

    async def abandon(self, found: Attributes) -> bool:
        """The inode is no more: everything local goes after the next sync of the journal.

        Whether there was anything, for the journal's `purge`, which the caller owes.
        """
        local = self.is_local(found.ino)
        self.drop(found.ino, await self.journal.cached_beyond(found.ino, 0) if local else ())
        return local

    def only_here(self, ino: Ino) -> list[int]:
        """Blocks of an inode that Discord does not have in their last version."""
        live = self.live.get(ino)
        return [] if live is None else [i for i, d in live.dirty.items() if d.uploaded < d.version]

    async def revive(self, ino: Ino) -> None:
        """An inode without a name gets one again. What was its local file may yet be reaped."""
        await self._forget_clean(await self.journal.cached_beyond(ino, 0))
        generation = self._generations[ino] = await self._next_version()
        await self.journal.set_local_generation(ino, generation)

    def is_local(self, ino: Ino) -> bool:
        """Whether this machine may know anything of the inode's blocks."""
        return ino in self._generations or self.files.exists((ino, 0))

    def drop(self, ino: Ino, cached: Iterable[int]) -> None:
        """Forget what is in memory of an inode that the journal has forgotten, or will."""
        live = self.live.pop(ino, None)
        key = (ino, self._generations.pop(ino, 0))
        if live is not None:
            live.gone = True
            self.unsynced.discard(live)
            for index in list(live.dirty):
                self._drop_dirty(live, index)
        if self.files.exists(key):  # without it nothing of the inode is cached
            for clean in cached:
                self.room.used_bytes -= self._clean.pop(clean, 0)
            self.reap.files.append(key)
        self.room.progressed()

    async def run_spares(self) -> None:
        """Make local files ahead, for ever: see `cache.files`."""
        low = trio.Event()

        def tell() -> None:
            low.set()

        self.files.on_low_spares = tell
        while True:
            if numbers := self.files.spares_wanted():
                try:
                    await trio.to_thread.run_sync(self.files.make_spares, numbers)
                except LocalDiskError:
                    self.files.give_back(numbers)
                    raise
                self.files.add_spares(numbers)
            await low.wait()
            low = trio.Event()

    def reap_now(self, reap: Reap) -> None:
        """Destroy what `reap` names. The journal that makes it right has been synced."""
        for slot in reap.slots:
            self._marks.release(slot)
        for file in reap.files:
            self.files.remove(file)

    def take_reap(self) -> Reap:
        """Hand over what has gathered; the caller syncs the journal and calls `reap_now`."""
        reap, self.reap = self.reap, Reap()
        return reap
