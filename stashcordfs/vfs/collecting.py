"""Garbage: finding what nothing needs any more, and taking it off Discord (docs/garbage.md).

    census -> plan -> sparse messages emptied (repacking) -> condemned -> after a grace deleted

In this order for each message, and each step is durable before the next:

1. what is needed of it is on Discord elsewhere, and blocks refer to that;
2. it is condemned: one transaction lets its chunks be chosen no more, and notes it as condemned;
3. a segment on Discord tells of 1 and 2, and the grace is over: reads under way have ended;
4. nobody else writes to the volume (the journal channel was looked at): it is deleted;
5. its row is forgotten. Cut short anywhere, the next run goes on; what is gone already is no error.

What may refer to a chunk between census and condemning is known by `Journal.noting` and by
`Uploader.chosen_chunks`; both are asked in the very step that condemns, which does not suspend.

`purge` uses `expel` (rewrite the messages that hold some chunks, without these) and `delete`.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import StashcordError, StoreError
from stashcordfs.journal.census import take_census, take_contents
from stashcordfs.ops.accounting import Account, charged
from stashcordfs.store.api import BULK_S
from stashcordfs.vfs.garbage_plan import CollectSettings, batches, make_plan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
    from pathlib import Path

    from stashcordfs.journal import Journal
    from stashcordfs.journal.census import Census, HeldMessage
    from stashcordfs.journal.garbage import Block, Condemned
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.vfs.fencing import Fence
    from stashcordfs.vfs.orphans import Orphans
    from stashcordfs.vfs.publishing import Publisher
    from stashcordfs.vfs.repacking import Emptied, Repacker
    from stashcordfs.vfs.uploading import Uploader

log = logging.getLogger(__name__)

Address = tuple[int, int]  # channel, message

_AT_ONCE = 500  # rows in a transaction
_BULK = 100  # messages in one request
_REPACK_COSTS = 4  # requests at most, as a rule: a message, the links of what is read
_LATELY_S = 60.0  # so old may the last look for another writer be when something is deleted
_FIRST_DELAY_S = 600.0


@dataclass(slots=True)
class Outcome:
    """What a run found and did. Bytes are of attachments, those of chunks as they are sealed."""

    messages: int = 0
    held_bytes: int = 0
    live_bytes: int = 0
    history_bytes: int = 0
    dead_bytes: int = 0
    condemned_messages: int = 0  # waiting to be deleted, at the end
    condemned_bytes: int = 0
    newly_condemned: int = 0
    repacked_messages: int = 0
    repacked_bytes: int = 0
    deleted_messages: int = 0
    deleted_bytes: int = 0
    orphans: int = 0
    orphan_bytes: int = 0
    orphans_deleted: int = 0
    requests: int = 0

    def as_json(self) -> dict[str, object]:
        """For the control socket, `status` and `--json`."""
        return asdict(self)


class Collector:
    """Collects garbage: in the background (`run`, supervised by the daemon), or when told to."""

    def __init__(
        self,
        *,
        journal: Journal,
        path: Path,
        store: ObjectStore,
        uploader: Uploader,
        publisher: Publisher,
        fence: Fence,
        repacker: Repacker,
        orphans: Orphans,
        now_ns: Callable[[], int],
        clock: Callable[[], float],
        requests: Callable[[], int],
        offline: Callable[[], bool],
        settings: CollectSettings | None = None,
    ) -> None:
        """`path` is the journal's file. `requests` counts all that were made by this mount."""
        self.settings = settings or CollectSettings()
        self.account = Account()
        self.total = Outcome()  # of this mount; its figures are those of the last census
        self._journal = journal
        self._path = path
        self._store = store
        self._uploader = uploader
        self._publisher = publisher
        self._fence = fence
        self._repacker = repacker
        self._orphans = orphans
        self._now_ns = now_ns
        self._clock = clock
        self._requests = requests
        self._offline = offline
        self._begun_s = clock()
        self._turn = trio.Lock()
        self._told = journal.last_change  # a segment that holds this tells of all that is condemned
        self._unreadable: set[Address] = set()
        self._seen_change = -1
        self._posted_bytes = 0  # by the last repacking
        self.stage = ""

    # ------------------------------------------------------------------ in the background

    async def run(self) -> None:
        """Collect now and then, for ever; nothing while offline, or when another writes here."""
        delay_s, failures = self.settings.first_s, 0
        while not self._fence.reason:
            await trio.sleep(delay_s)
            delay_s = self.settings.every_s
            if self._offline():
                delay_s = _FIRST_DELAY_S
            elif await self._may_find():
                try:
                    outcome = await self.collect()
                    failures = 0
                    if outcome.condemned_messages:
                        delay_s = min(delay_s, self.settings.grace_s + _LATELY_S)
                except StashcordError as error:
                    log.warning("garbage is not collected now: %s", error)
                    delay_s = min(_FIRST_DELAY_S * 2.0**failures, self.settings.every_s)
                    failures += 1
        await trio.sleep_forever()

    async def _may_find(self) -> bool:
        """Whether anything has changed, or something waits: an idle volume is left alone."""
        total = self.total
        waits = total.history_bytes or total.condemned_messages
        much = total.dead_bytes >= self.settings.least_bytes
        if waits or much or self._seen_change != self._journal.last_change:
            return True
        return await self._orphans.is_due()

    async def collect(self, *, thorough: bool = False) -> Outcome:
        """One run. `thorough`: somebody asked, so it waits for nobody and has no budget.

        EROFS when another writer has the volume; DiscordError, LocalDiskError.
        """
        self._fence.require_writable()
        outcome = Outcome()
        before = self.account.requests
        with charged(self.account):
            if await self._finds_some(thorough=thorough) and await self._in_company(thorough):
                async with self._turn:
                    await self._act(outcome, thorough=thorough)
            await self._await_look(thorough=thorough)
            async with self._turn:
                await self._delete_due(outcome, thorough=thorough)
                if thorough or await self._orphans.is_due():
                    await self._collect_orphans(outcome)
                async with self.looking() as (census, _):
                    await self._count(census, outcome)
        outcome.requests = self.account.requests - before
        self._keep_total(outcome)
        log.info("garbage %s", " ".join(f"{k}={v}" for k, v in asdict(outcome).items() if v))
        return outcome

    async def _finds_some(self, *, thorough: bool) -> bool:
        async with self._turn:
            self.stage = "looking for what nothing needs"
            await self._clear()
            async with self.looking() as (census, _):
                return bool(self._plan(census, thorough=thorough))

    async def _in_company(self, thorough: bool) -> bool:
        """Wait until a segment is due anyway, else it costs one of its own. False: not now."""
        if thorough:
            return True
        with trio.move_on_after(self.settings.patience_s):
            await self._publisher.due()
            while self._uploader.crowded:
                await self._uploader.calm()
                await self._publisher.due()
        return not self._uploader.crowded  # what programs write goes first

    async def _await_look(self, *, thorough: bool) -> None:
        """Wait until what is condemned was told, and the channel has just been looked at."""
        if thorough:
            await self._publisher.posted(self._told)
        elif await self._due() and self._fence.unseen_s > _LATELY_S:
            with trio.move_on_after(self.settings.patience_s):
                await self._publisher.told()

    def _plan(self, census: Census, *, thorough: bool) -> Sequence[Sequence[HeldMessage]]:
        plan = make_plan(
            [each for each in census.messages if each.address not in self._unreadable],
            age_s=self._store.age_s,
            settings=self.settings,
            thorough=thorough,
        )
        room = self._store.limits.max_request_bytes * 9 // 10
        return [*([plan.dead] if plan.dead else []), *batches(plan.sparse, room)]

    async def _act(self, outcome: Outcome, *, thorough: bool) -> None:
        self.stage = "packing anew what is needed"
        async with self.looking() as (census, noted):
            for batch in self._plan(census, thorough=thorough):
                if not batch[0].needed_bytes:
                    outcome.newly_condemned += len(await self._condemn(batch, noted))
                    continue
                if not thorough and self._allowance() < _REPACK_COSTS:
                    break
                try:
                    done = await self._empty(batch, noted)
                except StoreError as error:  # not of the network: others need not wait for it
                    log.warning("%d messages are not repacked: %s", len(batch), error)
                    self._unreadable |= {each.address for each in batch}
                    continue
                outcome.newly_condemned += len(done)
                outcome.repacked_messages += len(done)
                outcome.repacked_bytes += self._posted_bytes
        await self._journal.wal_sync()
        await self._clear()

    def _allowance(self) -> float:
        """Requests that may be spent now: a share of all, and some a day however few there are."""
        days = (self._clock() - self._begun_s) / 86_400 + 1
        share = self.settings.share * self._requests()
        return share + self.settings.daily * days - self.account.requests

    # ------------------------------------------------------------------ looking

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[tuple[Census, set[Block]]]:
        """A census, and what has been made to refer to a chunk since; what is unused is noted."""
        with self._journal.noting() as noted:
            self._journal.commit()
            self._seen_change = self._journal.last_change
            census = await trio.to_thread.run_sync(
                partial(take_census, self._path, kept_since_ns=self._kept_since_ns())
            )
            for at in range(0, len(census.revived), _AT_ONCE):
                await self._journal.note_used(census.revived[at : at + _AT_ONCE])
                await trio.lowlevel.checkpoint()
            now = self._now_ns()
            for at in range(0, len(census.fresh), _AT_ONCE):
                referred = {row for row, _ in (await self._referred(noted)).values()}
                some = [row for row in census.fresh[at : at + _AT_ONCE] if row not in referred]
                await self._journal.note_unused(some, now)
                await trio.lowlevel.checkpoint()
            yield census, noted

    def _kept_since_ns(self) -> int:
        return self._now_ns() - int(self.settings.history_s * 1e9)

    async def _referred(self, noted: set[Block]) -> dict[Block, tuple[int, int]]:
        return await self._journal.referred_chunks(list(noted))

    async def _count(self, census: Census, outcome: Outcome) -> None:
        outcome.messages = len(census.messages)
        outcome.held_bytes = census.held_bytes
        outcome.live_bytes = sum(each.live_bytes for each in census.messages)
        outcome.history_bytes = sum(each.history_bytes for each in census.messages)
        outcome.dead_bytes = sum(each.size_bytes - each.needed_bytes for each in census.messages)
        waiting = await self._journal.condemned()
        outcome.condemned_messages = len(waiting)
        outcome.condemned_bytes = sum(each.size_bytes for each in waiting)

    def _keep_total(self, outcome: Outcome) -> None:
        total = self.total
        for name in (
            "newly_condemned", "repacked_messages", "repacked_bytes", "deleted_messages",
            "deleted_bytes", "orphans_deleted",
        ):  # fmt: skip
            setattr(total, name, getattr(total, name) + getattr(outcome, name))
        for name in (
            "messages", "held_bytes", "live_bytes", "history_bytes", "dead_bytes",
            "condemned_messages", "condemned_bytes", "orphans", "orphan_bytes",
        ):  # fmt: skip
            setattr(total, name, getattr(outcome, name))
        total.requests = self.account.requests

    # ------------------------------------------------------------------ emptying and condemning

    async def _empty(
        self,
        messages: Sequence[HeldMessage],
        noted: set[Block],
        without: Collection[int] = (),
    ) -> list[Address]:
        """Pack anew what is needed of some messages, and condemn them; those that were."""
        packs = [pack for each in messages for pack in each.packs]
        contents = await trio.to_thread.run_sync(
            partial(
                take_contents,
                self._path,
                packs,
                kept_since_ns=self._kept_since_ns(),
                without=without,
            )
        )
        if contents.excepted:
            raise StashcordError(f"{len(contents.excepted)} blocks still refer to what shall go")
        done = await self._repacker.empty(contents)
        self._posted_bytes = done.posted_bytes
        bad = [each for each in messages if done.unreadable & set(each.packs)]
        self._unreadable |= {each.address for each in bad}
        whole = [each for each in messages if each not in bad]
        await self._journal.wal_sync()
        return await self._condemn(whole, noted, done, without)

    async def _condemn(
        self,
        messages: Sequence[HeldMessage],
        noted: set[Block],
        done: Emptied | None = None,
        without: Collection[int] = (),
    ) -> list[Address]:
        """Condemn those that nothing refers to by now; which they are.

        Each of their chunks is known as unused, or was moved away, or is one of `without`.

        Nothing here suspends, so nothing can refer to a chunk between the question and the answer.
        """
        if done is not None:
            await self._move_late(noted, done)
        victims = {pack: each for each in messages for pack in each.packs}
        busy = {pack for _, pack in (await self._referred(noted)).values()}
        busy |= await self._journal.packs_on_their_way()
        for chunk_id in self._uploader.chosen_chunks():
            holders = {pack for _, pack in await self._journal.copies_of(chunk_id)}
            if holders <= victims.keys():  # else another copy will do
                busy |= holders
        excused = {*without, *(done.moved if done is not None else ())}
        busy |= await self._journal.packs_with_more(victims, excused)
        spared = {victims[pack].address for pack in busy & victims.keys()}
        chosen = [each for each in messages if each.address not in spared]
        for each in chosen:
            await self._journal.condemn(each.channel, each.message, each.packs, each.size_bytes)
        self._journal.commit()
        self._told = self._journal.last_change
        return [each.address for each in chosen]

    async def _move_late(self, noted: set[Block], done: Emptied) -> None:
        """Blocks that were made to refer to what has just been packed anew."""
        referred = await self._referred(noted)
        await self._repacker.move_late(referred, done)

    async def _clear(self) -> None:
        """Remove the rows of what is condemned, a few at a time."""
        while await self._journal.clear_condemned():
            await trio.lowlevel.checkpoint()
        await self._journal.wal_sync()

    # ------------------------------------------------------------------ for `purge`

    async def expel(self, chunks: Collection[int], *, packs: Collection[int] = ()) -> list[Address]:
        """Rewrite the messages that hold these rows of chunks, without them; their addresses.

        Also those of `packs` (rows), whatever they hold: for what their tables tell. Nothing may
        refer to the chunks any more (StashcordError), nor does history keep them. What else the
        messages hold is packed anew. They are condemned, not deleted: call `delete` with what this
        returns. Everything that is condemned is told in the next segment.
        """
        self._fence.require_writable()
        doomed = set(chunks)
        async with self._turn:
            with charged(self.account):
                async with self.looking() as (census, noted):
                    found = {*packs, *await self._journal.packs_of(doomed)}
                    held = [each for each in census.messages if found & set(each.packs)]
                    condemned: list[Address] = []
                    room = self._store.limits.max_request_bytes * 9 // 10
                    for batch in batches(held, room):
                        condemned += await self._empty(batch, noted, doomed)
                    left = {each.address for each in held} - set(condemned)
                await self._journal.wal_sync()
                await self._clear()
        if left:
            raise StashcordError(f"{len(left)} messages cannot be rewritten now; try again")
        return condemned

    async def delete(self, messages: Iterable[Address]) -> None:
        """Delete condemned messages at once, without a grace, and see that they are gone.

        Returns when Discord's API shows none of them. DiscordError; StashcordError if one is still
        there. Waits until a segment on Discord tells of them.
        """
        wanted = set(messages)
        async with self._turn:
            with charged(self.account):
                await self._publisher.posted(self._told)
                due = [
                    each
                    for each in await self._journal.condemned()
                    if (each.channel, each.message) in wanted
                ]
                await self._delete(due, Outcome(), thorough=True)
                for channel, message in sorted(wanted):
                    if await self._store.attachments(channel, message) is not None:
                        raise StashcordError(f"message {message} is still there; try again")

    # ------------------------------------------------------------------ deleting

    async def _due(self) -> list[Condemned]:
        """What is condemned, was told, and has had its grace."""
        if self._publisher.posted_change < self._told:
            return []
        late_ns = self._now_ns() - int(self.settings.grace_s * 1e9)
        return [each for each in await self._journal.condemned() if each.since_ns <= late_ns]

    async def _delete_due(self, outcome: Outcome, *, thorough: bool) -> None:
        await self._delete(await self._due(), outcome, thorough=thorough)

    async def _delete(self, due: Sequence[Condemned], outcome: Outcome, *, thorough: bool) -> None:
        self.stage = "deleting"
        for batch in self._bulks(due):
            if not thorough and self._allowance() < 1:
                return
            await self._fence.check_lately(_LATELY_S)
            self._fence.require_writable()
            where = [(each.channel, each.message) for each in batch]
            await self._store.delete(where)
            await self._journal.forget_condemned(where)
            await self._journal.wal_sync()
            outcome.deleted_messages += len(batch)
            outcome.deleted_bytes += sum(each.size_bytes for each in batch)

    def _bulks(self, due: Sequence[Condemned]) -> list[list[Condemned]]:
        """What one request deletes: up to a hundred young ones of a channel, or one old one."""
        young: dict[int, list[Condemned]] = {}
        found = []
        for each in due:
            if self._store.age_s(each.message) < BULK_S:
                young.setdefault(each.channel, []).append(each)
            else:
                found.append([each])
        bulks = [
            some[at : at + _BULK] for some in young.values() for at in range(0, len(some), _BULK)
        ]
        return [*bulks, *found]

    async def _collect_orphans(self, outcome: Outcome) -> None:
        self.stage = "looking for orphans"
        found, ripe = await self._orphans.look()
        outcome.orphans, outcome.orphan_bytes = len(found), sum(found.values())
        for at in range(0, len(ripe), _BULK):
            some = ripe[at : at + _BULK]
            await self._fence.check_lately(_LATELY_S)
            self._fence.require_writable()
            await self._store.delete(some)
            await self._orphans.forget(some)
            outcome.orphans_deleted += len(some)
