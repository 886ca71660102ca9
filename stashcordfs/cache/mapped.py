"""A table of slots of equal size in a mapped file: survives a killed process at no cost.

A store into the mapping is neither a system call nor a commit, and the kernel owns the page, so
that it outlives the process. It does not outlive a power cut, unless `sync` returned after it.

Layout, little-endian: a header of 4096 bytes (`<16sQ`: magic, a parameter that must agree), slots.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import TYPE_CHECKING

from stashcordfs.errors import LocalDiskError

if TYPE_CHECKING:
    from pathlib import Path

_HEADER_BYTES = 4096
_HEAD = struct.Struct("<16sQ")
_GROW_SLOTS = 4096


def sync_path(path: str | Path) -> None:
    """Make a file's bytes, or a folder's names, durable. Blocks."""
    # A descriptor of its own: the shared ones may be closed by the loop meanwhile. Linux
    # reports a writeback error once to every descriptor opened before it happened, and to
    # one opened later if nobody has seen it yet (errseq_t).
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


class MappedTable:
    """The slots as `map`, each at `at(slot)`; what is in them is the owner's. One thread only."""

    def __init__(self, path: Path, *, magic: bytes, parameter: int, stride: int) -> None:
        """Open or make the table at `path`; `stride` is a slot's size. Raises LocalDiskError."""
        self._what = path.name
        self._stride = stride
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            size = os.fstat(self._fd).st_size
            if size < _HEADER_BYTES or not any(os.pread(self._fd, _HEAD.size, 0)):
                # New, or a power cut took what was never synced: then no slot would count anyway.
                self._reserve(_HEADER_BYTES + _GROW_SLOTS * stride)
                os.pwrite(self._fd, _HEAD.pack(magic, parameter), 0)
                os.fsync(self._fd)
                sync_path(path.parent)
            self.map = mmap.mmap(self._fd, 0)
        except OSError as error:
            raise self._failed(error) from error
        if _HEAD.unpack_from(self.map, 0) != (magic, parameter):
            raise LocalDiskError(0, f"{path} is no such table of this volume")

    def _failed(self, error: OSError) -> LocalDiskError:
        return LocalDiskError(error.errno or 0, f"{self._what}: {error.strerror}")

    def _reserve(self, size: int) -> None:
        # Not a hole: a store into one on a full disk is no error but a SIGBUS, which kills.
        os.posix_fallocate(self._fd, 0, size)

    def __len__(self) -> int:
        """How many slots there are."""
        return (len(self.map) - _HEADER_BYTES) // self._stride

    def at(self, slot: int) -> int:
        """Where a slot begins in `map`."""
        return _HEADER_BYTES + slot * self._stride

    def grow(self) -> None:
        """Twice as many slots, the new ones of zeros. Raises LocalDiskError."""
        size = _HEADER_BYTES + max(len(self) * 2, _GROW_SLOTS) * self._stride
        try:
            self._reserve(size)
            self.map.resize(size)
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Make durable what was stored so far. For a worker thread: it blocks. Raises OSError."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Unmap; the table stays on disk."""
        self.map.close()
        os.close(self._fd)
