"""fallocate(2) with its flags, and syncfs(2): Python's `os` has neither."""

from __future__ import annotations

import ctypes
import os

KEEP_SIZE, PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate a range of a file, or punch it out. Raises OSError."""
    _check(_libc.fallocate(fd, mode, offset, length))


def syncfs(fd: int) -> None:
    """Return when all of the file system that holds the file is on its disk. Raises OSError."""
    _check(_libc.syncfs(fd))


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
