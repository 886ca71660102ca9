"""Exactly once: what becomes of an upload whose outcome is not known.

A create whose answer was lost may have happened. So, in this order:

1. for two minutes, well within the server's memory of nonces, the same body with the same nonce is
   sent again, each time after a listing that was answered and did not show it;
2. then listings alone, until three that were answered, some time apart, have not shown it: the
   upload is given up, its blocks are dirty as before;
3. the names given up are *watched* for a day: a message that appears after all is deleted, so that
   no orphan stays. A message is a unit, and wholly ours: its names are unguessable.

An upload that succeeded after an attempt without an answer is watched as well: that attempt may be
carried out when the server has forgotten the nonce. Only what no pack of the journal stands in is
deleted.

All that are unsettled share their listings, those that an earlier run left among them: `run` lists
when the first of them is due, and what was found serves all. While the network is gone nothing is
asked; `vfs.network` wakes the round.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import DiscordError, ObjectCorrupt, OutcomeUnknown, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stashcordfs.journal import Journal
    from stashcordfs.journal.engine import Intent
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.store.pack import FinishedPack
    from stashcordfs.types import Location, ObjectId
    from stashcordfs.vfs.network import Network

log = logging.getLogger(__name__)

_RESEND_FOR_S = 120.0  # "the last few minutes" is all that Discord says of the nonce's memory
_FIRST_DELAY_S, _LONGEST_DELAY_S = 1.0, 15.0
_LONGEST_UNANSWERED_S = 60.0
_TOGETHER_S = 0.5  # who is due so soon after a listing began is served by it
_LISTINGS = 3
_LISTING_LAGS_S = 900.0  # a message that is older than this is in every listing
_WATCH_FIRST_S, _WATCH_LONGEST_S, _WATCH_FOR_NS = 60.0, 6 * 3600.0, 86_400 * 10**9

Wanted = dict["ObjectId", tuple[str, int]]  # name and size by object id


@dataclass(slots=True, eq=False)
class _Unsettled:
    """An upload whose outcome is not known, and the listing that it waits for."""

    wanted: Wanted
    after: int
    since_ns: int
    due_s: float = math.inf  # a listing begun about then or later counts
    there: Mapping[ObjectId, Location] = field(default_factory=dict)
    looked: trio.Event = field(default_factory=trio.Event)

    @property
    def whole(self) -> bool:
        """The last listing showed all of it, each pack of the right size."""
        return self.there.keys() == self.wanted.keys()

    def see(self, listed: Mapping[str, Location]) -> None:
        self.there = {
            object_id: listed[name]
            for object_id, (name, size) in self.wanted.items()
            if name in listed and listed[name].size_bytes == size
        }


class Settler:
    """Delivers messages exactly once. `report` hears what waits; listings are `listing_s` apart."""

    def __init__(
        self,
        *,
        journal: Journal,
        store: ObjectStore,
        network: Network,
        clock: Callable[[], float],
        now_ns: Callable[[], int],
        report: Callable[[str], None],
        listing_s: float,
    ) -> None:
        """Take the collaborators."""
        self._journal = journal
        self._store = store
        self._network = network
        self._clock = clock
        self._now_ns = now_ns
        self._report = report
        self._listing_s = listing_s
        self._unsettled: list[_Unsettled] = []
        self._complained: type[DiscordError] | None = None  # since the last listing answered
        self._asked = trio.Event()
        self._watch_added = trio.Event()
        self._looks: deque[tuple[float, int]] = deque()  # when, and the newest id known then
        self._seen_to = 0  # what is not newer has been looked through for good

    @property
    def unsettled(self) -> int:
        """How many uploads have an outcome that is not known."""
        return len(self._unsettled)

    @property
    def unsettled_since_ns(self) -> int:
        """When the oldest of them was sent, Unix time in ns; 0 when there is none."""
        return min((upload.since_ns for upload in self._unsettled), default=0)

    def oldest_unsettled_s(self) -> float:
        """Age in seconds of the oldest of them; 0 when there is none."""
        since_ns = self.unsettled_since_ns
        return max(0.0, (self._now_ns() - since_ns) / 1e9) if since_ns else 0.0

    # ------------------------------------------------------------------ one upload

    async def deliver(
        self,
        packs: Sequence[FinishedPack],
        *,
        nonce: str,
        after: int,
        unclear: Callable[[], None],
    ) -> Mapping[ObjectId, Location]:
        """Post one message. On any error it is not there, or it is watched for.

        `unclear` is called when the outcome is not known and has to be settled first.
        """
        begun_s, begun_ns = self._clock(), self._now_ns()
        wanted: Wanted = {p.object_id: (p.filename, p.size) for p in packs}
        try:
            found = await self._put(packs, nonce)
        except ObjectCorrupt:
            await self._watch(wanted, after)
            raise
        except OutcomeUnknown as error:
            self._report(f"an upload's outcome is unknown: {error}")
        else:
            if self._store.doubtful(nonce):
                await self._watch(wanted, after)
            return found
        with self._among_unsettled(wanted, after, begun_ns) as upload:
            unclear()
            settled = await self._resend(upload, packs, nonce=nonce, begun_s=begun_s)
            if settled is None:
                settled = await self._await_listed(upload)
            await self._watch(wanted, after)
        if settled is None:
            raise OutcomeUnknown("an upload was given up after its answer was lost; it is repeated")
        return settled

    async def settle_left(self, intent: Intent) -> bool:
        """Settle what an earlier run left: True when it was there and is adopted, durably."""
        with self._among_unsettled(intent.packs, intent.after_message, intent.since_ns) as upload:
            found = await self._look(upload, _FIRST_DELAY_S)
            if found is None:
                found = await self._await_listed(upload)
            await self._watch(intent.packs, intent.after_message)
            if found is None:
                await self._journal.abandon_intent(intent.id)
            else:
                # The chunks are known from here on: the blocks, still dirty, will refer to them.
                await self._journal.confirm_intent_packs(intent.id, found)
                await self._journal.close_intent(intent.id)
                log.info("adopted %d packs that an earlier run had sent", len(found))
            await self._journal.wal_sync()
        return found is not None

    async def _put(self, packs: Sequence[FinishedPack], nonce: str) -> Mapping[ObjectId, Location]:
        with self._network.noticing():
            locations = await self._store.put(packs, nonce=nonce)
        return {pack.object_id: at for pack, at in zip(packs, locations, strict=True)}

    async def _resend(
        self, upload: _Unsettled, packs: Sequence[FinishedPack], *, nonce: str, begun_s: float
    ) -> Mapping[ObjectId, Location] | None:
        delay_s = _FIRST_DELAY_S
        ends_s = begun_s + _RESEND_FOR_S
        while self._clock() + delay_s < ends_s:
            found = await self._look(upload, delay_s)
            if found is not None:
                return found
            if self._clock() >= ends_s:  # the listing may have been long in coming
                return None
            try:
                return await self._put(packs, nonce)
            except (DiscordError, StoreError) as error:
                log.info("an upload is still unclear: %s", error)
                if not getattr(error, "temporary", False):
                    return None
            delay_s = min(delay_s * 2, _LONGEST_DELAY_S)
        return None

    async def _await_listed(self, upload: _Unsettled) -> Mapping[ObjectId, Location] | None:
        """Look until it is there, or was absent from enough answered listings."""
        for _ in range(_LISTINGS):
            found = await self._look(upload, self._listing_s)
            if found is not None:
                return found
        return None

    # ------------------------------------------------------------------ shared listings

    @contextmanager
    def _among_unsettled(self, wanted: Wanted, after: int, since_ns: int) -> Iterator[_Unsettled]:
        upload = _Unsettled(wanted, after, since_ns)
        self._unsettled.append(upload)
        try:
            yield upload
        finally:
            self._unsettled.remove(upload)

    async def _look(self, upload: _Unsettled, delay_s: float) -> Mapping[ObjectId, Location] | None:
        """Where it is, by a listing that was answered; None: one begun after the delay lacks it.

        Returns early when a listing for others shows it.
        """
        upload.looked = trio.Event()
        upload.due_s = self._clock() + delay_s
        self._asked.set()
        await upload.looked.wait()
        return upload.there if upload.whole else None

    async def run(self) -> None:
        """List for all that are unsettled, for ever. Sleeps while none waits for it."""
        delay_s = 0.0
        while True:
            self._asked = trio.Event()
            due_s = min((upload.due_s for upload in self._unsettled), default=math.inf)
            if (wait_s := due_s - self._clock()) > 0:
                with trio.move_on_after(wait_s):
                    await self._asked.wait()
            elif await self._round():
                delay_s = 0.0
            else:  # unanswered is not absent
                delay_s = min(max(_FIRST_DELAY_S, delay_s * 2), _LONGEST_UNANSWERED_S)
                with trio.move_on_after(math.inf if self._network.gone else delay_s):
                    await self._network.returned()

    async def _round(self) -> bool:
        """One listing for all; False when nobody answered."""
        begun_s = self._clock()
        uploads = list(self._unsettled)
        listed = await self._list(uploads)
        if listed is None:
            return False
        for upload in uploads:
            upload.see(listed)
            if upload.whole or upload.due_s <= begun_s + _TOGETHER_S:
                upload.due_s = math.inf
                upload.looked.set()
        return True

    async def _list(self, uploads: Sequence[_Unsettled]) -> Mapping[str, Location] | None:
        names = {name for upload in uploads for name, _ in upload.wanted.values()}
        try:
            with self._network.noticing():
                found = await self._store.find(min(upload.after for upload in uploads), names)
        except DiscordError as error:
            if type(error) is not self._complained:  # once, not at every look
                self._complained = type(error)
                self._report(f"looking for what may have arrived: {error}")
            return None
        self._complained = None
        return found

    # ------------------------------------------------------------------ the watch list

    async def _watch(self, wanted: Wanted, after: int) -> None:
        await self._journal.watch((name for name, _ in wanted.values()), after)
        self._watch_added.set()

    async def run_watch(self) -> None:
        """Delete what appears late, for ever. Sleeps while nothing is watched for."""
        delay_s, due_s = _WATCH_FIRST_S, self._clock() + _WATCH_FIRST_S
        while True:
            added = self._watch_added = trio.Event()
            if not await self._journal.watched():
                due_s = math.inf
            with trio.move_on_after(max(0.0, due_s - self._clock())):
                await added.wait()
            if added.is_set():  # soon, but not at once: whoever added it has not finished
                delay_s = _WATCH_FIRST_S
                due_s = min(due_s, self._clock() + delay_s)
                continue
            await self._look_for_watched()
            delay_s = min(delay_s * 3, _WATCH_LONGEST_S)
            due_s = self._clock() + delay_s

    async def _look_for_watched(self) -> None:
        watched = await self._journal.watched()
        begun_s = self._clock()
        after = max(self._seen_to, min((after for _, after, _ in watched), default=0))
        try:
            newest = await self._store.newest_id()
            with self._network.noticing():
                found = await self._store.find_all(after, {name for name, _, _ in watched})
            late = await self._late(found)
            if late:
                await self._store.delete(sorted(late))
                log.info("deleted %d messages that appeared late", len(late))
        except DiscordError as error:
            log.info("watched uploads not looked for: %s", error)
            return
        self._looked_through(begun_s, newest)
        done = self._now_ns() - _WATCH_FOR_NS
        await self._journal.unwatch(name for name, _, at in watched if at < done)

    async def _late(self, found: Sequence[Location]) -> set[tuple[int, int]]:
        """Messages that nothing refers to, and nothing will: none of their packs stands there.

        A pack of message 0 is still being settled: its message may be the one to keep. What is
        condemned is the collector's to delete, in its time.
        """
        kept = await self._journal.messages_of({at.filename for at in found})
        stands = {
            (at.channel, at.message)
            for at in found
            if at.filename in kept and kept[at.filename] in ((0, 0), (at.channel, at.message))
        }
        stands |= {(each.channel, each.message) for each in await self._journal.condemned()}
        return {(at.channel, at.message) for at in found} - stands

    def _looked_through(self, begun_s: float, newest: int) -> None:
        """Let the next look begin where listings were complete at this one."""
        self._looks.append((begun_s, newest))
        while self._looks and self._looks[0][0] <= begun_s - _LISTING_LAGS_S:
            self._seen_to = self._looks.popleft()[1]
