"""Telling Discord of the journal: segments, when they are due, cut, and posted.

Cadence (docs/recovery.md has the promise):

* A change is due `bound_s` after it was made; content, after it was written. What is written again
  and again (the same block, or only the size and times of the same file) is due `slow_bound_s`
  after it was last told.
* While more than a message of data waits, a segment waits until its two requests (a look for
  another writer, the post) are within `metadata_share` of all, for `stretch_s` at most; when the
  data is all sent within ten messages, so must be those of the segment that follows then.
* An idle volume looks once a day, and sends nothing else.

A cut is one moment: sizes carried over, the group committed, the blocks noted that only this
machine has. Its changes become one segment or, after a long time offline, several. A segment is in
the journal, durably, before it is posted; whatever it refers to was confirmed before.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from stashcordfs.crypto.keys import KIND_SEGMENT
from stashcordfs.errors import ObjectCorrupt, StashcordError, TooLarge
from stashcordfs.journal.changes import OwnObject
from stashcordfs.store.pack import Head
from stashcordfs.store.sealed import SealedObject, seal_object
from stashcordfs.store.segment import Change, Segment, encode_segment

if TYPE_CHECKING:
    from collections.abc import Callable

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Journal
    from stashcordfs.journal.sqlite.database import Recorded
    from stashcordfs.types import Attributes, Ino
    from stashcordfs.vfs.blocks import Blocks
    from stashcordfs.vfs.checkpointing import Checkpointer
    from stashcordfs.vfs.durability import Durability
    from stashcordfs.vfs.fencing import Fence
    from stashcordfs.vfs.journal_channel import JournalChannel

log = logging.getLogger(__name__)

_REQUESTS = 2  # of a segment: the look and the post
_SOON = 10  # messages; ten seconds, in a channel
_FIRST_DELAY_S, _LONGEST_DELAY_S = 1.0, 300.0
_CLOCKS_S = 2.0  # by how much an inode's time may be before that of its change


@dataclass(frozen=True, slots=True)
class PublishSettings:
    """How soon Discord is told. Seconds, bytes of changes in a segment, share of requests."""

    bound_s: float = 30.0
    slow_bound_s: float = 300.0
    stretch_s: float = 70.0
    look_every_s: float = 86_400.0
    segment_bytes: int = 4 << 20
    metadata_share: float = 0.05


class Publisher:
    """The background task that posts segments. `run` is supervised by the daemon."""

    def __init__(
        self,
        *,
        journal: Journal,
        blocks: Blocks,
        durability: Durability,
        channel: JournalChannel,
        fence: Fence,
        checkpointer: Checkpointer,
        keys: VolumeKeys,
        clock: Callable[[], float],
        now_ns: Callable[[], int],
        report: Callable[[str], None],
        requests: Callable[[], int],
        backlog: Callable[[], float],
        settings: PublishSettings | None = None,
    ) -> None:
        """Take the collaborators. `requests`: how many were made; `backlog`: messages of data."""
        self.settings = settings or PublishSettings()
        self.last_error = ""
        self._journal = journal
        self._blocks = blocks
        self._durability = durability
        self._channel = channel
        self._fence = fence
        self._checkpointer = checkpointer
        self._keys = keys
        self._clock = clock
        self._now_ns = now_ns
        self._report = report
        self._requests = requests
        self._backlog = backlog
        self._wake = trio.Event()
        self._changed = trio.Event()
        self._noted = trio.Event()
        self._due_s = math.inf
        self._oldest_s = math.inf  # of what is in no segment yet
        self._written_s = math.inf  # of content whose change is in the open group
        self._cut_oldest_s = math.inf  # of what is in a segment that Discord does not have
        self._touched: set[tuple[int, int]] = set()
        self._changed_inos: set[int] = set()  # by what is in no segment yet
        self._cut_inos: set[int] = set()  # by what is in segments that Discord does not have
        self._left = -1  # the last change that an earlier run has left to tell
        self._told_s: dict[tuple[int, int], float] = {}
        self._spent = 0  # requests made when the last segment was posted
        self._paused_until_s = 0.0
        self._backoff_s = 0.0
        self._again = False  # the last round failed, whatever it was about
        self._wanted = 0
        checkpointer.cover = self._cover
        self._closing: trio.Event | None = None
        self._renewing: trio.Event | None = None
        self._renewed = 0
        self._posted = 0
        self.segment = 0

    async def load(self) -> None:
        """Take up what an earlier run has left to tell."""
        await self._read_posted()
        oldest_ns = await self._journal.oldest_change_ns()
        if oldest_ns is not None:
            now = self._clock()
            age_s = max(0.0, (self._now_ns() - oldest_ns) / 1e9)
            self._oldest_s = now - age_s
            self._due_s = now + max(0.0, self.settings.bound_s - age_s)
            self._left = self._journal.last_change
        self._journal.on_recorded(self._note)

    async def _read_posted(self) -> None:
        """The newest segment up to which Discord has all."""
        for known in await self._journal.own_objects(KIND_SEGMENT, after=self.segment):
            if known.location is None:
                break
            self.segment, self._posted = known.number, known.last_change

    # ------------------------------------------------------------------ asking

    @property
    def behind_s(self) -> float:
        """Age in seconds of the oldest change that Discord does not have; 0 when it has all."""
        oldest = min(self._oldest_s, self._cut_oldest_s)
        return max(0.0, self._clock() - oldest) if oldest < math.inf else 0.0

    def has_told(self, found: Attributes) -> bool:
        """Whether Discord knows an inode, its names and its chunk list as they are.

        Names show in its ctime. Of what an earlier run has left nobody remembers whose it is.
        """
        behind_s = self.behind_s
        if not behind_s:
            return True
        since_ns = self._now_ns() - int((behind_s + _CLOCKS_S) * 1e9)
        if found.ctime_ns >= since_ns or self._posted < self._left:
            return False
        return found.ino not in self._changed_inos and found.ino not in self._cut_inos

    @property
    def posted_change(self) -> int:
        """The newest change that is in a segment on Discord, with all before it."""
        return self._posted

    async def head(self) -> Head | None:
        """The newest segment that was cut; None before the first."""
        number, digest = await self._fence.head()
        return Head(number, digest) if number else None

    async def due(self) -> None:
        """Return when there is something to tell: what is changed now goes along with it."""
        while self._due_s == math.inf and self._wanted <= self._posted:
            await self._noted.wait()

    async def told(self) -> None:
        """Return after the next round: a segment was posted, or the channel was looked at."""
        await self._changed.wait()

    def retry_now(self) -> None:
        """Forget the delay after failures: the network may be back."""
        self._paused_until_s = self._backoff_s = 0.0
        self._wake.set()

    def hurry(self) -> None:
        """Tell all that is committed as soon as possible; with a checkpoint, if one is due."""
        self._wanted = max(self._wanted, self._journal.last_change)
        self._wake.set()

    async def resumed(self) -> None:
        """The machine has slept, so another writer may have come: look now, not at the next due."""
        self._channel.looked_s = -math.inf
        self.retry_now()

    async def posted(self, change: int) -> None:
        """Return when a segment on Discord holds this row of `changes` and all before it.

        It is posted as soon as possible. EROFS when another writer has the volume. It may wait as
        long as the network is away: who cannot, sets a deadline.
        """
        self._wanted = max(self._wanted, change)
        self._wake.set()
        while self._posted < change:
            self._fence.require_writable()
            await self._changed.wait()

    async def flush(self) -> None:
        """Return when Discord knows everything that the journal holds now."""
        await self._durability.commit()
        await self.posted(self._journal.last_change)

    async def finish(self) -> None:
        """The same before an unmount: with a checkpoint, if it is time for one.

        Where there is nothing to tell nothing is asked, so that it ends without a network, too.
        """
        await self.flush()
        # `run` ends when another writer has the volume: nobody takes a checkpoint then
        if self._fence.reason or not await self._checkpointer.is_due(closing=True):
            return
        if self._closing is None:  # else it serves all who wait
            self._closing = trio.Event()
        self._wake.set()
        await self._closing.wait()

    async def renew(self) -> int:
        """Begin history anew, for a purge: a checkpoint and segments that tell nothing of before.

        Returns the number of a segment. With the newest checkpoint, those after it are all that
        somebody needs; neither they nor the copies in their messages tell what was deleted before
        this call. EROFS when another writer has the volume.
        """
        self._fence.require_writable()
        self._renewing = done = self._renewing or trio.Event()
        self._wake.set()
        await done.wait()
        self._fence.require_writable()
        return self._renewed

    # ------------------------------------------------------------------ when

    def uploaded(self, since_s: float) -> None:
        """Content that was written then is on Discord, but no segment tells whose it is."""
        self._written_s = min(self._written_s, since_s)
        self._oldest_s = min(self._oldest_s, since_s)

    def _note(self, recorded: Recorded) -> None:
        """A group was committed that changed something: decide when Discord is told."""
        now = self._clock()
        settings = self.settings
        begun_s, self._written_s = min(now, self._written_s), math.inf
        due_s = begun_s + settings.bound_s
        if not recorded.names:
            told = [self._told_s.get(what, -math.inf) for what in recorded.touched]
            due_s = max(due_s, min(told, default=now) + settings.slow_bound_s)
        self._touched |= recorded.touched
        self._changed_inos.update(ino for ino, _ in recorded.touched)
        self._oldest_s = min(self._oldest_s, begun_s)
        if due_s < self._due_s:
            self._due_s = due_s
            self._wake.set()
            self._noted.set()
            self._noted = trio.Event()

    def _due_in(self) -> float:
        now = self._clock()
        if self._paused_until_s > now:
            return self._paused_until_s - now
        unsent = self._wanted > self._posted or self._cut_oldest_s < math.inf
        asked = self._closing is not None or self._renewing is not None
        if self._again or unsent or asked or not self._fence.claimed:
            return 0.0
        look_s = self._channel.looked_s + self.settings.look_every_s
        wait_s = min(self._due_s, look_s) - now
        if wait_s > 0 or look_s <= now or not self._crowds():
            return wait_s
        return 1.0 if now < self._due_s + self.settings.stretch_s else 0.0

    def _crowds(self) -> bool:
        """Whether a segment now would take more than its share of the requests.

        When the data is soon all sent, another follows then: together they must keep to it.
        """
        backlog = self._backlog()
        data, own = self._requests() - self._spent, _REQUESTS
        if backlog <= _SOON:
            data, own = data + int(backlog), 2 * _REQUESTS
        return backlog > 0 and self.settings.metadata_share * (data + own) < own

    async def _until_due(self) -> None:
        while True:
            self._wake = trio.Event()
            wait_s = self._due_in()
            if wait_s <= 0:
                return
            with trio.move_on_after(wait_s):
                await self._wake.wait()

    # ------------------------------------------------------------------ the loop

    async def run(self) -> None:
        """Tell Discord what is due, for ever. Ends when another writer has the volume."""
        while not self._fence.reason:
            await self._until_due()
            try:
                await self._round()
            except StashcordError as error:
                self._failed(str(error))
            else:
                self._again, self._backoff_s, self.last_error = False, 0.0, ""
            self._tell()
        self._end_closing()
        await trio.sleep_forever()

    def _end_closing(self) -> None:
        if self._fence.reason and self._renewing is not None:
            self._renewing.set()
        if self._closing is not None:
            self._closing.set()
            self._closing = None

    async def _round(self) -> None:
        await self._fence.check()
        if self._fence.reason:
            return
        await self._read_posted()  # the look may have found what was sent before
        wanted = self._wanted > self._posted
        if wanted or self._due_s <= self._clock() or self._cut_oldest_s < math.inf:
            await self._cut()
            await self._post()
            self._tell()
        if self._renewing is not None:
            await self._renew(self._renewing)
        if await self._checkpointer.is_due(closing=self._closing is not None):
            await self._checkpointer.take()
        self._end_closing()

    async def _renew(self, asked: trio.Event) -> None:
        # The first tells what was deleted, by name; the second carries a copy of the first.
        for _ in range(2):
            await self._cut(even_empty=True)
            await self._post()
        self._renewed = self.segment
        await self._checkpointer.take()
        await self._journal.note_renewal()  # else nothing shows that the checkpoint belongs here
        await self._cut()  # its message carries a copy of the second
        await self._post()
        self._renewing = None
        asked.set()

    async def _cover(self, change: int) -> None:
        """A segment on Discord holds this change, and tells which blocks are only here."""
        newest = await self._journal.newest_object(KIND_SEGMENT, dropped=True)
        if newest is None or newest.last_change < change:
            await self._cut(even_empty=True)
        await self._post()
        if self._posted < change:  # what held it was lost before it was posted
            await self._journal.note_renewal()
            await self._cut()
            await self._post()
        self._tell()

    def _failed(self, why: str) -> None:
        self._again, self.last_error = True, why
        self._report(f"the journal is not on Discord yet: {why}")
        self._backoff_s = min(max(_FIRST_DELAY_S, self._backoff_s * 2), _LONGEST_DELAY_S)
        self._paused_until_s = self._clock() + self._backoff_s

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ------------------------------------------------------------------ cutting

    async def _cut(self, *, even_empty: bool = False) -> None:
        """Make segments of all changes so far, in the journal, durably."""
        await self._durability.commit()
        # Nothing suspends from the commit to here: changes and blocks are of one moment.
        last = self._journal.last_change
        dirty = self._only_here()
        told, self._touched = self._touched, set()
        self._cut_inos |= self._changed_inos
        self._changed_inos.clear()
        self._cut_oldest_s = min(self._cut_oldest_s, self._oldest_s)
        self._oldest_s = self._due_s = math.inf
        rows = await self._journal.changes_until(last, self.settings.segment_bytes)
        while rows or even_empty:
            even_empty = False
            upto = rows[-1][0] if rows else last
            number, previous = await self._fence.head()
            segment = Segment(
                number + 1,
                self._journal.writer_epoch,
                self._journal.schema_version,
                self._now_ns(),
                previous,
                [Change(*row) for row in rows],
                dirty if upto == last else (),
                complete=upto == last,
            )
            await self._keep(segment, upto)
            rows = await self._journal.changes_until(last, self.settings.segment_bytes)
        await self._journal.wal_sync()
        self._remember(told)

    def _only_here(self) -> list[tuple[Ino, int]]:
        found = [
            (live.ino, index)
            for live, index in self._blocks.queue.values()
            if live.dirty[index].uploaded < live.dirty[index].version and not live.gone
        ]
        return sorted(found)

    async def _keep(self, segment: Segment, last_change: int) -> None:
        made = await trio.to_thread.run_sync(self._sealed, segment)
        own = OwnObject(
            made.object_id, KIND_SEGMENT, segment.number, 0, last_change,
            segment.made_ns, made.digest, made.size,
        )  # fmt: skip
        await self._journal.add_object(own, made.data)

    def _sealed(self, segment: Segment) -> SealedObject:
        return seal_object(self._keys, KIND_SEGMENT, segment.number, encode_segment(segment))

    def _remember(self, told: set[tuple[int, int]]) -> None:
        now = self._clock()
        old = now - self.settings.slow_bound_s
        self._told_s = {what: s for what, s in self._told_s.items() if s > old}
        self._told_s |= dict.fromkeys(told, now)

    # ------------------------------------------------------------------ posting

    async def _post(self) -> None:
        """Post every segment that Discord does not have, each with a copy of the one before."""
        before: SealedObject | None = None
        for own in await self._journal.own_objects(KIND_SEGMENT, after=self.segment - 1):
            made = await self._sealed_before(own)
            if own.location is None:
                if made is None:
                    raise ObjectCorrupt(f"segment {own.number} was lost before it was posted")
                await self._post_one(made, before)
                await self._journal.drop_sealed(KIND_SEGMENT, own.number)
            before = made
        await self._read_posted()
        self._cut_oldest_s = math.inf
        self._cut_inos.clear()

    async def _post_one(self, made: SealedObject, before: SealedObject | None) -> None:
        if before is not None:
            try:
                await self._channel.post(made, before)
            except TooLarge:
                await self._channel.post(made)
        else:
            await self._channel.post(made)
        self._spent = self._requests()
        log.info("segment posted number=%d bytes=%d", made.number, made.size)

    async def _sealed_before(self, own: OwnObject) -> SealedObject | None:
        data = await self._journal.sealed_bytes(own.object_id)
        return None if data is None else SealedObject(own.object_id, own.kind, own.number, data)
