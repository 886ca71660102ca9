"""What rate limits are known, kept in a file: the next process goes on within them.

Without it a volume that is unmounted and mounted at once would spend a second window's requests in
the first one's time, and meet a 429. Written at each request and answer into the page cache, not
synced: it survives a killed process, and after a power cut every window is over. A volume's lock
sees to it that one process at a time writes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stashcordfs.discord.limiter import RateLimiter

_log = logging.getLogger(__name__)


class KeptLimits:
    def __init__(self, path: Path, *, wall: Callable[[], float] = time.time) -> None:
        """`wall` is Unix time in seconds, which two processes share."""
        self._path = path
        self._wall = wall
        self._descriptor = -1
        self._size = 0

    def load(self, limiter: RateLimiter, now: float) -> None:
        """Take up what the last process knew. A file that is missing or damaged tells nothing."""
        try:
            kept = json.loads(self._path.read_bytes())
            # a clock that was set back has nothing to say about how much time has passed
            limiter.restore(kept, now, max(0.0, self._wall() - float(kept["at"])))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            _log.info("rate limits not taken up file=%s error=%r", self._path, error)

    def save(self, limiter: RateLimiter, now: float) -> None:
        """Keep what is known now. A disk that refuses costs a moment's courtesy, no data."""
        line = json.dumps({"at": self._wall(), **limiter.snapshot(now)}).encode()
        try:
            if self._descriptor < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                self._descriptor = os.open(self._path, flags, 0o600)
                self._size = os.fstat(self._descriptor).st_size
            # blanks hide what is left of a longer line: a kill finds the old or the new one whole
            os.pwrite(self._descriptor, line.ljust(self._size), 0)
            self._size = len(line)
        except OSError as error:
            _log.debug("rate limits not kept file=%s error=%r", self._path, error)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
