"""Space on the disk for the WAL, ahead of its end: a full disk must not lose a group of changes.

SQLite takes back the whole group when the WAL cannot grow, with operations that were answered
already. So what programs ask for is refused before, while there is still room for what must go on
by itself: the commits of uploads and evictions, which may free the disk.

A group of 512 operations takes 6 MiB where each is on a folder of its own, and 10 MiB where names
go in random order out of a large journal, as each dirties pages of its own. So groups are cut short
when less than that is ahead. The WAL's index (`-shm`) grows with it, 32 KiB for 4,096 pages
(https://sqlite.org/walformat.html, "The WAL-Index File Format").
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from stashcordfs.syscalls import KEEP_SIZE, fallocate

if TYPE_CHECKING:
    from pathlib import Path

WANTED_BYTES = 32 << 20
FOR_CHANGES_BYTES, FOR_REMOVAL_BYTES = 16 << 20, 8 << 20
_SHORT_OPERATIONS, _ANY_OPERATIONS = 64, 1 << 20
_INDEX_SHARE = 256  # twice what the index needs


class Reserve:
    """What is ahead of the WAL's end. For the event loop: a check is an fstat, mostly."""

    def __init__(self, database: Path) -> None:
        """Of a database whose WAL may come to be later."""
        self._database = database
        self._wal = self._index = -1
        self._allocated_to = 0
        self._can_allocate = True  # some file systems cannot
        self.ahead_bytes = WANTED_BYTES

    @property
    def operations(self) -> int:
        """How many operations a group may have at most, as far as the room ahead is concerned."""
        return _SHORT_OPERATIONS if self.ahead_bytes < FOR_CHANGES_BYTES else _ANY_OPERATIONS

    def refill(self) -> None:
        """Set `ahead_bytes` anew, and allocate more when half is used up. Raises nothing."""
        try:
            if self._wal < 0:
                self._wal = os.open(f"{self._database}-wal", os.O_RDWR | os.O_CLOEXEC)
            if self._index < 0:
                self._index = os.open(f"{self._database}-shm", os.O_RDWR | os.O_CLOEXEC)
            end = os.fstat(self._wal).st_size
            if self._can_allocate and self._allocated_to - end < FOR_CHANGES_BYTES:
                self._allocate(end)
            self.ahead_bytes = self._allocated_to - end if self._can_allocate else self._free()
        except OSError:  # no WAL yet, or a failing disk, of which the commit tells
            self.ahead_bytes = WANTED_BYTES

    def _allocate(self, end: int) -> None:
        wanted = end + WANTED_BYTES
        try:
            fallocate(self._index, KEEP_SIZE, 0, wanted // _INDEX_SHARE)
            fallocate(self._wal, KEEP_SIZE, 0, wanted)
            self._allocated_to = wanted
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._can_allocate = False
            elif error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _free(self) -> int:
        """What is free, where nothing can be allocated: each time anew, as others may use it up."""
        info = os.fstatvfs(self._wal)
        return info.f_bavail * info.f_frsize

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
