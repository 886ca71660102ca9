"""One deadline for a read that the kernel makes twice. No I/O; times are given, in seconds.

A program's read reaches us as a read-ahead request. When that fails, the kernel asks once more, for
the page that the program waits for (mm/filemap.c: what is not up to date is read again by itself),
some milliseconds later. Without this a program would wait for two deadlines.

So each failed request excuses one echo of its range, for a moment only: a program that tries again
by itself has a whole deadline, and so has everybody once the network has answered.
"""

from __future__ import annotations

from dataclasses import dataclass

_ECHO_S = 0.5


@dataclass(frozen=True, slots=True)
class _Failed:
    ino: int
    offset: int
    end: int
    since: float
    at: float


class Echoes:
    """What reads have just waited for in vain, and since when."""

    def __init__(self) -> None:
        self._failed: list[_Failed] = []

    def take(self, ino: int, offset: int, end: int, *, now: float) -> float | None:
        """When the waiting began of which this read is the echo; None when it is none."""
        self._failed = [each for each in self._failed if now - each.at <= _ECHO_S]
        for each in self._failed:
            inside = each.ino == ino and each.offset <= offset and end <= each.end
            # one page of several: of a page that was read by itself there is no echo
            if inside and end - offset < each.end - each.offset:
                self._failed.remove(each)
                return each.since
        return None

    def failed(self, ino: int, offset: int, end: int, *, since: float, now: float) -> None:
        """A read that was no echo gave up, for want of a network."""
        self._failed = [each for each in self._failed if now - each.at <= _ECHO_S]
        self._failed.append(_Failed(ino, offset, end, since, now))

    def clear(self) -> None:
        """The network has answered."""
        self._failed.clear()
