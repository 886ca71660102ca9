"""One deadline for a read that the kernel makes twice. No I/O; times are given, in seconds.

A program's read reaches us as a read-ahead request. When that fails, the kernel asks once more, for
the one page that the program waits for (mm/filemap.c: a page that is not up to date is read again
by itself), some milliseconds later. Without this a program would wait for two deadlines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

_ECHO_S = 1.0


class Echoes:
    """Which blocks a read has just waited for in vain, and since when."""

    def __init__(self) -> None:
        self._failed: dict[Hashable, tuple[float, float]] = {}

    def since(self, blocks: Collection[Hashable], now: float) -> float:
        """When the waiting for these blocks began: `now`, unless this is an echo."""
        failed = [self._failed.get(block) for block in blocks]
        begun = [each[0] for each in failed if each is not None and now - each[1] <= _ECHO_S]
        return min(begun) if begun and len(begun) == len(blocks) else now

    def failed(self, blocks: Collection[Hashable], *, since: float, now: float) -> None:
        """A read gave up. The failure of an echo does not make further echoes of later reads."""
        self._failed = {k: v for k, v in self._failed.items() if now - v[1] <= _ECHO_S}
        for block in blocks:
            self._failed.setdefault(block, (since, now))

    def clear(self) -> None:
        """The network has answered: whoever asks now has a whole deadline."""
        self._failed.clear()
