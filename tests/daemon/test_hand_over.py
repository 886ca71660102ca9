"""What the kernel has not handed over yet is asked for at the end, not waited for for ever."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from stashcordfs.daemon import control


class Stuck:
    """A process in an uninterruptible wait: a signal does not end it."""

    returncode = None
    killed = 0

    async def wait(self) -> None:
        await trio.sleep_forever()

    def kill(self) -> None:
        self.killed += 1


async def test_a_sync_that_never_ends_does_not_keep_a_mount(autojump_clock, monkeypatch) -> None:
    stuck = Stuck()

    async def opened(command):
        await trio.lowlevel.checkpoint()
        assert command[:2] == ["sync", "-f"]
        return stuck

    monkeypatch.setattr(trio.lowlevel, "open_process", opened)
    await control._hand_over(Path("/mnt"))
    assert trio.current_time() == control._HAND_OVER_S
    assert stuck.killed == 1
