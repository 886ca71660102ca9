"""Read-after-write gaps: a message just made that the API or the CDN does not show yet."""

from __future__ import annotations

import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from stashcordfs.crypto.keys import VolumeKeys
from stashcordfs.errors import ObjectMissing
from stashcordfs.store.discord_store import DiscordStore
from stashcordfs.store.packer import RequestBuilder
from stashcordfs.types import Limits

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from in_process import Server

KEYS = VolumeKeys(bytes(16), {0: bytes(32)})
DAY_S = 86_400


@pytest.fixture
def server(tmp_path):
    return Server(tmp_path, rate_limits=False)


@asynccontextmanager
async def opened(server, **more):
    """A store as after a restart: no link is known."""
    async with server.client(**more) as client:
        yield DiscordStore(client, channels=[server.channel], journal_channel=server.channel)


@pytest.fixture
async def place(server):
    builder = RequestBuilder(KEYS, Limits())
    data = os.urandom(1000)
    await builder.add(0, data, KEYS.chunk_id(data))
    packs = await builder.finish([], [])
    async with opened(server) as store:
        (where,) = await store.put(packs, nonce="n")
    server.asked.clear()
    return where


def older(server, seconds: float) -> None:
    server.sandbox.store.clock.offset += seconds


HIDDEN = {"kind": "hide", "younger_s": 10 * DAY_S}
NOT_YET = {"kind": "not_yet", "younger_s": 10 * DAY_S}


@pytest.mark.parametrize("fault", [HIDDEN, NOT_YET], ids=["API", "CDN"])
async def test_a_young_message_is_looked_for_until_it_is_there(
    server, place, fault, autojump_clock
) -> None:
    server.faults({**fault, "times": 12})
    async with opened(server) as store:
        assert len(await store.fetch(place, 0, 100)) == 100


@pytest.mark.parametrize("fault", [HIDDEN, NOT_YET], ids=["API", "CDN"])
async def test_the_readers_deadline_ends_the_looking(server, place, fault, autojump_clock) -> None:
    server.faults({**fault, "for_s": DAY_S})
    async with opened(server) as store:
        begun = trio.current_time()
        with pytest.raises(trio.TooSlowError), trio.fail_after(20):
            await store.fetch(place, 0, 100)
        assert trio.current_time() - begun == pytest.approx(20)


@pytest.mark.parametrize("fault", [HIDDEN, NOT_YET], ids=["API", "CDN"])
async def test_without_a_deadline_it_ends_when_the_message_is_not_young_any_more(
    server, place, fault, autojump_clock
) -> None:
    server.faults({**fault, "for_s": DAY_S})
    async with opened(server) as store:
        begun = trio.current_time()
        with pytest.raises(ObjectMissing):
            await store.fetch(place, 0, 100)
        assert 50 <= trio.current_time() - begun <= 70
    assert len(server.asked) < 80


@pytest.mark.parametrize("fault", [HIDDEN, NOT_YET], ids=["API", "CDN"])
async def test_an_old_one_that_is_missing_is_gone_at_once(
    server, place, fault, autojump_clock
) -> None:
    older(server, 61)
    server.faults({**fault, "for_s": DAY_S})
    async with opened(server) as store:
        begun = trio.current_time()
        with pytest.raises(ObjectMissing):
            await store.fetch(place, 0, 100)
        assert trio.current_time() == begun
    assert len(server.asked) <= 4


async def test_a_server_whose_date_is_behind_does_not_make_everything_young_for_ever(
    server, place, autojump_clock
) -> None:
    older(server, DAY_S)
    server.faults(
        {**HIDDEN, "for_s": DAY_S}, {"kind": "skew_date", "seconds": -2 * DAY_S, "for_s": DAY_S}
    )
    async with opened(server) as store:
        begun = trio.current_time()
        with pytest.raises(ObjectMissing):
            await store.fetch(place, 0, 100)
        assert trio.current_time() - begun <= 70
