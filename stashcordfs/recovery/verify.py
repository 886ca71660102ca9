"""`verify`: does Discord still have what the journal counts on?

Existence by listing, a hundred messages a request; with `data`, every chunk is downloaded, opened,
and its place compared with the pack's own table. What is missing is asked for once more by itself,
twice, before it is believed. Then: blocks of which another copy exists refer to that one; blocks
that are still in the local cache are sent anew; the rest is told by path.

It runs inside a mounted volume's daemon, under its rate limiter, or over a volume that is assembled
without a kernel. A subset goes on where the last one ended: `State` keeps that beside the journal.

Requests: one a hundred messages, at most two for each of `_ASKED` missing ones, and for `data` the
CDN's, which are not under the API's limits.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import ObjectCorrupt, ObjectMissing, StoreError, UsageError
from stashcordfs.journal.inspection import readable
from stashcordfs.recovery.presence import Key, Presence, all_packs, key_of
from stashcordfs.recovery.verify_journal import RECORD, HeldObject, JournalObjects
from stashcordfs.store.fetching import fetch_chunks, fetch_table, runs
from stashcordfs.store.pack import HEADER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Journal
    from stashcordfs.journal.holdings import HeldPack
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.types import ChunkRef, Ino, Location
    from stashcordfs.vfs.blocks import Blocks

log = logging.getLogger(__name__)

_LISTED = 1000  # damaged files that are told by path
_TRIES = 2


@dataclass(slots=True)
class State:
    """What outlives a run, in a small file beside the journal."""

    cursor: list[int] = field(default_factory=lambda: [0, 0, 0])
    finished_at: float = 0.0
    damaged_blocks: int = 0
    missing_packs: int = 0
    missing_objects: int = 0

    @classmethod
    def load(cls, path: Path) -> State:
        """As the last run left it; anew when it is missing or unreadable."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                [int(number) for number in raw["cursor"]][:3],
                float(raw["finished_at"]),
                int(raw["damaged_blocks"]),
                int(raw.get("missing_packs", 0)),
                int(raw.get("missing_objects", 0)),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        temporary.replace(path)


@dataclass(slots=True)
class Outcome:
    """What a run found, for `--json`."""

    packs: int = 0
    checked_packs: int = 0
    opened_bytes: int = 0
    missing_packs: list[str] = field(default_factory=list)
    corrupt_packs: list[str] = field(default_factory=list)
    found_again: int = 0
    renamed: int = 0
    corrected_chunks: int = 0
    from_other_copy: int = 0
    resent_blocks: int = 0
    damaged_blocks: int = 0
    damaged: dict[str, int] = field(default_factory=dict)  # path: blocks
    objects: int = 0  # of the journal: segments, checkpoints and their parts
    missing_objects: list[str] = field(default_factory=list)
    corrupt_objects: list[str] = field(default_factory=list)
    checkpoint_wanted: bool = False  # one is posted that makes them needless

    @property
    def clean(self) -> bool:
        """Nothing was missing, nothing is damaged."""
        packs = self.missing_packs or self.corrupt_packs or self.damaged_blocks
        return not (packs or self.missing_objects or self.corrupt_objects)

    def as_json(self) -> dict[str, object]:
        """For the control socket and `--json`."""
        return {"clean": self.clean, **asdict(self)}


class Verifier:
    """One run at a time. Lives on the loop of the parts that it is given."""

    def __init__(
        self,
        *,
        journal: Journal,
        blocks: Blocks,
        store: ObjectStore,
        keys: VolumeKeys,
        state_path: Path,
        report: Callable[[str], None],
        now_s: Callable[[], float] = time.time,
        objects: JournalObjects | None = None,
    ) -> None:
        """Take the collaborators; `report` hears what a person should know.

        Without `objects` the journal's own are not looked at.
        """
        self._journal = journal
        self._blocks = blocks
        self._store = store
        self._keys = keys
        self._state_path = state_path
        self._report = report
        self._now_s = now_s
        self._objects = objects
        self._busy = False
        self.stage, self.done, self.total = "", 0, 0
        self.state = State.load(state_path)  # as the last run has left it

    async def run(self, *, data: bool = False, part: tuple[int, int] | None = None) -> Outcome:
        """Check all packs, or the next `part` (n of t by bytes) after the last one's end.

        UsageError when a run is under way already.
        """
        if self._busy:
            raise UsageError("a verify of this volume is running already")
        self._busy = True
        try:
            return await self._run(data=data, part=part)
        finally:
            self._busy = False

    async def _run(self, *, data: bool, part: tuple[int, int] | None) -> Outcome:
        state = State.load(self._state_path)
        outcome = Outcome()
        presence = Presence(self._store, begin=self._begin, tick=self._tick)
        self._begin("reading the journal", 0)
        packs = await self._held()
        outcome.packs = len(packs)
        chosen = choose(packs, part, (state.cursor[0], state.cursor[1], state.cursor[2]))
        outcome.checked_packs = len(chosen)
        found, objects = await self._look_for(chosen, presence, outcome)
        if data:
            await self._open_all(found, outcome)
            await self._open_objects(objects, outcome)
        outcome.renamed = presence.renamed
        needed = await self._mend_blocks(outcome)
        lost = [pack.row for pack in await self._held() if pack.lost]
        await self._journal.forget_packs(row for row in lost if row not in needed)
        state.missing_packs = len(needed.intersection(lost))
        state.missing_objects = len(outcome.missing_objects) + len(outcome.corrupt_objects)
        await self._journal.wal_sync()
        if chosen:
            state.cursor = list(key_of(chosen[-1]))
        state.finished_at, state.damaged_blocks = self._now_s(), outcome.damaged_blocks
        state.save(self._state_path)
        self.state = state
        self._tell(outcome)
        return outcome

    def _begin(self, stage: str, total: int) -> None:
        self.stage, self.done, self.total = stage, 0, total

    def _tick(self) -> None:
        self.done += 1

    def _tell(self, outcome: Outcome) -> None:
        if gone := [*outcome.missing_objects, *outcome.corrupt_objects]:
            cure = "; a new checkpoint takes its place" if outcome.checkpoint_wanted else ""
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            self._report(f"verify: {gone[0]}{more} missing or damaged on Discord{cure}")
        lost = len(outcome.missing_packs) + len(outcome.corrupt_packs)
        if lost:
            self._report(
                f"verify: {lost} packs are missing or damaged on Discord; {outcome.resent_blocks} "
                f"blocks are sent anew, {outcome.damaged_blocks} are lost"
            )
        elif outcome.damaged_blocks:
            self._report(f"verify: {outcome.damaged_blocks} blocks are lost")
        log.info("verify checked=%d lost=%d", outcome.checked_packs, lost)

    async def _held(self) -> list[HeldPack]:
        return await all_packs(self._journal)

    # ------------------------------------------------------------------ existence

    async def _look_for(
        self, packs: Sequence[HeldPack], presence: Presence, outcome: Outcome
    ) -> tuple[list[HeldPack], list[HeldObject]]:
        """What is there as it should be; the journal learns what is not."""
        objects = await self._objects.held() if self._objects is not None else []
        outcome.objects = len(objects)
        held: list[HeldPack | HeldObject] = sorted([*packs, *objects], key=key_of)
        self._begin("listing", len(held))
        suspects: list[HeldPack] = []
        there: list[HeldPack] = []
        odd: list[HeldObject] = []
        start = self._objects.channel if self._objects is not None else 0  # mkfs's record is there
        for channel in sorted({each.location.channel for each in held}):
            mine = [each for each in held if each.location.channel == channel]
            async for each, seen in presence.compare(channel, mine, from_start=channel == start):
                if isinstance(each, HeldObject):
                    odd += [] if seen else [each]
                else:
                    (there if seen else suspects).append(each)
        await self._settle_objects(odd, presence, outcome)
        there = await self._settle_packs(suspects, there, presence, outcome)
        return there, [each for each in objects if each not in odd]

    async def _settle_objects(
        self, odd: Sequence[HeldObject], presence: Presence, outcome: Outcome
    ) -> None:
        """What is missing of the journal's own objects, and the cure."""
        if self._objects is None:
            return
        gone = await self._objects.lost(await presence.confirm(odd), presence.names)
        outcome.missing_objects = [str(each) for each in gone]
        if not await self._objects.has_record(presence):
            outcome.missing_objects.append(RECORD)
        needed = RECORD in outcome.missing_objects or any(each.needed for each in gone)
        if outcome.missing_objects:
            outcome.checkpoint_wanted = needed
            await self._objects.mend(gone, wanted=needed)

    async def _open_objects(self, objects: Sequence[HeldObject], outcome: Outcome) -> None:
        """Fetch and open them. What cannot be opened keeps its row: it is deleted in its time."""
        assert self._objects is not None or not objects
        self._begin("opening what the journal has posted", len(objects))
        bad: list[HeldObject] = []
        gone: list[HeldObject] = []
        for each in objects:
            assert self._objects is not None
            try:
                await self._objects.open(each)
            except ObjectMissing:
                gone += await self._objects.lost([each], ())
            except ObjectCorrupt as error:
                log.warning("%s: %s", each, error)
                bad.append(each)
            self._tick()
        if self._objects is not None and (bad or gone):
            outcome.corrupt_objects += [str(each) for each in bad]
            outcome.missing_objects += [str(each) for each in gone]
            needed = any(each.needed for each in (*bad, *gone))
            outcome.checkpoint_wanted |= needed
            await self._objects.mend(gone, wanted=needed)

    async def _settle_packs(
        self,
        suspects: Sequence[HeldPack],
        there: Sequence[HeldPack],
        presence: Presence,
        outcome: Outcome,
    ) -> list[HeldPack]:
        """Which packs are there as they should be; the journal learns which are not."""
        known = [pack for pack in suspects if pack.lost]  # told before, and still so
        missing = await presence.confirm([pack for pack in suspects if not pack.lost])
        missing = await self._journal.still_held(missing)  # not what was collected meanwhile
        gone = {pack.row for pack in (*missing, *known)}
        there = [*there, *(pack for pack in suspects if pack.row not in gone)]
        back = [pack for pack in there if pack.lost and await self._has_bytes(pack)]
        still = {pack.row for pack in there if pack.lost} - {pack.row for pack in back}
        outcome.missing_packs = [pack.location.filename for pack in missing]
        await self._journal.set_lost(missing, lost=True)
        await self._journal.set_lost(back, lost=False)
        outcome.found_again = len(back)
        return sorted((pack for pack in there if pack.row not in still), key=key_of)

    async def _has_bytes(self, pack: HeldPack) -> bool:
        """Whether a pack that is listed again can be read again."""
        try:
            await self._store.fetch(pack.location, 0, HEADER.size)
        except StoreError:
            return False
        return True

    # ------------------------------------------------------------------ data

    async def _open_all(self, packs: Sequence[HeldPack], outcome: Outcome) -> None:
        self._begin("opening", sum(pack.location.size_bytes for pack in packs))
        for pack in packs:
            try:
                await self._open_pack(pack, outcome)
            except ObjectMissing:
                if not await self._journal.still_held([pack]):
                    continue
                outcome.missing_packs.append(pack.location.filename)
                await self._journal.set_lost([pack], lost=True)
            self.done += pack.location.size_bytes

    async def _open_pack(self, pack: HeldPack, outcome: Outcome) -> None:
        chunks = await self._journal.chunks_of(pack)
        try:
            chunks = await self._by_table(pack, chunks, outcome)
        except ObjectCorrupt as error:  # its chunks may be whole all the same
            log.warning("pack %s: %s", pack.location.filename, error)
            outcome.corrupt_packs.append(pack.location.filename)
        bad: list[int] = []
        for run in runs(chunks):
            bad += await self._open_run(pack.location, run)
        outcome.opened_bytes += sum(ref.length for _, ref in chunks)
        if bad:
            if pack.location.filename not in outcome.corrupt_packs:
                outcome.corrupt_packs.append(pack.location.filename)
            await self._journal.forget_chunks(bad)

    async def _by_table(
        self, pack: HeldPack, chunks: Sequence[tuple[int, ChunkRef]], outcome: Outcome
    ) -> list[tuple[int, ChunkRef]]:
        """The chunks as the pack's sealed table places them; the journal's rows are corrected."""
        right = {ref.number: ref for ref in await self._table(pack)}
        by_id = {ref.chunk_id: ref for ref in right.values()}
        result = []
        for row, ref in chunks:
            told = by_id.get(ref.chunk_id) or right.get(ref.number)
            if told is not None and told != ref:
                await self._journal.correct_chunk(row, told)
                outcome.corrected_chunks += 1
            result.append((row, told or ref))
        return result

    async def _table(self, pack: HeldPack) -> list[ChunkRef]:
        for left in reversed(range(_TRIES)):
            try:
                table, _ = await fetch_table(self._store, self._keys, pack.object_id, pack.location)
            except ObjectCorrupt:
                if not left:
                    raise
            else:
                return table.chunks
        raise AssertionError("unreachable")

    async def _open_run(self, where: Location, run: Sequence[tuple[int, ChunkRef]]) -> list[int]:
        """Rows of the chunks that cannot be opened, asked for twice."""
        bad: list[int] = []
        try:
            await self._open(where, [ref for _, ref in run])
        except ObjectCorrupt:
            for row, ref in run:
                try:
                    await self._open(where, [ref])
                except ObjectCorrupt as error:
                    log.warning("chunk row %d of %s: %s", row, where.filename, error)
                    bad.append(row)
        return bad

    async def _open(self, where: Location, refs: Sequence[ChunkRef]) -> None:
        await fetch_chunks(self._store, self._keys, where, refs)

    # ------------------------------------------------------------------ what is lost

    async def _mend_blocks(self, outcome: Outcome) -> set[int]:
        """Every lost block: another copy, the local one, or its path. Packs still referred to."""
        self._begin("looking for lost blocks", 0)
        needed: set[int] = set()
        at: tuple[int, int] | None = (0, -1)
        while at is not None:
            damaged, at = await self._journal.damaged_blocks(at)
            for ino, index, pack in damaged:
                if await self._journal.use_other_copy(ino, index):
                    outcome.from_other_copy += 1
                    continue
                if pack is not None:
                    needed.add(pack)
                await self._mend(ino, index, outcome)
            await trio.lowlevel.checkpoint()
        return needed

    async def _mend(self, ino: Ino, index: int, outcome: Outcome) -> None:
        if await self._blocks.renew(ino, index):
            outcome.resent_blocks += 1
        else:
            outcome.damaged_blocks += 1
            path = readable(await self._journal.told_path(ino))
            if path in outcome.damaged or len(outcome.damaged) < _LISTED:
                outcome.damaged[path] = outcome.damaged.get(path, 0) + 1


def choose(
    packs: Sequence[HeldPack], part: tuple[int, int] | None, cursor: Key
) -> Sequence[HeldPack]:
    """The packs of one run: all, or n/t of their bytes after the cursor, up to the end.

    `packs` are in the order of checking. At least one pack, so that t/n runs see all of them.
    """
    if part is None:
        return packs
    first = next((at for at, pack in enumerate(packs) if key_of(pack) > cursor), 0)
    wanted = sum(pack.location.size_bytes for pack in packs) * part[0] / part[1]
    taken = 0
    for at in range(first, len(packs)):
        taken += packs[at].location.size_bytes
        if taken >= wanted:
            return packs[first : at + 1]
    return packs[first:]
