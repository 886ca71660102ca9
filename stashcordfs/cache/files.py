"""Local files: one sparse file per inode and generation, at the file's own offsets.

A truncation to nothing starts a new generation, so that the old bytes can stay until the journal
says durably that they are not needed, while new ones are written. Holes are made by
`fallocate(FALLOC_FL_PUNCH_HOLE)`. Descriptors are kept in a bounded LRU.

A removed file is emptied and kept as a spare for the next one, and further spares are made ahead in
a thread: ext4 passes over inodes that were deleted in the last minute or more (`recently_deleted`
in fs/ext4/ialloc.c), one by one, so that making a file after many were removed, by anybody, costs
0.5 ms, twenty times the usual. A spare that a power cut leaves under a new name with old bytes is
harmless: only what was synced there afterwards counts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from typing import TYPE_CHECKING

from cachetools import LRUCache

from stashcordfs.errors import LocalDiskError
from stashcordfs.types import Ino

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_KEEP_SIZE_AND_PUNCH = 0x01 | 0x02  # linux/falloc.h
_SPARES_MOST, _SPARES_MADE, _SPARES_LOW = 4096, 1024, 512
_SPARE_FOLDER = "spare"
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

FileKey = tuple[Ino, int]  # inode, generation


def _local(error: OSError, what: str) -> LocalDiskError:
    return LocalDiskError(error.errno or errno.EIO, f"local cache, {what}: {error.strerror}")


def _packed(key: FileKey) -> int:
    """One integer: half the memory of a tuple in a set of many thousands."""
    return key[0] << 64 | key[1]


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
        self._root = str(root)
        self._open: _Descriptors = _Descriptors(maxsize=max_open)
        self._there: set[int] = set()  # so that nobody asks the disk for a file that is not there
        self.on_low_spares: Callable[[], None] = lambda: None
        self._spares: list[str] = []
        self._spares_made = 0
        try:
            for name in range(256):
                (root / f"{name:02x}").mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.rmtree(root / _SPARE_FOLDER, ignore_errors=True)
            (root / _SPARE_FOLDER).mkdir(mode=0o700)
            self.at_start = dict(self.scan())  # lengths in bytes, for whoever loads
            self._there.update(_packed(key) for key in self.at_start)
        except OSError as error:
            raise _local(error, "mkdir") from error

    def path(self, key: FileKey) -> str:
        """Where a file lies. A string: pathlib costs as much as the system call that follows."""
        ino, generation = key
        return f"{self._root}/{ino & 255:02x}/{ino:x}.{generation:x}"

    def descriptor(self, key: FileKey) -> int:
        """An open descriptor, which may be closed at the next call; `os.dup` it to keep it."""
        fd = self._open.get(key)
        if fd is None:
            try:
                fd = self._open_file(key)
            except OSError as error:
                raise _local(error, "open") from error
            self._open[key] = fd
        return fd

    def _open_file(self, key: FileKey) -> int:
        path, flags = self.path(key), os.O_RDWR | os.O_CLOEXEC
        if self.exists(key):
            return os.open(path, flags)
        if self._spares:
            os.rename(self._spares.pop(), path)  # noqa: PTH104  see `path`
            if len(self._spares) == _SPARES_LOW:
                self.on_low_spares()
        fd = os.open(path, flags | os.O_CREAT, 0o600)
        self._there.add(_packed(key))
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

    def data_ranges(self, key: FileKey, start: int, stop: int) -> list[tuple[int, int]]:
        """Where between `start` and `stop` the file has data, not holes (lseek(2), SEEK_DATA)."""
        fd = self.descriptor(key)
        found: list[tuple[int, int]] = []
        try:
            while start < stop:
                first = os.lseek(fd, start, os.SEEK_DATA)
                start = min(os.lseek(fd, first, os.SEEK_HOLE), stop)
                if first < stop:
                    found.append((first, start))
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data beyond
                raise _local(error, "seek") from error
        return found

    def exists(self, key: FileKey) -> bool:
        """Whether there is a local file, without making one."""
        return _packed(key) in self._there

    def remove(self, key: FileKey) -> None:
        """Give up the file and its space; one that is not there is no error."""
        if not self.exists(key):
            return
        fd = self._open.pop(key, None)
        path = self.path(key)
        self._there.discard(_packed(key))  # first: a sync in its thread may look for the file
        try:
            if fd is None:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            os.ftruncate(fd, 0)
            if len(self._spares) < _SPARES_MOST:
                self._spares_made += 1
                spare = self._spare(self._spares_made)
                os.rename(path, spare)  # noqa: PTH104  see `path`
                self._spares.append(spare)
            else:
                os.unlink(path)  # noqa: PTH108  see `path`
        except FileNotFoundError:
            pass  # somebody was faster
        except OSError as error:
            raise _local(error, "remove") from error
        finally:
            if fd is not None:
                os.close(fd)

    def spares_wanted(self) -> list[str]:
        """Names of the spares that should be made ahead; empty while there are enough."""
        if len(self._spares) > _SPARES_LOW:
            return []
        first = self._spares_made + 1
        self._spares_made += _SPARES_MADE - len(self._spares)
        return [self._spare(number) for number in range(first, self._spares_made + 1)]

    @staticmethod
    def make_spares(names: list[str]) -> None:
        """Make these files. For a worker thread: it blocks."""
        try:
            for name in names:
                os.close(os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise _local(error, "create") from error

    def add_spares(self, names: list[str]) -> None:
        """Take up what `make_spares` has made."""
        self._spares.extend(names)

    def _spare(self, number: int) -> str:
        return f"{self._root}/{_SPARE_FOLDER}/{number:x}"

    def scan(self) -> Iterator[tuple[FileKey, int]]:
        """Every file with its length in bytes."""
        for folder in sorted(self.root.iterdir()):
            if folder.name == _SPARE_FOLDER or not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    ino, _, generation = entry.name.partition(".")
                    yield (Ino(int(ino, 16)), int(generation, 16)), entry.stat().st_size

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
                path = self.path(key)
                try:
                    sync_path(path)
                except FileNotFoundError:
                    if self.exists(key):
                        raise
                    continue  # given up meanwhile: Discord has it, or nobody wants it any more
                sync_path(path.rpartition("/")[0])
        except OSError as error:
            raise _local(error, "sync") from error

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
