"""Reading: what is not in the block cache is fetched, by ranges, each chunk once.

A chunk, not a pack, is what a read fetches; neighbours in a pack come in one range. Two readers of
one block share one fetch. Sequential reads grow a window that is fetched ahead of the reader.
Every wait has a deadline, then EIO with the reason logged; never zeros, never short data.
"""

from __future__ import annotations

import errno
import logging
import math
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

import trio
from cachetools import LRUCache

from stashcordfs.cache import sums_of
from stashcordfs.errors import (
    ContentLost,
    CryptoError,
    DiscordError,
    FsError,
    ObjectCorrupt,
    ObjectMissing,
    StashcordError,
    StoreError,
)
from stashcordfs.store.pack import open_chunk
from stashcordfs.vfs.echoes import Echoes
from stashcordfs.vfs.neighbours import Neighbours

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractContextManager

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import ChunkEntry, Journal
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.types import ChunkId, ChunkRef
    from stashcordfs.vfs.blocks import Blocks
    from stashcordfs.vfs.live import Handle, Live, Spawn

log = logging.getLogger(__name__)

_MAX_WAITING_READS = 64
_RANGE_BYTES = 8 << 20
_GAP_BYTES = 64 << 10  # cheaper to skip over than to ask again for
_INLINE_BYTES = 64 << 10  # opened on the loop: a thread hop costs more
_FETCHES_AT_ONCE = 4
_FIRST_WINDOW_BYTES = 2 << 20
_TRIES = 4
_UNKEPT_BLOCKS = 8


class _GaveUp(FsError):
    """EIO for want of a network, not of the data."""


class Reader:
    """Makes blocks present. `spawn` runs read-ahead; `report` hears why a read failed."""

    def __init__(
        self,
        *,
        blocks: Blocks,
        journal: Journal,
        store: ObjectStore,
        keys: VolumeKeys,
        spawn: Spawn,
        answered: Callable[[], None],
        read_ahead_bytes: int,
        deadline_s: float,
        report: Callable[[str], None],
    ) -> None:
        """Take the collaborators. `answered` hears of each fetch that the network let through."""
        self._blocks = blocks
        self._journal = journal
        self._store = store
        self._keys = keys
        self._spawn = spawn
        self._answered = answered
        self._read_ahead_bytes = read_ahead_bytes
        self.deadline_s = deadline_s
        self._report = report
        self._flights: dict[tuple[int, int], trio.Event] = {}
        self._slots = trio.CapacityLimiter(_FETCHES_AT_ONCE)
        self._waiting = 0
        self.watched: Callable[[int], AbstractContextManager[None]] = lambda _fh: nullcontext()
        self._echoes = Echoes()
        self._neighbours = Neighbours()
        self._unkept: LRUCache[ChunkId, bytes] = LRUCache(_UNKEPT_BLOCKS)  # the disk had no room
        self.fetched_bytes = 0
        blocks.fill = self.fill

    async def read(self, handle: Handle, offset: int, size: int) -> bytes:
        """Bytes at `offset`, fewer than `size` only at the end of the file. EIO on any fault."""
        live = handle.live
        end = min(offset + size, live.size)
        if offset >= end:
            return b""
        self._look_ahead(handle, offset, end)
        pieces, missing = await self._gather(live, offset, end)
        if missing:
            with self.watched(handle.fh):
                async with self._one_deadline(live, offset, end), self._waiting_for(live, missing):
                    pieces = await self._fetched(live, offset, end, missing)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _fetched(
        self, live: Live, offset: int, end: int, missing: Sequence[int]
    ) -> list[bytes]:
        for _ in range(_TRIES):
            await self._bring(live, missing)
            end = min(end, live.size)  # it may have been truncated meanwhile
            if offset >= end:
                return []
            pieces, missing = await self._gather(live, offset, end)
            if not missing:
                return pieces
        raise FsError(errno.EIO, "the cache is too small to hold what is being read")

    async def _gather(self, live: Live, offset: int, end: int) -> tuple[list[bytes], list[int]]:
        """What is here of a range, in order, and the blocks that must be fetched first."""
        step = self._blocks.block_bytes
        pieces: list[bytes] = []
        missing: list[int] = []
        for index in range(offset // step, -(-end // step)):
            start, stop = max(0, offset - index * step), min(step, end - index * step)
            piece = await self._blocks.read(live, index, start, stop)
            if piece is None:
                piece = await self._not_cached(live, index, start, stop)
            if piece is None:
                missing.append(index)
            else:
                pieces.append(piece)
        return pieces, missing

    async def _not_cached(self, live: Live, index: int, start: int, stop: int) -> bytes | None:
        if index in live.dirty:
            return None
        entry = await self._journal.chunk_at(live.ino, index)
        if entry is None:
            return bytes(stop - start)  # a hole
        plain = self._unkept.get(entry.ref.chunk_id)
        if plain is None:
            return None
        return plain[start : min(stop, entry.valid_length)].ljust(stop - start, b"\0")

    @asynccontextmanager
    async def _one_deadline(self, live: Live, offset: int, end: int) -> AsyncIterator[None]:
        """Within: a read that waits. What is left of the first one's deadline when it is an echo.

        Its failure was reported by the first, so the end of the rest is not reported again.
        """
        begun_s = trio.current_time()
        since_s = self._echoes.take(live.ino, offset, end, now=begun_s)
        try:
            with trio.fail_at(math.inf if since_s is None else since_s + self.deadline_s):
                yield
        except trio.TooSlowError:
            raise FsError(errno.EIO, "deadline passed") from None
        except _GaveUp:
            if since_s is None:
                now = trio.current_time()
                self._echoes.failed(live.ino, offset, end, since=begun_s, now=now)
            raise

    @asynccontextmanager
    async def _waiting_for(self, live: Live, missing: Sequence[int]) -> AsyncIterator[None]:
        """A wait for the network inside: bounded in number and time, its faults EIO."""
        if self._waiting >= _MAX_WAITING_READS:
            raise FsError(errno.EIO, "too many reads wait for Discord")
        self._waiting += 1
        try:
            with trio.fail_after(self.deadline_s):
                yield
        except trio.TooSlowError:
            self._report(f"read: Discord did not answer within {self.deadline_s:g} s")
            raise _GaveUp(errno.EIO, "deadline passed") from None
        except (StoreError, DiscordError, CryptoError) as error:
            self._report(f"read: inode {live.ino}, blocks {list(missing)[:4]}: {error}")
            if isinstance(error, DiscordError):
                kind = _GaveUp if error.temporary else FsError
            else:
                kind = ContentLost
            raise kind(errno.EIO, str(error)) from error
        finally:
            self._waiting -= 1

    async def fill(self, live: Live, index: int) -> None:
        """Merge the base of a dirty block into its local file. EIO when it can't be had."""
        async with self._waiting_for(live, [index]):
            for _ in range(_TRIES):
                await self._bring(live, [index])
                if self._blocks.present(live, index):
                    return
            raise FsError(errno.EIO, "the base of a block is not kept")

    # ------------------------------------------------------------------ fetching

    async def _bring(self, live: Live, indices: Sequence[int]) -> None:
        """Fetch blocks, or wait for those who already do."""
        others = [e for i in indices if (e := self._flights.get((live.ino, i))) is not None]
        mine = [i for i in indices if (live.ino, i) not in self._flights]
        if mine:
            await self._fetch(live, mine)
        for event in others:
            await event.wait()

    async def _fetch(self, live: Live, indices: Sequence[int]) -> None:
        done = trio.Event()
        for index in indices:
            self._flights[live.ino, index] = done
        try:
            wanted = []
            for index in indices:
                entry = await self._journal.chunk_at(live.ino, index)
                if entry is not None and entry.damaged:
                    raise ObjectMissing("its content is lost: see stashcordfs fsck and verify")
                if entry is not None:
                    wanted.append((index, entry))
            for run in _runs(wanted):
                async with self._slots:
                    await self._fetch_run(live, run)
        finally:
            for index in indices:
                self._flights.pop((live.ino, index), None)
            done.set()

    async def _fetch_run(self, live: Live, run: Sequence[tuple[int, ChunkEntry]]) -> None:
        start = run[0][1].ref.offset
        last = run[-1][1].ref
        length = last.offset + last.length - start
        sealed = await self._sealed(run[0][1], start, length)
        try:
            await self._open_run(live, run, sealed)
        except (ObjectCorrupt, CryptoError):  # damaged on its way, perhaps: the next read asks anew
            self._neighbours.forget(run[0][1].ref.pack)
            raise

    async def _open_run(
        self, live: Live, run: Sequence[tuple[int, ChunkEntry]], sealed: memoryview
    ) -> None:
        start = run[0][1].ref.offset
        for index, entry in run:
            ref = entry.ref
            piece = bytes(sealed[ref.offset - start : ref.offset - start + ref.length])
            if ref.length <= _INLINE_BYTES:
                plain, sums = self._open(ref, piece)
            else:
                plain, sums = await trio.to_thread.run_sync(self._open, ref, piece)
            await self._keep(live, index, entry, plain, sums)

    async def _sealed(self, entry: ChunkEntry, start: int, length: int) -> memoryview:
        """A range of a pack, which may be here since a neighbour of it was fetched."""
        pack = entry.ref.pack
        sealed = self._neighbours.take(pack, start, length)
        if sealed is None:
            planned = self._neighbours.plan(pack, start, length, size=entry.location.size_bytes)
            data = await self._store.fetch(entry.location, start, planned)
            self._answered()
            self._echoes.clear()
            self.fetched_bytes += planned
            if planned > length:
                self._neighbours.keep(pack, start, data)
            sealed = memoryview(data)[:length]
        return sealed

    def _open(self, ref: ChunkRef, sealed: bytes) -> tuple[bytes, bytes]:
        plain = open_chunk(self._keys, ref, sealed)
        return plain, sums_of(plain)

    async def _keep(
        self, live: Live, index: int, entry: ChunkEntry, plain: bytes, sums: bytes
    ) -> None:
        # The world may have changed while we waited: only what is still so is kept. A read-ahead
        # outlives its handle, so the inode may have become another object, which was written to.
        current = await self._blocks.enter(live.ino, required=False)
        if current is None:
            return
        try:
            await self._keep_in(current, index, entry, plain, sums)
        finally:
            self._blocks.leave(current)

    async def _keep_in(
        self, live: Live, index: int, entry: ChunkEntry, plain: bytes, sums: bytes
    ) -> None:
        now = await self._journal.chunk_at(live.ino, index)
        if now is None or now.ref.chunk_id != entry.ref.chunk_id:
            return
        if now.valid_length < len(plain):
            plain = plain[: now.valid_length]
            sums = sums_of(plain)
        if index in live.dirty:
            await self._blocks.merge_base(live, index, plain)
        elif not self._blocks.present(live, index) and not await self._blocks.add_clean(
            live, index, plain, sums
        ):
            self._unkept[entry.ref.chunk_id] = plain

    # ------------------------------------------------------------------ read-ahead

    def _look_ahead(self, handle: Handle, offset: int, end: int) -> None:
        # The kernel's own read-ahead sends a few requests at once, not always in order.
        near = abs(offset - handle.next_offset) <= 2 * self._blocks.block_bytes
        if not near or not handle.next_offset:
            handle.window_bytes = 0
            handle.ahead_to = end
        elif end > handle.next_offset:
            grown = max(_FIRST_WINDOW_BYTES, handle.window_bytes * 2)
            handle.window_bytes = min(grown, self._read_ahead_bytes)
        handle.next_offset = max(end, handle.next_offset) if near else end
        goal = min(handle.next_offset + handle.window_bytes, handle.live.size)
        if handle.window_bytes and goal - handle.ahead_to >= min(
            handle.window_bytes // 2, handle.live.size - handle.ahead_to
        ):
            first = max(handle.ahead_to, end) // self._blocks.block_bytes
            last = (goal - 1) // self._blocks.block_bytes
            handle.ahead_to = goal
            if last >= first:
                self._spawn(self._read_ahead, handle.live, first, last)

    async def _read_ahead(self, live: Live, first: int, last: int) -> None:
        try:
            missing = [
                i
                for i in range(first, last + 1)
                if (live.ino, i) not in self._flights and not self._blocks.present(live, i)
            ]  # holes among them are passed over
            with trio.move_on_after(self.deadline_s):
                if missing:
                    await self._fetch(live, missing)
        except StashcordError as error:
            log.debug("read-ahead gave up ino=%d error=%s", live.ino, error)  # the read will say


def _runs(
    wanted: Sequence[tuple[int, ChunkEntry]],
) -> list[list[tuple[int, ChunkEntry]]]:
    """Group chunks that lie near each other in one pack, in the pack's order."""
    ordered = sorted(wanted, key=lambda item: (item[1].ref.pack, item[1].ref.offset))
    runs: list[list[tuple[int, ChunkEntry]]] = []
    for item in ordered:
        ref = item[1].ref
        if runs:
            head, tail = runs[-1][0][1].ref, runs[-1][-1][1].ref
            gap = ref.offset - (tail.offset + tail.length)
            fits = ref.offset + ref.length - head.offset <= _RANGE_BYTES
            if ref.pack == tail.pack and gap <= _GAP_BYTES and fits:
                runs[-1].append(item)
                continue
        runs.append([item])
    return runs
