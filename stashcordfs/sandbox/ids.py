"""Snowflakes, the clock they are made by, and file names as the server cleans them."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

EPOCH_MS = 1_420_070_400_000
_UNWANTED = re.compile(r"[^A-Za-z0-9_.-]")


class Clock:
    """The server's time: the machine's, moved by `offset`, which only grows."""

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    def wall(self) -> float:
        return time.time() + self.offset

    def monotonic(self) -> float:
        return time.monotonic() + self.offset


class Snowflakes:
    """Ids that only grow, also when the machine's clock steps back."""

    def __init__(self, clock: Clock, last: int = 0) -> None:
        self._clock = clock
        self._last = last

    def next(self) -> int:
        self._last = max(self._last + 1, (int(self._clock.wall() * 1000) - EPOCH_MS) << 22)
        return self._last

    @staticmethod
    def at(unix_s: float) -> int:
        """The lowest id of a time."""
        return (int(unix_s * 1000) - EPOCH_MS) << 22


def time_of(snowflake: int) -> float:
    return ((snowflake >> 22) + EPOCH_MS) / 1000


def iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="microseconds")


def clean_filename(name: str, fallback: str) -> tuple[str, str | None]:
    """The name in the link, and the title when the name could not be expressed at all."""
    cleaned = _UNWANTED.sub("", "_".join(name.split())).strip("._")
    if _UNWANTED.sub("", name.rpartition(".")[0] or name).strip("._"):
        return cleaned[:255], None
    ending = _UNWANTED.sub("", name.rpartition(".")[2]) if "." in name else ""
    return (f"{fallback}.{ending}" if ending else fallback), name[:1024]
