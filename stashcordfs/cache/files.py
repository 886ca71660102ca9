"""Local files: one sparse file per inode and generation, at the file's own offsets.

A truncation to nothing starts a new generation, so that the old bytes can stay until the journal
says durably that they are not needed, while new ones are written. Holes are made by
`fallocate(FALLOC_FL_PUNCH_HOLE)`. Descriptors are kept in a bounded LRU.

Local files are numbered, and a mapped table (`owners`) says whose each is: giving one to an inode
is a store of 16 bytes, where a name of its own would be a rename (a fifth of what a small file
costs). A removed file is emptied and kept as a spare, and further spares are made ahead in a
thread: ext4 passes over inodes that were deleted in the last minute or more (`recently_deleted` in
fs/ext4/ialloc.c), one by one, so that making a file after many were removed, by anybody, costs
0.5 ms. A file that a power cut leaves to a new owner with old bytes is harmless: only what was
synced there afterwards counts.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from stashcordfs.cache.mapped import MappedTable, sync_path
from stashcordfs.errors import LocalDiskError
from stashcordfs.syscalls import KEEP_SIZE, PUNCH_HOLE, fallocate, syncfs
from stashcordfs.types import Ino

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SPARES_MOST, _SPARES_MADE, _SPARES_LOW = 8192, 4096, 2048
_FOLDER_BITS = 12  # of a number: 4096 files a folder
_MAGIC = b"STASHCORDFILES1\0"
_HEX = re.compile("[0-9a-f]+")
_OWNER = struct.Struct("<QQ")  # inode, generation; no inode: a spare, or no file

FileKey = tuple[Ino, int]  # inode, generation


def _local(error: OSError, what: str) -> LocalDiskError:
    return LocalDiskError(error.errno or errno.EIO, f"local cache, {what}: {error.strerror}")


def _packed(key: FileKey) -> int:
    """One integer: half the memory of a tuple in a table of many thousands."""
    return key[0] << 64 | key[1]


def read_owners(root: Path) -> Iterator[tuple[int, FileKey]]:
    """The number of each local file that is somebody's, with its owner. Changes nothing."""
    if not (root / "owners").exists():
        return
    table = MappedTable(root / "owners", magic=_MAGIC, parameter=0, stride=_OWNER.size)
    try:
        for number in range(len(table)):
            ino, generation = _OWNER.unpack_from(table.map, table.at(number))
            if ino:
                yield number, (Ino(ino), generation)
    finally:
        table.close()


def folder_name(number: int) -> str:
    """Where below the root a local file lies, under its number in hex."""
    return f"n{number >> _FOLDER_BITS:04x}"


class LocalFiles:
    """Reads, writes, punches and removes local files. Every OSError becomes LocalDiskError."""

    def __init__(self, root: Path, *, max_open: int = 256) -> None:
        """Keep the files under `root`."""
        self.root = root
        self._root = str(root)
        self._max_open = max_open
        self._open: OrderedDict[int, int] = OrderedDict()  # by number; cachetools' costs five times
        self._numbers: dict[int, int] = {}
        self.on_low_spares: Callable[[], None] = lambda: None
        self._spares: list[int] = []
        self._vacant: list[int] = []  # numbers below `_next` without a file
        self._next = 0
        self._owners_stored = False  # since they were synced
        self._owners_lock = threading.Lock()
        self._owners_failed: OSError | None = None
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._owners = MappedTable(
                root / "owners", magic=_MAGIC, parameter=0, stride=_OWNER.size
            )
            self.at_start = self._load()  # lengths in bytes, for whoever loads
            self._adopt_named()
        except OSError as error:
            raise _local(error, "start") from error

    # ------------------------------------------------------------------ start

    def _load(self) -> dict[FileKey, int]:
        """Match the owners with the files that are there; files without an owner are spares."""
        there = dict(self._on_disk())
        self._next = max(there, default=-1) + 1
        found: dict[FileKey, int] = {}
        for number in range(len(self._owners)):
            ino, generation = _OWNER.unpack_from(self._owners.map, self._owners.at(number))
            key = (Ino(ino), generation)
            if ino and number in there and key not in found:
                found[key] = there.pop(number)
                self._numbers[_packed(key)] = number
            elif ino:  # removed by hand, or given up when the power was cut
                self._set_owner(number, (Ino(0), 0))
            if number < self._next and number not in there and key not in found:
                self._vacant.append(number)
        for number, size in there.items():
            if size:
                os.truncate(self._path(number), 0)
            self._keep_spare(number)
        return found

    def _on_disk(self) -> Iterator[tuple[int, int]]:
        for folder in self.root.iterdir():
            if folder.is_dir() and folder.name[0] == "n":
                with os.scandir(folder) as entries:
                    yield from (
                        (int(entry.name, 16), entry.stat().st_size)
                        for entry in entries
                        if _HEX.fullmatch(entry.name)  # fsck tells of others
                    )

    def _adopt_named(self) -> None:
        """Take over files of the earlier layout, which were named `INODE.GENERATION`."""
        for folder in [f for f in self.root.iterdir() if f.is_dir() and len(f.name) == 2]:
            for old in folder.iterdir():
                ino, _, generation = old.name.partition(".")
                key = (Ino(int(ino, 16)), int(generation, 16))
                self.at_start[key] = old.stat().st_size
                number = self._take_spare()
                self._set_owner(number, key)
                self._numbers[_packed(key)] = number
                old.rename(self._path(number))  # killed before it: adopted anew by the next start
            folder.rmdir()
        shutil.rmtree(self.root / "spare", ignore_errors=True)

    # ------------------------------------------------------------------ numbers and descriptors

    def path(self, key: FileKey) -> str:
        """Where a file lies, made if it is not there: for people and tests."""
        self.descriptor(key)
        return self._path(self._numbers[_packed(key)])

    def _folder(self, number: int) -> str:
        return f"{self._root}/{folder_name(number)}"

    def _path(self, number: int) -> str:
        # A string: pathlib costs as much as the system call that follows.
        return f"{self._folder(number)}/{number:x}"

    def _set_owner(self, number: int, key: FileKey) -> None:
        while number >= len(self._owners):
            self._owners.grow()
        _OWNER.pack_into(self._owners.map, self._owners.at(number), *key)
        self._owners_stored = True

    def descriptor(self, key: FileKey) -> int:
        """An open descriptor, which may be closed at the next call; `os.dup` it to keep it."""
        number = self._numbers.get(key[0] << 64 | key[1])
        if number is None:
            number = self._give(key)
        fd = self._open.get(number)
        if fd is None:
            return self._open_file(number)
        self._open.move_to_end(number)
        return fd

    def _give(self, key: FileKey) -> int:
        """Let a spare be this inode's. Said before a byte is written, as a mark is."""
        try:
            number = self._take_spare()
        except OSError as error:
            raise _local(error, "create") from error
        try:
            self._set_owner(number, key)
        except LocalDiskError:
            self._spares.append(number)
            raise
        self._numbers[_packed(key)] = number
        if len(self._spares) == _SPARES_LOW:
            self.on_low_spares()
        return number

    def _take_spare(self) -> int:
        if self._spares:
            return self._spares.pop()
        number = self._new_number()
        try:
            self._make(self._path(number))
        except OSError:
            self._vacant.append(number)
            raise
        return number

    def _new_number(self) -> int:
        if self._vacant:
            return self._vacant.pop()
        self._next += 1
        return self._next - 1

    @staticmethod
    def _make(path: str) -> None:
        """An empty file."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            os.close(os.open(path, flags, 0o600))
        except FileNotFoundError:
            folder = path.rpartition("/")[0]
            os.makedirs(folder, mode=0o700, exist_ok=True)  # noqa: PTH103  see `_path`
            sync_path(
                folder.rpartition("/")[0]
            )  # a later sync of the file asks for its folder only
            os.close(os.open(path, flags, 0o600))

    def _open_file(self, number: int) -> int:
        try:
            fd = os.open(self._path(number), os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _local(error, "open") from error
        self._open[number] = fd
        if len(self._open) > self._max_open:
            os.close(self._open.popitem(last=False)[1])
        return fd

    # ------------------------------------------------------------------ bytes

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
        try:
            done = os.pwrite(fd, data, offset)
            while done < len(data):  # a signal or a full disk came between
                done += os.pwrite(fd, memoryview(data)[done:], offset + done)
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
        try:
            fallocate(self.descriptor(key), KEEP_SIZE | PUNCH_HOLE, offset, length)
        except OSError as error:
            raise _local(error, "punch") from error

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
        return _packed(key) in self._numbers

    # ------------------------------------------------------------------ giving up, spares

    def remove(self, key: FileKey) -> None:
        """Give up the file and its space; one that is not there is no error."""
        number = self._numbers.pop(_packed(key), None)
        if number is None:
            return
        self._set_owner(number, (Ino(0), 0))
        fd = self._open.pop(number, -1)
        try:
            if fd < 0:
                fd = os.open(self._path(number), os.O_RDWR | os.O_CLOEXEC)
            try:
                os.ftruncate(fd, 0)
            finally:
                # Now: ext4 remembers a truncation to nothing until the next close, which then
                # starts to write out what the file has (`EXT4_STATE_DA_ALLOC_CLOSE`, 50 us).
                os.close(fd)
            self._keep_spare(number)
        except FileNotFoundError:
            self._drop(number)  # somebody was faster
        except OSError as error:  # neither used again before the next start
            raise _local(error, "remove") from error

    def _keep_spare(self, number: int) -> None:
        if len(self._spares) < _SPARES_MOST:
            self._spares.append(number)
        else:
            os.unlink(self._path(number))  # noqa: PTH108  see `_path`
            self._drop(number)

    def _drop(self, number: int) -> None:
        fd = self._open.pop(number, None)
        if fd is not None:
            os.close(fd)
        self._vacant.append(number)

    def spares_wanted(self) -> list[int]:
        """Numbers of the spares that should be made ahead; empty while there are enough."""
        if len(self._spares) > _SPARES_LOW:
            return []
        return [self._new_number() for _ in range(_SPARES_MADE - len(self._spares))]

    def make_spares(self, numbers: list[int]) -> None:
        """Make these files. For a worker thread: it blocks."""
        try:
            for number in numbers:
                self._make(self._path(number))
        except OSError as error:
            raise _local(error, "create") from error

    def add_spares(self, numbers: list[int]) -> None:
        """Take up what `make_spares` has made."""
        self._spares.extend(numbers)

    def give_back(self, numbers: list[int]) -> None:
        """`make_spares` has failed with these."""
        self._vacant.extend(numbers)

    # ------------------------------------------------------------------ the disk

    def sync(self, keys: list[FileKey]) -> None:
        """Make the bytes and names of these files durable. For a worker thread: it blocks.

        Many files are cheaper by one `syncfs` than by an fdatasync each. A new file's name is in
        its folder, which POSIX wants synced on its own; whose the file is, in the table of owners.
        """
        if not keys:
            return
        try:
            if len(keys) > 8:
                self._sync_all()
                return
            numbers = [self._numbers.get(_packed(key)) for key in keys]
            for number in numbers:
                if number is not None:  # given up meanwhile: nobody wants it any more
                    sync_path(self._path(number))
                    sync_path(self._folder(number))
            self._sync_owners()
        except OSError as error:
            raise _local(error, "sync") from error

    def _sync_all(self) -> None:
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syncfs(fd)
        finally:
            os.close(fd)
        self._sync_owners()

    def _sync_owners(self) -> None:
        """Make durable whose each file is. A failure stays one: the kernel may drop the pages."""
        with self._owners_lock:  # who comes second must find it done, not under way
            if self._owners_failed is not None:
                raise self._owners_failed
            if self._owners_stored:
                self._owners_stored = False
                try:
                    self._owners.sync()
                except OSError as error:
                    self._owners_failed = error
                    raise

    def free_bytes(self) -> int:
        """Free space of the disk below, for callers without privilege."""
        info = os.statvfs(self.root)
        return info.f_bavail * info.f_frsize

    def close(self) -> None:
        """Close every descriptor."""
        while self._open:
            os.close(self._open.popitem()[1])
        self._owners.close()
