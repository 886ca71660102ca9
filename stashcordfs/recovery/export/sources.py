"""Where a copy reads from: the parts of a volume that nobody has mounted, or a mount.

Both walk folders before what is in them. Neither changes anything, access times included.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from stashcordfs.errors import FsError
from stashcordfs.recovery.export.manifest import Entry
from stashcordfs.types import ROOT_INO, Attributes, Ino

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from stashcordfs.vfs.filesystem import FileSystem

    Read = Callable[[int, int], Awaitable[bytes]]  # offset, size: fewer bytes at the end alone

_PAGE = 1000
_FIRST_NAMES = 2  # "." and ".."


class Source(Protocol):
    """What can be copied. OSError and FsError: one entry cannot be read, the rest can."""

    def walk(self) -> AsyncGenerator[Entry | tuple[bytes, str], None]:
        """Every name but the root's; a folder that cannot be read as its path and why."""

    async def look(self, entry: Entry) -> Entry:
        """The entry as it is now."""

    def reading(self, entry: Entry) -> AbstractAsyncContextManager[Read]:
        """A file's content."""


def entry_of(
    path: bytes, a: Attributes, target: bytes | None, xattrs: tuple[tuple[bytes, bytes], ...]
) -> Entry:
    """An inode under one of its names."""
    return Entry(
        path, a.ino, a.mode, a.uid, a.gid, a.size, a.atime_ns, a.mtime_ns, a.ctime_ns,
        a.rdev, a.nlink, target, xattrs,
    )  # fmt: skip


class VolumeSource:
    """An assembled volume: no kernel is needed. `noatime` is its assembler's to set."""

    def __init__(self, filesystem: FileSystem) -> None:
        """Take the facade."""
        self._fs = filesystem

    async def walk(self) -> AsyncGenerator[Entry, None]:
        """As `Source` has it."""
        folders: list[tuple[bytes, Ino]] = [(b"", ROOT_INO)]
        while folders:
            path, ino = folders.pop()
            fh = await self._fs.opendir(ino)
            try:
                last = _FIRST_NAMES
                while page := await self._fs.readdir(fh, last, _PAGE):
                    for cookie, name, attributes in page:
                        last = cookie
                        entry = await self._entry(_join(path, name), attributes)
                        yield entry
                        if stat.S_ISDIR(entry.mode):
                            folders.append((entry.path, Ino(entry.ino)))
                    await trio.lowlevel.checkpoint()
            finally:
                await self._fs.releasedir(fh)

    async def _entry(self, path: bytes, attributes: Attributes) -> Entry:
        ino = attributes.ino
        target = await self._fs.readlink(ino) if stat.S_ISLNK(attributes.mode) else None
        names = await self._fs.listxattr(ino)
        xattrs = [(bytes(name), await self._fs.getxattr(ino, name)) for name in names]
        return entry_of(path, attributes, target, tuple(xattrs))

    async def look(self, entry: Entry) -> Entry:
        """As `Source` has it."""
        return await self._entry(entry.path, await self._fs.getattr(Ino(entry.ino)))

    @asynccontextmanager
    async def reading(self, entry: Entry) -> AsyncIterator[Read]:
        """As `Source` has it."""
        fh = await self._fs.open(Ino(entry.ino), os.O_RDONLY)
        try:
            yield partial(self._fs.read, fh)
        finally:
            with trio.CancelScope(shield=True):
                await self._fs.release(fh)


class MountSource:
    """A mount, read as any program reads it: each file as it is at that moment."""

    def __init__(self, mountpoint: bytes) -> None:
        """`mountpoint`: of a volume, nothing else below it is looked at."""
        self._root = mountpoint
        self._device = os.lstat(mountpoint).st_dev

    async def walk(self) -> AsyncGenerator[Entry | tuple[bytes, str], None]:
        """As `Source` has it."""
        folders = [b""]
        while folders:
            path = folders.pop()
            try:
                names = await _in_thread(os.listdir, self._at(path))
            except OSError as error:
                yield path, os.strerror(error.errno or 0)
                continue
            for name in names:
                here = _join(path, name)
                try:
                    entry = await _in_thread(self._entry, here)
                except FileNotFoundError:
                    continue  # removed meanwhile
                except OSError as error:
                    yield here, os.strerror(error.errno or 0)
                    continue
                if entry is None:
                    continue
                yield entry
                if stat.S_ISDIR(entry.mode):
                    folders.append(here)

    def _at(self, path: bytes) -> bytes:
        return _join(self._root, path) if path else self._root

    def _entry(self, path: bytes) -> Entry | None:
        """None: another file system is mounted there."""
        full = self._at(path)
        s = os.lstat(full)
        if s.st_dev != self._device:
            return None
        attributes = Attributes(
            Ino(s.st_ino), s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_rdev, s.st_size,
            s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns,
        )  # fmt: skip
        target = os.readlink(full) if stat.S_ISLNK(s.st_mode) else None
        names = os.listxattr(full, follow_symlinks=False)
        xattrs = [(n.encode(), os.getxattr(full, n, follow_symlinks=False)) for n in names]
        return entry_of(path, attributes, target, tuple(xattrs))

    async def look(self, entry: Entry) -> Entry:
        """As `Source` has it."""
        found = await _in_thread(self._entry, entry.path)
        if found is None:
            raise FsError(errno.ENOENT)
        return found

    @asynccontextmanager
    async def reading(self, entry: Entry) -> AsyncIterator[Read]:
        """As `Source` has it."""
        descriptor = await _in_thread(_open, self._at(entry.path))

        async def read(offset: int, size: int) -> bytes:
            return await _in_thread(os.pread, descriptor, size, offset)

        try:
            yield read
        finally:
            os.close(descriptor)


def _open(path: bytes) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # another's file
        return os.open(path, flags)


def _join(folder: bytes, name: bytes) -> bytes:
    return b"%b/%b" % (folder, name) if folder else name


_in_thread = partial(trio.to_thread.run_sync, abandon_on_cancel=True)
