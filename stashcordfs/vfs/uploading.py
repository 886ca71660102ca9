"""Uploading: dirty blocks become chunks, packs, messages, and then the chunk list's truth.

A round fills one message. The order of events is what keeps every byte:

1. copy the oldest due blocks, name them (chunk id), refer to known chunks, seal the others;
2. the intent (packs, nonce, newest message known) is durable in the journal;
3. the message is posted; its answer counts only if every name and size matches;
4. chunk lists, in transactions of at most 128 chunks, and the closing of the intent are durable;
5. only then do the blocks become clean.

Any failure leaves the blocks dirty, the delay doubles to five minutes, and `status` shows why; the
network's return ends the delay of what failed for want of it (`vfs.network`). An outcome that is
not known is settled first (`vfs.settling`): until then the blocks of that intent stay dirty and
are not sent again, nor are others with the same bytes. Everything else goes on meanwhile.
"""

from __future__ import annotations

import errno
import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from stashcordfs.cache import sums_of
from stashcordfs.errors import (
    ContentLost,
    DiscordUnavailable,
    FsError,
    LocalDiskError,
    StashcordError,
    TooLarge,
)
from stashcordfs.store.pack import Reference
from stashcordfs.store.packer import RequestBuilder
from stashcordfs.vfs.blocks import Uploaded
from stashcordfs.vfs.posting import file_notes, post_packs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Journal
    from stashcordfs.journal.engine import Intent
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.store.pack import FileNote, FinishedPack, Head
    from stashcordfs.types import ChunkId, Ino, Location, ObjectId
    from stashcordfs.vfs.blocks import Blocks
    from stashcordfs.vfs.live import Dirty, Live
    from stashcordfs.vfs.network import Network
    from stashcordfs.vfs.settling import Settler

log = logging.getLogger(__name__)

_INLINE_BYTES = 64 << 10
_CHUNKS_A_TRANSACTION = 128
_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 300.0
_UNSETTLED_AT_ONCE = 4  # each may keep its message in memory; more would not help either
_MISFITS = 16  # blocks that did not fit before a message counts as full


@dataclass(frozen=True, slots=True)
class UploadSettings:
    """When a block is due. Times in seconds."""

    delay_s: float = 5.0
    delay_max_s: float = 300.0
    concurrency: int = 2
    dedup: bool = True
    compress: bool = True


@dataclass(slots=True)
class UploadState:
    """What `status` tells of the uploader."""

    pending_packs: int = 0
    uploaded_bytes: int = 0
    failures: int = 0
    last_error: str = ""
    paused_until_s: float = 0.0


def _is_lasting(error: FsError | LocalDiskError) -> bool:
    """Whether another try is not likely to go better: not for want of a network, or of room."""
    if isinstance(error, LocalDiskError):
        return error.errno != errno.ENOSPC
    return isinstance(error, ContentLost)


async def _no_head() -> None:
    """Nobody posts segments."""


@dataclass(slots=True, eq=False)
class _Parcel:
    """One message on its way, and the blocks that it or known chunks answer."""

    items: list[tuple[Uploaded, ChunkId]] = field(default_factory=list)
    packs: list[FinishedPack] = field(default_factory=list)
    sending: bool = True  # one of those sent at once; else its outcome is being settled

    def release(self) -> None:
        """The blocks may be picked again, if they are still dirty."""
        for item, _ in self.items:
            item.dirty.sealing = False


class Uploader:
    """The background task that sends what is due. `run` is supervised by the daemon."""

    def __init__(
        self,
        *,
        blocks: Blocks,
        journal: Journal,
        store: ObjectStore,
        keys: VolumeKeys,
        settler: Settler,
        network: Network,
        settings: UploadSettings,
        clock: Callable[[], float],
        report: Callable[[str], None],
    ) -> None:
        """Take the collaborators."""
        self.state = UploadState()
        self.settings = settings
        self._blocks = blocks
        self._journal = journal
        self._store = store
        self._keys = keys
        self._settler = settler
        self._network = network
        self._clock = clock
        self._report = report
        self._wake = trio.Event()
        self._resting = False  # until something becomes dirty, or a message has ended
        self._sending = trio.Semaphore(settings.concurrency)
        self._changed = trio.Event()
        self._backoff_s = 0.0
        self._paused_offline = False
        self._in_flight: dict[ChunkId, list[Dirty]] = {}
        self._parcels: set[_Parcel] = set()  # being filled, or on their way
        self.halted: Callable[[], bool] = lambda: False  # another writer has the volume
        self.committed: Callable[[float], None] = lambda _: None  # since when the blocks waited
        self.head: Callable[[], Awaitable[Head | None]] = _no_head  # the newest segment
        self.freed: Callable[[], None] = lambda: None  # a message's memory was given back
        self._doubted = 0  # messages of this run whose outcome is being settled
        self._adopted: set[ChunkId] = set()
        blocks.on_dirty = self._became_dirty

    # ------------------------------------------------------------------ asking

    def wake(self) -> None:
        """Try now: what failed may work again (after a sleep, with a new token, when asked)."""
        self._backoff_s = 0.0
        self._network.wake()
        self._end_pause()

    async def flush(
        self, only: Callable[[Live], bool] | None = None, *, patience_s: float = math.inf
    ) -> None:
        """Return when every block that is dirty now is on Discord, in this version or a newer one.

        EROFS when another writer has the volume; ContentLost when only blocks are left that cannot
        be sent: they stay here, and are tried again now and then.

        With `only`, the blocks of matching inodes are waited for, and sent first. `patience_s`:
        how long to wait without anything being acknowledged, then DiscordUnavailable. Who has a
        limit to it may be one of many: it brings the next try nearer, but never forgets the delay
        after failures.
        """
        waiting = {}
        for live, index in self._blocks.queue.values():
            if only is None or only(live):
                waiting[live.ino, index] = live.dirty[index].ask()
        if patience_s == math.inf:
            self.wake()
        else:
            soon_s = self._clock() + patience_s / 2
            self.state.paused_until_s = min(self.state.paused_until_s, soon_s)
            self._wake.set()
        moved_s, sent_bytes = self._clock(), self.state.uploaded_bytes
        failures = self.state.failures
        while waiting := {k: v for k, v in waiting.items() if self._still_waits(k, v)}:
            if self.halted():
                raise FsError(errno.EROFS)
            if all(self._blocks.live[ino].dirty[index].stuck for ino, index in waiting):
                raise await self._cannot_be_sent(waiting)
            with trio.move_on_after(max(0.0, moved_s + patience_s - self._clock())) as scope:
                await self._changed.wait()
            if sent_bytes != self.state.uploaded_bytes:
                moved_s, sent_bytes = self._clock(), self.state.uploaded_bytes
            elif scope.cancelled_caught:
                why = self.state.last_error if failures != self.state.failures else "no answer"
                raise DiscordUnavailable(f"nothing acknowledged for {patience_s:g} s: {why}")

    def look_again(self) -> None:
        """Whoever waits looks again: something that is no upload has changed."""
        self._notify()

    def _still_waits(self, key: tuple[Ino, int], version: int) -> bool:
        live = self._blocks.live.get(key[0])
        dirty = live.dirty.get(key[1]) if live else None
        return dirty is not None and dirty.uploaded < version

    async def _cannot_be_sent(self, waiting: Iterable[tuple[Ino, int]]) -> ContentLost:
        (ino, index), *others = waiting
        paths = await self._journal.paths_of(ino)
        path = f"/{paths[0].decode(errors='backslashreplace')}" if paths else f"inode {ino}"
        more = f" and {len(others)} more" if others else ""
        why = self._blocks.live[ino].dirty[index].stuck
        text = f"not on Discord, but kept here: block {index} of {path}{more}: {why}"
        return ContentLost(errno.EIO, text)

    def chosen_chunks(self) -> set[ChunkId]:
        """Chunks that blocks on their way are about to refer to, known ones among them."""
        return {chunk_id for parcel in self._parcels for _, chunk_id in parcel.items}

    @property
    def crowded(self) -> bool:
        """Whether more waits than a message holds."""
        return self._blocks.room.dirty_bytes >= self._store.limits.max_request_bytes

    @property
    def sending(self) -> bool:
        """Whether packs are on their way: what they bring will have to be told, too."""
        return self.state.pending_packs > 0

    @property
    def backlog(self) -> float:
        """How many messages the data is that waits or is on its way; 0 when that is soon done."""
        if not (self.crowded or self.sending):
            return 0.0
        return self._blocks.room.dirty_bytes / self._store.limits.max_request_bytes or 1.0

    async def landed(self) -> None:
        """Return when every message that is made or on its way now has ended, however."""
        under_way = set(self._parcels)
        while under_way & self._parcels:
            await self._changed.wait()

    async def calm(self) -> None:
        """Return when no more than a message of data waits."""
        while self.crowded:
            await self._changed.wait()

    def oldest_dirty_s(self) -> float:
        """Age in seconds of the oldest byte that is not on Discord; 0 when there is none."""
        oldest = min(
            (live.dirty[index].since_s for live, index in self._blocks.queue.values()),
            default=None,
        )
        return 0.0 if oldest is None else self._clock() - oldest

    # ------------------------------------------------------------------ the loop

    async def run(self) -> None:
        """Send what is due, for ever. What an earlier run left open is settled beside it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._settler.run)
            nursery.start_soon(self._network.run, self._wants_network)
            nursery.start_soon(self._follow_network)
            for intent in await self._journal.open_intents():
                self._in_flight |= {chunk_id: [] for chunk_id in intent.chunk_ids}
                nursery.start_soon(self._settle_left, intent)
            self._notify()
            while True:
                await self._until_due()
                await self._sending.acquire()
                handed_over = False
                try:
                    parcel = await self._build()
                    if parcel.items:
                        nursery.start_soon(self._deliver, parcel)
                        handed_over = True
                finally:
                    if not handed_over:
                        self._sending.release()

    async def _settle_left(self, intent: Intent) -> None:
        """Blocks with this intent's chunks wait for it; then they refer to them, or are sent."""
        try:
            if await self._settler.settle_left(intent):
                self._adopted |= intent.chunk_ids
        finally:
            self._land(intent.chunk_ids)
            self._notify()

    def _land(self, chunk_ids: Iterable[ChunkId]) -> None:
        """These chunks are not on their way any more: who waited for them is looked at again."""
        for chunk_id in chunk_ids:
            for dirty in self._in_flight.pop(chunk_id, ()):
                dirty.sealing = False

    def _wants_network(self) -> bool:
        return bool(self._blocks.queue) or self._settler.unsettled > 0

    async def _follow_network(self) -> None:
        while True:
            await self._network.returned()
            if self._paused_offline:
                self._end_pause()

    def _end_pause(self) -> None:
        self.state.paused_until_s = 0.0
        self._paused_offline = False
        self._wake.set()

    def _became_dirty(self) -> None:
        if self._resting:  # else it looks again in time
            self._wake.set()

    async def _until_due(self) -> None:
        while True:
            self._wake = trio.Event()
            wait_s = self._due_in()
            if wait_s <= 0:
                return
            self._resting = wait_s == math.inf
            with trio.move_on_after(wait_s):
                await self._wake.wait()

    def _due_in(self) -> float:
        """Seconds until a round should start; 0 or less: now."""
        now = self._clock()
        if self.halted():
            return math.inf
        if self.state.paused_until_s > now:
            return self.state.paused_until_s - now
        if self._doubted >= _UNSETTLED_AT_ONCE:
            return math.inf
        waiting = 0
        soonest = math.inf
        for live, index in self._blocks.queue.values():
            dirty = live.dirty[index]
            if dirty.sealing:
                continue
            if dirty.rests_to_s > now:
                soonest = min(soonest, dirty.rests_to_s - now)
                continue
            waiting += dirty.charge
            if self._forced or waiting >= self._store.limits.max_request_bytes:
                return 0.0
            # Looked at once a second: a block's due time moves while it is written.
            soonest = min(soonest, 1.0, self._due_at(dirty) - now)
            if soonest <= 0:
                return 0.0
        return soonest

    @property
    def _forced(self) -> bool:
        return self._blocks.room.pressure.is_set()

    def _due_at(self, dirty: Dirty) -> float:
        if dirty.is_asked:
            return -math.inf
        quiet = dirty.changed_s + self.settings.delay_s
        return min(quiet, dirty.since_s + self.settings.delay_max_s)

    def _pick(self) -> list[tuple[Live, int]]:
        """The oldest due blocks, a little more than a message holds, in inode order."""
        now = self._clock()
        idle = [
            (live, index)
            for live, index in self._blocks.queue.values()
            if not live.dirty[index].sealing and live.dirty[index].rests_to_s <= now
        ]
        idle.sort(key=lambda item: not item[0].dirty[item[1]].is_asked)  # somebody waits for it
        want = self._store.limits.max_request_bytes * 5 // 4
        everything = self._forced or sum(v.dirty[i].charge for v, i in idle) >= want * 4 // 5
        picked: list[tuple[Live, int]] = []
        for live, index in idle:
            dirty = live.dirty[index]
            if everything or self._due_at(dirty) <= now:
                picked.append((live, index))
                want -= max(dirty.charge, 1)
                if want <= 0:
                    break
        picked.sort(key=lambda item: (item[0].ino, item[1]))
        return picked

    # ------------------------------------------------------------------ building

    async def _build(self) -> _Parcel:
        """Fill one message. On any failure every block taken may be picked again."""
        parcel = _Parcel()
        self._parcels.add(parcel)
        builder = RequestBuilder(self._keys, self._store.limits, compress=self.settings.compress)
        seen: set[ChunkId] = set()
        try:
            await self._fill(parcel, builder, seen)
            if seen:
                told = await self._table(parcel)
                parcel.packs = await builder.finish(*told, head=await self.head())
        except BaseException:
            self._parcels.discard(parcel)
            parcel.release()
            raise
        if not parcel.items:
            self._parcels.discard(parcel)
        self.state.pending_packs += len(parcel.packs)
        self._in_flight |= {chunk_id: [] for chunk_id in seen}
        return parcel

    async def _fill(self, parcel: _Parcel, builder: RequestBuilder, seen: set[ChunkId]) -> None:
        misfits = 0
        for live, index in self._pick():
            copied = await self._copy(live, index)
            if copied is None:
                continue
            item, chunk_id, data = copied
            if chunk_id in self._in_flight:  # another message brings it: sealing until then
                item.dirty.sealing = True
                self._in_flight[chunk_id].append(item.dirty)
                continue
            if chunk_id not in seen and not await self._is_known(chunk_id):
                if not await builder.add((live.ino, index), data, chunk_id):
                    misfits += 1
                    if builder.full or misfits >= _MISFITS:
                        break
                    continue
                seen.add(chunk_id)
            item.dirty.sealing = True
            parcel.items.append((item, chunk_id))

    async def _copy(self, live: Live, index: int) -> tuple[Uploaded, ChunkId, bytes] | None:
        """Copy a block, its base merged. None: it is gone, or can't be had now."""
        dirty = live.dirty.get(index)
        if dirty is None or dirty.sealing:
            return None
        try:
            if not dirty.whole:
                await self._blocks.fill(live, index)
                if live.dirty.get(index) is not dirty or not dirty.whole:
                    return None
            data = self._blocks.snapshot(live, index)
            version = dirty.version
            chunk_id, sums = await self._name(data)
        except (FsError, LocalDiskError) as error:
            self._failed(f"inode {live.ino} block {index} cannot be sent: {error}", pause=False)
            why = str(error) if _is_lasting(error) else ""
            dirty.failed(self._clock(), first_s=max(1.0, self.settings.delay_s), why=why)
            self._notify()
            return None
        return Uploaded(live, index, dirty, version, len(data), sums), chunk_id, data

    async def _name(self, data: bytes) -> tuple[ChunkId, bytes]:
        """The chunk's id, and the checksums for the local copy."""
        if len(data) <= _INLINE_BYTES:
            return self._named(data)
        return await trio.to_thread.run_sync(self._named, data)

    def _named(self, data: bytes) -> tuple[ChunkId, bytes]:
        return self._keys.chunk_id(data), sums_of(data)

    async def _is_known(self, chunk_id: ChunkId) -> bool:
        if not self.settings.dedup and chunk_id not in self._adopted:
            return False
        return await self._journal.find_chunk(chunk_id) is not None

    async def _table(self, parcel: _Parcel) -> tuple[list[Reference], list[FileNote]]:
        """What the packs' tables tell, so that packs and key alone can rebuild the volume."""
        refs = [
            Reference(u.live.ino, u.index, u.version, chunk_id, u.valid)
            for u, chunk_id in parcel.items
        ]
        sizes = {u.live.ino: u.live.size for u, _ in parcel.items}  # the journal's may be behind
        return refs, await file_notes(self._journal, sizes)

    # ------------------------------------------------------------------ delivering

    async def _deliver(self, parcel: _Parcel) -> None:
        try:
            intent, locations = await self._post(parcel) if parcel.packs else (0, {})
            await self._commit(parcel.items, intent, locations)
            # From here on the journal's chunk lists refer to what this message brought, durably.
            self.state.uploaded_bytes += sum(u.valid for u, _ in parcel.items)
            self._backoff_s = 0.0
            if not self._blocks.queue:
                self._blocks.room.pressure = trio.Event()
        except TooLarge as error:
            log.warning("the attachment limit was lowered; packing anew: %s", error)
        except StashcordError as error:
            self._failed(str(error), pause=True)
            self._paused_offline = isinstance(error, DiscordUnavailable) and error.offline
        finally:
            self._parcels.discard(parcel)
            parcel.release()
            self._land(chunk_id for _, chunk_id in parcel.items)
            self.state.pending_packs -= len(parcel.packs)
            parcel.packs = []
            self.freed()
            if parcel.sending:
                self._sending.release()
            else:
                self._doubted -= 1
            self._notify()

    def _doubt(self, parcel: _Parcel) -> None:
        """Its outcome is being settled: others go on, a little later."""
        self._pause()
        self._doubted += 1
        parcel.sending = False
        self._sending.release()

    async def _post(self, parcel: _Parcel) -> tuple[int, Mapping[ObjectId, Location]]:
        return await post_packs(
            parcel.packs,
            journal=self._journal,
            store=self._store,
            settler=self._settler,
            unclear=lambda: self._doubt(parcel),
        )

    async def _commit(
        self,
        items: Sequence[tuple[Uploaded, ChunkId]],
        intent: int,
        locations: Mapping[ObjectId, Location],
    ) -> None:
        if intent:
            await self._journal.confirm_intent_packs(intent, locations)
        for at in range(0, len(items), _CHUNKS_A_TRANSACTION):
            part = [
                (u, c)
                for u, c in items[at : at + _CHUNKS_A_TRANSACTION]
                if not u.live.gone and u.live.dirty.get(u.index) is u.dirty
            ]
            for u, _ in part:  # no chunk may be longer than its file
                await self._blocks.carry_size(u.live)
            await self._journal.commit_chunks([(u.live.ino, u.index, c, u.valid) for u, c in part])
            if part:
                self.committed(min(u.dirty.since_s for u, _ in part))
            for u, _ in part:
                u.dirty.uploaded = max(u.dirty.uploaded, u.version)
                await self._journal.drop_dirty(u.live.ino, [(u.index, u.version)])
            await trio.lowlevel.checkpoint()
        if intent:
            await self._journal.close_intent(intent)
        await self._journal.wal_sync()
        await self._blocks.uploaded([u for u, _ in items])

    # ------------------------------------------------------------------ failing

    def _failed(self, why: str, *, pause: bool) -> None:
        self.state.failures += 1
        self.state.last_error = why
        self._report(why)
        if pause:
            self._pause()
            log.warning("upload failed, next try in %.0f s: %s", self._backoff_s, why)

    def _pause(self) -> None:
        self._backoff_s = min(max(_FIRST_DELAY_S, self._backoff_s * 2), _LONGEST_DELAY_S)
        self.state.paused_until_s = self._clock() + self._backoff_s
        self._paused_offline = False

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
        self._wake.set()
