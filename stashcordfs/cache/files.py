"""Local files: one sparse file per inode and generation, at the file's own offsets.

A truncation to nothing starts a new generation, so that the old bytes can stay until the journal
says durably that they are not needed, while new ones are written. Holes are made by
`fallocate(FALLOC_FL_PUNCH_HOLE)`. Descriptors are kept in a bounded LRU.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

from cachetools import LRUCache

from stashcordfs.errors import LocalDiskError
from stashcordfs.types import Ino

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_KEEP_SIZE_AND_PUNCH = 0x01 | 0x02  # linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

FileKey = tuple[Ino, int]  # inode, generation


def _local(error: OSError, what: str) -> LocalDiskError:
    return LocalDiskError(error.errno or errno.EIO, f"local cache, {what}: {error.strerror}")


class _Descriptors(LRUCache[FileKey, int]):
    def popitem(self) -> tuple[FileKey, int]:
        key, fd = super().popitem()
        os.close(fd)
        return key, fd


class LocalFiles:
    """Reads, writes, punches and removes local files. Every OSError becomes LocalDiskError."""

    def __init__(self, root: Path, *, max_open: int = 256) -> None:
        """Keep the files under `root`, in 256 folders by the inode's low byte."""
        self.root = root
        self._open: _Descriptors = _Descriptors(maxsize=max_open)
        try:
            for name in range(256):
                (root / f"{name:02x}").mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _local(error, "mkdir") from error

    def path(self, key: FileKey) -> Path:
        """Where a file lies."""
        ino, generation = key
        return self.root / f"{ino & 255:02x}" / f"{ino:x}.{generation:x}"

    def descriptor(self, key: FileKey) -> int:
        """An open descriptor, which may be closed at the next call; `os.dup` it to keep it."""
        fd = self._open.get(key)
        if fd is None:
            try:
                fd = os.open(self.path(key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise _local(error, "open") from error
            self._open[key] = fd
        return fd

    def read(self, key: FileKey, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. A shorter file is a fault (EIO), never short data."""
        try:
            data = os.pread(self.descriptor(key), length, offset)
        except OSError as error:
            raise _local(error, "read") from error
        if len(data) != length:
            raise LocalDiskError(errno.EIO, "local cache, read: the file is shorter than it was")
        return data

    def write(self, key: FileKey, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        fd = self.descriptor(key)
        view = memoryview(data)
        try:
            while view:
                done = os.pwrite(fd, view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise _local(error, "write") from error

    def resize(self, key: FileKey, size: int) -> None:
        """Set the file's length; what is added reads as zeros."""
        try:
            os.ftruncate(self.descriptor(key), size)
        except OSError as error:
            raise _local(error, "truncate") from error

    def grow(self, key: FileKey, size: int) -> None:
        """Make the file at least `size` long."""
        if self.size(key) < size:
            self.resize(key, size)

    def size(self, key: FileKey) -> int:
        """Length in bytes."""
        return os.fstat(self.descriptor(key)).st_size

    def punch(self, key: FileKey, offset: int, length: int) -> None:
        """Give the range's disk space back; it reads as zeros, the length stays."""
        fd = self.descriptor(key)
        if _libc.fallocate(fd, _KEEP_SIZE_AND_PUNCH, offset, length):
            code = ctypes.get_errno()
            raise _local(OSError(code, os.strerror(code)), "punch")

    def exists(self, key: FileKey) -> bool:
        """Whether there is a local file, without making one."""
        return key in self._open or self.path(key).exists()

    def remove(self, key: FileKey) -> None:
        """Unlink the file; one that is not there is no error."""
        fd = self._open.pop(key, None)
        if fd is not None:
            os.close(fd)
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            raise _local(error, "unlink") from error

    def scan(self) -> Iterator[tuple[FileKey, int, int]]:
        """Every file with its length and its disk space, both in bytes."""
        for folder in sorted(self.root.iterdir()):
            if not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    ino, _, generation = entry.name.partition(".")
                    info = entry.stat()
                    yield (
                        (Ino(int(ino, 16)), int(generation, 16)),
                        info.st_size,
                        info.st_blocks * 512,
                    )

    def sync(self, keys: list[FileKey]) -> None:
        """Make the bytes and names of these files durable. For a worker thread: it blocks.

        Many files are cheaper by one `syncfs` than by an fdatasync each. A new file's name is in
        its folder, which POSIX wants synced on its own.
        """
        if not keys:
            return
        try:
            if len(keys) > 8:
                self._sync_all()
                return
            for key in keys:
                self._sync_path(self.path(key))
                self._sync_path(self.path(key).parent)
        except OSError as error:
            raise _local(error, "sync") from error

    @staticmethod
    def _sync_path(path: Path) -> None:
        # A descriptor of its own: the shared ones may be closed by the loop meanwhile. Linux
        # reports a writeback error once to every descriptor opened before it happened, and to
        # one opened later if nobody has seen it yet (errseq_t).
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def _sync_all(self) -> None:
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(fd):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
        finally:
            os.close(fd)

    def free_bytes(self) -> int:
        """Free space of the disk below, for callers without privilege."""
        info = os.statvfs(self.root)
        return info.f_bavail * info.f_frsize

    def close(self) -> None:
        """Close every descriptor."""
        while self._open:
            self._open.popitem()
