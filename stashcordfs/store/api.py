"""What the vfs asks of a store. Implemented over Discord and over a local folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from stashcordfs.store.pack import FinishedPack
    from stashcordfs.types import Limits, Location


class ObjectStore(Protocol):
    """Packs by address. Errors are StoreError and DiscordError; `temporary` ones may be retried."""

    @property
    def limits(self) -> Limits:
        """What one message may carry now."""

    async def put(self, packs: Sequence[FinishedPack], *, nonce: str) -> list[Location]:
        """Post all packs in one message; where they are, in order. OutcomeUnknown when unclear."""

    async def fetch(self, location: Location, start: int, length: int) -> bytes:
        """Exactly these bytes of an object, or ObjectMissing, or a temporary DiscordError."""

    async def newest_id(self) -> int:
        """The newest message id known; what is posted later has a higher one."""

    async def find(self, after: int, names: Collection[str]) -> dict[str, Location]:
        """Objects with these names in messages after an id; those that are there."""
