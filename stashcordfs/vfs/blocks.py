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

import errno
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import FsError, LocalDiskError
from stashcordfs.types import PAGE_BYTES, Attributes, Ino
from stashcordfs.vfs.live import Dirty, Live

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from stashcordfs.cache import LocalFiles, Marks
    from stashcordfs.journal import Journal

log = logging.getLogger(__name__)

_VERSIONS_AT_ONCE = 1 << 20
_FREE_SPACE_EVERY_BYTES = 64 << 20


def _round(length: int) -> int:
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def _mask(first: int, last: int) -> int:
    return ((1 << (last - first + 1)) - 1) << first


def clean_key(ino: int, index: int) -> int:
    """One integer for a block: cheaper than a tuple in a table of many thousands."""
    return ino << 32 | index


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Bounds of the block cache in bytes; how long a write waits without any progress, in s."""

    max_bytes: int
    min_free_bytes: int
    dirty_bytes: int
    deadline_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A block as it was copied for an upload: its version then, and how many bytes are valid."""

    live: Live
    index: int
    dirty: Dirty
    version: int
    valid: int


@dataclass(slots=True)
class Reap:
    """What may be destroyed after the next sync of the journal."""

    files: list[tuple[Ino, int]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


class Blocks:
    """Owner of all blocks' states. Lives on the event loop; no method is for another thread."""

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
        self.limits = limits
        self.used_bytes = 0
        self.dirty_bytes = 0
        self.live: dict[Ino, Live] = {}
        self.queue: OrderedDict[int, tuple[Live, int]] = OrderedDict()  # dirty, oldest first
        self.reap = Reap()
        self.unsynced: set[Live] = set()
        self.fill: Callable[[Live, int], Awaitable[None]] = self._no_fill
        self.on_dirty: Callable[[], None] = lambda: None  # the first block became dirty
        self._marks = marks
        self._clock = clock
        self._clean: OrderedDict[int, int] = OrderedDict()
        self._generations: dict[Ino, int] = {}
        self._version = 0
        self._version_end = 0
        self._progress = trio.Event()
        self._waiters = 0
        self._since_free_check = _FREE_SPACE_EVERY_BYTES
        self.pressure = trio.Event()

    @staticmethod
    async def _no_fill(live: Live, index: int) -> None:
        msg = f"no reader to fill block {index} of inode {live.ino}"
        raise FsError(errno.EIO, msg)

    # ------------------------------------------------------------------ start

    async def load(self, *, power_lost: bool) -> None:
        """Take up what an earlier run left. `power_lost`: trust only what was synced."""
        self._generations = dict(await self.journal.local_generations())
        on_disk = dict(self.files.scan())
        if power_lost:
            await self._load_synced(on_disk)
        else:
            await self._load_marked(on_disk)
        await self._load_clean(on_disk, trust=not power_lost)
        wanted = {live.key for live in self.live.values()}
        wanted |= {self._file_of(Ino(key >> 32)) for key in self._clean}
        for key in on_disk.keys() - wanted:
            self.files.remove(key)

    def _file_of(self, ino: Ino) -> tuple[Ino, int]:
        return (ino, self._generations.get(ino, 0))

    async def _load_marked(self, on_disk: dict[tuple[Ino, int], int]) -> None:
        cached = set(await self.journal.cached_all())
        for mark in sorted(self._marks, key=lambda mark: mark.version, reverse=True):
            key = (mark.ino, mark.generation)
            live = await self.enter(mark.ino, required=False)
            if (
                live is None
                or mark.index in live.dirty  # a newer mark of the same block
                or key not in on_disk
                or live.generation != mark.generation
                or mark.index * self.block_bytes >= live.size
            ):
                self._marks.release(mark.slot)
                continue
            await self._adopt(
                live, mark.index, mark.slot, mark.pages,
                whole=clean_key(mark.ino, mark.index) in cached,
            )  # fmt: skip
        self._forget_idle()

    async def _load_synced(self, on_disk: dict[tuple[Ino, int], int]) -> None:
        for mark in list(self._marks):
            self._marks.release(mark.slot)
        for ino, index, pages in await self.journal.all_dirty():
            live = await self.enter(ino, required=False)
            if live is None or live.key not in on_disk or index * self.block_bytes >= live.size:
                continue
            slot = self._marks.claim(
                ino, live.generation, index, await self._next_version(), pages=pages
            )
            await self._adopt(live, index, slot, pages, whole=False)
        self._forget_idle()

    async def _adopt(self, live: Live, index: int, slot: int, pages: int, *, whole: bool) -> None:
        entry = await self.journal.chunk_at(live.ino, index)
        valid = entry.valid_length if entry else 0
        now = self._clock()
        version = await self._next_version()
        dirty = Dirty(slot, version, pages, whole or not valid, valid, now, now)
        self._marks.update(slot, version, pages)
        # The size may be behind the last write by one group commit: what lies beyond it goes,
        # and what is missing up to it reads as zeros.
        self.files.resize(live.key, live.size)
        live.dirty[index] = dirty
        self.queue[clean_key(live.ino, index)] = (live, index)
        self.unsynced.add(live)
        self._charge(dirty)

    async def _load_clean(self, on_disk: dict[tuple[Ino, int], int], *, trust: bool) -> None:
        for key in list(await self.journal.cached_all()):
            ino, index = Ino(key >> 32), key & 0xFFFFFFFF
            entry = await self.journal.chunk_at(ino, index) if trust else None
            file = self._file_of(ino)
            length = entry.valid_length if entry else 0
            if not length or on_disk.get(file, 0) < index * self.block_bytes + length:
                await self.journal.cached_remove([key])
            elif not self._is_dirty(ino, index):
                self._add_clean(key, length)

    def _is_dirty(self, ino: Ino, index: int) -> bool:
        live = self.live.get(ino)
        return live is not None and index in live.dirty

    # ------------------------------------------------------------------ live inodes

    async def enter(self, ino: Ino, *, required: bool = True) -> Live | None:
        """The live inode, made from the journal when it is not in memory. ENOENT if required."""
        live = self.live.get(ino)
        if live is None:
            try:
                attributes = await self.journal.getattr(ino)
            except FsError:
                if required:
                    raise
                return None
            live = Live(ino, attributes.size, self._generations.get(ino, 0))
            self.live[ino] = live
        return live

    def leave(self, live: Live) -> None:
        """Drop it from memory if nothing needs it there."""
        if not (live.handles or live.dirty or live.size_changed) and not live.nameless:
            self.live.pop(live.ino, None)
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
        need = _mask(start // PAGE_BYTES, last)
        return dirty.pages & need == need

    def snapshot(self, live: Live, index: int) -> bytes:
        """A copy of the whole block, cut at the file's end. The block must be whole."""
        at = index * self.block_bytes
        length = min(self.block_bytes, live.size - at)
        self.files.grow(live.key, at + length)
        return self.files.read(live.key, at, length)

    @property
    def clean_blocks(self) -> int:
        """How many blocks are cached and clean."""
        return len(self._clean)

    # ------------------------------------------------------------------ writing

    async def write(self, live: Live, offset: int, data: bytes) -> None:
        """Put bytes into the local file, marked first. Waits for room; ENOSPC if none comes."""
        await self._room(len(data))
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
        if self.used_bytes > self.limits.max_bytes:
            await self.evict()

    async def _write_block(self, live: Live, index: int, start: int, data: memoryview) -> None:
        stop = start + len(data)
        dirty = live.dirty.get(index)
        if dirty is None:
            dirty = await self._make_dirty(live, index)
        if not dirty.whole and self._cuts_a_page(dirty, start, stop):
            await self.fill(live, index)
            dirty = live.dirty.get(index) or await self._make_dirty(live, index)
        pages = dirty.pages | _mask(start // PAGE_BYTES, (stop - 1) // PAGE_BYTES)
        version = await self._next_version()
        before = dirty.pages
        self._marks.update(dirty.slot, version, pages)
        try:
            self.files.write(live.key, index * self.block_bytes + start, data)
        except LocalDiskError:
            if not dirty.whole:  # what was not written must not count as data
                self._marks.update(dirty.slot, version, before)
            raise
        dirty.version = version
        dirty.pages = pages
        dirty.changed_s = self._clock()
        self._charge(dirty)
        self.unsynced.add(live)
        self._since_free_check += len(data)

    def _cuts_a_page(self, dirty: Dirty, start: int, stop: int) -> bool:
        """Whether an edge of the write lies inside a page whose other bytes only the base has."""
        if start % PAGE_BYTES and not dirty.pages >> (start // PAGE_BYTES) & 1:
            return start // PAGE_BYTES * PAGE_BYTES < dirty.base_valid
        if stop % PAGE_BYTES and not dirty.pages >> (stop // PAGE_BYTES) & 1:
            return stop < dirty.base_valid
        return False

    async def _make_dirty(self, live: Live, index: int) -> Dirty:
        key = clean_key(live.ino, index)
        entry = await self.journal.chunk_at(live.ino, index)
        base = entry.valid_length if entry else 0
        was_clean = self._clean.pop(key, None)
        if was_clean is not None:
            self.used_bytes -= was_clean
        version = await self._next_version()
        slot = self._marks.claim(live.ino, live.generation, index, version)
        now = self._clock()
        dirty = Dirty(slot, version, 0, was_clean is not None or not base, base, now, now)
        live.dirty[index] = dirty
        if not self.queue:
            self.on_dirty()
        self.queue[key] = (live, index)
        self.files.grow(live.key, live.size)  # a shorter local file would count as a fault
        self._charge(dirty)
        return dirty

    def _charge(self, dirty: Dirty) -> None:
        charge = dirty.pages.bit_count() * PAGE_BYTES
        if dirty.whole:
            charge = max(charge, _round(dirty.base_valid))
        self.used_bytes += charge - dirty.charge
        self.dirty_bytes += charge - dirty.charge
        dirty.charge = charge

    async def _next_version(self) -> int:
        if self._version >= self._version_end:
            self._version = await self.journal.reserve_versions(_VERSIONS_AT_ONCE)
            self._version_end = self._version + _VERSIONS_AT_ONCE
        self._version += 1
        return self._version

    async def _room(self, length: int) -> None:
        """Wait while the dirty budget is used up and uploading or evicting makes progress."""
        if self._since_free_check >= _FREE_SPACE_EVERY_BYTES:
            self._since_free_check = 0
            if self.files.free_bytes() < self.limits.min_free_bytes + length:
                self._since_free_check = _FREE_SPACE_EVERY_BYTES
                await self._wait_for(self._has_free_space)
        if self.dirty_bytes + length > self.limits.dirty_bytes:
            await self._wait_for(lambda: self.dirty_bytes + length <= self.limits.dirty_bytes)

    def _has_free_space(self) -> bool:
        return self.files.free_bytes() >= self.limits.min_free_bytes

    async def _wait_for(self, enough: Callable[[], bool]) -> None:
        while not enough():
            if await self.evict(at_least=32 * self.block_bytes) and enough():
                return
            self.pressure.set()
            self._waiters += 1
            try:
                with trio.move_on_after(self.limits.deadline_s) as scope:
                    await self._progress.wait()
            finally:
                self._waiters -= 1
            if scope.cancelled_caught:
                raise FsError(errno.ENOSPC, "the cache is full of data that Discord does not have")

    def progressed(self) -> None:
        """Tell waiting writers that something was uploaded or freed."""
        if self._waiters:
            self._progress.set()
            self._progress = trio.Event()

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
        await self.journal.cached_add([clean_key(live.ino, index)])
        self._charge(dirty)

    async def add_clean(self, live: Live, index: int, plain: bytes) -> None:
        """Keep a fetched block. The caller has checked that it is still what the journal says."""
        at = index * self.block_bytes
        room = max(0, min(self.block_bytes, live.size - at))
        self.files.write(live.key, at, plain[:room].ljust(room, b"\0"))
        self.files.grow(live.key, live.size)
        key = clean_key(live.ino, index)
        self._add_clean(key, room)
        await self.journal.cached_add([key])
        if self.used_bytes > self.limits.max_bytes:
            await self.evict()

    def _add_clean(self, key: int, length: int) -> None:
        charge = _round(length)
        self.used_bytes += charge - self._clean.get(key, 0)
        self._clean[key] = charge

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
            self.used_bytes -= dirty.charge
            self.dirty_bytes -= dirty.charge
            self._add_clean(key, valid)
            await self.journal.cached_add([key])
            self._marks.release(dirty.slot)
            self.leave(live)
        self.progressed()
        if self.used_bytes > self.limits.max_bytes:
            await self.evict()

    # ------------------------------------------------------------------ destroying

    async def evict(self, *, at_least: int = 0) -> int:
        """Give back local space of clean blocks, least recently used first. Returns bytes freed."""
        want = max(at_least, self.used_bytes - self.limits.max_bytes * 19 // 20)
        victims: list[int] = []
        freed = 0
        for key, charge in self._clean.items():
            if freed >= want:
                break
            victims.append(key)
            freed += charge
        if not victims:
            return 0
        # A row says "every byte is here": it must be gone from the journal before the bytes are.
        await self.journal.cached_remove(victims)
        self.journal.commit()
        for key in victims:
            self.used_bytes -= self._clean.pop(key)
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
            await self.journal.truncate(live.ino, size, self.block_bytes, now_ns)
            live.size, live.size_changed = size, False
            if live.dirty or self.files.exists(live.key):
                self.files.grow(live.key, size)
            return
        synced = any(d.synced for i, d in live.dirty.items() if (i + 1) * self.block_bytes > size)
        await self.journal.truncate(live.ino, size, self.block_bytes, now_ns)
        live.size, live.size_changed = size, False
        await self._forget_beyond(live, size)
        if size == 0:
            await self._new_generation(live)
        elif self.files.exists(live.key):
            if synced:
                await self.journal.wal_sync()
            else:
                self.journal.commit()
            if self.files.size(live.key) > live.size:  # a write may have come in meanwhile
                self.files.resize(live.key, live.size)
        self.leave(live)
        self.progressed()

    async def _forget_beyond(self, live: Live, size: int) -> None:
        edge, cut = divmod(size, self.block_bytes)
        for index in [i for i in live.dirty if i > edge or (i == edge and not cut)]:
            self._drop_dirty(live, index)
        if cut and (old := live.dirty.pop(edge, None)):
            pages = old.pages & _mask(0, (cut - 1) // PAGE_BYTES)
            version = await self._next_version()
            new = Dirty(
                old.slot, version, pages, old.whole, min(old.base_valid, cut),
                old.since_s, self._clock(), old.charge,
            )  # fmt: skip
            self._marks.update(old.slot, version, pages)
            live.dirty[edge] = new
            self._charge(new)
        first = edge + bool(cut)
        beyond = await self.journal.cached_beyond(live.ino, first)
        for key in beyond:
            self.used_bytes -= self._clean.pop(key, 0)
        await self.journal.cached_remove(beyond)

    def _drop_dirty(self, live: Live, index: int) -> None:
        dirty = live.dirty.pop(index)
        self.queue.pop(clean_key(live.ino, index), None)
        self.used_bytes -= dirty.charge
        self.dirty_bytes -= dirty.charge
        self.reap.slots.append(dirty.slot)

    async def _new_generation(self, live: Live) -> None:
        if not self.files.exists(live.key):
            return
        self.reap.files.append(live.key)
        live.generation = await self._next_version()
        self._generations[live.ino] = live.generation
        await self.journal.set_local_generation(live.ino, live.generation)

    async def purge(self, found: Attributes) -> None:
        """The inode is no more: everything local goes after the next sync of the journal."""
        ino = found.ino
        live = self.live.pop(ino, None)
        generation = self._generations.pop(ino, 0)
        if live is not None:
            live.gone = True
            self.unsynced.discard(live)
            for index in list(live.dirty):
                self._drop_dirty(live, index)
        local = self.files.exists((ino, generation))
        if local:  # without it nothing of the inode is cached or dirty
            for key in await self.journal.cached_beyond(ino, 0):
                self.used_bytes -= self._clean.pop(key, 0)
            self.reap.files.append((ino, generation))
        await self.journal.purge(found, local=local or bool(generation))
        self.progressed()

    async def run_spares(self) -> None:
        """Make local files ahead, for ever: see `cache.files`."""
        low = trio.Event()

        def tell() -> None:
            low.set()

        self.files.on_low_spares = tell
        while True:
            if names := self.files.spares_wanted():
                await trio.to_thread.run_sync(self.files.make_spares, names)
                self.files.add_spares(names)
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
