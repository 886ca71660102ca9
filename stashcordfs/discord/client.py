"""The REST client: the routes we use, one `request` chain, uploads with a nonce.

It knows messages and attachments, not what is in them. One instance per volume, inside one trio
loop; methods may run in parallel and may be cancelled at any time (a cancelled create may have
been carried out: repeat it with its nonce, or list).

The token is asked for anew with each request, goes to the API's host only (redirects are not
followed, the CDN is asked by a second HTTP client that never holds it), and is kept nowhere: not
in repr, logs, or error texts. After a 401 the same token is sent by `check_token` alone, now and
then (`gate`), because every 401 counts towards a ban of the host.

The clock should go on while the machine sleeps (CLOCK_BOOTTIME): limits, links and the memory of a
nonce do. After a sleep the owner calls `resumed`.
"""

from __future__ import annotations

import logging
import random
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

import httpx
import trio

from stashcordfs import __version__
from stashcordfs.discord import models, policy, wire
from stashcordfs.discord.connections import Connections
from stashcordfs.discord.gate import TokenGate
from stashcordfs.discord.limiter import RateLimiter, Route
from stashcordfs.discord.multipart import MultipartBody, Sending, UploadFile, message_payload
from stashcordfs.discord.queue import GrantQueue
from stashcordfs.errors import (
    DiscordError,
    DiscordUnavailable,
    NotFound,
    OutcomeUnknown,
    TooLarge,
    UsageError,
)
from stashcordfs.ops.accounting import count_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from stashcordfs.discord.kept import KeptLimits
    from stashcordfs.discord.models import Channel, Guild, Message, User

__all__ = ["ClientStats", "DiscordClient", "UploadFile"]

_log = logging.getLogger(__name__)

_USER_AGENT = f"DiscordBot (https://github.com/stashcordfs/stashcordfs, {__version__})"
_PAGE = 100
_REFRESH_AT_ONCE = 50
_BULK_DELETE = range(2, 101)
_YOUNG_S = 10.0
_OLD_S = 14 * 86_400.0
_NONCE_SAFE_S = 120.0  # the documentation says: a few minutes
_EDIT_OLD_S = 3600.0


@dataclass(slots=True)
class ClientStats:
    """Counters since the client was made; read by status and metrics at any time."""

    requests: int = 0
    messages_sent: int = 0
    rate_limited: int = 0
    invalid: int = 0
    bytes_sent: int = 0
    bytes_streamed: int = 0  # as they leave, also of requests that fail later
    bytes_received: int = 0
    downloads: int = 0


class DiscordClient:
    def __init__(
        self,
        *,
        api_url: str,
        token: Callable[[], str],
        clock: Callable[[], float] = trio.current_time,
        transport: httpx.AsyncBaseTransport | None = None,
        timeout_s: float = 60.0,
        stats: ClientStats | None = None,
        limiter: RateLimiter | None = None,
        kept: KeptLimits | None = None,
    ) -> None:
        """`api_url` holds the version (https://discord.com/api/v10). Use as `async with`.

        With `kept` the limiter goes on where another process of the same volume ended.
        """
        parts = urlsplit(api_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError("api_url must be like https://discord.com/api/v10")
        self._url = api_url.rstrip("/")
        self.gate = TokenGate(token)
        self._clock = clock
        self._transport = transport
        self._timeout_s = timeout_s
        # proxies of the environment are for the world outside, not for a server on loopback
        self._trust_env = parts.scheme == "https"
        self._limiter = limiter or RateLimiter()
        self._queue = GrantQueue(self._limiter, clock)
        self._kept = kept
        self._hurry = trio.Event()
        self._server_time: tuple[float, float] | None = None
        self._me: User | None = None
        self.stats = stats or ClientStats()

    def __repr__(self) -> str:
        return f"<DiscordClient {urlsplit(self._url).hostname}>"

    async def __aenter__(self) -> Self:
        self._connections = Connections(self._http)
        if self._kept is not None:
            self._kept.load(self._limiter, self._clock())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connections.aclose()
        if self._kept is not None:
            self._kept.close()

    def _keep_limits(self) -> None:
        if self._kept is not None:
            self._kept.save(self._limiter, self._clock())

    def _http(self, connections: int) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=self._transport,
            timeout=httpx.Timeout(self._timeout_s, connect=min(10.0, self._timeout_s)),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=16),
            headers={"User-Agent": _USER_AGENT},
            follow_redirects=False,
            trust_env=self._trust_env,
        )

    # What is known of the server without asking

    def server_now(self) -> float | None:
        """The server's wall clock, from the last Date header; None before the first answer."""
        if self._server_time is None:
            return None
        at_server, at_us = self._server_time
        return at_server + self._clock() - at_us

    @property
    def limiter(self) -> RateLimiter:
        return self._limiter

    # Time, and a machine that sleeps

    @property
    def clock(self) -> Callable[[], float]:
        return self._clock

    async def pause(self, seconds: float) -> None:
        """Wait by the client's clock: `resumed` ends what a sleep of the machine has outlasted."""
        until = self._clock() + seconds
        while (left := until - self._clock()) > 0:
            hurry = self._hurry
            with trio.move_on_after(left):
                await hurry.wait()

    async def resumed(self) -> None:
        """The machine has slept: drop all connections, and let all who wait look at the clock.

        What was under way fails as if its connection had broken, and is repeated like that.
        """
        await self._connections.drop()
        self._hurry.set()
        self._hurry = trio.Event()
        self._queue.wake()

    # Objects

    async def current_user(self, *, probe: bool = False) -> User:
        answer = await self._request(
            policy.Call(route=Route("GET", "/users/@me"), path="/users/@me", probe=probe)
        )
        self._me = models.parse_user(answer)
        return self._me

    async def check_token(self) -> None:
        """Ask whether the token is good: one request, also of a refused one whose time has come.

        TokenRejected when it is not, or when it is too early to ask again.
        """
        await self.current_user(probe=True)

    async def own_id(self) -> int:
        """The bot's own id, asked for once."""
        return (self._me or await self.current_user()).id

    async def ping(self) -> None:
        """One small request, not repeated: does anybody answer?"""
        route = Route("GET", "/users/@me")
        await self._request(policy.Call(route=route, path="/users/@me", attempts=1))

    async def channel(self, channel_id: int) -> Channel:
        return models.parse_channel(
            await self._request(_call("GET", "/channels/{}", channel_id, path=f"/{channel_id}"))
        )

    async def guild(self, guild_id: int) -> Guild:
        route = Route("GET", "/guilds/{}", str(guild_id))
        return models.parse_guild(
            await self._request(policy.Call(route=route, path=f"/guilds/{guild_id}"))
        )

    # Messages

    async def create_message(
        self,
        channel_id: int,
        files: Sequence[UploadFile],
        *,
        nonce: str,
        payload: Mapping[str, object] | None = None,
        doubt: Callable[[], None] = lambda: None,
    ) -> Message:
        """Post one message with these attachments.

        `nonce` (at most 25 characters, unique to this content for ever) makes it safe to repeat for
        some minutes: the server answers with the first message. Raises OutcomeUnknown when it may
        have been stored; also when the nonce is known but its message was deleted meanwhile.
        `doubt` is called when it succeeded after an attempt that may still be carried out, beyond
        the server's memory of the nonce.
        """
        if not 0 < len(nonce) <= 25:
            raise ValueError("a nonce has 1 to 25 characters")
        body = MultipartBody(message_payload(files, nonce=nonce, payload=payload), files)
        call = policy.Call(
            route=Route("POST", "/channels/{}/messages", str(channel_id)),
            path=f"/channels/{channel_id}/messages",
            body=body,
            background=True,
            creates=True,
            doubt=doubt,
        )
        answer = await self._request(call)
        try:
            message = models.parse_message(answer, channel_id=channel_id)
        except DiscordUnavailable as error:
            raise OutcomeUnknown(f"the message may have been stored: {error}") from error
        self.stats.messages_sent += 1
        return message

    async def get_message(
        self, channel_id: int, message_id: int, *, background: bool = False
    ) -> Message:
        return models.parse_message(
            await self._request(
                _call(
                    "GET",
                    "/channels/{}/messages/{}",
                    channel_id,
                    path=f"/{channel_id}/messages/{message_id}",
                    background=background,
                )
            ),
            channel_id=channel_id,
        )

    async def list_messages(
        self,
        channel_id: int,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = _PAGE,
        background: bool = False,
    ) -> list[Message]:
        """One page, newest first; with `after`, the messages just after that id."""
        params = {"limit": str(min(max(limit, 1), _PAGE))}
        if after is not None:
            params["after"] = str(after)
        elif before is not None:
            params["before"] = str(before)
        return models.parse_messages(
            await self._request(
                _call(
                    "GET",
                    "/channels/{}/messages",
                    channel_id,
                    path=f"/{channel_id}/messages",
                    params=params,
                    background=background,
                )
            ),
            channel_id=channel_id,
        )

    async def delete_message(self, channel_id: int, message_id: int) -> bool:
        """False when it was already gone."""
        call = _call(
            "DELETE",
            "/channels/{}/messages/{}",
            channel_id,
            path=f"/{channel_id}/messages/{message_id}",
            sub=self._delete_age(message_id),
            background=True,
        )
        try:
            await self._request(call)
        except NotFound as error:
            if error.code == policy.UNKNOWN_MESSAGE:
                return False
            raise
        return True

    async def bulk_delete(self, channel_id: int, message_ids: Sequence[int]) -> None:
        """Delete many messages; Discord refuses (50034) when one is older than 14 days."""
        for start in range(0, len(message_ids), _BULK_DELETE.stop - 1):
            some = message_ids[start : start + _BULK_DELETE.stop - 1]
            if len(some) not in _BULK_DELETE:
                await self.delete_message(channel_id, some[0])
                continue
            await self._request(
                _call(
                    "POST",
                    "/channels/{}/messages/bulk-delete",
                    channel_id,
                    path=f"/{channel_id}/messages/bulk-delete",
                    json={"messages": [str(message) for message in some]},
                    background=True,
                )
            )

    async def edit_message_attachments(
        self, channel_id: int, message_id: int, keep_ids: Sequence[int]
    ) -> Message:
        """Drop all attachments of an own message but these; the kept ones stay as they are."""
        old = self._age(message_id) > _EDIT_OLD_S
        return models.parse_message(
            await self._request(
                _call(
                    "PATCH",
                    "/channels/{}/messages/{}",
                    channel_id,
                    path=f"/{channel_id}/messages/{message_id}",
                    sub="old" if old else "",
                    json={"attachments": [{"id": str(attachment)} for attachment in keep_ids]},
                    background=True,
                )
            ),
            channel_id=channel_id,
        )

    async def refresh_urls(self, urls: Sequence[str]) -> dict[str, str]:
        """New links for old ones; undocumented by Discord, so nothing may depend on it."""
        fresh: dict[str, str] = {}
        for start in range(0, len(urls), _REFRESH_AT_ONCE):
            call = policy.Call(
                route=Route("POST", "/attachments/refresh-urls"),
                path="/attachments/refresh-urls",
                json={"attachment_urls": list(urls[start : start + _REFRESH_AT_ONCE])},
            )
            fresh |= models.parse_refreshed(await self._request(call))
        return fresh

    # The CDN

    @asynccontextmanager
    async def stream_cdn(
        self, url: str, headers: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """A GET without any credential; for cdn.py, which reads it."""
        self.stats.downloads += 1
        with self._connections.breakable() as scope:
            try:
                http = self._connections.cdn
                async with http.stream("GET", url, headers=dict(headers)) as response:
                    try:
                        yield response
                    finally:
                        self.stats.bytes_received += response.num_bytes_downloaded
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
                raise DiscordUnavailable(f"CDN: {wire.reason_of(error)}") from None
        if scope.cancelled_caught:
            raise DiscordUnavailable(f"CDN: {wire.DROPPED}")

    # The chain

    async def _request(self, call: policy.Call) -> object:
        """Attempt until the policy says that it is done; the parsed JSON of the answer."""
        chain: policy.Chain | None = None
        while True:
            try:
                outcome = await self._attempt(call, chain)
            except DiscordError as error:  # not sent: breaker, a refused token, an old nonce
                if chain is not None and chain.unclear:
                    raise chain.final(error) from error
                raise
            now = self._clock()
            chain = chain or policy.Chain(call, deadline=now + self._repeats_for(call))
            try:
                delay = chain.judge(outcome, now, jitter=random.uniform(0.75, 1.25))
            except DiscordUnavailable as error:
                if chain.refused_early:
                    await self._blame_size(error)
                raise
            if delay is None:
                if chain.unclear:
                    call.doubt()
                return outcome.data if isinstance(outcome, wire.Answer) else None
            if delay > 0:
                _log.info(
                    "again method=%s template=%s in_s=%.1f outcome=%s",
                    call.route.method,
                    call.route.template,
                    delay,
                    outcome.status if isinstance(outcome, wire.Answer) else outcome.reason,
                )
            await self.pause(delay)

    def _repeats_for(self, call: policy.Call) -> float:
        """Seconds from the first failure; a create only while its nonce is surely remembered."""
        longest = 4 * self._timeout_s
        return min(longest, _NONCE_SAFE_S) if call.creates else longest

    async def _blame_size(self, error: DiscordUnavailable) -> None:
        """Large uploads broke off again and again: if small requests pass, the size is to blame.

        A server may answer 413 before it has read the body, and the answer is lost in the reset.
        """
        await self.current_user()
        raise TooLarge(f"{error}; smaller requests pass", status=413) from error

    async def _attempt(self, call: policy.Call, chain: policy.Chain | None) -> wire.Outcome:
        await self._queue.granted(call.route, background=call.background)
        sending: Sending | None = None
        try:
            if chain is not None:
                chain.check_repeatable(self._clock())
            token = self.gate.usable(self._clock(), probe=call.probe)
            request, sending = self._build(call, token)
            self.stats.requests += 1
            self._keep_limits()
            count_request()
            with self._connections.breakable() as scope:
                outcome = await wire.exchange(
                    self._connections.api, request, body=call.body, limit_s=10 * self._timeout_s
                )
            if scope.cancelled_caught:
                outcome = wire.dropped(call.body)
            self._account(call, outcome, token)
            return outcome
        finally:
            if sending is not None:
                sending.body = None
            self._queue.release(call.route)
            self._keep_limits()

    def _build(self, call: policy.Call, token: str) -> tuple[httpx.Request, Sending | None]:
        """The request, and for an upload what holds the body while it is on its way."""
        headers = {"Authorization": f"Bot {token}"}
        http = self._connections.api
        url = self._url + call.path
        if call.body is None:
            bare = http.build_request(
                call.route.method, url, params=call.params, json=call.json, headers=headers
            )
            return bare, None
        call.body.taken = self._streamed
        headers["Content-Type"] = call.body.content_type
        headers["Content-Length"] = str(call.body.size_bytes)
        bare = http.build_request(call.route.method, url, headers=headers)
        sending = Sending(call.body)
        request = httpx.Request(  # a stream of ours is not wrapped, but nor are headers added
            bare.method,
            bare.url,
            headers=bare.headers,
            stream=sending,
            extensions=bare.extensions,
        )
        return request, sending

    def _streamed(self, count: int) -> None:
        self.stats.bytes_streamed += count

    def _account(self, call: policy.Call, outcome: wire.Outcome, token: str) -> None:
        """Let limiter, counters and the server's clock learn from what came back."""
        if call.body is not None and call.body.whole:
            self.stats.bytes_sent += call.body.size_bytes
        if isinstance(outcome, wire.Failure):
            return
        now = self._clock()
        self._limiter.learn(call.route, outcome.status, outcome.headers, outcome.data, now)
        self.stats.rate_limited += outcome.status == 429
        self.stats.invalid += outcome.status in (401, 403, 429)
        self.gate.answered(token, outcome.status, now)
        try:
            date = parsedate_to_datetime(outcome.headers["date"]).timestamp()
        except (KeyError, ValueError):
            return
        self._server_time = (date, now)

    def _age(self, message_id: int) -> float:
        now = self.server_now()
        return 0.0 if now is None else now - models.snowflake_time(message_id)

    def _delete_age(self, message_id: int) -> str:
        """Deletes have three buckets, by the message's age."""
        if self.server_now() is None:
            return "unknown"
        age = self._age(message_id)
        return "young" if age < _YOUNG_S else "old" if age > _OLD_S else "settled"


def _call(
    method: str,
    template: str,
    channel_id: int,
    *,
    path: str,
    sub: str = "",
    json: object = None,
    params: Mapping[str, str] | None = None,
    background: bool = False,
) -> policy.Call:
    """A call below one channel, which is its major parameter."""
    return policy.Call(
        route=Route(method, template, str(channel_id), sub),
        path=f"/channels{path}",
        json=json,
        params=params,
        background=background,
    )
