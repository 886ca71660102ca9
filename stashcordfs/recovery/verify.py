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
from stashcordfs.store.fetching import fetch_chunks, fetch_table, runs
from stashcordfs.store.pack import HEADER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from pathlib import Path

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Journal
    from stashcordfs.journal.holdings import HeldPack
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.types import ChunkRef, Ino, Location
    from stashcordfs.vfs.blocks import Blocks

log = logging.getLogger(__name__)

_ASKED = 50  # so many missing messages are asked for one by one; then the listing is believed
_ASK_AGAIN_S = 10.0  # a message that was just made may not be shown yet
_LISTED = 1000  # damaged files that are told by path
_TRIES = 2

Key = tuple[int, int, int]  # channel, message, attachment: the order of checking


@dataclass(slots=True)
class State:
    """What outlives a run, in a small file beside the journal."""

    cursor: list[int] = field(default_factory=lambda: [0, 0, 0])
    finished_at: float = 0.0
    damaged_blocks: int = 0

    @classmethod
    def load(cls, path: Path) -> State:
        """As the last run left it; anew when it is missing or unreadable."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                [int(number) for number in raw["cursor"]][:3],
                float(raw["finished_at"]),
                int(raw["damaged_blocks"]),
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

    @property
    def clean(self) -> bool:
        """Nothing was missing, nothing is damaged."""
        return not (self.missing_packs or self.corrupt_packs or self.damaged_blocks)

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
    ) -> None:
        """Take the collaborators; `report` hears what a person should know."""
        self._journal = journal
        self._blocks = blocks
        self._store = store
        self._keys = keys
        self._state_path = state_path
        self._report = report
        self._now_s = now_s
        self._busy = False
        self.stage, self.done, self.total = "", 0, 0
        self.damaged_blocks = State.load(state_path).damaged_blocks

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
        self._begin("reading the journal", 0)
        packs = await self._held()
        outcome.packs = len(packs)
        chosen = choose(packs, part, (state.cursor[0], state.cursor[1], state.cursor[2]))
        outcome.checked_packs = len(chosen)
        found = await self._look_for(chosen, outcome)
        if data:
            await self._open_all(found, outcome)
        needed = await self._mend_blocks(outcome)
        lost = [pack.row for pack in await self._held() if pack.lost]
        await self._journal.forget_packs(row for row in lost if row not in needed)
        await self._journal.wal_sync()
        if chosen:
            state.cursor = list(_key(chosen[-1]))
        state.finished_at, state.damaged_blocks = self._now_s(), outcome.damaged_blocks
        state.save(self._state_path)
        self.damaged_blocks = outcome.damaged_blocks
        self._tell(outcome)
        return outcome

    def _begin(self, stage: str, total: int) -> None:
        self.stage, self.done, self.total = stage, 0, total

    def _tell(self, outcome: Outcome) -> None:
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
        """Every pack in the order of checking. A few hundred bytes each, one a 20 MiB of data."""
        packs: list[HeldPack] = []
        while some := await self._journal.held_packs(packs[-1].row if packs else 0):
            packs += some
            await trio.lowlevel.checkpoint()
        return sorted(packs, key=_key)

    # ------------------------------------------------------------------ existence

    async def _look_for(self, packs: Sequence[HeldPack], outcome: Outcome) -> list[HeldPack]:
        """Which packs are there as they should be; the journal learns which are not."""
        self._begin("listing", len(packs))
        suspects: list[HeldPack] = []
        there: list[HeldPack] = []
        for channel in sorted({pack.location.channel for pack in packs}):
            mine = [pack for pack in packs if pack.location.channel == channel]
            async for pack, seen in self._compare(channel, mine, outcome):
                (there if seen else suspects).append(pack)
        known = [pack for pack in suspects if pack.lost]  # told before, and still so
        missing = await self._confirm([pack for pack in suspects if not pack.lost], outcome)
        missing = await self._journal.still_held(missing)  # not what was collected meanwhile
        gone = {pack.row for pack in (*missing, *known)}
        there += [pack for pack in suspects if pack.row not in gone]
        back = [pack for pack in there if pack.lost and await self._has_bytes(pack)]
        still = {pack.row for pack in there if pack.lost} - {pack.row for pack in back}
        outcome.missing_packs = [pack.location.filename for pack in missing]
        await self._journal.set_lost(missing, lost=True)
        await self._journal.set_lost(back, lost=False)
        outcome.found_again = len(back)
        return sorted((pack for pack in there if pack.row not in still), key=_key)

    async def _has_bytes(self, pack: HeldPack) -> bool:
        """Whether a pack that is listed again can be read again."""
        try:
            await self._store.fetch(pack.location, 0, HEADER.size)
        except StoreError:
            return False
        return True

    async def _compare(
        self, channel: int, packs: Sequence[HeldPack], outcome: Outcome
    ) -> AsyncIterator[tuple[HeldPack, bool]]:
        """Each pack, and whether a listing shows it. `packs` are in the order of messages."""
        at = 0
        after = 0
        while at < len(packs):
            after = max(after, packs[at].location.message - 1)  # over what is not ours
            page = await self._store.page(channel, after)
            shown = _by_address(page.attachments)
            while at < len(packs) and (
                page.last is None or packs[at].location.message <= page.last
            ):
                yield packs[at], _agrees(packs[at].location, shown, outcome)
                at += 1
                self.done += 1
            if page.last is not None:
                after = page.last

    async def _confirm(self, suspects: Sequence[HeldPack], outcome: Outcome) -> list[HeldPack]:
        """Those that are missing when they are asked for by themselves, at two times.

        A listing may lag, and shows nothing at all without the right to read the history: then this
        raises the refusal, and nothing is taken for lost.
        """
        missing = list(suspects)
        for wait_s in (0.0, _ASK_AGAIN_S):
            if not missing:
                break
            await trio.sleep(wait_s)
            self._begin("asking for what is missing", min(len(missing), _ASKED))
            asked = missing[:_ASKED]
            shown = [pack for pack in asked if await self._is_there(pack, outcome)]
            if shown and len(missing) > _ASKED:
                raise StoreError(
                    "Discord's listings leave out messages that exist: try again later"
                )
            missing = [pack for pack in missing if pack not in shown]
        return missing

    async def _is_there(self, pack: HeldPack, outcome: Outcome) -> bool:
        self.done += 1
        where = pack.location
        found = await self._store.attachments(where.channel, where.message)
        return _agrees(where, _by_address(found or ()), outcome)

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


def _key(pack: HeldPack) -> Key:
    return pack.location.channel, pack.location.message, pack.location.attachment


def _by_address(shown: Iterable[Location]) -> dict[tuple[int, int], Location]:
    return {(location.message, location.attachment): location for location in shown}


def _agrees(wanted: Location, shown: dict[tuple[int, int], Location], outcome: Outcome) -> bool:
    """Whether an attachment is there with its size. A name may be changed by the server."""
    found = shown.get((wanted.message, wanted.attachment))
    if found is None or found.size_bytes != wanted.size_bytes:
        return False
    outcome.renamed += found.filename != wanted.filename
    return True


def choose(
    packs: Sequence[HeldPack], part: tuple[int, int] | None, cursor: Key
) -> Sequence[HeldPack]:
    """The packs of one run: all, or n/t of their bytes after the cursor, up to the end.

    `packs` are in the order of checking. At least one pack, so that t/n runs see all of them.
    """
    if part is None:
        return packs
    first = next((at for at, pack in enumerate(packs) if _key(pack) > cursor), 0)
    wanted = sum(pack.location.size_bytes for pack in packs) * part[0] / part[1]
    taken = 0
    for at in range(first, len(packs)):
        taken += packs[at].location.size_bytes
        if taken >= wanted:
            return packs[first : at + 1]
    return packs[first:]
