"""One side of the comparison: a folder, open handles, and operations by name.

The same code drives the mount and the plain folder. What an operation returns, or the errno that
it fails with, is its outcome; times are in it only where the caller has set them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import mmap
import os
import random
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Outcome = tuple[str, Any]

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_NAME_AT = 19  # in a linux_dirent64
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
SHOWN_BYTES = 64


@functools.cache
def _stuff(seed: int) -> bytes:
    return random.Random(seed).randbytes(1 << 20)


def bytes_of(seed: int, length: int) -> bytes:
    """The same for the same seed, so that equal blocks occur."""
    return _stuff(seed)[:length]


def short(data: bytes) -> bytes | str:
    """Bytes for a report: long ones by their length and digest."""
    if len(data) <= SHOWN_BYTES:
        return data
    return f"{len(data)} bytes {hashlib.sha256(data).hexdigest()[:16]}"


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    @classmethod
    def of(cls, value: int | str) -> _TimeSpec:
        if isinstance(value, str):
            return cls(0, {"now": UTIME_NOW, "omit": UTIME_OMIT}[value])
        return cls(*divmod(value, 10**9))


@dataclass
class Side:
    root: Path
    handles: dict[int, int] = field(default_factory=dict)

    def do(self, name: str, *args: Any) -> Outcome:
        try:
            return "ok", getattr(self, name)(*args)
        except OSError as error:
            return "error", errno.errorcode.get(error.errno or 0, str(error))
        except ValueError as error:  # mmap's own checks
            return "error", str(error)

    def at(self, path: bytes) -> bytes:
        return os.fsencode(self.root) + b"/" + path

    def close_all(self) -> None:
        for slot in list(self.handles):
            self.close(slot)

    # ------------------------------------------------------------------ handles

    def open(self, slot: int, path: bytes, flags: int) -> None:
        self.close(slot)
        self.handles[slot] = os.open(self.at(path), flags, 0o640)

    def close(self, slot: int) -> None:
        if slot in self.handles:
            os.close(self.handles.pop(slot))

    def pread(self, slot: int, offset: int, length: int) -> bytes | str:
        return short(os.pread(self.handles[slot], length, offset))

    def pwrite(self, slot: int, offset: int, length: int, seed: int) -> int:
        return os.pwrite(self.handles[slot], bytes_of(seed, length), offset)

    def read(self, slot: int, length: int) -> bytes | str:
        return short(os.read(self.handles[slot], length))

    def write(self, slot: int, length: int, seed: int) -> int:
        return os.write(self.handles[slot], bytes_of(seed, length))

    def seek(self, slot: int, offset: int, whence: int) -> int:
        if offset and stat.S_ISDIR(os.fstat(self.handles[slot]).st_mode):
            raise OSError(errno.EINVAL, "a folder's positions are its file system's own")
        return os.lseek(self.handles[slot], offset, whence)

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self.handles[slot], size)

    def fsync(self, slot: int) -> None:
        os.fsync(self.handles[slot])

    def fdatasync(self, slot: int) -> None:
        os.fdatasync(self.handles[slot])

    def fchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self.handles[slot], mode)

    def mapped_write(self, slot: int, page: int, at: int, length: int, seed: int, how: str) -> None:
        with self._mapped(slot, page, at + length, mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
            mapping[at : at + length] = bytes_of(seed, length)
            if how == "flush":
                mapping.flush()

    def mapped_read(self, slot: int, page: int, at: int, length: int) -> bytes | str:
        with self._mapped(slot, page, at + length, mmap.PROT_READ) as mapping:
            return short(mapping[at : at + length])

    def _mapped(self, slot: int, page: int, length: int, access: int) -> mmap.mmap:
        offset = page * mmap.PAGESIZE
        return mmap.mmap(self.handles[slot], length, mmap.MAP_SHARED, access, offset=offset)

    def copy_range(self, slot: int, offset: int, to: int, at: int, length: int) -> int:
        done = 0
        while done < length:
            some = os.copy_file_range(
                self.handles[slot], self.handles[to], length - done, offset + done, at + done
            )
            if not some:
                break
            done += some
        return done

    def direct_write(self, path: bytes, page: int, pages: int, seed: int) -> int:
        with self._direct(path, os.O_WRONLY) as fd, _aligned(pages) as buffer:
            buffer.write(bytes_of(seed, len(buffer)))
            return os.pwritev(fd, [buffer], page * mmap.PAGESIZE)

    def direct_read(self, path: bytes, page: int, pages: int) -> bytes | str:
        with self._direct(path, os.O_RDONLY) as fd, _aligned(pages) as buffer:
            return short(buffer[: os.preadv(fd, [buffer], page * mmap.PAGESIZE)])

    @contextlib.contextmanager
    def _direct(self, path: bytes, flags: int) -> Any:
        fd = os.open(self.at(path), flags | os.O_DIRECT | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "no regular file")
            yield fd
        finally:
            os.close(fd)

    # ------------------------------------------------------------------ names

    def mkdir(self, path: bytes, mode: int) -> None:
        os.mkdir(self.at(path), mode)

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self.at(path))

    def unlink(self, path: bytes) -> None:
        os.unlink(self.at(path))

    def rename(self, old: bytes, new: bytes, flags: int) -> None:
        _check(_libc.renameat2(_AT_FDCWD, self.at(old), _AT_FDCWD, self.at(new), flags))

    def link(self, old: bytes, new: bytes) -> None:
        os.link(self.at(old), self.at(new), follow_symlinks=False)

    def symlink(self, target: bytes, path: bytes) -> None:
        os.symlink(target, self.at(path))

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        os.mknod(self.at(path), mode, device)

    # ------------------------------------------------------------------ attributes

    def truncate(self, path: bytes, size: int) -> None:
        if stat.S_ISFIFO(os.stat(self.at(path)).st_mode):
            raise OSError(errno.EINVAL, "would wait")
        same = os.stat(self.at(path)).st_size == size
        os.truncate(self.at(path), size)
        if same:  # then FUSE moves no times: fs/fuse/dir.c, fuse_do_setattr, `trust_local_cmtime`
            os.utime(self.at(path))

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self.at(path), mode)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        os.chown(self.at(path), uid, gid, follow_symlinks=False)

    def utimens(self, path: bytes, atime: int | str, mtime: int | str) -> list[int]:
        times = (_TimeSpec * 2)(_TimeSpec.of(atime), _TimeSpec.of(mtime))
        _check(_libc.utimensat(_AT_FDCWD, self.at(path), times, 0x100))  # AT_SYMLINK_NOFOLLOW
        found = os.lstat(self.at(path))
        told = [(atime, found.st_atime_ns), (mtime, found.st_mtime_ns)]
        return [ns for asked, ns in told if isinstance(asked, int)]

    def setxattr(self, path: bytes, name: str, value: bytes, flags: int) -> None:
        os.setxattr(self.at(path), name, value, flags, follow_symlinks=False)

    def removexattr(self, path: bytes, name: str) -> None:
        os.removexattr(self.at(path), name, follow_symlinks=False)

    # ------------------------------------------------------------------ folders that change

    def list_changing(self, path: bytes, entries: int, step: int) -> list[str]:
        """Read a folder in small pieces while names come and go. Returns what POSIX forbids.

        Who was there all the time must be told once; who never was, not at all.
        """
        folder = self.at(path)
        os.mkdir(folder)
        names = [b"n%03d-%s" % (n, b"x" * (n % 200)) for n in range(entries)]
        for name in names:
            os.mknod(folder + b"/" + name)
        seen: list[bytes] = []
        gone = set[bytes]()
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            turn = 0
            while piece := _entries(fd, 1024):
                seen += piece
                turn += 1
                victim = names[turn * step % entries]
                if victim not in gone:
                    gone.add(victim)
                    os.unlink(folder + b"/" + victim)
                    os.mknod(folder + b"/new-%d" % turn)
        finally:
            os.close(fd)
        for entry in os.listdir(folder):
            os.unlink(folder + b"/" + entry)
        os.rmdir(folder)
        wrong = [f"{n!r} is missing" for n in names if n not in gone and n not in seen]
        wrong += [f"{n!r} twice" for n in {*names, b".", b".."} if seen.count(n) > 1]
        known = {*names, b".", b".."}
        return wrong + [f"{n!r} never was" for n in seen if n not in known and n[:4] != b"new-"]


@contextlib.contextmanager
def _aligned(pages: int) -> Any:
    with mmap.mmap(-1, pages * mmap.PAGESIZE) as buffer:
        yield buffer


def _entries(fd: int, size: int) -> list[bytes]:
    """The next names of an open folder, by one getdents64(2) with so large a buffer."""
    buffer = ctypes.create_string_buffer(size)
    got = _check(_libc.getdents64(fd, buffer, size))
    names, at = [], 0
    while at < got:
        (length,) = struct.unpack_from("<H", buffer.raw, at + 16)
        names.append(buffer.raw[at + _NAME_AT : at + length].partition(b"\0")[0])
        at += length
    return names
