"""Ends the waits of programs that are being killed.

The kernel asks for that by FUSE_INTERRUPT, which pyfuse3 does not pass on; it goes on waiting for
the answer, and a killed program with it. So what waits for long is looked at: a thread that is
about to die has SIGKILL pending, whichever signal kills it (Linux, kernel/signal.c,
complete_signal). Signals that a program handles end nothing: reads and fsyncs that give EINTR are
more than programs are ready for.

The thread that is known is the one that opened the file. One that got the descriptor from it waits
until the answer.
"""

from __future__ import annotations

import errno
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import FsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LOOK_EVERY_S = 1.0
_PENDING = "SigPnd:"  # of the thread, in hexadecimal; signal n is bit n - 1


def is_being_killed(pid: int, proc: Path = Path("/proc")) -> bool:
    """Whether a thread has SIGKILL pending. One that is gone already is not."""
    try:
        status = (proc / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    line = next((line for line in status.splitlines() if line.startswith(_PENDING)), _PENDING + "0")
    return bool(int(line.removeprefix(_PENDING), 16) >> (signal.SIGKILL - 1) & 1)


class Interrupts:
    """Requests under way that may be given up. `run` looks at those that have lasted a while."""

    def __init__(self, is_killed: Callable[[int], bool] = is_being_killed) -> None:
        """`is_killed` tells of a thread by its id."""
        self._is_killed = is_killed
        self._waits: dict[trio.CancelScope, int] = {}
        self._some = trio.Event()

    @contextmanager
    def watched(self, pid: int) -> Iterator[None]:
        """Inside, thread `pid` waits; FsError EINTR when it is being killed."""
        with trio.CancelScope() as scope:
            self._waits[scope] = pid
            self._some.set()
            try:
                yield
            finally:
                del self._waits[scope]
        if scope.cancelled_caught:
            raise FsError(errno.EINTR)

    async def run(self) -> None:
        """Look, for ever; sleeps while nothing waits."""
        seen: set[trio.CancelScope] = set()  # those that have lasted one turn
        while True:
            if not self._waits:
                self._some = trio.Event()
                await self._some.wait()
            await trio.sleep(_LOOK_EVERY_S)
            for scope in seen & self._waits.keys():
                if self._is_killed(self._waits[scope]):
                    scope.cancel()
            seen = set(self._waits)
