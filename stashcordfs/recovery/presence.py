"""Are attachments there as they should be? By listing, and by asking for what a listing lacks.

Requests: one a hundred messages, at most two for each of `_ASKED` suspects.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol, TypeVar

import trio

from stashcordfs.errors import StoreError
from stashcordfs.types import Ino

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from stashcordfs.journal import Journal
    from stashcordfs.journal.holdings import HeldPack
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.types import Location

_ASKED = 50  # so many missing messages are asked for one by one; then the listing is believed
_ASK_AGAIN_S = 10.0  # a message that was just made may not be shown yet

Key = tuple[int, int, int]  # channel, message, attachment: the order of checking


class Held(Protocol):
    """Something that Discord should have."""

    @property
    def location(self) -> Location:
        """Where."""


T = TypeVar("T", bound=Held)


def key_of(held: Held) -> Key:
    """The order of checking."""
    return held.location.channel, held.location.message, held.location.attachment


async def all_packs(journal: Journal) -> list[HeldPack]:
    """Every pack in the order of checking. A few hundred bytes each, one a 20 MiB of data."""
    packs: list[HeldPack] = []
    while some := await journal.held_packs(packs[-1].row if packs else 0):
        packs += some
        await trio.lowlevel.checkpoint()
    return sorted(packs, key=key_of)


async def note_lost_packs(
    journal: Journal, store: ObjectStore, progress: Callable[[str, int, int], None]
) -> tuple[list[HeldPack], dict[Ino, int]]:
    """Packs that are not there, which the journal learns, and how many blocks of inodes need them.

    For a journal that nobody has mounted. DiscordError.
    """
    packs = await all_packs(journal)
    presence = Presence(store, begin=lambda stage, total: progress(stage, 0, total), tick=_nothing)
    suspects: list[HeldPack] = []
    progress("looking for the packs", 0, len(packs))
    for channel in sorted({pack.location.channel for pack in packs}):
        mine = [pack for pack in packs if pack.location.channel == channel]
        suspects += [pack async for pack, seen in presence.compare(channel, mine) if not seen]
    lost = await presence.confirm(suspects)
    await journal.set_lost(lost, lost=True)
    gone, blocks = {pack.row for pack in lost}, Counter[Ino]()
    at: tuple[int, int] | None = (0, -1) if lost else None
    while at is not None:
        damaged, at = await journal.damaged_blocks(at)
        blocks.update(ino for ino, _, pack in damaged if pack in gone)
        await trio.lowlevel.checkpoint()
    return lost, blocks


def _nothing() -> None:
    """Nobody counts."""


class Presence:
    """One run's look at the channels. `renamed`: attachments with another name than they had."""

    def __init__(
        self, store: ObjectStore, *, begin: Callable[[str, int], None], tick: Callable[[], None]
    ) -> None:
        """`begin` is told of a stage and its size, `tick` of each step."""
        self._store = store
        self._begin = begin
        self._tick = tick
        self.renamed = 0
        self.names: set[str] = set()  # of attachments that were listed

    async def compare(
        self, channel: int, held: Sequence[T], *, from_start: bool = False
    ) -> AsyncIterator[tuple[T, bool]]:
        """Each, and whether a listing shows it. `held` are in the order of checking.

        `from_start`: what is before the first counts as well.
        """
        at = 0
        after = 0
        while at < len(held):
            if not from_start:
                after = max(after, held[at].location.message - 1)  # over what is not ours
            from_start = False
            page = await self._store.page(channel, after)
            self.names.update(found.filename for found in page.attachments)
            shown = _by_address(page.attachments)
            while at < len(held) and (page.last is None or held[at].location.message <= page.last):
                yield held[at], self._agrees(held[at].location, shown)
                at += 1
                self._tick()
            if page.last is not None:
                after = page.last

    async def confirm(self, suspects: Sequence[T]) -> list[T]:
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
            shown = [held for held in asked if await self._is_there(held)]
            if shown and len(missing) > _ASKED:
                raise StoreError(
                    "Discord's listings leave out messages that exist: try again later"
                )
            missing = [held for held in missing if held not in shown]
        return missing

    async def shows(self, channel: int, name: str, *, before: int) -> bool:
        """Whether an attachment of this name was listed, or is in a message before this id."""
        after: int | None = 0
        while name not in self.names and after is not None and after < before:
            page = await self._store.page(channel, after)
            self.names.update(found.filename for found in page.attachments)
            after = page.last
        return name in self.names

    async def _is_there(self, held: Held) -> bool:
        self._tick()
        where = held.location
        found = await self._store.attachments(where.channel, where.message)
        return self._agrees(where, _by_address(found or ()))

    def _agrees(self, wanted: Location, shown: dict[tuple[int, int], Location]) -> bool:
        """Whether it is there with its size. A name may be changed by the server."""
        found = shown.get((wanted.message, wanted.attachment))
        if found is None or found.size_bytes != wanted.size_bytes:
            return False
        self.renamed += found.filename != wanted.filename
        return True


def _by_address(shown: Iterable[Location]) -> dict[tuple[int, int], Location]:
    return {(location.message, location.attachment): location for location in shown}
