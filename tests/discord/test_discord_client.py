from __future__ import annotations

import json
import logging
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import trio

from stashcordfs import errors
from stashcordfs.discord.client import ClientStats, DiscordClient, UploadFile
from stashcordfs.discord.limiter import RateLimiter, Route
from stashcordfs.discord.models import snowflake_at, snowflake_time
from stashcordfs.discord.multipart import MultipartBody
from stashcordfs.discord.queue import GrantQueue

if TYPE_CHECKING:
    from collections.abc import Callable

TOKEN = "SECRET.token-of.the.bot"
VIA = {"via": "1.1 google"}
MESSAGE = {
    "id": "900",
    "channel_id": "7",
    "author": {"id": "1", "username": "bot"},
    "type": 0,
    "attachments": [
        {"id": "11", "filename": "a", "size": 3, "url": "https://cdn/x?ex=ff", "proxy_url": "p"}
    ],
    "unheard_of": {},
}


class Script:
    """A transport that answers from a list, the last entry again and again."""

    def __init__(
        self, *answers: httpx.Response | Exception | Callable[..., httpx.Response]
    ) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            if not isinstance(answer, httpx.ConnectError):
                await request.aread()
            raise answer
        await request.aread()
        if isinstance(answer, httpx.Response):
            return httpx.Response(
                answer.status_code, headers=answer.headers, content=answer.content
            )
        return answer(request)


def ok(data: Any, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=data, headers=headers)


def refused(status: int, code: int = 0, **headers: str) -> httpx.Response:
    return ok({"code": code, "message": "no"}, status, **headers)


def limited(seconds: float) -> httpx.Response:
    return ok({"message": "slow", "retry_after": seconds, "global": False}, 429, **VIA)


def client_of(script: Script, **more: Any) -> DiscordClient:
    return DiscordClient(
        api_url="https://discord.test/api/v10",
        token=lambda: TOKEN,
        transport=httpx.MockTransport(script),
        **more,
    )


async def create(client: DiscordClient) -> Any:
    file = UploadFile("pack", [b"abc", memoryview(b"defg")[1:]])
    return await client.create_message(7, [file, UploadFile("two", [])], nonce="n-1")


async def test_a_create_sends_one_multipart_body_of_known_length() -> None:
    script, stats = Script(ok(MESSAGE)), ClientStats()
    async with client_of(script, stats=stats) as client:
        message = await create(client)
    assert (message.id, message.author_id, message.attachments[0].size) == (900, 1, 3)
    (request,) = script.requests
    body = request.content
    assert request.headers["content-length"] == str(len(body)) == str(stats.bytes_sent)
    assert "transfer-encoding" not in request.headers
    assert request.headers["authorization"] == f"Bot {TOKEN}"
    assert request.headers["user-agent"].startswith("DiscordBot (")
    assert b'name="files[0]"; filename="pack"\r\nContent-Type: application/octet-stream' in body
    assert b"\r\n\r\nabcefg\r\n--" in body
    start = body.index(b"{")
    payload, _ = json.JSONDecoder().raw_decode(body[start:].decode("latin-1"))
    assert payload == {
        "nonce": "n-1",
        "enforce_nonce": True,
        "allowed_mentions": {"parse": []},
        "attachments": [{"id": 0, "filename": "pack"}, {"id": 1, "filename": "two"}],
    }
    assert (stats.requests, stats.messages_sent) == (1, 1)


async def test_a_body_starts_anew_each_time_and_comes_in_small_pieces() -> None:
    body = MultipartBody({}, [UploadFile("a", [bytes(1_000_000)])])
    first = [bytes(piece) async for piece in body]
    assert body.whole
    assert first == [bytes(piece) async for piece in body]
    assert max(map(len, first)) <= 256 * 1024
    assert sum(map(len, first)) == body.size_bytes


@pytest.mark.parametrize("name", ['a"b', "a\r\nb", "a\\b"])
def test_a_name_that_would_break_the_header_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        MultipartBody({}, [UploadFile(name, [b"x"])])


@pytest.mark.parametrize(
    "trouble",
    [
        httpx.ReadTimeout("late"),
        httpx.RemoteProtocolError("gone"),
        httpx.ConnectError("refused"),
        httpx.Response(502, text="<html>"),
        httpx.Response(500, json={"code": 0}),
        httpx.Response(503),
        httpx.Response(200, text="not json"),
        limited(0.3),
    ],
)
async def test_a_create_is_repeated_with_the_same_body_and_nonce(
    autojump_clock: trio.abc.Clock, trouble: Any
) -> None:
    script = Script(trouble, ok(MESSAGE))
    async with client_of(script) as client:
        assert (await create(client)).id == 900
    assert len(script.requests) == 2
    if not isinstance(trouble, httpx.ConnectError):
        assert script.requests[0].content == script.requests[1].content


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (httpx.ReadTimeout("late"), errors.OutcomeUnknown),
        (httpx.Response(504), errors.OutcomeUnknown),
        (httpx.ConnectError("refused"), errors.DiscordUnavailable),
        (httpx.Response(503), errors.DiscordUnavailable),
        (ok({"surprise": 1}), errors.OutcomeUnknown),
    ],
)
async def test_what_a_create_comes_to_when_the_trouble_lasts(
    autojump_clock: trio.abc.Clock, trouble: Any, kind: type[Exception]
) -> None:
    async with client_of(Script(trouble)) as client:
        with pytest.raises(kind):
            await create(client)


async def test_once_unclear_a_later_refusal_does_not_make_it_certain(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with client_of(Script(httpx.ReadTimeout("late"), refused(403, 50001))) as client:
        with pytest.raises(errors.OutcomeUnknown, match="403"):
            await create(client)


async def test_a_refused_size_is_certain_even_after_a_timeout(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with client_of(Script(httpx.ReadTimeout("late"), refused(413, 40005))) as client:
        with pytest.raises(errors.TooLarge):
            await create(client)


async def test_a_nonce_whose_message_was_deleted_tells_that_it_did_exist() -> None:
    async with client_of(Script(refused(404, 10008))) as client:
        with pytest.raises(errors.OutcomeUnknown, match="deleted"):
            await create(client)


@pytest.mark.parametrize("nonce", ["", "x" * 26])
async def test_a_nonce_has_one_to_twenty_five_characters(nonce: str) -> None:
    async with client_of(Script(ok(MESSAGE))) as client:
        with pytest.raises(ValueError, match="nonce"):
            await client.create_message(7, [], nonce=nonce)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refused(401), errors.TokenRejected),
        (refused(403, 50001), errors.AccessDenied),
        (refused(404, 10003), errors.NotFound),
        (refused(413), errors.TooLarge),
        (refused(400, 50045), errors.TooLarge),
        (refused(400, 50035), errors.DiscordRefused),
        (
            httpx.Response(301, headers={"location": "https://elsewhere.test"}),
            errors.DiscordRefused,
        ),
    ],
)
async def test_refusals_have_their_own_errors_and_are_not_repeated(
    answer: httpx.Response, kind: type[errors.DiscordError]
) -> None:
    script = Script(answer)
    async with client_of(script) as client:
        with pytest.raises(kind) as caught:
            await client.channel(7)
    assert type(caught.value) is kind
    assert len(script.requests) == 1
    assert TOKEN not in str(caught.value) + repr(client)


async def test_a_rejected_token_is_not_sent_again_until_it_changes() -> None:
    script = Script(refused(401), ok({"id": "7"}))
    tokens = ["old-token"]
    client = DiscordClient(
        api_url="https://discord.test/api/v10/",
        token=lambda: tokens[0],
        transport=httpx.MockTransport(script),
    )
    async with client:
        for _ in range(3):
            with pytest.raises(errors.TokenRejected):
                await client.channel(7)
        assert len(script.requests) == 1
        tokens[0] = "new-token"
        assert (await client.channel(7)).id == 7
    assert client.stats.invalid == 1


@pytest.mark.parametrize("token", ["", "two words", "line\n", "tökén"])
async def test_a_malformed_token_is_refused_without_being_quoted(token: str) -> None:
    client = DiscordClient(
        api_url="https://discord.test",
        token=lambda: token,
        transport=httpx.MockTransport(Script(ok({}))),
    )
    async with client:
        with pytest.raises(errors.TokenRejected) as caught:
            await client.current_user()
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize("url", ["discord.com/api", "ftp://discord.com", "https://"])
def test_an_api_url_without_scheme_or_host_is_wrong_use(url: str) -> None:
    with pytest.raises(errors.UsageError, match="api_url"):
        DiscordClient(api_url=url, token=lambda: TOKEN)


async def test_a_429_is_waited_for_and_counted(autojump_clock: trio.abc.Clock) -> None:
    script = Script(limited(3.5), ok([MESSAGE]))
    async with client_of(script) as client:
        began = trio.current_time()
        assert [message.id for message in await client.list_messages(7, after=5)] == [900]
        assert trio.current_time() - began == pytest.approx(3.55, abs=0.01)
    assert client.stats.rate_limited == client.stats.invalid == 1
    assert dict(script.requests[0].url.params) == {"limit": "100", "after": "5"}


async def test_endless_limits_end_in_unavailable(autojump_clock: trio.abc.Clock) -> None:
    async with client_of(Script(limited(0.1))) as client:
        with pytest.raises(errors.DiscordUnavailable, match="rate limited"):
            await client.guild(7)
    async with client_of(Script(limited(3600))) as client:
        with pytest.raises(errors.DiscordUnavailable) as caught:
            await client.guild(7)
    assert caught.value.retry_after_s == 3600


async def test_a_ban_by_cloudflare_stops_all_requests() -> None:
    script = Script(httpx.Response(429, text="error code: 1015"))
    async with client_of(script) as client:
        for _ in range(3):
            with pytest.raises(errors.BreakerOpen):
                await client.current_user()
    assert len(script.requests) == 1


async def test_reads_and_deletes_are_repeated_freely(autojump_clock: trio.abc.Clock) -> None:
    troubles = [httpx.ReadTimeout("x"), httpx.Response(500), httpx.ReadError("x")]
    async with client_of(Script(*troubles, ok(MESSAGE))) as client:
        assert (await client.get_message(7, 900)).id == 900
    async with client_of(Script(*troubles, httpx.Response(204))) as client:
        assert await client.delete_message(7, 900)
    async with client_of(Script(*troubles)) as client:
        with pytest.raises(errors.DiscordUnavailable, match="connection broke"):
            await client.get_message(7, 900)


async def test_deleting_what_is_gone_says_so() -> None:
    async with client_of(Script(refused(404, 10008))) as client:
        assert await client.delete_message(7, 900) is False
    async with client_of(Script(refused(404, 10003))) as client:
        with pytest.raises(errors.NotFound):
            await client.delete_message(7, 900)


async def test_deletes_and_edits_choose_their_limit_by_the_messages_age() -> None:
    now = 1_800_000_000.0
    script = Script(ok({"id": "1", "username": "b"}, date=formatdate(now, usegmt=True)))
    async with client_of(script) as client:
        assert client._delete_age(snowflake_at(now)) == "unknown"
        await client.current_user()
        ages = [client._delete_age(snowflake_at(now - age)) for age in (1, 60, 15 * 86_400)]
        assert ages == ["young", "settled", "old"]
        assert await client.own_id() == 1
    assert len(script.requests) == 1
    assert snowflake_time(snowflake_at(now)) == now


async def test_the_other_calls_send_what_discord_expects() -> None:
    script = Script(
        httpx.Response(204),
        httpx.Response(204),
        ok(MESSAGE),
        ok({"refreshed_urls": [{"original": "a", "refreshed": "b"}, {"original": "c"}, 5]}),
        ok({"id": "3", "premium_tier": 2, "features": ["X", 1]}),
        ok([]),
    )
    async with client_of(script) as client:
        await client.bulk_delete(7, list(range(1, 102)))
        await client.edit_message_attachments(7, 900, [11])
        assert await client.refresh_urls(["a", "c"]) == {"a": "b"}
        guild = await client.guild(3)
        assert await client.list_messages(7, before=9, limit=1, background=True) == []
    assert (guild.premium_tier, guild.features) == (2, ("X",))
    made = [
        (request.method, request.url.path.removeprefix("/api/v10")) for request in script.requests
    ]
    assert made == [
        ("POST", "/channels/7/messages/bulk-delete"),
        ("DELETE", "/channels/7/messages/101"),
        ("PATCH", "/channels/7/messages/900"),
        ("POST", "/attachments/refresh-urls"),
        ("GET", "/guilds/3"),
        ("GET", "/channels/7/messages"),
    ]
    assert json.loads(script.requests[0].content) == {"messages": [str(n) for n in range(1, 101)]}
    assert json.loads(script.requests[2].content) == {"attachments": [{"id": "11"}]}


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"id": None},
        {"id": "x"},
        {"id": True},
        {"id": "1", "attachments": 3},
        {"id": "1", "attachments": [{"id": "2", "filename": 5, "size": 1, "url": ""}]},
    ],
)
async def test_an_answer_of_the_wrong_shape_is_a_clear_error(data: Any) -> None:
    async with client_of(Script(ok(data))) as client:
        with pytest.raises(errors.DiscordUnavailable, match="the answer"):
            await client.get_message(7, 900)


async def test_optional_fields_may_be_absent() -> None:
    async with client_of(Script(ok({"id": "5"}))) as client:
        message = await client.get_message(7, 5)
        channel = await client.channel(7)
    assert (message.channel_id, message.author_id, message.attachments) == (7, 0, ())
    assert (channel.guild_id, channel.name) == (None, "")
    async with client_of(Script(ok({"id": "5"}))) as client:
        with pytest.raises(errors.DiscordUnavailable, match="list of messages"):
            await client.list_messages(7)


async def test_neither_token_nor_signature_is_logged(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.abc.Clock
) -> None:
    caplog.set_level(logging.DEBUG)
    script = Script(httpx.Response(500), ok(MESSAGE))
    async with client_of(script) as client:
        await client.get_message(7, 900)
        async with client.stream_cdn("https://cdn.test/f?hm=sign", {}) as response:
            await response.aread()
    assert "again method=GET" in caplog.text
    assert TOKEN not in caplog.text
    assert "sign" not in caplog.text
    assert "authorization" not in script.requests[-1].headers


async def test_uploads_that_are_always_cut_off_are_too_large_when_small_requests_pass(
    autojump_clock: trio.abc.Clock,
) -> None:
    class Cut(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.method == "GET":
                return ok({"id": "1", "username": "bot"})
            async for _ in request.stream:  # type: ignore[union-attr]
                raise httpx.WriteError("reset")
            raise AssertionError

    client = DiscordClient(api_url="https://d.test", token=lambda: TOKEN, transport=Cut())
    async with client:
        with pytest.raises(errors.TooLarge, match="smaller requests pass"):
            await client.create_message(7, [UploadFile("a", [bytes(9 << 20)])], nonce="n")
        with pytest.raises(errors.DiscordUnavailable, match="connection broke"):
            await client.create_message(7, [UploadFile("a", [bytes(1 << 20)])], nonce="n")


async def test_a_server_that_never_answers_is_given_up(autojump_clock: trio.abc.Clock) -> None:
    async def silent(request: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError

    client = DiscordClient(
        api_url="https://d.test",
        token=lambda: TOKEN,
        transport=httpx.MockTransport(silent),
        timeout_s=1.0,
    )
    async with client:
        with pytest.raises(errors.DiscordUnavailable, match="longer than 10 s"):
            await client.current_user()


async def test_a_waiting_reader_goes_before_background_requests(
    autojump_clock: trio.abc.Clock,
) -> None:
    route = Route("GET", "/x", "1")
    queue = GrantQueue(RateLimiter(), trio.current_time)
    order: list[str] = []

    async def ask(name: str, *, background: bool) -> None:
        await queue.granted(route, background=background)
        order.append(name)
        await trio.sleep(1)
        queue.release(route)

    async with trio.open_nursery() as nursery:
        for number, name in enumerate(["b1", "b2", "b3", "reader"]):
            nursery.start_soon(lambda n=name: ask(n, background=n != "reader"))
            await trio.sleep(0.1 * (number + 1))
    assert order == ["b1", "reader", "b2", "b3"]
    assert queue._lines == {}


async def test_a_cancelled_waiter_leaves_the_line(autojump_clock: trio.abc.Clock) -> None:
    route = Route("GET", "/x", "1")
    queue = GrantQueue(RateLimiter(), trio.current_time)
    await queue.granted(route, background=False)
    with trio.move_on_after(1) as scope:
        await queue.granted(route, background=False)
    assert scope.cancelled_caught
    queue.release(route)
    with trio.fail_after(1):
        await queue.granted(route, background=True)


async def test_a_create_that_was_unclear_stays_so_when_the_breaker_opens(
    autojump_clock: trio.abc.Clock,
) -> None:
    script = Script(httpx.ReadTimeout("late"), httpx.Response(429, text="error code: 1015"))
    async with client_of(script) as client:
        with pytest.raises(errors.OutcomeUnknown, match="blocks this address"):
            await create(client)


@pytest.mark.parametrize(
    ("answer", "offline"),
    [(httpx.ConnectError("refused"), True), (httpx.Response(503), False)],
)
async def test_a_ping_is_one_request_and_tells_whether_anybody_answered(answer, offline) -> None:
    script = Script(answer)
    async with client_of(script) as client:
        with pytest.raises(errors.DiscordUnavailable) as caught:
            await client.ping()
    assert len(script.requests) == 1
    assert caught.value.offline == offline


@pytest.mark.parametrize(
    ("answers", "doubts"),
    [
        ([ok(MESSAGE)], 0),
        ([httpx.ConnectError("refused"), ok(MESSAGE)], 0),
        ([httpx.ReadTimeout("late"), ok(MESSAGE)], 1),
        ([httpx.Response(502), ok(MESSAGE)], 1),
    ],
)
async def test_a_success_after_an_unclear_attempt_is_told(answers, doubts, autojump_clock) -> None:
    heard: list[bool] = []
    async with client_of(Script(*answers)) as client:
        await client.create_message(
            7, [UploadFile("pack", [b"x"])], nonce="n", doubt=lambda: heard.append(True)
        )
    assert len(heard) == doubts
