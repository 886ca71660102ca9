"""Everything of a tree that a program can see, and how the mount's may differ: not at all.

Times that nobody has set are not equal on two file systems. So of mtime and ctime it is compared
whether an operation has moved them, and, where the plain folder's is a set one, its value. Not of
FIFOs: on FUSE the kernel neither moves their times at a write nor tells the file system of it
(`S_NOCMTIME` of all but regular files, fs/fuse/inode.c).
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from typing import Any

from sides import SHOWN_BYTES, Side, short

_SLACK_NS = 50_000_000  # the kernel stamps writes by a clock that moves every few ms
Tree = dict[bytes, "Facts"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What both sides must agree on, in `shared`; the rest is this side's own."""

    shared: tuple[Any, ...]
    ino: int
    mtime_ns: int
    ctime_ns: int
    fifo: bool


def look(side: Side) -> Tree:
    """Every name below the side's root, and what it leads to; also the open handles."""
    tree: Tree = {}
    first: dict[int, bytes] = {}
    _walk(side, b"", tree, first)
    for slot, fd in sorted(side.handles.items()):
        found = os.fstat(fd)
        known = first.get(found.st_ino, b"nameless")
        shared = (*_plain(found), _position(fd), _pread_all(fd), known)
        tree[b"handle %d" % slot] = _facts(shared, found)
    return tree


def _facts(shared: tuple[Any, ...], found: os.stat_result) -> Facts:
    fifo = stat.S_ISFIFO(found.st_mode)
    return Facts(shared, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, fifo)


def _walk(side: Side, path: bytes, tree: Tree, first: dict[int, bytes]) -> None:
    at = side.at(path)
    found = os.lstat(at)
    same = first.setdefault(found.st_ino, path)
    content: Any = None
    if stat.S_ISLNK(found.st_mode):
        content = os.readlink(at)
    elif stat.S_ISREG(found.st_mode):
        content = _content(at)
    elif stat.S_ISDIR(found.st_mode):
        content = tuple(sorted(os.listdir(at)))
        for name in content:
            _walk(side, path + b"/" + name if path else name, tree, first)
    xattrs = tuple((n, os.getxattr(at, n, follow_symlinks=False)) for n in _xattrs(at))
    shared = (*_plain(found), content, xattrs, same)
    tree[path] = _facts(shared, found)


def _xattrs(at: bytes) -> list[str]:
    return sorted(os.listxattr(at, follow_symlinks=False))


def _plain(found: os.stat_result) -> tuple[Any, ...]:
    size = None if stat.S_ISDIR(found.st_mode) else found.st_size
    return (oct(found.st_mode), found.st_nlink, found.st_uid, found.st_gid, found.st_rdev, size)


def _content(at: bytes) -> bytes | str:
    with open(at, "rb", buffering=0) as file:
        head = file.read(SHOWN_BYTES + 1)
        if len(head) <= SHOWN_BYTES:
            return head
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _position(fd: int) -> int | None:
    try:
        return os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:  # a FIFO
        return None


def _pread_all(fd: int) -> bytes | str | None:
    try:
        return short(os.pread(fd, 1 << 24, 0))
    except OSError:  # opened for writing only, on both sides
        return None


def differences(mount: Tree, plain: Tree) -> list[str]:
    """Where what both sides share is not alike."""
    wrong = [f"{path!r} is on the mount only" for path in sorted(mount.keys() - plain.keys())]
    wrong += [f"{path!r} is not on the mount" for path in sorted(plain.keys() - mount.keys())]
    for path in sorted(mount.keys() & plain.keys()):
        here, there = mount[path].shared, plain[path].shared
        if here != there:
            wrong.append(f"{path!r}: the mount has {here}, the plain folder {there}")
    return wrong


def times(before: tuple[Tree, Tree], after: tuple[Tree, Tree], begun_ns: int) -> list[str]:
    """Times that an operation moved on one side only, by path and inode."""
    wrong = []
    for path in after[0].keys() & after[1].keys():
        mount, plain = after[0][path], after[1][path]
        old_mount, old_plain = before[0].get(path), before[1].get(path)
        if old_mount is None or old_plain is None:
            continue
        same = old_mount.ino == mount.ino and old_plain.ino == plain.ino
        if not same or mount.fifo:
            continue
        for name in ("mtime_ns", "ctime_ns"):
            now, was = getattr(mount, name), getattr(old_mount, name)
            moved = getattr(plain, name) != getattr(old_plain, name)
            if not moved and now != was:
                wrong.append(f"{path!r}: {name} went from {was} to {now} for nothing")
            stale = now < begun_ns - _SLACK_NS and now != getattr(plain, name)
            if moved and stale:
                wrong.append(f"{path!r}: {name} is still {now}, begun {begun_ns}")
    return wrong


def changed(before: Tree, after: Tree) -> list[str]:
    """What a remount has changed: nothing may, not even the numbers of the inodes."""
    wrong = differences(after, before)
    for path in before.keys() & after.keys():
        for name in ("ino", "mtime_ns", "ctime_ns"):
            was, now = getattr(before[path], name), getattr(after[path], name)
            if was != now:
                wrong.append(f"{path!r}: {name} was {was}, is {now} after the remount")
    return wrong
