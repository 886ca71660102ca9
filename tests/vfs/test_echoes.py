"""A read that fails takes one deadline, also when the kernel makes it twice."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.errors import DiscordUnavailable, FsError
from stashcordfs.vfs.echoes import Echoes

sys.path.append(str(Path(__file__).parent))
from harness import BLOCK, FaultyStore, volume

DEADLINE_S = 30.0


class Silent(FaultyStore):
    """A network that does not answer, or answers after so long that it cannot."""

    silent = False
    fails_after_s = 1e9
    asked = 0

    async def fetch(self, location, start, length):
        self.asked += 1
        if self.silent:
            await trio.sleep(self.fails_after_s)
            raise DiscordUnavailable("no network")
        return await super().fetch(location, start, length)


class Reading:
    def __init__(self, made, ino: int) -> None:
        self._made = made
        self._ino = ino

    async def __call__(self, block: int, *, succeeds: bool = False) -> float:
        """Seconds until a read of 4 KiB in this block has ended."""
        fh = await self._made.fs.open(self._ino, 0)
        begun = trio.current_time()
        if succeeds:
            assert await self._made.fs.read(fh, block * BLOCK, 4096)
        else:
            with pytest.raises(FsError) as caught:
                await self._made.fs.read(fh, block * BLOCK, 4096)
            assert caught.value.errno == errno.EIO
        await self._made.fs.release(fh)
        return trio.current_time() - begun


@pytest.fixture
async def cold(tmp_path, autojump_clock):
    """A file of four blocks, none of them here, and the network that they are behind."""
    store = Silent(tmp_path / "store")
    async with volume(tmp_path, other_store=store) as made:
        await made.make(b"f", bytes(range(256)) * (4 * BLOCK // 256))
        await made.uploader.flush()
    for left in (tmp_path / "blocks").rglob("*"):
        if left.is_file():
            left.unlink()
    async with volume(tmp_path, other_store=store, deadline_s=DEADLINE_S) as made:
        found = await made.fs.lookup(1, b"f")
        store.silent = True
        yield Reading(made, found.ino), store, made


async def test_the_kernels_second_request_fails_at_once(cold, autojump_clock) -> None:
    read, _, made = cold
    assert await read(0) == pytest.approx(DEADLINE_S)
    await trio.sleep(0.01)
    assert await read(0) == 0
    assert len(made.reports) == 1


async def test_a_failure_before_the_deadline_leaves_the_rest_of_it(cold, autojump_clock) -> None:
    read, store, _ = cold
    store.fails_after_s = 20.0
    assert await read(0) == pytest.approx(20)
    assert await read(0) == pytest.approx(10)


async def test_another_block_has_a_deadline_of_its_own(cold, autojump_clock) -> None:
    read, _, _ = cold
    await read(0)
    assert await read(2) == pytest.approx(DEADLINE_S)


async def test_a_program_that_tries_again_later_waits_for_the_network(cold, autojump_clock) -> None:
    read, _, _ = cold
    await read(0)
    await trio.sleep(2)
    assert await read(0) == pytest.approx(DEADLINE_S)


async def test_a_program_that_tries_again_and_again_is_not_refused_for_ever(
    cold, autojump_clock
) -> None:
    read, store, _ = cold
    await read(0)
    asked = store.asked
    refused = 0
    for _ in range(50):
        refused += await read(0) == 0
        await trio.sleep(0.1)
    assert refused < 50
    assert store.asked > asked


async def test_any_answer_of_the_network_ends_it_at_once(cold, autojump_clock) -> None:
    read, store, _ = cold
    await read(0)
    store.silent = False
    await read(2, succeeds=True)
    await read(0, succeeds=True)


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 3), st.floats(0, 5))))
def test_no_wait_is_ever_said_to_have_begun_long_before_its_first_failure(steps) -> None:
    echoes, now, longest = Echoes(), 0.0, 5.0
    for block, pause, waited in steps:
        now += pause
        since = echoes.since([block], now)
        assert now - (longest + 1) <= since <= now
        if since + longest > now:
            now = min(now + waited, since + longest)
            echoes.failed([block], since=since, now=now)
    assert len(echoes._failed) <= 3
