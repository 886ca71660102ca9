from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import trio

from stashcordfs import errors
from stashcordfs.discord.cdn import fetch_range
from stashcordfs.discord.client import DiscordClient
from stashcordfs.discord.links import LinkLeases
from stashcordfs.discord.models import Attachment, Message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

DATA = bytes(n * 7 % 251 for n in range(10_000))
URL = "https://cdn.test/attachments/1/2/f?ex=1&is=1&hm=1"


class Pieces(httpx.AsyncByteStream):
    """A body in pieces; breaks off before its end when told so."""

    def __init__(self, data: bytes, *, broken: bool = False) -> None:
        self.data, self.broken, self.given, self.closed = data, broken, 0, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self.data), 700):
            if self.closed:
                raise httpx.ReadError("closed")
            self.given += 1
            yield self.data[start : start + 700]
        if self.broken:
            raise httpx.ReadError("reset")

    async def aclose(self) -> None:
        self.closed = True


def ranged(request: httpx.Request, *, cut: int | None = None) -> httpx.Response:
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["range"])
    assert match is not None
    first, last = int(match[1]), min(int(match[2]), len(DATA) - 1)
    body = DATA[first : last + 1]
    return httpx.Response(
        206,
        headers={"content-range": f"bytes {first}-{last}/{len(DATA)}"},
        stream=Pieces(body if cut is None else body[:cut], broken=cut is not None),
    )


@asynccontextmanager
async def cdn(*answers: Callable[[httpx.Request], httpx.Response]) -> AsyncIterator[Any]:
    queue, seen = list(answers), []

    async def serve(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return (queue.pop(0) if len(queue) > 1 else queue[0])(request)

    client = DiscordClient(
        api_url="https://d.test", token=lambda: "t", transport=httpx.MockTransport(serve)
    )
    async with client:
        client.seen = seen  # type: ignore[attr-defined]
        yield client


async def test_a_range_is_fetched() -> None:
    async with cdn(ranged) as client:
        assert await fetch_range(client, URL, 1234, 4000) == DATA[1234:5234]
        assert await fetch_range(client, URL, 0, 0) == b""
    assert len(client.seen) == 1
    assert client.seen[0].headers["accept-encoding"] == "identity"
    assert str(client.seen[0].url) == URL


async def test_a_server_that_ignores_ranges_is_read_no_further_than_needed() -> None:
    stream = Pieces(DATA)
    whole = httpx.Response(200, headers={"content-length": str(len(DATA))}, stream=stream)
    async with cdn(lambda _: whole) as client:
        assert await fetch_range(client, URL, 1000, 2000) == DATA[1000:3000]
    assert stream.given <= 5


async def test_a_whole_answer_without_a_length_serves_as_well() -> None:
    async with cdn(lambda _: httpx.Response(200, stream=Pieces(DATA))) as client:
        assert await fetch_range(client, URL, 9000, 1000) == DATA[9000:]


async def test_a_broken_download_goes_on_where_it_broke(autojump_clock: trio.abc.Clock) -> None:
    async with cdn(lambda r: ranged(r, cut=700)) as client:
        assert await fetch_range(client, URL, 100, 3000) == DATA[100:3100]
    asked = [request.headers["range"] for request in client.seen]
    assert asked[:2] == ["bytes=100-3099", "bytes=800-3099"]


async def test_a_short_answer_is_resumed_and_never_returned(
    autojump_clock: trio.abc.Clock,
) -> None:
    def short(request: httpx.Request) -> httpx.Response:
        full = ranged(request)
        full.stream.data = full.stream.data[:10]  # type: ignore[union-attr]
        return full

    async with cdn(short, ranged) as client:
        assert await fetch_range(client, URL, 5, 100) == DATA[5:105]
    async with cdn(short) as client:
        with pytest.raises(errors.DiscordUnavailable, match="again and again"):
            await fetch_range(client, URL, 5, 5000)


@pytest.mark.parametrize("status", [403, 404])
async def test_an_expired_link_has_its_own_error(status: int) -> None:
    async with cdn(lambda _: httpx.Response(status, text="no longer available")) as client:
        with pytest.raises(errors.LinkExpired):
            await fetch_range(client, URL, 0, 10)
    assert len(client.seen) == 1


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: httpx.Response(416),
        lambda _: httpx.Response(415),
        lambda _: httpx.Response(302, headers={"location": "https://x.test"}),
        lambda _: httpx.Response(200, headers={"content-length": "50"}, stream=Pieces(DATA[:50])),
        lambda _: httpx.Response(
            206, headers={"content-range": "bytes 40-49/50"}, stream=Pieces(DATA[40:50])
        ),
    ],
)
async def test_what_the_cdn_cannot_give_is_refused_at_once(answer: Any) -> None:
    async with cdn(answer) as client:
        with pytest.raises(errors.DiscordRefused):
            await fetch_range(client, URL, 40, 11)
    assert len(client.seen) == 1


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: httpx.Response(503, headers={"retry-after": "2"}),
        lambda _: httpx.Response(429),
        lambda _: httpx.Response(206, headers={"content-range": "bytes 0-9/50"}, content=b"0" * 10),
        lambda _: httpx.Response(206, content=b"0" * 10),
        lambda _: httpx.Response(200, headers={"content-encoding": "br"}, stream=Pieces(DATA)),
    ],
)
async def test_temporary_trouble_is_repeated_a_few_times(
    autojump_clock: trio.abc.Clock, answer: Any
) -> None:
    async with cdn(answer, ranged) as client:
        assert await fetch_range(client, URL, 40, 10) == DATA[40:50]
    async with cdn(answer) as client:
        with pytest.raises(errors.DiscordUnavailable):
            await fetch_range(client, URL, 40, 10)
    assert len(client.seen) == 3


async def test_a_long_pause_asked_for_is_left_to_the_caller() -> None:
    async with cdn(lambda _: httpx.Response(429, headers={"retry-after": "90"})) as client:
        with pytest.raises(errors.DiscordUnavailable) as caught:
            await fetch_range(client, URL, 0, 10)
    assert caught.value.retry_after_s == 90


class Api:
    """A channel's messages as the API shows them, with links of an hour."""

    def __init__(self, count: int = 250, *, attachments: bool = True, author: int = 1) -> None:
        self.now, self.calls, self.issued, self.author = 1_000_000.0, 0, 0, author
        self.ids = list(range(1000, 1000 + count))
        self.attachments, self.lag, self.visible = attachments, False, True

    def message(self, message_id: int) -> Message:
        self.issued += 1
        url = (
            f"https://c/{message_id}?ex={int(self.now) + 3600:x}&is={int(self.now):x}&{self.issued}"
        )
        found = (Attachment(message_id * 10, "pack", 5, url),) if self.attachments else ()
        return Message(message_id, 7, self.author, 0, found)

    async def list_messages(
        self,
        channel_id: int,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
        background: bool = False,
    ) -> list[Message]:
        self.calls += 1
        await trio.sleep(0.1)
        ids = [] if self.lag else [each for each in self.ids if each > (after or 0)][:limit]
        return [self.message(each) for each in reversed(ids)]

    async def get_message(
        self, channel_id: int, message_id: int, *, background: bool = False
    ) -> Message:
        self.calls += 1
        if message_id not in self.ids:
            raise errors.NotFound("gone", status=404, code=10008 if self.visible else 10003)
        return self.message(message_id)

    async def own_id(self) -> int:
        return 1

    def server_now(self) -> float | None:
        return self.now


def leases_of(api: Api, **more: Any) -> LinkLeases:
    return LinkLeases(api, lambda: 0.0, **more)


async def test_one_renewal_serves_the_hundred_messages_that_follow(
    autojump_clock: trio.abc.Clock,
) -> None:
    api = Api()
    leases = leases_of(api)
    async with trio.open_nursery() as nursery:
        for message in range(1050, 1150):
            nursery.start_soon(leases.url, 7, message, message * 10, "pack")
    assert api.calls <= 2
    calls = api.calls
    await leases.url(7, 1149, 11490, "pack")
    assert api.calls == calls


async def test_a_lease_ends_with_its_link_by_the_servers_clock(
    autojump_clock: trio.abc.Clock,
) -> None:
    api = Api()
    leases = leases_of(api)
    first = await leases.url(7, 1000, 10_000, "pack")
    api.now += 3530
    assert await leases.url(7, 1000, 10_000, "pack") == first
    api.now += 30
    assert await leases.url(7, 1000, 10_000, "pack") != first


async def test_a_refused_link_is_renewed_once_for_all_who_met_it(
    autojump_clock: trio.abc.Clock,
) -> None:
    api = Api()
    leases = leases_of(api)
    old = await leases.url(7, 1000, 10_000, "pack")
    leases.forget(7, 1000, 10_000, url=old)
    new = await leases.url(7, 1000, 10_000, "pack")
    leases.forget(7, 1000, 10_000, url=old)
    assert await leases.url(7, 1000, 10_000, "pack") == new != old
    assert api.calls == 2
    leases.forget(7, 1000, 10_000)
    leases.forget(7, 1000, 10_000)
    assert await leases.url(7, 1000, 10_000, "pack") != new


async def test_a_message_or_attachment_that_is_gone_is_missing(
    autojump_clock: trio.abc.Clock,
) -> None:
    api = Api()
    leases = leases_of(api)
    with pytest.raises(errors.ObjectMissing):
        await leases.url(7, 5, 50, "pack")
    with pytest.raises(errors.ObjectMissing):
        await leases.url(7, 1001, 1, "other")
    api.visible = False
    with pytest.raises(errors.NotFound):
        await leases.url(7, 6, 60, "pack")


async def test_a_page_that_lags_behind_is_completed_by_the_message_itself(
    autojump_clock: trio.abc.Clock,
) -> None:
    api = Api()
    api.lag = True
    assert "1003" in await leases_of(api).url(7, 1003, 10_030, "pack")


async def test_an_attachment_is_found_by_name_when_its_id_changed(
    autojump_clock: trio.abc.Clock,
) -> None:
    api = Api()
    leases = leases_of(api)
    url = await leases.url(7, 1000, 1, "pack")
    assert await leases.url(7, 1000, 1, "pack") == url
    assert api.calls == 1


async def test_empty_attachments_of_another_bot_name_the_intent(
    autojump_clock: trio.abc.Clock,
) -> None:
    with pytest.raises(errors.AccessDenied, match="MESSAGE_CONTENT"):
        await leases_of(Api(attachments=False, author=2)).url(7, 1000, 1, "pack")
    with pytest.raises(errors.ObjectMissing):
        await leases_of(Api(attachments=False)).url(7, 1000, 1, "pack")


async def test_links_seen_in_any_message_are_learned_and_bounded() -> None:
    api = Api()
    leases = leases_of(api, capacity=10)
    for message in range(1000, 1050):
        leases.learn(api.message(message))
    assert "1049" in await leases.url(7, 1049, 10_490, "pack")
    assert api.calls == 0
    assert len(leases._leases) == 10


async def test_links_without_a_readable_expiry_are_kept_for_a_while() -> None:
    api = Api()
    leases = leases_of(api)
    for number, url in enumerate(["https://c/x", "https://c/x?ex=zz"]):
        leases.learn(Message(1, 7, 1, 0, (Attachment(number, "a", 1, url),)))
        assert await leases.url(7, 1, number, "a") == url
