"""Orphans: messages of packs that this volume has posted and that its journal does not know.

They come of an upload that appeared when nobody watched for it any more. Found by a listing, a
hundred messages a request. Believed only when two listings, `grace_s` apart, show them: meanwhile
somebody may recover what refers to them. A message is one only if this bot has posted it, all of
its attachments bear names that this volume's key has made for packs, and none of them stands, or
may yet stand, in the journal. None is deleted once the journal has lost rows (`SPARED`): what it
does not know may be what a recovery would need.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING

from stashcordfs.crypto.keys import KIND_PACK, object_id_of
from stashcordfs.errors import CryptoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Journal
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.types import Location

Address = tuple[int, int]  # channel, message

_YOUNG_S = 86_400.0  # what is younger may be on its way, by whatever clock
_KEPT = 10_000  # orphans that are remembered; the rest is found the next time
SPARED = "orphans_spared"  # the journal's fact: it has lost rows of packs, which are no orphans
_SEEN, _LISTED = "orphans", "orphans_listed_ns"


class Orphans:
    """Finds them; whoever calls deletes. `look` asks Discord, all else the journal."""

    def __init__(
        self,
        *,
        journal: Journal,
        store: ObjectStore,
        keys: VolumeKeys,
        now_ns: Callable[[], int],
        grace_s: float,
        every_s: float,
    ) -> None:
        """Take the collaborators. `every_s`: how long a listing is good for, in the background."""
        self._journal = journal
        self._store = store
        self._keys = keys
        self._now_ns = now_ns
        self._grace_s = grace_s
        self._every_s = every_s

    async def is_due(self) -> bool:
        """Whether it is time for a listing: the first comes when the volume is so old."""
        listed = await self._journal.get_local(_LISTED)
        if listed is None:
            await self._journal.set_local(_LISTED, str(self._now_ns()))
            return False
        age_s = (self._now_ns() - int(listed)) / 1e9
        waiting = bool(await self._seen())
        return age_s >= (min(self._grace_s, self._every_s) if waiting else self._every_s)

    async def look(self) -> tuple[dict[Address, int], list[Address]]:
        """List the channels: orphans with their bytes, and those whose grace is over. DiscordError.

        One request a hundred messages.
        """
        found: dict[Address, int] = {}
        for channel in self._store.channels:
            after: int | None = 0
            while after is not None:
                page = await self._store.page(channel, after, own=True)
                found |= await self._of_page(page.attachments)
                after = page.last
        now = self._now_ns()
        before = await self._seen()
        seen = {where: before.get(where, now) for where in sorted(found)[:_KEPT]}
        await self._remember(seen)
        await self._journal.set_local(_LISTED, str(now))
        ripe = [where for where, since in seen.items() if now - since >= self._grace_s * 1e9]
        if await self._journal.get_local(SPARED):
            ripe = []
        return found, ripe

    async def forget(self, messages: Iterable[Address]) -> None:
        """They are deleted."""
        gone = set(messages)
        await self._remember(
            {where: since for where, since in (await self._seen()).items() if where not in gone}
        )

    async def _of_page(self, attachments: Iterable[Location]) -> dict[Address, int]:
        by_message: dict[Address, list[Location]] = defaultdict(list)
        for at in attachments:
            by_message[at.channel, at.message].append(at)
        suspects = {
            where: carried
            for where, carried in by_message.items()
            if self._store.age_s(where[1]) >= self._least_age_s and all(map(self._is_pack, carried))
        }
        if not suspects:
            return {}
        names = {at.filename for carried in suspects.values() for at in carried}
        known = await self._journal.messages_of(names)
        condemned = {(c.channel, c.message) for c in await self._journal.condemned()}
        return {
            where: sum(at.size_bytes for at in carried)
            for where, carried in suspects.items()
            if where not in condemned
            and not any(known.get(at.filename) in ((0, 0), where) for at in carried)
        }

    @property
    def _least_age_s(self) -> float:
        return min(_YOUNG_S, self._grace_s)

    def _is_pack(self, at: Location) -> bool:
        object_id = object_id_of(at.filename)
        if object_id is None:
            return False
        try:
            return self._keys.read_object_id(object_id)[0] == KIND_PACK
        except CryptoError:
            return False

    async def _seen(self) -> dict[Address, int]:
        kept = json.loads(await self._journal.get_local(_SEEN) or "[]")
        return {(channel, message): since for channel, message, since in kept}

    async def _remember(self, seen: dict[Address, int]) -> None:
        rows = [[*where, since] for where, since in seen.items()]
        await self._journal.set_local(_SEEN, json.dumps(rows))
