"""Space on the disk for the WAL, ahead of its end: a full disk must not lose a group of changes.

SQLite takes back the whole group when the WAL cannot grow, with operations that were answered
already. So what programs ask for is refused before, while there is still room for what must go on
by itself: the commits of uploads and evictions, which may free the disk.

A group of 512 operations on as many folders takes about 6 MiB. The WAL's index (`-shm`) grows with
it, 32 KiB for 4,096 pages (https://sqlite.org/walformat.html, "The WAL-Index File Format").
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from stashcordfs.falloc import KEEP_SIZE, fallocate

if TYPE_CHECKING:
    from pathlib import Path

WANTED_BYTES = 32 << 20
FOR_CHANGES_BYTES, FOR_REMOVAL_BYTES = 16 << 20, 8 << 20
_INDEX_SHARE = 256  # twice what the index needs


class Reserve:
    """What is ahead of the WAL's end. For the event loop: a check is an fstat, mostly."""

    def __init__(self, database: Path) -> None:
        """Of a database whose WAL may come to be later."""
        self._database = database
        self._wal = self._index = -1
        self._allocated_to = 0
        self.ahead_bytes = WANTED_BYTES

    def refill(self) -> None:
        """Set `ahead_bytes` anew, and allocate more when half is used up. Raises nothing."""
        try:
            if self._wal < 0:
                self._wal = os.open(f"{self._database}-wal", os.O_RDWR | os.O_CLOEXEC)
            if self._index < 0:
                self._index = os.open(f"{self._database}-shm", os.O_RDWR | os.O_CLOEXEC)
            end = os.fstat(self._wal).st_size
            if self._allocated_to - end < FOR_CHANGES_BYTES:
                self._allocate(end)
            self.ahead_bytes = self._allocated_to - end
        except OSError:  # no WAL yet, or a failing disk, of which the commit tells
            self.ahead_bytes = WANTED_BYTES

    def _allocate(self, end: int) -> None:
        wanted = end + WANTED_BYTES
        try:
            fallocate(self._index, KEEP_SIZE, 0, wanted // _INDEX_SHARE)
            fallocate(self._wal, KEEP_SIZE, 0, wanted)
            self._allocated_to = wanted
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # some file systems cannot: what is free, then
                info = os.fstatvfs(self._wal)
                self._allocated_to = end + info.f_bavail * info.f_frsize
            elif error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def forget(self) -> None:
        """The WAL was truncated: nothing is allocated any more."""
        self._allocated_to = 0

    def close(self) -> None:
        """Close, after the connection: closing the index's descriptor drops SQLite's locks on it.

        What is allocated goes with the files.
        """
        for fd in (self._wal, self._index):
            if fd >= 0:
                os.close(fd)
        self._wal = self._index = -1
