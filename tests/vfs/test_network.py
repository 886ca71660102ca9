"""The network goes and comes back: who waits is woken, and nobody storms."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from stashcordfs.errors import (
    AccessDenied,
    BreakerOpen,
    DiscordError,
    DiscordUnavailable,
    OutcomeUnknown,
    TokenRejected,
)
from stashcordfs.vfs.network import Network

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, volume

OFFLINE = DiscordUnavailable("no network", offline=True)


class Probe:
    """A network's ping; `up` says whether it is answered."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.up = False

    async def __call__(self) -> None:
        await trio.lowlevel.checkpoint()
        self.at.append(trio.current_time())
        if not self.up:
            raise OFFLINE


def network_of(probe: Probe) -> Network:
    return Network(probe=probe, clock=trio.current_time)


def notice(network: Network, error: Exception | None) -> None:
    with suppress(DiscordError), network.noticing():
        if error:
            raise error


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (None, False),
        (DiscordUnavailable("HTTP 503"), False),
        (AccessDenied("no", status=403), False),
        (TokenRejected("remembered", status=401), True),
        (BreakerOpen("not asked"), True),
        (OutcomeUnknown("lost"), True),
        (OFFLINE, True),
    ],
)
async def test_only_an_answer_brings_the_network_back(clock, error, gone) -> None:
    network = network_of(Probe())
    notice(network, OFFLINE)
    notice(network, error)

    assert network.gone == gone


async def test_a_ping_a_minute_while_it_is_gone_and_wanted(clock, nursery) -> None:
    probe, wanted = Probe(), True
    network = network_of(probe)
    nursery.start_soon(network.run, lambda: wanted)
    await trio.sleep(1000)
    assert probe.at == []

    network.lost()
    await trio.sleep(185)
    assert probe.at == [1060, 1120, 1180]

    wanted = False
    await trio.sleep(600)
    assert len(probe.at) == 3

    wanted = probe.up = True
    await trio.sleep(60)
    assert not network.gone
    await trio.sleep(600)
    assert len(probe.at) == 4


async def test_it_is_pinged_also_when_somebody_woke_all_before_it_went(clock, nursery) -> None:
    probe = Probe()
    network = network_of(probe)
    nursery.start_soon(network.run, lambda: True)
    await trio.testing.wait_all_tasks_blocked()
    network.wake()
    network.lost()
    await trio.sleep(61)

    assert probe.at == [60]


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (DiscordUnavailable("HTTP 503"), False),
        (TokenRejected("remembered", status=401), False),
        (BreakerOpen("not asked"), True),
        (OFFLINE, True),
    ],
)
async def test_a_ping_that_fails_may_be_an_answer(clock, nursery, error, gone) -> None:
    async def probe() -> None:
        await trio.lowlevel.checkpoint()
        raise error

    network = Network(probe=probe, clock=trio.current_time)
    nursery.start_soon(network.run, lambda: True)
    network.lost()
    await trio.sleep(61)

    assert network.gone == gone


async def test_a_request_that_failed_just_now_stands_for_the_ping(clock, nursery) -> None:
    probe = Probe()
    network = network_of(probe)
    nursery.start_soon(network.run, lambda: True)
    for _ in range(20):
        network.lost()
        await trio.sleep(50)

    assert probe.at == []


async def test_answers_of_others_wake_at_most_once_a_minute(clock, nursery) -> None:
    network, returns = network_of(Probe()), []

    async def follow() -> None:
        while True:
            await network.returned()
            returns.append(trio.current_time())
            network.lost()  # what was woken fails again

    nursery.start_soon(follow)
    await trio.testing.wait_all_tasks_blocked()
    network.lost()
    for _ in range(300):
        network.answered()
        await trio.sleep(1)

    assert returns == [0, 60, 120, 180, 240]


async def test_an_upload_starts_as_soon_as_a_reader_was_answered(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        old = await v.make(b"old", os.urandom(BLOCK))
        await v.fs.sync_remote()
        await v.blocks.evict(BLOCK)
        v.store.offline = True
        await v.make(b"new", os.urandom(BLOCK))
        await trio.sleep(7200)
        puts, left_s = v.store.puts, v.uploader.state.paused_until_s - trio.current_time()
        assert left_s > 30

        v.store.offline = False
        await v.read(old)
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(1)
        assert v.store.puts == puts + 1


async def test_an_upload_starts_within_a_minute_of_the_networks_return(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        v.store.offline = True
        await v.make(b"a", os.urandom(BLOCK))
        await trio.sleep(7200)
        v.store.offline = False
        await trio.sleep(61)

        assert v.blocks.room.dirty_bytes == 0
        assert v.store.pings <= 120


async def test_wake_ends_the_pause(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        v.store.offline = True
        await v.make(b"a", os.urandom(BLOCK))
        await trio.sleep(7200)
        v.store.offline = False
        v.uploader.wake()
        await trio.sleep(0.1)

        assert v.blocks.room.dirty_bytes == 0


async def test_an_error_of_the_servers_own_is_waited_for_all_the_same(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        old = await v.make(b"old", os.urandom(BLOCK))
        await v.fs.sync_remote()
        tries = 0

        async def troubled(packs, *, nonce):
            nonlocal tries
            tries += 1
            await trio.lowlevel.checkpoint()
            raise DiscordUnavailable("HTTP 503")

        v.store.put = troubled
        await v.make(b"new", os.urandom(BLOCK))
        for _ in range(600):
            await v.blocks.evict(BLOCK)
            await v.read(old)  # readers are answered all the time
            await trio.sleep(6)

        assert tries < 21  # 1, 2, 4 ... 256 s, then every 300 s
        assert v.store.pings == 0
