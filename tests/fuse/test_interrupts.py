"""Programs that are being killed are let go; nobody else is."""

from __future__ import annotations

import errno

import pytest
import trio
import trio.testing

from stashcordfs.errors import FsError
from stashcordfs.fuse.interrupts import Interrupts, is_being_killed


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.mark.parametrize(
    ("pending", "killed"),
    [
        ("0000000000000100", True),
        ("0000000000000102", True),
        ("0000000000000002", False),
        ("", None),
    ],
)
def test_a_thread_with_sigkill_pending_is_being_killed(tmp_path, pending, killed):
    if pending:
        (tmp_path / "7").mkdir()
        (tmp_path / "7/status").write_text(f"Name:\tx\nSigPnd:\t{pending}\nShdPnd:\t0\n")
    assert is_being_killed(7, tmp_path) == bool(killed)


async def test_who_is_being_killed_is_let_go_and_others_wait_on(clock):
    interrupts = Interrupts(is_killed={7}.__contains__)
    ended, codes = [], []

    async def wait(pid: int) -> None:
        try:
            with interrupts.watched(pid):
                await trio.sleep(100)
        except FsError as error:
            codes.append(error.errno)
        ended.append((pid, trio.current_time()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupts.run)
        async with trio.open_nursery() as waiting:
            waiting.start_soon(wait, 7)
            waiting.start_soon(wait, 8)
        nursery.cancel_scope.cancel()
    assert [pid for pid, _ in ended] == [7, 8]
    assert codes == [errno.EINTR]
    assert ended[0][1] < 5
    assert ended[1][1] == 100


async def test_it_sleeps_while_nothing_waits(clock):
    asked = []
    interrupts = Interrupts(is_killed=lambda pid: bool(asked.append(pid)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupts.run)
        with interrupts.watched(7):
            pass
        await trio.sleep(1000)
        assert asked == []
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == float("inf")
        nursery.cancel_scope.cancel()
