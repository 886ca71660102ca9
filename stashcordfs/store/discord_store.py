"""The store over Discord: packs as attachments, several a message, spread over data channels."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from stashcordfs.discord.cdn import fetch_range
from stashcordfs.discord.links import LinkLeases
from stashcordfs.discord.multipart import UploadFile
from stashcordfs.errors import (
    DiscordError,
    DiscordRefused,
    LinkExpired,
    NotFound,
    ObjectMissing,
    StoreError,
    TooLarge,
)
from stashcordfs.store.limits import LearnedLimits
from stashcordfs.store.record import PREFIX
from stashcordfs.types import Limits, Location

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    from stashcordfs.discord.client import DiscordClient
    from stashcordfs.discord.models import Attachment, Message
    from stashcordfs.store.pack import FinishedPack

_PAGE = 100
_MAX_PAGES = 200


class DiscordStore:
    """Satisfies `store.api.ObjectStore`."""

    def __init__(
        self, client: DiscordClient, *, channels: Sequence[int], journal_channel: int
    ) -> None:
        """`channels` take packs in turns; the record goes to `journal_channel`."""
        self._client = client
        self._channels = list(channels)
        self._journal_channel = journal_channel
        self._links = LinkLeases(client, time.time)
        self._limits = LearnedLimits()
        self._newest = 0
        self._turn = 0
        self._tier_known = False

    @property
    def limits(self) -> Limits:
        """What one message may carry now."""
        return self._limits.now

    # ------------------------------------------------------------------ packs

    async def put(self, packs: Sequence[FinishedPack], *, nonce: str) -> list[Location]:
        """Post all packs in one message. The answer counts only if every size matches."""
        channel = self._channels[self._turn % len(self._channels)]
        self._turn += 1
        files = [UploadFile(pack.filename, pack.parts) for pack in packs]
        try:
            message = await self._client.create_message(channel, files, nonce=nonce)
        except TooLarge:
            self._limits.refused(max(pack.size for pack in packs))
            raise
        self._newest = max(self._newest, message.id)
        self._links.learn(message)
        return _match(packs, message)

    async def fetch(self, location: Location, start: int, length: int) -> bytes:
        """Exactly these bytes. A link that was refused is renewed once."""
        address = (location.channel, location.message, location.attachment)
        for attempt in range(2):
            url = await self._links.url(*address, location.filename)
            try:
                return await fetch_range(self._client, url, start, length)
            except LinkExpired:
                self._links.forget(*address)
                if attempt:
                    break
            except NotFound as error:
                raise ObjectMissing(f"attachment {location.filename}: {error}") from error
            except DiscordRefused as error:
                raise StoreError(f"attachment {location.filename}: {error}") from error
        raise ObjectMissing(f"the CDN does not serve {location.filename} by a fresh link")

    async def newest_id(self) -> int:
        """The newest message id known over all data channels."""
        if not self._newest:
            for channel in self._channels:
                page = await self._client.list_messages(channel, limit=1)
                self._newest = max(self._newest, *(m.id for m in page), 1)
        await self._learn_tier()
        return self._newest

    async def _learn_tier(self) -> None:
        if self._tier_known:
            return
        channel = await self._client.channel(self._channels[0])
        if channel.guild_id is not None:
            guild = await self._client.guild(channel.guild_id)
            self._limits.learn_tier(guild.premium_tier)
        self._tier_known = True

    async def find(self, after: int, names: Collection[str]) -> dict[str, Location]:
        """Objects with these names in messages after an id."""
        found: dict[str, Location] = {}
        for channel in self._channels:
            async for message in self._since(channel, after):
                for attachment in message.attachments:
                    if attachment.filename in names:
                        found[attachment.filename] = _location(message, attachment)
            if len(found) == len(names):
                break
        return found

    async def _since(self, channel: int, after: int) -> AsyncIterator[Message]:
        for _ in range(_MAX_PAGES):
            page = await self._client.list_messages(channel, after=after, limit=_PAGE)
            for message in page:
                yield message
            if len(page) < _PAGE:
                return
            after = max(message.id for message in page)

    # ------------------------------------------------------------------ the volume's record

    async def check(self) -> None:
        """Raise what stands in the way of using the channels: token, access, kind of channel."""
        await self._client.current_user()
        for channel in {*self._channels, self._journal_channel}:
            await self._client.channel(channel)
            await self._client.list_messages(channel, limit=1)

    async def post_record(self, data: bytes, filename: str, *, nonce: str) -> int:
        """Post a volume's record to the journal channel; its message id."""
        message = await self._client.create_message(
            self._journal_channel, [UploadFile(filename, [data])], nonce=nonce
        )
        if [a.size for a in message.attachments] != [len(data)]:
            raise StoreError("the volume's record did not arrive as it was sent")
        self._links.learn(message)
        return message.id

    async def find_records(self) -> list[tuple[int, str]]:
        """Volume records in the journal channel, oldest first: message id and file name."""
        found = []
        async for message in self._since(self._journal_channel, 1):
            found += [
                (message.id, a.filename)
                for a in message.attachments
                if a.filename.startswith(PREFIX)
            ]
        return sorted(found)


def _location(message: Message, attachment: Attachment) -> Location:
    return Location(
        message.channel_id, message.id, attachment.id, attachment.filename, attachment.size
    )


def _match(packs: Sequence[FinishedPack], message: Message) -> list[Location]:
    """Each pack's attachment: by name, else by the one unclaimed attachment of its size."""
    left = list(message.attachments)
    placed: dict[str, Location] = {}
    for by_name in (True, False):
        for pack in packs:
            if pack.filename in placed:
                continue
            fits = [
                a for a in left
                if a.size == pack.size and (not by_name or a.filename == pack.filename)
            ]  # fmt: skip
            if len(fits) == 1:
                placed[pack.filename] = _location(message, fits[0])
                left.remove(fits[0])
    if len(placed) != len(packs):
        raise DiscordError("the message does not hold what was sent; it is left alone")
    return [placed[pack.filename] for pack in packs]
