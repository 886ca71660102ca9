"""A client whose machine has slept: old connections, old waits, an old nonce."""

from __future__ import annotations

from email.utils import formatdate

import httpx
import pytest
import trio

from stashcordfs import errors
from stashcordfs.discord.cdn import fetch_range
from stashcordfs.discord.client import DiscordClient, UploadFile
from stashcordfs.discord.links import LinkLeases
from stashcordfs.discord.models import Attachment, Message

MESSAGE = {"id": "900", "author": {"id": "1"}, "attachments": []}
ME = {"id": "1", "username": "bot"}


class Machine:
    """A server that answers from a list, and a clock that counts sleep as well."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.slept_s = 0.0
        self.silent = False

    def clock(self) -> float:
        return trio.current_time() + self.slept_s

    async def serve(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        await request.aread()
        if self.silent:
            await trio.sleep_forever()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(*answer[:1], **answer[1])

    def client(self) -> DiscordClient:
        return DiscordClient(
            api_url="https://d.test",
            token=lambda: "t",
            clock=self.clock,
            transport=httpx.MockTransport(self.serve),
        )

    async def sleep(self, client: DiscordClient, seconds: float) -> None:
        self.slept_s += seconds
        await client.resumed()


class Stuck(httpx.AsyncByteStream):
    """A body whose connection dies after its first byte, without a word."""

    def __init__(self) -> None:
        self._begun = False

    def __aiter__(self):
        return self

    async def __anext__(self) -> bytes:
        if self._begun:
            await trio.sleep_forever()
        self._begun = True
        return b"a"


def ok(data, **headers):
    return (200, {"json": data, "headers": headers})


async def test_a_request_on_a_dead_connection_is_made_again_on_a_new_one(autojump_clock) -> None:
    machine = Machine(ok(ME))
    async with machine.client() as client, trio.open_nursery() as nursery:
        machine.silent = True
        nursery.start_soon(client.current_user)
        await trio.testing.wait_all_tasks_blocked()
        old = client._connections.api
        machine.silent = False
        begun = trio.current_time()
        await machine.sleep(client, 600)
        assert old.is_closed
        nursery.cancel_scope.deadline = begun + 10
    assert not nursery.cancel_scope.cancelled_caught
    assert machine.asked == 2


async def test_an_upload_under_way_is_repeated_with_its_nonce_after_a_short_sleep(
    autojump_clock,
) -> None:
    machine = Machine(ok(MESSAGE))
    made = []

    async def create(client) -> None:
        made.append(await client.create_message(7, [UploadFile("a", [b"x"])], nonce="n"))

    async with machine.client() as client, trio.open_nursery() as nursery:
        machine.silent = True
        nursery.start_soon(create, client)
        await trio.testing.wait_all_tasks_blocked()
        machine.silent = False
        await machine.sleep(client, 10)
    assert [message.id for message in made] == [900]
    assert machine.asked == 2


async def test_an_upload_that_was_unclear_before_a_long_sleep_is_not_sent_again(
    autojump_clock, nursery
) -> None:
    machine = Machine((504, {}), ok(MESSAGE))
    outcome = []

    async def create(client) -> None:
        with pytest.raises(errors.OutcomeUnknown, match="too late"):
            await client.create_message(7, [UploadFile("a", [b"x"])], nonce="n")
        outcome.append("unknown")

    async with machine.client() as client, trio.open_nursery() as inner:
        inner.start_soon(create, client)
        await trio.testing.wait_all_tasks_blocked(0.0)
        assert machine.asked == 1
        await machine.sleep(client, 3600)
    assert outcome == ["unknown"]
    assert machine.asked == 1


async def test_a_long_rate_limit_does_not_let_a_nonce_grow_old(autojump_clock) -> None:
    limited = {"message": "slow", "retry_after": 200.0, "global": False}
    machine = Machine((504, {}), (429, {"json": limited, "headers": {"via": "x"}}), ok(MESSAGE))
    async with machine.client() as client:
        with pytest.raises(errors.OutcomeUnknown, match="too late"):
            await client.create_message(7, [UploadFile("a", [b"x"])], nonce="n")
    assert machine.asked == 2


async def test_waits_end_when_a_sleep_has_outlasted_them(autojump_clock) -> None:
    limited = {"message": "slow", "retry_after": 250.0, "global": False}
    machine = Machine((429, {"json": limited, "headers": {"via": "x"}}), ok(ME))
    async with machine.client() as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.current_user)
        nursery.start_soon(client.pause, 100)
        await trio.sleep(1)
        begun = trio.current_time()
        await machine.sleep(client, 300)
        nursery.cancel_scope.deadline = begun + 1
    assert not nursery.cancel_scope.cancelled_caught
    assert trio.current_time() < begun + 1


async def test_what_the_server_asked_to_wait_is_still_waited_after_a_short_sleep(
    autojump_clock,
) -> None:
    machine = Machine(ok(ME))
    async with machine.client() as client, trio.open_nursery() as nursery:
        begun = trio.current_time()
        nursery.start_soon(client.pause, 100)
        await trio.sleep(1)
        await machine.sleep(client, 30)
    assert trio.current_time() == pytest.approx(begun + 70)


async def test_a_download_under_way_is_resumed_on_a_new_connection(autojump_clock) -> None:
    def piece(first: int, stream: httpx.AsyncByteStream):
        return (206, {"stream": stream, "headers": {"content-range": f"bytes {first}-2/3"}})

    machine = Machine(piece(0, Stuck()), piece(1, httpx.ByteStream(b"bc")))
    got = []

    async def fetch(client) -> None:
        got.append(await fetch_range(client, "https://cdn.test/f", 0, 3))

    async with machine.client() as client, trio.open_nursery() as nursery:
        nursery.start_soon(fetch, client)
        await trio.testing.wait_all_tasks_blocked()
        await machine.sleep(client, 60)
    assert got == [b"abc"]
    assert machine.asked == 2


async def test_a_link_that_died_during_the_sleep_is_not_used(autojump_clock) -> None:
    now = 1_800_000_000
    page = [
        {
            "id": "900",
            "author": {"id": "1"},
            "attachments": [
                {"id": "11", "filename": "a", "size": 3, "url": f"https://c/a?ex={now + 2**20:x}"}
            ],
        }
    ]
    machine = Machine(ok(ME, date=formatdate(now, usegmt=True)), ok(page))
    async with machine.client() as client:
        await client.current_user()
        leases = LinkLeases(client, lambda: float(now))
        url = f"https://c/a?ex={now + 86_400:x}&is={now:x}"
        leases.learn(Message(900, 7, 1, 0, (Attachment(11, "a", 3, url),)))
        assert await leases.url(7, 900, 11, "a") == url
        assert machine.asked == 1
        await machine.sleep(client, 90_000)
        assert await leases.url(7, 900, 11, "a") == f"https://c/a?ex={now + 2**20:x}"
    assert machine.asked == 2


async def test_a_peer_that_does_not_let_go_holds_nobody_up(autojump_clock) -> None:
    machine = Machine(ok(ME))
    async with machine.client() as client:

        async def stuck() -> None:
            await trio.sleep_forever()

        client._connections.api.aclose = stuck
        begun = trio.current_time()
        await machine.sleep(client, 60)
        assert trio.current_time() - begun <= 2
        assert await client.own_id() == 1
