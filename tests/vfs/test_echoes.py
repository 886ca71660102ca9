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

    async def fetch(self, location, start, length):
        if self.silent:
            await trio.sleep(self.fails_after_s)
            raise DiscordUnavailable("no network")
        return await super().fetch(location, start, length)


class Reading:
    def __init__(self, made, ino: int) -> None:
        self._made = made
        self._ino = ino

    async def __call__(self, block: int, *, succeeds: bool = False, size: int = 4096) -> float:
        """Seconds until a read at the start of this block has ended."""
        fh = await self._made.fs.open(self._ino, 0)
        begun = trio.current_time()
        if succeeds:
            assert await self._made.fs.read(fh, block * BLOCK, size)
        else:
            with pytest.raises(FsError) as caught:
                await self._made.fs.read(fh, block * BLOCK, size)
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
    assert await read(0, size=BLOCK) == pytest.approx(DEADLINE_S)
    await trio.sleep(0.01)
    assert await read(0) == 0
    assert len(made.reports) == 1


async def test_a_failure_before_the_deadline_leaves_the_rest_of_it(cold, autojump_clock) -> None:
    read, store, _ = cold
    store.fails_after_s = 20.0
    assert await read(0, size=BLOCK) == pytest.approx(20)
    assert await read(0) == pytest.approx(10)


async def test_another_block_has_a_deadline_of_its_own(cold, autojump_clock) -> None:
    read, _, _ = cold
    await read(0, size=BLOCK)
    assert await read(2) == pytest.approx(DEADLINE_S)


async def test_a_program_that_tries_again_later_waits_for_the_network(cold, autojump_clock) -> None:
    read, _, _ = cold
    await read(0, size=BLOCK)
    await trio.sleep(1)
    assert await read(0) == pytest.approx(DEADLINE_S)


async def test_a_program_that_tries_again_at_once_waits_for_the_network(
    cold, autojump_clock
) -> None:
    read, _, _ = cold
    await read(0, size=BLOCK)
    assert await read(0) == 0  # the kernel's
    assert await read(0) == pytest.approx(DEADLINE_S)


async def test_any_answer_of_the_network_ends_it_at_once(cold, autojump_clock) -> None:
    read, store, _ = cold
    await read(0, size=BLOCK)
    store.silent = False
    await read(2, succeeds=True)
    await read(0, succeeds=True)


async def test_what_is_gone_for_good_excuses_no_echo(cold, autojump_clock) -> None:
    read, store, made = cold
    store.silent, store.missing = False, True
    await read(0, size=BLOCK)
    await read(0)
    assert len(made.reports) == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.floats(0, 1))))
def test_an_echo_lies_within_one_failed_request_just_before_it(steps) -> None:
    echoes, now, failed = Echoes(), 10.0, []
    for offset, size, pause in steps:
        now += pause
        since = echoes.take(1, offset, offset + size, now=now)
        end = offset + size
        fits = [f for f in failed if f[0] <= offset and end <= f[1] and size < f[1] - f[0]]
        fits = [f for f in fits if now - f[3] <= 0.5]
        assert (since is None) == (not fits)
        if since is None:
            echoes.failed(1, offset, offset + size, since=now, now=now + 5)
            failed.append((offset, offset + size, now, now + 5))
            now += 5
        else:
            assert since == fits[0][2]
            failed.remove(fits[0])
    echoes.clear()
    assert echoes.take(1, 0, 1, now=now) is None
