"""What a journal channel holds, read backwards from its newest message: names alone, and records.

The key's holder reads kind and number of an object from its name, so a page of a hundred messages
is one request and no download. Nothing is believed here: who opens an object authenticates it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stashcordfs.crypto.keys import object_id_of
from stashcordfs.errors import CryptoError

if TYPE_CHECKING:
    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.types import Location, ObjectId


@dataclass(slots=True)
class Seen:
    """An object by its name, and every message that carries it."""

    object_id: ObjectId
    kind: int
    number: int
    places: list[Location] = field(default_factory=list)


class Catalog:
    """Grows page by page, from the newest message to the oldest."""

    def __init__(self, store: ObjectStore, keys: VolumeKeys) -> None:
        """`store` is bound to the journal channel alone."""
        self._store = store
        self._keys = keys
        self._before: int | None = None
        self.objects: dict[ObjectId, Seen] = {}
        self.newest_message = 0
        self.pages = 0
        self.complete = False

    async def read_page(self) -> None:
        """One page further back. DiscordError. `complete` when it was the last."""
        page = await self._store.page_back(self._before)
        self.pages += 1
        for at in page.attachments:
            self.newest_message = max(self.newest_message, at.message)
            object_id = object_id_of(at.filename)
            if object_id is not None:
                self._add(object_id, at)
        self._before = page.last
        self.complete = page.last is None

    def reaches(self, message: int) -> bool:
        """Whether all from this message on was read."""
        return self._before is None or self._before <= message

    def _add(self, object_id: ObjectId, at: Location) -> None:
        seen = self.objects.get(object_id)
        if seen is None:
            try:
                kind, number = self._keys.read_object_id(object_id)
            except CryptoError:
                return  # another's
            seen = self.objects[object_id] = Seen(object_id, kind, number)
        seen.places.append(at)

    def of_kind(self, kind: int) -> list[Seen]:
        """All of a kind, by number."""
        found = [seen for seen in self.objects.values() if seen.kind == kind]
        return sorted(found, key=lambda seen: seen.number)
