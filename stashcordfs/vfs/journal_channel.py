"""The journal channel as one writer sees it: what he has posted, and what another has.

Everything posted here is sealed, named by an id that is never used for two contents, and recorded
in the journal before its first byte leaves. So posting needs no outcome: what may have arrived is
looked for before it is sent again, under the same nonce, and a second copy would be the same bytes.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stashcordfs.crypto.keys import KIND_CLAIM, KIND_MANIFEST, KIND_SEGMENT, object_id_of
from stashcordfs.errors import CryptoError, StoreError
from stashcordfs.store.checkpoint import decode_manifest
from stashcordfs.store.sealed import open_object
from stashcordfs.store.segment import Claim, decode_claim, decode_segment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Journal
    from stashcordfs.store.api import ObjectStore, Uploadable
    from stashcordfs.store.sealed import SealedObject
    from stashcordfs.types import Location, ObjectId

log = logging.getLogger(__name__)

SEEN = "journal_seen"  # the journal's fact: a message id up to which all was looked at
OVERLAP = 15_000 << 22  # ids of 15 s, as snowflakes are time: a list may lack the newest
_MAX_OBJECT_BYTES = 64 << 20
FETCH_TRIES = 3  # of an object whose name is ours: it may be damaged on its way


@dataclass(frozen=True, slots=True)
class Foreign:
    """An authentic object of this volume that this writer has not made."""

    kind: int
    number: int
    writer_epoch: int
    location: Location
    claim: Claim | None = None


class JournalChannel:
    """Posts and looks. `store` is bound to the journal channel alone."""

    def __init__(
        self,
        *,
        journal: Journal,
        store: ObjectStore,
        keys: VolumeKeys,
        clock: Callable[[], float],
    ) -> None:
        """Take the collaborators."""
        self._journal = journal
        self._store = store
        self._keys = keys
        self._clock = clock
        self._ignored: set[ObjectId] = set()
        self.looked_s = -math.inf

    @property
    def part_bytes(self) -> int:
        """What an attachment may have."""
        limits = self._store.limits
        return min(limits.max_attachment_bytes, limits.max_request_bytes - 4096, 48 << 20)

    @property
    def unseen_s(self) -> float:
        """Seconds since it was looked at."""
        return self._clock() - self.looked_s

    async def look(self) -> list[Foreign]:
        """List what is new. Own objects whose outcome was unknown are confirmed; others returned.

        One request a hundred messages. Afterwards the same are not listed again, but for the last
        seconds.
        """
        seen = await self.seen()
        listed = await self._store.listed(max(0, seen - OVERLAP))
        unconfirmed = await self._journal.unconfirmed()
        foreign = []
        for at in listed:
            object_id = object_id_of(at.filename)
            if object_id is None or object_id in self._ignored:
                continue
            if await self._journal.is_own(object_id):
                if object_id in unconfirmed:
                    await self._journal.confirm_object(object_id, at)
                continue
            found = await self._authenticate(object_id, at)
            if found is None:
                self._ignored.add(object_id)
            else:
                foreign.append(found)
        await self._journal.set_local(SEEN, str(max([seen, *(at.message for at in listed)])))
        self.looked_s = self._clock()
        return foreign

    async def seen(self) -> int:
        """A message id up to which everything was looked at: of a new volume, its record's."""
        kept = await self._journal.get_local(SEEN)
        return await self._store.newest_id() if kept is None else int(kept)

    async def _authenticate(self, object_id: ObjectId, at: Location) -> Foreign | None:
        try:
            kind, number = self._keys.read_object_id(object_id)
        except CryptoError:
            return None  # of another volume, or nothing of ours at all
        if kind not in (KIND_SEGMENT, KIND_MANIFEST, KIND_CLAIM):
            return None
        for tried in range(1, FETCH_TRIES + 1):
            try:
                return await self._opened(object_id, kind, number, at)
            except (CryptoError, StoreError) as error:
                log.info(
                    "not to be read in the journal channel: message=%d tried=%d %s",
                    at.message, tried, error,
                )  # fmt: skip
        return None

    async def _opened(self, object_id: ObjectId, kind: int, number: int, at: Location) -> Foreign:
        data = await self._store.fetch(at, 0, min(at.size_bytes, _MAX_OBJECT_BYTES))
        body = open_object(self._keys, kind, object_id, data)
        if kind == KIND_CLAIM:
            claim = decode_claim(body)
            return Foreign(kind, number, claim.writer_epoch, at, claim)
        decode = decode_segment if kind == KIND_SEGMENT else decode_manifest
        return Foreign(kind, number, decode(body).writer_epoch, at)

    async def post(self, made: SealedObject, *riders: Uploadable) -> None:
        """Post one message, led by an object that the journal has recorded durably."""
        locations = await self._store.put([made, *riders], nonce=made.object_id.hex()[:24])
        await self._journal.confirm_object(made.object_id, locations[0])
        await self._journal.wal_sync()

    async def delete(self, messages: Sequence[tuple[int, int]]) -> None:
        """Delete messages (channel, id)."""
        await self._store.delete(messages)
