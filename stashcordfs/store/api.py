"""What the rest asks of a store: put, fetch, find, delete. Its forms are Discord and a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from stashcordfs.errors import ObjectCorrupt
from stashcordfs.types import Location

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from stashcordfs.types import Limits

RECORD_PREFIX = "stashcordfs-volume-"
MAX_RECORD_BYTES = 64 << 10
BULK_S = 13 * 86_400.0  # younger messages go together: Discord refuses that from 14 days on


class Page(NamedTuple):
    """Attachments of some messages, oldest first. `last`: the last id looked at, None: no more."""

    attachments: list[Location]
    last: int | None


class Uploadable(Protocol):
    """What one attachment is made of: a pack, an object of the journal, a record."""

    @property
    def filename(self) -> str:
        """The attachment's name."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def parts(self) -> list[bytes]:
        """The bytes, in pieces."""


class OnePiece:
    """An uploadable whose bytes are in one piece."""

    __slots__ = ()
    data: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    @property
    def parts(self) -> list[bytes]:
        """The bytes in pieces, as packs have them."""
        return [self.data]


class ObjectStore(Protocol):
    """Objects in messages. All methods may run in parallel and may be cancelled."""

    @property
    def limits(self) -> Limits:
        """What one message may carry now."""

    @property
    def channels(self) -> Sequence[int]:
        """Where packs are put."""

    def age_s(self, message: int) -> float:
        """Seconds since a message was made, by the server's clock."""

    async def ping(self) -> None:
        """One small request, not repeated: returns when the store answers. DiscordError."""

    async def put(self, packs: Sequence[Uploadable], *, nonce: str) -> list[Location]:
        """Post one message; where each pack is, in order.

        OutcomeUnknown: it may be stored (repeat with the same nonce, or `find`). TooLarge: the
        limits were lowered, pack anew.
        """

    def doubtful(self, nonce: str) -> bool:
        """Whether a post under this nonce succeeded, but may yet be carried out once more."""

    async def fetch(self, location: Location, start: int, length: int) -> bytes:
        """Exactly these bytes. ObjectMissing, ObjectCorrupt when shorter than recorded."""

    async def newest_id(self) -> int:
        """An id before every message that is posted from now on."""

    async def find(self, after: int, names: Collection[str]) -> dict[str, Location]:
        """Those of the named attachments that stand in own messages after this id."""

    async def page(self, channel: int, after: int, *, own: bool = False) -> Page:
        """What messages after this id carry, at most 100 of them, whoever posted them.

        `own`: only what this bot has posted.
        """

    async def page_back(self, before: int | None) -> Page:
        """What messages before this id (None: the newest) carry, at most 100, of any author.

        `last` is the oldest id looked at, to go on from. Of a store that is bound to one channel.
        """

    async def attachments(self, channel: int, message: int) -> list[Location] | None:
        """What one message carries now; None when there is no such message."""

    async def find_all(self, after: int, names: Collection[str]) -> list[Location]:
        """The same, each occurrence of a name: one message may have been made twice."""

    async def listed(self, after: int) -> list[Location]:
        """Every attachment of own messages after this id, oldest first."""

    async def post_record(self, data: bytes, filename: str) -> Location:
        """Post the volume's record to the journal channel."""

    async def find_records(self) -> list[bytes]:
        """What bears a record's name in the journal channel, oldest first; not yet verified."""

    async def link(self, location: Location) -> str:
        """Where an attachment is served now; a lease. ObjectMissing when it is gone."""

    async def serves(self, link: str) -> bool:
        """Whether a link still leads to anything: a deleted file may be served for hours."""

    async def delete(self, messages: Sequence[tuple[int, int]]) -> None:
        """Delete messages (channel, id). One that is gone already is no error."""


def match_attachments(
    wanted: Sequence[tuple[str, int]],
    got: Sequence[tuple[int, str, int]],
    *,
    channel: int,
    message: int,
) -> list[Location]:
    """Pair the sent (name, size) with the echoed (id, name, size). ObjectCorrupt when one is off.

    A server may clean a name; then a size that only one file has still tells which it is.
    """
    left = list(got)
    found: list[Location | None] = []
    for name, size in wanted:
        hit = next((item for item in left if item[1] == name and item[2] == size), None)
        if hit:
            left.remove(hit)
        found.append(hit and Location(channel, message, *hit))
    for at, (name, size) in enumerate(wanted):
        if found[at] is None:
            fits = [item for item in left if item[2] == size]
            rivals = [n for i, (n, s) in enumerate(wanted) if s == size and found[i] is None]
            if len(fits) != 1 or len(rivals) != 1:
                raise ObjectCorrupt(f"the server did not keep {name} as it was sent")
            left.remove(fits[0])
            found[at] = Location(channel, message, *fits[0])
    if left:
        raise ObjectCorrupt("the server's message has attachments that were not sent")
    return [location for location in found if location is not None]
