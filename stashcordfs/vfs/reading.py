"""Reading: what is not in the block cache is fetched, by ranges, each chunk once.

A chunk, not a pack, is what a read fetches; neighbours in a pack come in one range. Two readers of
one block share one fetch. Sequential reads grow a window that is fetched ahead of the reader.
Every wait has a deadline, then EIO with the reason logged; never zeros, never short data.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import CryptoError, DiscordError, FsError, StashcordError, StoreError
from stashcordfs.store.pack import open_chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import ChunkEntry, Journal
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.vfs.blocks import Blocks
    from stashcordfs.vfs.live import Handle, Live

log = logging.getLogger(__name__)

_MAX_WAITING_READS = 64
_RANGE_BYTES = 8 << 20
_GAP_BYTES = 64 << 10  # cheaper to skip over than to ask again for
_INLINE_BYTES = 64 << 10  # opened on the loop: a thread hop costs more
_FETCHES_AT_ONCE = 4
_FIRST_WINDOW_BYTES = 2 << 20
_TRIES = 4


class Reader:
    """Makes blocks present. `nursery` runs read-ahead; `report` hears why a read failed."""

    def __init__(
        self,
        *,
        blocks: Blocks,
        journal: Journal,
        store: ObjectStore,
        keys: VolumeKeys,
        nursery: trio.Nursery,
        read_ahead_bytes: int,
        deadline_s: float,
        report: Callable[[str], None],
    ) -> None:
        """Take the collaborators."""
        self._blocks = blocks
        self._journal = journal
        self._store = store
        self._keys = keys
        self._nursery = nursery
        self._read_ahead_bytes = read_ahead_bytes
        self._deadline_s = deadline_s
        self._report = report
        self._flights: dict[tuple[int, int], trio.Event] = {}
        self._slots = trio.CapacityLimiter(_FETCHES_AT_ONCE)
        self._waiting = 0
        self.fetched_bytes = 0
        blocks.fill = self.fill

    async def read(self, handle: Handle, offset: int, size: int) -> bytes:
        """Bytes at `offset`, fewer than `size` only at the end of the file. EIO on any fault."""
        live = handle.live
        blocks = self._blocks
        end = min(offset + size, live.size)
        if offset >= end:
            return b""
        step = blocks.block_bytes
        missing = [
            index
            for index in range(offset // step, (end - 1) // step + 1)
            if not blocks.present(
                live, index, max(0, offset - index * step), min(step, end - index * step)
            )
        ]
        self._look_ahead(handle, offset, end)
        if missing:
            missing = await self._without_holes(live, missing)
        if missing:
            await self._wait_for(live, missing)
            end = min(end, live.size)
            if offset >= end:
                return b""
        if not live.dirty and not blocks.files.exists(live.key):
            return bytes(end - offset)  # nothing but holes: there is no local file
        blocks.files.grow(live.key, min(end, live.size))
        return blocks.files.read(live.key, offset, end - offset)

    async def _without_holes(self, live: Live, missing: Sequence[int]) -> list[int]:
        return [
            index
            for index in missing
            if index in live.dirty or await self._journal.chunk_at(live.ino, index) is not None
        ]

    async def _wait_for(self, live: Live, missing: Sequence[int]) -> None:
        if self._waiting >= _MAX_WAITING_READS:
            raise FsError(errno.EIO, "too many reads wait for Discord")
        self._waiting += 1
        try:
            with trio.fail_after(self._deadline_s):
                for _ in range(_TRIES):
                    await self._bring(live, missing)
                    missing = [i for i in missing if not self._blocks.present(live, i)]
                    if not missing:
                        return
            raise FsError(errno.EIO, "the cache is too small to hold what is being read")
        except trio.TooSlowError:
            self._report(f"read: Discord did not answer within {self._deadline_s:g} s")
            raise FsError(errno.EIO, "deadline passed") from None
        except (StoreError, DiscordError, CryptoError) as error:
            self._report(f"read: inode {live.ino}, blocks {list(missing)[:4]}: {error}")
            raise FsError(errno.EIO, str(error)) from error
        finally:
            self._waiting -= 1

    async def fill(self, live: Live, index: int) -> None:
        """Merge the base of a dirty block into its local file. EIO when it can't be had."""
        await self._wait_for(live, [index])

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
        sealed = memoryview(await self._store.fetch(run[0][1].location, start, length))
        self.fetched_bytes += length
        for index, entry in run:
            ref = entry.ref
            piece = bytes(sealed[ref.offset - start : ref.offset - start + ref.length])
            if ref.length <= _INLINE_BYTES:
                plain = open_chunk(self._keys, ref, piece)
            else:
                plain = await trio.to_thread.run_sync(open_chunk, self._keys, ref, piece)
            await self._keep(live, index, entry, plain)

    async def _keep(self, live: Live, index: int, entry: ChunkEntry, plain: bytes) -> None:
        # The world may have changed while we waited: only what is still so is kept.
        now = await self._journal.chunk_at(live.ino, index)
        if live.gone or now is None or now.ref.chunk_id != entry.ref.chunk_id:
            return
        valid = plain[: now.valid_length]
        if index in live.dirty:
            await self._blocks.merge_base(live, index, valid)
        elif not self._blocks.present(live, index):
            await self._blocks.add_clean(live, index, valid)

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
                self._nursery.start_soon(self._read_ahead, handle.live, first, last)

    async def _read_ahead(self, live: Live, first: int, last: int) -> None:
        try:
            missing = [
                i
                for i in range(first, last + 1)
                if (live.ino, i) not in self._flights and not self._blocks.present(live, i)
            ]
            missing = await self._without_holes(live, missing)
            with trio.move_on_after(self._deadline_s):
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
