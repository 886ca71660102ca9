"""The machine sleeps: CLOCK_BOOTTIME goes on, trio's timers do not."""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from stashcordfs.daemon import sleep
from stashcordfs.daemon.mounted import _hurry
from stashcordfs.daemon.sleep import SleepWatch
from stashcordfs.errors import DiscordUnavailable
from stashcordfs.store.discord_store import DiscordStore

sys.path += [str(Path(__file__).resolve().parents[1] / name) for name in ("support", "vfs")]
from harness import volume
from in_process import Server


class Machine:
    def __init__(self) -> None:
        self.slept_s = 0.0

    def boottime(self) -> float:
        return trio.current_time() + self.slept_s

    def watch(self, *resumed) -> SleepWatch:
        return SleepWatch(resumed, boottime=self.boottime, monotonic=trio.current_time)


async def test_each_is_called_in_order_once_after_a_sleep(autojump_clock, nursery) -> None:
    machine, called = Machine(), []

    async def first() -> None:
        called.append("first")

    async def second() -> None:
        called.append("second")

    watch = machine.watch(first, second)
    nursery.start_soon(watch.run)
    await trio.sleep(3600)
    assert called == []
    machine.slept_s += 600
    await trio.sleep(6)
    assert called == ["first", "second"]
    await trio.sleep(3600)
    assert called == ["first", "second"]
    machine.slept_s += 4
    await trio.sleep(6)
    assert called == ["first", "second"] * 2
    assert watch.suspends == 2


async def test_a_moment_is_no_sleep(autojump_clock, nursery) -> None:
    machine = Machine()
    watch = machine.watch()
    nursery.start_soon(watch.run)
    for _ in range(100):
        machine.slept_s += 0.5
        await trio.sleep(5)
    assert watch.suspends == 0


async def test_one_that_fails_does_not_keep_the_next_from_being_called(
    autojump_clock, nursery, caplog
) -> None:
    machine, called = Machine(), trio.Event()

    async def fails() -> None:
        raise DiscordUnavailable("no network yet")

    async def works() -> None:
        called.set()

    watch = machine.watch(fails)
    watch.resumed.append(works)  # as the daemon's other parts do
    nursery.start_soon(watch.run)
    await trio.sleep(1)
    machine.slept_s = 60
    with caplog.at_level(logging.INFO):
        await called.wait()
    assert "slept for 60 s" in caplog.text
    assert "no network yet" in caplog.text


def test_the_machines_own_clocks_agree_on_what_they_count() -> None:
    asleep = sleep.boottime() - sleep.monotonic()
    assert asleep > -1
    assert sleep.boottime() - sleep.monotonic() == pytest.approx(asleep, abs=1)


async def test_an_upload_that_waits_for_the_network_goes_at_once_after_a_sleep(
    tmp_path, autojump_clock, nursery
) -> None:
    machine, server = Machine(), Server(tmp_path / "server", rate_limits=False)
    (tmp_path / "v").mkdir()
    async with server.client(clock=machine.boottime) as client:
        store = DiscordStore(client, channels=[server.channel], journal_channel=server.channel)
        async with volume(tmp_path / "v", other_store=store) as made:
            watch = machine.watch(client.resumed, partial(_hurry, made.uploader))
            nursery.start_soon(watch.run)
            server.cut = True
            await made.make(b"file", b"x" * 1000)
            while not made.uploader.state.failures:
                await made.uploader._changed.wait()
            server.cut = False
            made.uploader.state.paused_until_s = trio.current_time() + 1e6
            machine.slept_s += 3600
            with trio.move_on_after(1e5):
                while made.blocks.room.dirty_bytes:
                    await made.uploader._changed.wait()
            assert not made.blocks.room.dirty_bytes
        nursery.cancel_scope.cancel()
