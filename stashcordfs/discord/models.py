"""What Discord answers, reduced to what we use. Parsers only; no I/O.

Tolerant on purpose: unknown fields are ignored and optional ones may be absent, because the API
grows fields without notice. What is not even shaped like the object raises DiscordUnavailable: it
came from something between us and Discord, and asking again can help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stashcordfs.errors import DiscordUnavailable

_EPOCH_MS = 1_420_070_400_000  # Discord's own epoch, the first second of 2015


@dataclass(frozen=True, slots=True)
class Attachment:
    id: int
    filename: str
    size: int
    url: str


@dataclass(frozen=True, slots=True)
class Message:
    id: int
    channel_id: int
    author_id: int  # 0 when the message has no author that we can read
    type: int
    attachments: tuple[Attachment, ...]


@dataclass(frozen=True, slots=True)
class User:
    id: int
    username: str


@dataclass(frozen=True, slots=True)
class Channel:
    id: int
    guild_id: int | None
    type: int
    name: str


@dataclass(frozen=True, slots=True)
class Guild:
    id: int
    premium_tier: int
    features: tuple[str, ...]


def snowflake_time(snowflake: int) -> float:
    """Seconds since the Unix epoch at which an id was made, by the server's clock."""
    return ((snowflake >> 22) + _EPOCH_MS) / 1000


def snowflake_at(unix_s: float) -> int:
    """The lowest id of a moment: a cursor for listings."""
    return max(0, (int(unix_s * 1000) - _EPOCH_MS) << 22)


def _fields(data: object, what: str) -> Mapping[str, object]:
    if not isinstance(data, Mapping):
        raise DiscordUnavailable(f"the answer is not a {what}; ask again later")
    return data


def _int(value: object, what: str) -> int:
    """Ids come as strings, counts as numbers; either is taken for either."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    raise DiscordUnavailable(f"the answer's {what} is not a number; ask again later")


def _str(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise DiscordUnavailable(f"the answer's {what} is not a text; ask again later")
    return value


def _sequence(value: object, what: str) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise DiscordUnavailable(f"the answer's {what} is not a list; ask again later")
    return value


def parse_attachment(data: object) -> Attachment:
    fields = _fields(data, "attachment")
    return Attachment(
        id=_int(fields.get("id"), "attachment id"),
        filename=_str(fields.get("filename"), "attachment filename"),
        size=_int(fields.get("size"), "attachment size"),
        url=_str(fields.get("url"), "attachment url"),
    )


def parse_message(data: object, *, channel_id: int = 0) -> Message:
    """`channel_id` is what was asked for, used where the answer does not repeat it."""
    fields = _fields(data, "message")
    author = fields.get("author")
    author_id = author.get("id") if isinstance(author, Mapping) else None
    return Message(
        id=_int(fields.get("id"), "message id"),
        channel_id=_int(fields.get("channel_id", channel_id), "channel id"),
        author_id=0 if author_id is None else _int(author_id, "author id"),
        type=_int(fields.get("type", 0), "message type"),
        attachments=tuple(
            parse_attachment(item) for item in _sequence(fields.get("attachments"), "attachments")
        ),
    )


def parse_messages(data: object, *, channel_id: int) -> list[Message]:
    if not isinstance(data, list):
        raise DiscordUnavailable("the answer is not a list of messages; ask again later")
    return [parse_message(item, channel_id=channel_id) for item in data]


def parse_user(data: object) -> User:
    fields = _fields(data, "user")
    return User(_int(fields.get("id"), "user id"), _str(fields.get("username", ""), "user name"))


def parse_channel(data: object) -> Channel:
    fields = _fields(data, "channel")
    guild = fields.get("guild_id")
    return Channel(
        id=_int(fields.get("id"), "channel id"),
        guild_id=None if guild is None else _int(guild, "guild id"),
        type=_int(fields.get("type", 0), "channel type"),
        name=_str(fields.get("name") or "", "channel name"),
    )


def parse_guild(data: object) -> Guild:
    fields = _fields(data, "guild")
    features = _sequence(fields.get("features"), "features")
    return Guild(
        id=_int(fields.get("id"), "guild id"),
        premium_tier=_int(fields.get("premium_tier", 0), "boost tier"),
        features=tuple(item for item in features if isinstance(item, str)),
    )


def parse_refreshed(data: object) -> dict[str, str]:
    """Old link -> new link; a link that the server could not renew is left out."""
    pairs = _sequence(_fields(data, "list of links").get("refreshed_urls"), "links")
    fresh: dict[str, str] = {}
    for pair in pairs:
        if isinstance(pair, Mapping):
            old, new = pair.get("original"), pair.get("refreshed")
            if isinstance(old, str) and isinstance(new, str):
                fresh[old] = new
    return fresh
