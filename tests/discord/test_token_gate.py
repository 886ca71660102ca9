from __future__ import annotations

import itertools
import math

import httpx
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.discord.client import DiscordClient
from stashcordfs.discord.gate import TokenGate
from stashcordfs.errors import DiscordUnavailable, TokenRejected


class Tokens:
    """What the settings give, and what the service takes."""

    def __init__(self) -> None:
        self.now = "old-token"
        self.valid = "old-token"
        self.sent: list[str] = []

    def __call__(self) -> str:
        return self.now

    async def answer(self, request: httpx.Request) -> httpx.Response:
        token = request.headers["authorization"].removeprefix("Bot ")
        self.sent.append(token)
        if token != self.valid:
            return httpx.Response(401, json={"code": 0, "message": "401: Unauthorized"})
        return httpx.Response(200, json={"id": "1", "username": "bot"})


@pytest.fixture
def tokens() -> Tokens:
    return Tokens()


@pytest.fixture
async def client(tokens: Tokens):
    transport = httpx.MockTransport(tokens.answer)
    async with DiscordClient(
        api_url="https://d.test", token=tokens, transport=transport
    ) as running:
        yield running


async def rejected(client: DiscordClient, *, probe: bool = False) -> bool:
    try:
        await client.current_user(probe=probe)
    except TokenRejected:
        return True
    return False


async def test_a_refused_token_is_sent_by_probes_alone_at_most_once_a_minute(
    autojump_clock, tokens, client
) -> None:
    tokens.valid = "another"
    for _ in range(3600):
        assert await rejected(client)
        assert await rejected(client, probe=True)
        await trio.sleep(1)
    assert client.gate.word == "rejected"
    assert len(tokens.sent) == client.stats.invalid
    # the first, then after 5, 10, 20 and 40 s, then once a minute
    assert 60 <= len(tokens.sent) <= 65


async def test_a_token_that_is_valid_again_is_taken_up_by_the_next_probe(
    autojump_clock, tokens, client
) -> None:
    assert client.gate.word == "untried"
    await client.check_token()
    assert client.gate.word == "accepted"
    tokens.valid = "another"
    assert await rejected(client)
    tokens.valid = tokens.now
    assert await rejected(client, probe=True)
    await trio.sleep(5)
    await client.check_token()
    assert client.gate.word == "accepted"
    assert not await rejected(client)


async def test_another_token_is_sent_at_once(tokens, client) -> None:
    tokens.valid = "new-token"
    assert await rejected(client)
    assert await rejected(client)
    tokens.now = "new-token"
    assert client.gate.word == "untried"
    assert not await rejected(client)
    assert tokens.sent == ["old-token", "new-token"]


async def test_a_probe_that_is_lost_is_not_repeated(autojump_clock, tokens) -> None:
    asked = 0

    async def lost(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked == 1:
            return httpx.Response(401)
        raise httpx.ReadError("reset")

    transport = httpx.MockTransport(lost)
    async with DiscordClient(api_url="https://d.test", token=tokens, transport=transport) as client:
        assert await rejected(client)
        await trio.sleep(5)
        with pytest.raises((TokenRejected, DiscordUnavailable)):
            await client.check_token()
    assert asked == 2


async def test_a_late_refusal_of_the_token_before_does_not_touch_the_new_one(tokens) -> None:
    answered = trio.Event()

    async def slow(request: httpx.Request) -> httpx.Response:
        token = request.headers["authorization"]
        if token == "Bot old-token":
            await answered.wait()
        return await tokens.answer(request)

    transport = httpx.MockTransport(slow)
    async with DiscordClient(api_url="https://d.test", token=tokens, transport=transport) as client:

        async def early() -> None:
            assert await rejected(client)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(early)
            await trio.testing.wait_all_tasks_blocked()
            tokens.now = tokens.valid = "new-token"
            answered.set()
        assert client.gate.word == "untried"
        assert not await rejected(client)


def test_a_late_refusal_of_the_token_before_does_not_excuse_the_new_one(tokens) -> None:
    gate = TokenGate(tokens)
    tokens.now = "new-token"
    gate.answered("new-token", 401, 0.0)
    gate.answered("old-token", 401, 1.0)
    with pytest.raises(TokenRejected):
        gate.usable(2.0)


def test_a_token_that_cannot_be_sent_is_refused_without_a_probe() -> None:
    tokens = Tokens()
    tokens.now = "two words"
    gate = TokenGate(tokens)
    with pytest.raises(TokenRejected):
        gate.usable(0.0, probe=True)
    assert gate.word == "rejected"
    assert gate.probe_in_s(1e9) == math.inf
    tokens.now = "one"
    assert gate.usable(0.0) == "one"


async def test_who_waits_is_told_of_a_refusal_also_of_a_token_that_comes_back() -> None:
    tokens = Tokens()
    gate = TokenGate(tokens)
    gate.answered("old-token", 401, 0.0)
    tokens.now = "b"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.wait_rejected)
        await trio.testing.wait_all_tasks_blocked()
        tokens.now = "old-token"
        with pytest.raises(TokenRejected):
            gate.usable(1.0)


@given(st.lists(st.tuples(st.floats(0, 90), st.booleans(), st.booleans()), max_size=200))
def test_probes_come_ever_more_rarely_down_to_one_a_minute(steps) -> None:
    gate = TokenGate(lambda: "t")
    gate.answered("t", 401, 0.0)
    now, sent = 0.0, [0.0]
    for wait_s, probe, answered in steps:
        now += wait_s
        due = gate.probe_in_s(now) <= 0
        try:
            gate.usable(now, probe=probe)
        except TokenRejected:
            assert not (probe and due)
            continue
        assert probe
        sent.append(now)
        if answered:
            gate.answered("t", 401, now)
    for number, (before, after) in enumerate(itertools.pairwise(sent)):
        assert after - before >= min(60.0, 5.0 * 2**number) - 1e-6
