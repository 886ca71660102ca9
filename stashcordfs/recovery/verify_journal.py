"""The journal's own objects on Discord, for `verify`: what a recovery would miss, and its cure.

A segment's next message carries a copy of it, so that one lost message breaks nothing. What is
lost of what the newest state needs is made needless: by a new checkpoint, and a segment before it.
What only earlier states need cannot be brought back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import trio

from stashcordfs.crypto.keys import KIND_CHECKPOINT, KIND_MANIFEST, KIND_SEGMENT
from stashcordfs.errors import ObjectCorrupt
from stashcordfs.store.sealed import open_object

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Journal
    from stashcordfs.journal.changes import OwnObject
    from stashcordfs.recovery.presence import Presence
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.types import Location

log = logging.getLogger(__name__)

_TRIES = 2
_SAYS = {
    KIND_SEGMENT: "segment",
    KIND_CHECKPOINT: "part of checkpoint",
    KIND_MANIFEST: "checkpoint",
}
RECORD = "the volume's record"


@dataclass(frozen=True, slots=True)
class HeldObject:
    """A segment, or a checkpoint's manifest or part, on Discord. `needed`: by the newest state."""

    own: OwnObject
    location: Location
    needed: bool

    def __str__(self) -> str:
        what = f"{_SAYS[self.own.kind]} {self.own.number}"
        return what if self.needed else f"{what}, of history"


class JournalObjects:
    """One volume's. `channel` is the journal channel, `record` the name of the volume's record."""

    def __init__(
        self,
        *,
        journal: Journal,
        store: ObjectStore,
        keys: VolumeKeys,
        channel: int = 0,
        record: str = "",
        hurry: Callable[[], None] = lambda: None,
    ) -> None:
        """`hurry` is called when a checkpoint is wanted. Without a `record` none is looked for."""
        self._journal = journal
        self._store = store
        self._keys = keys
        self.channel = channel
        self._record = record
        self._hurry = hurry

    async def held(self) -> list[HeldObject]:
        """All that were confirmed and not superseded."""
        manifests = await self._confirmed(KIND_MANIFEST)
        newest = manifests[-1] if manifests else None
        covered, number = (newest.last_change, newest.number) if newest else (0, 0)
        segments = await self._confirmed(KIND_SEGMENT)
        whole = [*manifests, *await self._confirmed(KIND_CHECKPOINT)]
        found = [
            *((own, own.last_change > covered or own is segments[-1]) for own in segments),
            *((own, own.number == number) for own in whole),
        ]
        return [HeldObject(own, own.location, needed) for own, needed in found if own.location]

    async def _confirmed(self, kind: int) -> list[OwnObject]:
        return [own for own in await self._journal.own_objects(kind) if own.location is not None]

    async def lost(self, missing: Sequence[HeldObject], shown: Collection[str]) -> list[HeldObject]:
        """Those without a copy in another message, that nobody has dropped meanwhile."""
        there = {each.own.object_id for each in await self.held()}
        return [
            each
            for each in missing
            if each.own.object_id in there
            and not (each.own.kind == KIND_SEGMENT and each.location.filename in shown)
        ]

    async def has_record(self, presence: Presence) -> bool:
        """Whether the channel shows the volume's record; without it no key opens anything."""
        if not self._record:
            return True
        before = [each.location.message for each in await self.held()]
        return await presence.shows(self.channel, self._record, before=min(before, default=1 << 63))

    async def open(self, held: HeldObject) -> None:
        """Fetch it whole and open it. ObjectMissing, ObjectCorrupt."""
        for left in reversed(range(_TRIES)):
            data = await self._store.fetch(held.location, 0, held.location.size_bytes)
            try:
                self._check(held, data)
            except ObjectCorrupt:
                if not left:
                    raise
                await trio.lowlevel.checkpoint()
            else:
                return

    def _check(self, held: HeldObject, data: bytes) -> None:
        if sha256(data).digest() != held.own.digest:
            raise ObjectCorrupt(f"{held} is not what was posted")
        open_object(self._keys, held.own.kind, held.own.object_id, data)

    async def mend(self, gone: Sequence[HeldObject], *, wanted: bool) -> None:
        """Have a checkpoint posted if it is `wanted`; what is gone is counted on no more.

        The head stays known, though: the next segment goes on from it.
        """
        if wanted:
            await self._journal.want_checkpoint()
            await self._journal.wal_sync()
            self._hurry()
        head = await self._journal.newest_object(KIND_SEGMENT)
        broken = {o.own.number for o in gone if o.own.kind in (KIND_CHECKPOINT, KIND_MANIFEST)}
        ids = {each.own.object_id for each in gone}
        ids |= {o.object_id for o in await self._confirmed(KIND_MANIFEST) if o.number in broken}
        if head is not None:
            ids.discard(head.object_id)
        await self._journal.drop_objects(sorted(ids))
        await self._journal.wal_sync()
