"""Exactly once: what becomes of an upload whose outcome is not known.

A create whose answer was lost may have happened. So, in this order:

1. for two minutes, well within the server's memory of nonces, the same body with the same nonce is
   sent again, each time after a listing that was answered and did not show it;
2. then listings alone, until three that were answered, some time apart, have not shown it: the
   upload is given up, its blocks are dirty as before;
3. the names given up are *watched* for a day: a message that appears after all is deleted, so that
   no orphan stays. A message is a unit, and wholly ours: its names are unguessable.

The intents that an earlier run left are settled the same way, before anything new is sent.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import DiscordError, ObjectCorrupt, OutcomeUnknown, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stashcordfs.journal import Journal
    from stashcordfs.journal.engine import Intent
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.store.pack import FinishedPack
    from stashcordfs.types import Location, ObjectId

log = logging.getLogger(__name__)

_RESEND_FOR_S = 120.0  # "the last few minutes" is all that Discord says of the nonce's memory
_FIRST_DELAY_S, _LONGEST_DELAY_S = 1.0, 15.0
_LISTINGS = 3
_WATCH_FIRST_S, _WATCH_LONGEST_S, _WATCH_FOR_NS = 60.0, 6 * 3600.0, 86_400 * 10**9

Wanted = dict["ObjectId", tuple[str, int]]  # name and size by object id


class Settler:
    """Delivers messages exactly once. `report` hears what waits; listings are `listing_s` apart."""

    def __init__(
        self,
        *,
        journal: Journal,
        store: ObjectStore,
        clock: Callable[[], float],
        now_ns: Callable[[], int],
        report: Callable[[str], None],
        listing_s: float,
    ) -> None:
        """Take the collaborators."""
        self._journal = journal
        self._store = store
        self._clock = clock
        self._now_ns = now_ns
        self._report = report
        self._listing_s = listing_s
        self._watch_added = trio.Event()

    # ------------------------------------------------------------------ one upload

    async def deliver(
        self, packs: Sequence[FinishedPack], *, nonce: str, after: int
    ) -> Mapping[ObjectId, Location]:
        """Post one message. On any error it is not there, or it is watched for."""
        begun_s = self._clock()
        wanted: Wanted = {p.object_id: (p.filename, p.size) for p in packs}
        try:
            return _by_id(packs, await self._store.put(packs, nonce=nonce))
        except ObjectCorrupt:
            await self._watch(wanted, after)
            raise
        except OutcomeUnknown as error:
            self._report(f"an upload's outcome is unknown: {error}")
        found = await self._resend(packs, wanted, nonce=nonce, after=after, begun_s=begun_s)
        if found is None:
            found = await self._await_listed(wanted, after)
        if found is None:
            await self._watch(wanted, after)
            raise OutcomeUnknown("an upload was given up after its answer was lost; it is repeated")
        return found

    async def _resend(
        self,
        packs: Sequence[FinishedPack],
        wanted: Wanted,
        *,
        nonce: str,
        after: int,
        begun_s: float,
    ) -> Mapping[ObjectId, Location] | None:
        delay_s = _FIRST_DELAY_S
        while self._clock() + delay_s < begun_s + _RESEND_FOR_S:
            await trio.sleep(delay_s)
            delay_s = min(delay_s * 2, _LONGEST_DELAY_S)
            found = await self._look(wanted, after)
            if found is None:
                continue  # unanswered is not absent
            if found.keys() == wanted.keys():
                return found
            try:
                return _by_id(packs, await self._store.put(packs, nonce=nonce))
            except (DiscordError, StoreError) as error:
                log.info("an upload is still unclear: %s", error)
                if not getattr(error, "temporary", False):
                    return None
        return None

    async def _await_listed(self, wanted: Wanted, after: int) -> Mapping[ObjectId, Location] | None:
        """Look until it is there, or was absent from enough answered listings."""
        left = _LISTINGS
        while left:
            await trio.sleep(self._listing_s)
            found = await self._look(wanted, after)
            if found is not None and found.keys() == wanted.keys():
                return found
            left -= found is not None
        return None

    async def _look(self, wanted: Wanted, after: int) -> dict[ObjectId, Location] | None:
        """What is there, whole and of the right size; None when nobody answered."""
        try:
            there = await self._store.find(after, {name for name, _ in wanted.values()})
        except DiscordError as error:
            self._report(f"looking for what may have arrived: {error}")
            return None
        return {
            object_id: there[name]
            for object_id, (name, size) in wanted.items()
            if name in there and there[name].size_bytes == size
        }

    # ------------------------------------------------------------------ an earlier run's

    async def settle_left(self) -> None:
        """Settle the intents of an earlier run: adopt what is there, give up what is not."""
        for intent in await self._journal.open_intents():
            found = await self._find_left(intent)
            if found is None:
                await self._watch(intent.packs, intent.after_message)
                await self._journal.abandon_intent(intent.id)
            else:
                # The chunks are known from here on: the blocks, still dirty, will refer to them.
                await self._journal.confirm_intent_packs(intent.id, found)
                await self._journal.close_intent(intent.id)
                log.info("adopted %d packs that an earlier run had sent", len(found))
            await self._journal.wal_sync()

    async def _find_left(self, intent: Intent) -> Mapping[ObjectId, Location] | None:
        delay_s = _FIRST_DELAY_S
        while (found := await self._look(intent.packs, intent.after_message)) is None:
            await trio.sleep(delay_s)
            delay_s = min(delay_s * 2, _LONGEST_DELAY_S)
        if found.keys() == intent.packs.keys():
            return found
        return await self._await_listed(intent.packs, intent.after_message)

    # ------------------------------------------------------------------ the watch list

    async def _watch(self, wanted: Wanted, after: int) -> None:
        await self._journal.watch((name for name, _ in wanted.values()), after)
        self._watch_added.set()

    async def run_watch(self) -> None:
        """Delete what appears after its upload was given up, for ever. Sleeps while none is."""
        delay_s = 0.0
        while True:
            watched = await self._journal.watched()
            if not watched:
                self._watch_added = trio.Event()
                await self._watch_added.wait()
                delay_s = _WATCH_FIRST_S
            with trio.move_on_after(delay_s):
                self._watch_added = trio.Event()
                await self._watch_added.wait()
                delay_s = 0.0  # a new one: look sooner again
            delay_s = min(max(_WATCH_FIRST_S, delay_s * 3), _WATCH_LONGEST_S)
            await self._look_for_watched()

    async def _look_for_watched(self) -> None:
        watched = await self._journal.watched()
        try:
            found = await self._store.find(
                min((after for _, after, _ in watched), default=0), {name for name, _, _ in watched}
            )
            if found:
                await self._store.delete([(at.channel, at.message) for at in found.values()])
                log.info("deleted %d attachments whose upload had been given up", len(found))
        except DiscordError as error:
            log.info("watched uploads not looked for: %s", error)
            return
        late_ns = self._now_ns() - _WATCH_FOR_NS
        await self._journal.unwatch(n for n, _, at in watched if n in found or at < late_ns)


def _by_id(
    packs: Sequence[FinishedPack], locations: Sequence[Location]
) -> dict[ObjectId, Location]:
    return {pack.object_id: at for pack, at in zip(packs, locations, strict=True)}
