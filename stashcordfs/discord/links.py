"""Link leases: from an attachment's ids to a link that the CDN serves now.

Ids are addresses, links are leases: a link dies after about a day and is never stored. Every
message that anybody reads renews its links here (`learn`). A renewal fetches the page of 100
messages from the wanted one on, so that a sequential reader renews once in a hundred messages;
renewals of a channel go one after another, and whoever waited finds the neighbour's work done.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qs, urlsplit

import trio
from cachetools import LRUCache

from stashcordfs.errors import AccessDenied, NotFound, ObjectMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stashcordfs.discord.models import Attachment, Message

_MARGIN_S = 60.0  # a link must outlive the download that starts with it
_UNSIGNED_LEASE_S = 3600.0  # a link without an expiry (an older server): looked up now and then
_PAGE = 100


class MessageSource(Protocol):
    """DiscordClient, as far as it concerns leases."""

    async def list_messages(
        self,
        channel_id: int,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
        background: bool = False,
    ) -> list[Message]: ...

    async def get_message(
        self, channel_id: int, message_id: int, *, background: bool = False
    ) -> Message: ...

    async def own_id(self) -> int: ...

    def server_now(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class _Lease:
    url: str
    expires: float  # the server's wall clock


_Key = tuple[int, int, int]  # channel, message, attachment


class LinkLeases:
    def __init__(
        self, client: MessageSource, clock_wall: Callable[[], float], *, capacity: int = 20_000
    ) -> None:
        self._client = client
        self._clock_wall = clock_wall
        self._leases: LRUCache[_Key, _Lease] = LRUCache(capacity)
        self._waiting: dict[int, list[int]] = {}  # channel -> messages that readers wait for
        self._renewals: LRUCache[int, trio.Lock] = LRUCache(1024)

    def learn(self, message: Message) -> None:
        """Take the links of a message that the API has just answered with."""
        for attachment in message.attachments:
            key = (message.channel_id, message.id, attachment.id)
            self._leases[key] = _Lease(attachment.url, self._expiry(attachment.url))

    def forget(
        self, channel: int, message: int, attachment: int, *, url: str | None = None
    ) -> None:
        """The CDN refused the link: the next call renews it.

        With `url` only that link is dropped, not a newer one that another reader has fetched since.
        """
        key = (channel, message, attachment)
        lease = self._leases.get(key)
        if lease is not None and url in (None, lease.url):
            del self._leases[key]

    async def url(self, channel: int, message: int, attachment: int, filename: str) -> str:
        """A link that is served now. Raises ObjectMissing when the attachment is gone."""
        found = self._valid((channel, message, attachment))
        if found is not None:
            return found
        waiting = self._waiting.setdefault(channel, [])
        bisect.insort(waiting, message)
        try:
            async with self._renewals.setdefault(channel, trio.Lock()):
                found = self._valid((channel, message, attachment))
                if found is not None:
                    return found
                wanted = await self._renew(channel, message, waiting[0])
                return await self._pick(wanted, attachment, filename)
        finally:
            waiting.remove(message)
            if not waiting:
                self._waiting.pop(channel, None)

    def _now(self) -> float:
        """The server's clock decides when a link dies; ours may be wrong by much."""
        now = self._client.server_now()
        return self._clock_wall() if now is None else now

    def _valid(self, key: _Key) -> str | None:
        lease = self._leases.get(key)
        return lease.url if lease is not None and self._now() < lease.expires else None

    def _expiry(self, url: str) -> float:
        """From the link's own `ex` and `is` (hexadecimal seconds), less a margin."""
        fields = parse_qs(urlsplit(url).query)
        now = self._now()
        expires, issued = _hex(fields.get("ex")), _hex(fields.get("is"))
        if expires is None:
            return now + _UNSIGNED_LEASE_S
        life = expires - (now if issued is None else issued)
        return expires - min(_MARGIN_S, max(0.0, life) / 4)

    async def _renew(self, channel: int, message: int, lowest: int) -> Message:
        """The wanted message, and the links of a page from the lowest id that anybody waits for."""
        for first in sorted({lowest, message}):
            page = await self._client.list_messages(channel, after=first - 1, limit=_PAGE)
            for each in page:
                self.learn(each)
            wanted = next((each for each in page if each.id == message), None)
            if wanted is not None:
                return wanted
        # A page may lag behind, and comes back empty without the right to read the history;
        # asking for the one message tells these apart from a message that is gone.
        try:
            wanted = await self._client.get_message(channel, message)
        except NotFound as error:
            if error.code in (0, 10008):
                raise ObjectMissing(f"message {message} is not in channel {channel}") from error
            raise
        self.learn(wanted)
        return wanted

    async def _pick(self, wanted: Message, attachment: int, filename: str) -> str:
        found = _match(wanted.attachments, attachment, filename)
        if found is not None:
            # remembered under the id that was asked for, should the server have given another
            key = (wanted.channel_id, wanted.id, attachment)
            self._leases[key] = _Lease(found.url, self._expiry(found.url))
            return found.url
        if not wanted.attachments and wanted.author_id != await self._client.own_id():
            raise AccessDenied(
                f"message {wanted.id} of another bot shows no attachments; switch on the "
                "MESSAGE_CONTENT intent of this bot in the developer portal",
                status=403,
            )
        raise ObjectMissing(f"attachment {attachment} is not on message {wanted.id} any more")


def _match(attachments: Iterable[Attachment], attachment: int, filename: str) -> Attachment | None:
    attachments = tuple(attachments)
    by_id = (each for each in attachments if each.id == attachment)
    by_name = (each for each in attachments if each.filename == filename)
    return next(by_id, None) or next(by_name, None)


def _hex(values: list[str] | None) -> int | None:
    try:
        return int(values[0], 16) if values else None
    except ValueError:
        return None
