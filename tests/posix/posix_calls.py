"""System calls as steps of a POSIX case, each with its answer as one short text.

    create f 0644                    a step that must succeed
    chmod f 0600 -> EPERM            one that must fail so
    stat f mode,uid -> 0600,0        one that answers
    65534: unlink f -> EACCES        as a user: uid[/gid[,further groups]]
    tick, since f                    which times (a, m, c) are younger than the last tick

Paths are relative to the case's folder. Names with special meaning: `long:N` a name of N bytes,
`path:N:NAME` a path of N bytes that leads to NAME.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import shutil
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator

_NUMBERS = {"x86_64": (117, 119, 116), "aarch64": (147, 149, 159)}
_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_REALTIME_COARSE = 5  # linux/time.h; Python has no name for it
_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}
_FLAGS = {"noreplace": 1, "exchange": 2, "whiteout": 4}
_KINDS = {
    stat.S_IFREG: "regular", stat.S_IFDIR: "dir", stat.S_IFIFO: "fifo", stat.S_IFLNK: "symlink",
    stat.S_IFSOCK: "socket", stat.S_IFBLK: "block", stat.S_IFCHR: "char",
}  # fmt: skip
TYPES = tuple(_KINDS.values())


def _syscall(number: int, *args: object) -> None:
    if _LIBC.syscall(number, *args) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def acting(uid: int, gid: int, groups: tuple[int, ...]) -> Iterator[None]:
    """This thread alone with another identity and no capabilities; root again afterwards."""
    setresuid, setresgid, setgroups = _NUMBERS[platform.machine()]
    given = (ctypes.c_uint32 * max(1, len(groups)))(*groups)
    before = os.getgroups()
    _syscall(setgroups, len(groups), given)
    _syscall(setresgid, gid, gid, 0)
    _syscall(setresuid, uid, uid, 0)
    try:
        yield
    finally:
        _syscall(setresuid, 0, 0, 0)
        _syscall(setresgid, 0, 0, 0)
        _syscall(setgroups, len(before), (ctypes.c_uint32 * max(1, len(before)))(*before))


def errno_name(error: OSError) -> str:
    if error.errno == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # of the same number as ENOTSUP
    return errno.errorcode.get(error.errno or 0, str(error.errno))


class Calls:
    """The calls of one case, within its folder (the working directory). `close` ends it."""

    def __init__(self) -> None:
        self.open_files: dict[str, int] = {}
        self.running: list[subprocess.Popen[bytes]] = []
        self.mark_ns = 0

    def close(self) -> None:
        for descriptor in self.open_files.values():
            os.close(descriptor)
        for process in self.running:
            process.communicate()

    def run(self, verb: str, args: list[str]) -> str:
        """The answer; the errno's name when it fails."""
        call: Callable[..., object] = getattr(self, f"do_{verb}")
        try:
            answer = call(*(self._expanded(arg) for arg in args))
        except OSError as error:
            return errno_name(error)
        return "0" if answer is None else str(answer)

    @staticmethod
    def _expanded(arg: str) -> str:
        kind, _, rest = arg.partition(":")
        if kind == "long":
            return "n" * int(rest)
        if kind == "path":
            size, _, name = rest.partition(":")
            wanted = int(size) - len(name)
            return "./" * (wanted // 2) + "/" * (wanted % 2) + name
        return arg

    # ------------------------------------------------------------------ making

    def do_make(self, kind: str, path: str, mode: str = "0644") -> None:
        """Something of any type."""
        match kind:
            case "regular":
                self.do_create(path, mode)
            case "dir":
                os.mkdir(path, int(mode, 8))
            case "symlink":
                os.symlink("nowhere", path)
            case "socket":
                self.do_bind(path)
                os.chmod(path, int(mode, 8))
            case "fifo" | "block" | "char":
                self.do_mknod(path, kind, mode)

    def do_create(self, path: str, mode: str = "0644") -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, int(mode, 8)))

    def do_mkdir(self, path: str, mode: str = "0755") -> None:
        os.mkdir(path, int(mode, 8))

    def do_mkfifo(self, path: str, mode: str = "0644") -> None:
        os.mkfifo(path, int(mode, 8))

    def do_mknod(self, path: str, kind: str, mode: str = "0644", major="1", minor="3") -> None:
        kinds = {name: number for number, name in _KINDS.items()}
        os.mknod(path, kinds[kind] | int(mode, 8), os.makedev(int(major), int(minor)))

    def do_bind(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path)

    def do_symlink(self, target: str, path: str) -> None:
        os.symlink(target, path)

    def do_link(self, source: str, path: str) -> None:
        os.link(source, path, follow_symlinks=False)

    def do_umask(self, mode: str) -> None:
        os.umask(int(mode, 8))

    # ------------------------------------------------------------------ names

    def do_unlink(self, path: str) -> None:
        os.unlink(path)

    def do_rmdir(self, path: str) -> None:
        os.rmdir(path)

    def do_remove(self, path: str) -> None:
        """Whatever it is."""
        try:
            os.unlink(path)
        except IsADirectoryError:
            os.rmdir(path)

    def do_rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def do_rename2(self, old: str, new: str, flags: str = "") -> None:
        number = sum(_FLAGS[flag] for flag in flags.split(",") if flag)
        _syscall(
            _RENAMEAT2[platform.machine()],
            _AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), number,
        )  # fmt: skip

    def do_readlink(self, path: str) -> str:
        return os.readlink(path)

    def do_list(self, path: str) -> str:
        return ",".join(sorted(os.listdir(path))) or "-"

    def do_chdir(self, path: str) -> None:
        os.chdir(path)

    # ------------------------------------------------------------------ attributes

    def do_chmod(self, path: str, mode: str) -> None:
        os.chmod(path, int(mode, 8))

    def do_chown(self, path: str, uid: str, gid: str) -> None:
        os.chown(path, int(uid), int(gid))

    def do_lchown(self, path: str, uid: str, gid: str) -> None:
        os.lchown(path, int(uid), int(gid))

    def do_truncate(self, path: str, size: str) -> None:
        os.truncate(path, int(size))

    def do_utimens(self, path: str, atime: str, mtime: str, how: str = "") -> None:
        times = self._times(atime, mtime)
        flags = 0x100 if how else 0  # AT_SYMLINK_NOFOLLOW
        if _LIBC.utimensat(_AT_FDCWD, os.fsencode(path), times, flags) < 0:
            raise OSError(ctypes.get_errno(), "utimensat")

    @staticmethod
    def _times(atime: str, mtime: str) -> object:
        times = b""
        for time_ in (atime, mtime):
            special = {"now": (0, 0x3FFFFFFF), "omit": (0, 0x3FFFFFFE)}.get(time_)
            seconds, _, ns = time_.partition(".")
            times += struct.pack("qq", *(special or (int(seconds), int(ns.ljust(9, "0") or 0))))
        return ctypes.create_string_buffer(times)

    def do_stat(self, path: str, fields: str) -> str:
        return self._told(os.stat(path), fields)

    def do_lstat(self, path: str, fields: str) -> str:
        return self._told(os.lstat(path), fields)

    def _told(self, found: os.stat_result, fields: str) -> str:
        return ",".join(self._field(found, name) for name in fields.split(","))

    @staticmethod
    def _field(found: os.stat_result, name: str) -> str:
        match name:
            case "mode":
                return f"{stat.S_IMODE(found.st_mode):04o}"
            case "type":
                return _KINDS[stat.S_IFMT(found.st_mode)]
            case "rdev":
                return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
            case "atime" | "mtime" | "ctime":
                at = getattr(found, f"st_{name}_ns")
                seconds, ns = divmod(at, 10**9)
                return f"{seconds}.{ns:09}" if ns else str(seconds)
            case "holds":  # anything at all on the disk
                return "data" if found.st_blocks else "nothing"
        return str(getattr(found, f"st_{name}"))

    def do_access(self, path: str, mode: str) -> str:
        wanted = sum({"r": os.R_OK, "w": os.W_OK, "x": os.X_OK, "f": os.F_OK}[m] for m in mode)
        return "yes" if os.access(path, wanted) else "no"

    def do_tick(self) -> None:
        """From here on the kernel's coarse clock has passed everything before."""
        self.mark_ns = time.time_ns()
        while time.clock_gettime_ns(_REALTIME_COARSE) <= self.mark_ns:
            pass

    def do_since(self, path: str) -> str:
        return self._since(os.lstat(path))

    def do_fsince(self, name: str) -> str:
        return self._since(os.fstat(self.open_files[name]))

    def _since(self, found: os.stat_result) -> str:
        times = {"a": found.st_atime_ns, "m": found.st_mtime_ns, "c": found.st_ctime_ns}
        return "".join(name for name, at in times.items() if at > self.mark_ns) or "-"

    def do_statvfs(self, path: str, field: str) -> str:
        return str(getattr(os.statvfs(path), f"f_{field}"))

    # ------------------------------------------------------------------ open files

    def do_open(self, path: str, flags: str, mode: str = "0644", name: str = "") -> None:
        number = 0
        for flag in flags.split(","):
            number |= getattr(os, f"O_{flag.upper()}")
        descriptor = os.open(path, number | os.O_CLOEXEC, int(mode, 8))
        if name:
            self.open_files[name] = descriptor
        else:
            os.close(descriptor)

    def do_close(self, name: str) -> None:
        os.close(self.open_files.pop(name))

    def do_write(self, name: str, text: str, at: str = "") -> str | None:
        data, file = text.encode(), self.open_files[name]
        written = os.pwrite(file, data, int(at)) if at else os.write(file, data)
        return None if written == len(data) else f"{written} bytes"

    def do_read(self, name: str, size: str, at: str = "") -> str:
        file = self.open_files[name]
        data = os.pread(file, int(size), int(at)) if at else os.read(file, int(size))
        return data.replace(b"\0", b".").decode() or "-"

    def do_mmap_write(self, name: str, text: str, at: str) -> None:
        with mmap.mmap(self.open_files[name], 0) as mapped:
            mapped[int(at) : int(at) + len(text)] = text.encode()
            mapped.flush()

    def do_seek(self, name: str, offset: str, whence: str) -> str:
        return str(os.lseek(self.open_files[name], int(offset), getattr(os, f"SEEK_{whence}")))

    def do_fstat(self, name: str, fields: str) -> str:
        return self._told(os.fstat(self.open_files[name]), fields)

    def do_fchmod(self, name: str, mode: str) -> None:
        os.fchmod(self.open_files[name], int(mode, 8))

    def do_fchown(self, name: str, uid: str, gid: str) -> None:
        os.fchown(self.open_files[name], int(uid), int(gid))

    def do_ftruncate(self, name: str, size: str) -> None:
        os.ftruncate(self.open_files[name], int(size))

    def do_futimens(self, name: str, atime: str, mtime: str) -> None:
        if _LIBC.futimens(self.open_files[name], self._times(atime, mtime)) < 0:
            raise OSError(ctypes.get_errno(), "futimens")

    def do_fsync(self, name: str) -> None:
        os.fsync(self.open_files[name])

    def do_fallocate(self, name: str, offset: str, length: str) -> None:
        """As programs do it: by the C library, which writes where the file system can't."""
        os.posix_fallocate(self.open_files[name], int(offset), int(length))

    def do_copy_range(self, source: str, target: str, count: str) -> str:
        return str(os.copy_file_range(self.open_files[source], self.open_files[target], int(count)))

    def do_flock(self, name: str, how: str) -> None:
        fcntl.flock(self.open_files[name], getattr(fcntl, f"LOCK_{how}") | fcntl.LOCK_NB)

    def do_lockf(self, name: str, start: str, length: str) -> None:
        """An exclusive lock on a range, of the open file description."""
        wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, int(start), int(length), 0)
        fcntl.fcntl(self.open_files[name], 37, wanted)  # F_OFD_SETLK

    def do_program(self, path: str) -> None:
        """A program that waits until it is ended."""
        shutil.copy(shutil.which("cat") or "/bin/cat", path)

    def do_run(self, path: str) -> None:
        self.running.append(subprocess.Popen([f"./{path}"], stdin=subprocess.PIPE))

    # ------------------------------------------------------------------ extended attributes

    def do_setxattr(self, path: str, name: str, value: str, *flags: str) -> None:
        number = sum(getattr(os, f"XATTR_{flag.upper()}") for flag in flags)
        data = b"v" * int(value.removeprefix("bytes:")) if value.startswith("bytes:") else value
        data = data if isinstance(data, bytes) else data.encode()
        os.setxattr(path, self._xattr(name), data, number, follow_symlinks=False)

    @staticmethod
    def _xattr(name: str) -> str:
        prefix, _, size = name.partition("*")  # user.*250: 250 further bytes
        return prefix + "x" * int(size) if size else name

    def do_getxattr(self, path: str, name: str) -> str:
        value = os.getxattr(path, self._xattr(name), follow_symlinks=False)
        return value.decode() if len(value) < 100 else f"bytes:{len(value)}"

    def do_removexattr(self, path: str, name: str) -> None:
        os.removexattr(path, self._xattr(name), follow_symlinks=False)

    def do_listxattr(self, path: str) -> str:
        return ",".join(sorted(os.listxattr(path, follow_symlinks=False))) or "-"

    def do_setacl(self, path: str, kind: str, text: str) -> None:
        """`u::rw-,u:1:r--,g::r--,m::r--,o::---`, as setfacl has it; sorted as the kernel wants."""
        tags = {"u": (0x01, 0x02), "g": (0x04, 0x08), "m": (0x10, 0x10), "o": (0x20, 0x20)}
        packed = struct.pack("<I", 2)
        for entry in text.split(","):
            tag, who, bits = entry.split(":")
            number = sum({"r": 4, "w": 2, "x": 1, "-": 0}[bit] for bit in bits)
            packed += struct.pack(
                "<HHI", tags[tag][bool(who)], number, int(who) if who else 0xFFFFFFFF
            )
        os.setxattr(path, f"system.posix_acl_{kind}", packed)

    def do_getacl(self, path: str, kind: str) -> str:
        data = os.getxattr(path, f"system.posix_acl_{kind}")
        letters = {0x01: "u", 0x02: "u", 0x04: "g", 0x08: "g", 0x10: "m", 0x20: "o"}
        told = []
        for tag, bits, who in struct.iter_unpack("<HHI", data[4:]):
            named = str(who) if tag in {0x02, 0x08} else ""
            rights = "".join(
                letter if bits & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1))
            )
            told.append(f"{letters[tag]}:{named}:{rights}")
        return ",".join(told)
