"""The store on Discord: packs as attachments, spread over the data channels by who is least busy.

Ids are addresses; links are leased from `discord.links` and renewed when the CDN refuses one.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from cachetools import LRUCache

from stashcordfs.discord.cdn import fetch_range
from stashcordfs.discord.client import DiscordClient, UploadFile
from stashcordfs.discord.links import LinkLeases
from stashcordfs.discord.models import snowflake_time
from stashcordfs.discord.policy import UNKNOWN_MESSAGE
from stashcordfs.errors import (
    AccessDenied,
    DiscordError,
    DiscordRefused,
    LinkExpired,
    NotFound,
    ObjectCorrupt,
    ObjectMissing,
    StoreError,
    TooLarge,
)
from stashcordfs.store.api import (
    BULK_S,
    MAX_RECORD_BYTES,
    RECORD_PREFIX,
    Page,
    match_attachments,
)
from stashcordfs.store.limits import LearnedLimits
from stashcordfs.store.packer import least_limits
from stashcordfs.types import Limits, Location

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from stashcordfs.discord.models import Attachment, Message
    from stashcordfs.store.api import Uploadable

_PAGE = 100
_RECORD_PAGES = 5  # of the channel's beginning; later records stand on its newest page
_YOUNG_S = 60.0  # until then a message that is not shown may yet appear
_GAP_FIRST_S, _GAP_LONGEST_S = 0.5, 5.0  # between looks for it: up to three requests each


class DiscordStore:
    """An ObjectStore in Discord channels. Makes no request before it is asked for something."""

    def __init__(
        self,
        client: DiscordClient,
        *,
        channels: Sequence[int],
        journal_channel: int,
        block_bytes: int = 1 << 20,
        limits: Limits | None = None,
        clock_wall: Callable[[], float] = time.time,
    ) -> None:
        """`channels` carry packs; the record is in `journal_channel`. Blocks are never cut."""
        self._client = client
        self._busy = dict.fromkeys(channels, 0)
        self._journal_channel = journal_channel
        self._learned = LearnedLimits(limits, least=least_limits(block_bytes))
        self._clock_wall = clock_wall
        self._leases = LinkLeases(client, clock_wall)
        self._newest: int | None = None
        self._sent: LRUCache[str, int] = LRUCache(1024)
        self._doubtful: LRUCache[str, bool] = LRUCache(1024)

    @property
    def limits(self) -> Limits:
        """What one message may carry now."""
        return self._learned.limits

    async def learn_limits(self) -> Limits:
        """Ask the guild for its boost tier; done before the first upload."""
        channel = await self._client.channel(self._journal_channel)
        if channel.guild_id is not None:
            guild = await self._client.guild(channel.guild_id)
            self._learned.know_guild(guild.premium_tier, guild.features)
        return self.limits

    async def ping(self) -> None:
        """Ask who we are, once."""
        await self._client.ping()

    async def put(self, packs: Sequence[Uploadable], *, nonce: str) -> list[Location]:
        """Post one message to the channel with the fewest posts under way."""
        channel = self._channel_of(nonce)
        # Taking the channel out and in again makes equals take turns.
        self._busy[channel] = self._busy.pop(channel) + 1
        files = [UploadFile(pack.filename, pack.parts) for pack in packs]
        try:
            message = await self._client.create_message(
                channel, files, nonce=nonce, doubt=lambda: self._doubt(nonce)
            )
        except TooLarge as error:
            if not self._learned.too_large([pack.size for pack in packs]):
                largest = max(pack.size for pack in packs)
                raise StoreError(
                    f"Discord refuses even the smallest message that holds a block, of {largest} "
                    "bytes; is there a proxy in between?"
                ) from error
            raise
        finally:
            self._busy[channel] -= 1
        self._learned.accepted()
        try:
            return self._locate(message, [(pack.filename, pack.size) for pack in packs])
        except ObjectCorrupt:  # what is not as it was sent must not stay
            with suppress(DiscordError):
                await self._client.delete_message(message.channel_id, message.id)
            raise

    def doubtful(self, nonce: str) -> bool:
        """Whether some attempt under this nonce was not answered before one was."""
        return nonce in self._doubtful

    def _doubt(self, nonce: str) -> None:
        self._doubtful[nonce] = True

    async def fetch(self, location: Location, start: int, length: int) -> bytes:
        """Exactly these bytes, by a leased link.

        The API calls itself eventually consistent (Discord's reference, "Consistency"): a message
        may be missing for a moment after it was made, and so may its file on the CDN. So a young
        one is looked for until it is no longer young, or the caller's deadline ends it.
        """
        delay_s, waited_s = _GAP_FIRST_S, 0.0
        while True:
            try:
                return await self._fetch_leased(location, start, length)
            except ObjectMissing:
                # waited_s: a server whose Date is far behind its ids must not hold us for ever
                if waited_s >= _YOUNG_S or self.age_s(location.message) >= _YOUNG_S:
                    raise
            await self._client.pause(delay_s)
            waited_s += delay_s
            delay_s = min(2 * delay_s, _GAP_LONGEST_S)

    async def _fetch_leased(self, location: Location, start: int, length: int) -> bytes:
        """By the link that is known; a refused one is renewed once."""
        where = (location.channel, location.message, location.attachment)
        for _ in range(2):
            url = await self._leases.url(*where, location.filename)
            try:
                return await fetch_range(self._client, url, start, length)
            except LinkExpired:
                self._leases.forget(*where, url=url)
            except DiscordRefused as error:
                if error.status == 416:
                    raise ObjectCorrupt("an attachment is shorter than recorded") from error
                raise
        raise ObjectMissing(f"attachment {location.attachment} is not on Discord any more")

    async def newest_id(self) -> int:
        """An id before every message that is posted from now on: ids grow with time."""
        if self._newest is None:
            newest = 0
            for channel in list(self._busy):
                page = await self._client.list_messages(channel, limit=1, background=True)
                newest = max([newest, *(message.id for message in page)])
            with suppress(AccessDenied, NotFound):  # the defaults do as well
                await self.learn_limits()
            self._newest = max(newest, self._newest or 0)
        return self._newest

    async def find(self, after: int, names: Collection[str]) -> dict[str, Location]:
        """Those of the named attachments that stand in own messages after this id.

        Own ones only: anybody who reads the channel could post a file of a name that he saw there.
        """
        return {at.filename: at for at in await self.find_all(after, names)}

    async def find_all(self, after: int, names: Collection[str]) -> list[Location]:
        """Each occurrence of them, by channel and age."""
        own = await self._client.own_id()
        return [
            _location(message, attachment)
            for channel in list(self._busy)
            for message in await self._after(channel, after)
            if message.author_id == own
            for attachment in message.attachments
            if attachment.filename in names
        ]

    @property
    def channels(self) -> Sequence[int]:
        """Where packs are put."""
        return sorted(self._busy)

    async def page(self, channel: int, after: int, *, own: bool = False) -> Page:
        """What messages after this id carry. One request; the links are kept for reading."""
        author = await self._client.own_id() if own else None
        found = await self._client.list_messages(channel, after=after, limit=_PAGE, background=True)
        found.sort(key=lambda message: message.id)
        for message in found:
            self._leases.learn(message)
        carried = [
            _location(message, a)
            for message in found
            if author in (None, message.author_id)
            for a in message.attachments
        ]
        return Page(carried, found[-1].id if len(found) == _PAGE else None)

    async def page_back(self, before: int | None) -> Page:
        """What messages before this id carry, of any author. One request."""
        channel = next(iter(self._busy))
        found = await self._client.list_messages(channel, before=before, limit=_PAGE)
        found.sort(key=lambda message: message.id)
        for message in found:
            self._leases.learn(message)
        carried = [_location(message, a) for message in found for a in message.attachments]
        return Page(carried, found[0].id if len(found) == _PAGE else None)

    async def attachments(self, channel: int, message: int) -> list[Location] | None:
        """What one message carries now; None when there is no such message. One request."""
        try:
            found = await self._client.get_message(channel, message, background=True)
        except NotFound as error:
            if error.code == UNKNOWN_MESSAGE:
                return None
            raise  # the channel itself, for instance
        if not found.attachments and found.author_id != await self._client.own_id():
            raise StoreError(
                "another bot's attachments are not shown to this one: switch on its "
                "Message Content Intent, or use the bot that sent them"
            )
        return [_location(found, a) for a in found.attachments]

    async def listed(self, after: int) -> list[Location]:
        """Every attachment of own messages after this id, oldest first."""
        own = await self._client.own_id()
        found: list[Location] = []
        for channel in list(self._busy):
            for message in await self._after(channel, after):
                self._leases.learn(message)
                if message.author_id == own:
                    found += [_location(message, a) for a in message.attachments]
        return found

    async def post_record(self, data: bytes, filename: str) -> Location:
        """Post the volume's record to the journal channel."""
        message = await self._client.create_message(
            self._journal_channel, [UploadFile(filename, [data])], nonce=secrets.token_hex(12)
        )
        return self._locate(message, [(filename, len(data))])[0]

    async def find_records(self) -> list[bytes]:
        """What bears a record's name, at the journal channel's beginning and on its last page."""
        channel = self._journal_channel
        messages = await self._after(channel, 0, pages=_RECORD_PAGES)
        messages += await self._client.list_messages(channel)
        by_id = {message.id: message for message in messages}
        records = []
        for _, message in sorted(by_id.items()):
            self._leases.learn(message)
            for attachment in message.attachments:
                small = 0 < attachment.size <= MAX_RECORD_BYTES
                if small and attachment.filename.startswith(RECORD_PREFIX):
                    location = _location(message, attachment)
                    records.append(await self.fetch(location, 0, attachment.size))
        return records

    async def link(self, location: Location) -> str:
        """Where an attachment is served now; a lease. ObjectMissing when it is gone."""
        return await self._leases.url(
            location.channel, location.message, location.attachment, location.filename
        )

    async def serves(self, link: str) -> bool:
        """Whether the CDN still answers to a link. DiscordError when it cannot be asked."""
        try:
            await fetch_range(self._client, link, 0, 1)
        except LinkExpired:
            return False
        return True

    async def delete(self, messages: Sequence[tuple[int, int]]) -> None:
        """Delete messages, young ones together. One that is gone already is no error."""
        for channel in sorted({channel for channel, _ in messages}):
            ids = sorted({number for where, number in messages if where == channel})
            young = [number for number in ids if self.age_s(number) < BULK_S]
            if young:
                await self._client.bulk_delete(channel, young)
            for number in ids:
                if number not in young:
                    await self._client.delete_message(channel, number)

    def age_s(self, message: int) -> float:
        """Seconds since a message was made, by the server's clock."""
        now = self._client.server_now() or self._clock_wall()
        return now - snowflake_time(message)

    def _channel_of(self, nonce: str) -> int:
        """The least busy channel; for a nonce sent before its own one, where it is known."""
        if nonce not in self._sent:
            self._sent[nonce] = min(self._busy, key=self._busy.__getitem__)
        return self._sent[nonce]

    def _locate(self, message: Message, wanted: Sequence[tuple[str, int]]) -> list[Location]:
        got = [(a.id, a.filename, a.size) for a in message.attachments]
        where = match_attachments(wanted, got, channel=message.channel_id, message=message.id)
        self._leases.learn(message)
        if self._newest is not None:
            self._newest = max(self._newest, message.id)
        return where

    async def _after(self, channel: int, after: int, *, pages: int | None = None) -> list[Message]:
        """Messages after an id, oldest first."""
        all_of_them: list[Message] = []
        while pages is None or pages > 0:
            page = await self._client.list_messages(channel, after=after, limit=_PAGE)
            all_of_them += sorted(page, key=lambda message: message.id)
            if len(page) < _PAGE:
                break
            after = all_of_them[-1].id
            pages = None if pages is None else pages - 1
        return all_of_them


def _location(message: Message, a: Attachment) -> Location:
    return Location(message.channel_id, message.id, a.id, a.filename, a.size)
