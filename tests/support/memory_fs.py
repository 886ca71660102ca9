"""A file system in memory behind the vfs facade, to try the adapter through the kernel.

Started as a program it mounts itself: `memory_fs.py MOUNTPOINT`. Names that begin with `fault-`
make handlers fail on purpose: the mount has to live on.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import trio

from stashcordfs.errors import FsError, LocalDiskError, ObjectMissing
from stashcordfs.fuse.operations import StashcordOperations
from stashcordfs.fuse.options import sort_options
from stashcordfs.fuse.session import Session
from stashcordfs.ops.metrics import Metrics
from stashcordfs.types import Attributes, Ino
from stashcordfs.vfs.usage import StatFs

FAULTS = {
    b"fault-bug": ValueError("a bug"),
    b"fault-disk": LocalDiskError(errno.ENOSPC),
    b"fault-store": ObjectMissing("chunk is gone"),
    b"fault-posix": FsError(errno.EPERM),
}


@dataclass
class Node:
    attributes: Attributes
    entries: dict[bytes, tuple[int, Ino]] = field(default_factory=dict)  # name -> cookie, inode
    data: bytearray = field(default_factory=bytearray)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    target: bytes = b""


class MemoryFileSystem:
    def __init__(self) -> None:
        self.numbers = itertools.count(2)
        self.cookies = itertools.count(16)
        self.handles: dict[int, Ino] = {}
        self.nodes: dict[Ino, Node] = {}
        self._make(stat.S_IFDIR | 0o755, os.getuid(), os.getgid(), ino=Ino(1))

    def _make(self, mode: int, uid: int, gid: int, *, ino: Ino | None = None, rdev: int = 0):
        now = time.time_ns()
        ino = Ino(next(self.numbers)) if ino is None else ino
        made = Attributes(ino, mode, 1, uid, gid, rdev, 0, now, now, now)
        self.nodes[ino] = Node(made)
        return made

    def _handle(self, ino: Ino) -> int:
        fh = next(self.numbers)
        self.handles[fh] = ino
        return fh

    async def lookup(self, parent, name):
        if name in FAULTS:
            raise FAULTS[name]
        found = self.nodes[parent].entries.get(name)
        return None if found is None else self.nodes[found[1]].attributes

    def is_written(self, ino):
        return ino in self.handles.values()

    async def getattr(self, ino):
        return self.nodes[ino].attributes

    async def setattr(self, ino, *, size=None, fh=None, **changes):
        node = self.nodes[ino]
        if size is not None:
            node.data[size:] = bytes(max(0, size - len(node.data)))
            changes["size"] = size
        mode = changes.pop("mode", None)
        if mode is not None:
            changes["mode"] = stat.S_IFMT(node.attributes.mode) | stat.S_IMODE(mode)
        given = {key: value for key, value in changes.items() if value is not None}
        node.attributes = node.attributes._replace(**given)
        return node.attributes

    async def mknod(self, parent, name, mode, rdev, uid, gid):
        entries = self.nodes[parent].entries
        if name in entries:
            raise FsError(errno.EEXIST)
        made = self._make(mode, uid, gid, rdev=rdev)
        entries[name] = (next(self.cookies), made.ino)
        return made

    async def mkdir(self, parent, name, mode, uid, gid):
        return await self.mknod(parent, name, stat.S_IFDIR | mode & 0o7777, 0, uid, gid)

    async def symlink(self, parent, name, target, uid, gid):
        made = await self.mknod(parent, name, stat.S_IFLNK | 0o777, 0, uid, gid)
        self.nodes[made.ino].target = target
        return made

    async def readlink(self, ino):
        return self.nodes[ino].target

    async def create(self, parent, name, mode, flags, uid, gid):
        made = await self.mknod(parent, name, stat.S_IFREG | mode & 0o7777, 0, uid, gid)
        return self._handle(made.ino), made

    async def link(self, ino, parent, name):
        self.nodes[parent].entries[name] = (next(self.cookies), ino)
        node = self.nodes[ino]
        node.attributes = node.attributes._replace(nlink=node.attributes.nlink + 1)
        return node.attributes

    async def unlink(self, parent, name):
        node = self.nodes[self.nodes[parent].entries.pop(name)[1]]
        node.attributes = node.attributes._replace(nlink=node.attributes.nlink - 1)

    async def rmdir(self, parent, name):
        if self.nodes[self.nodes[parent].entries[name][1]].entries:
            raise FsError(errno.ENOTEMPTY)
        del self.nodes[parent].entries[name]

    async def rename(
        self, old_parent, old_name, new_parent, new_name, *, noreplace, exchange, whiteout
    ):
        old, new = self.nodes[old_parent].entries, self.nodes[new_parent].entries
        if noreplace and new_name in new:
            raise FsError(errno.EEXIST)
        if exchange:
            old[old_name], new[new_name] = new[new_name], old[old_name]
        else:
            new[new_name] = (next(self.cookies), old.pop(old_name)[1])

    async def open(self, ino, flags, *, privileged):
        if flags & os.O_TRUNC:
            await self.setattr(ino, size=0)
        return self._handle(ino)

    def watch_reads(self, watched):
        """Nothing here waits for a network."""

    async def read(self, fh, offset, size):
        return bytes(self.nodes[self.handles[fh]].data[offset : offset + size])

    async def write(self, fh, offset, data):
        node = self.nodes[self.handles[fh]]
        node.data.extend(bytes(max(0, offset - len(node.data))))
        node.data[offset : offset + len(data)] = data
        node.attributes = node.attributes._replace(size=len(node.data))
        return len(data)

    async def fsync(self, fh, datasync):
        if fh not in self.handles:
            raise FsError(errno.EBADF)

    async def release(self, fh):
        del self.handles[fh]

    async def opendir(self, ino):
        return self._handle(ino)

    async def readdir(self, fh, after_id, limit):
        ino = self.handles[fh]
        own = self.nodes[ino].attributes
        rows = [(1, b".", own), (2, b"..", own)]
        rows += sorted(
            (cookie, name, self.nodes[child].attributes)
            for name, (cookie, child) in self.nodes[ino].entries.items()
        )
        return [row for row in rows if row[0] > after_id][:limit]

    async def releasedir(self, fh):
        del self.handles[fh]

    async def fsyncdir(self, fh):
        await self.fsync(fh, False)

    async def getxattr(self, ino, name):
        if name not in self.nodes[ino].xattrs:
            raise FsError(errno.ENODATA)
        return self.nodes[ino].xattrs[name]

    async def setxattr(self, ino, name, value, *, in_group):
        self.nodes[ino].xattrs[name] = value

    async def listxattr(self, ino, *, trusted):
        return list(self.nodes[ino].xattrs)

    async def removexattr(self, ino, name):
        await self.getxattr(ino, name)
        del self.nodes[ino].xattrs[name]

    async def statfs(self):
        return StatFs(4096, 1000, 900, 800, 70, 60, 255)

    async def access(self, ino, mode, uid, gid, groups):
        return ino in self.nodes


def main(mountpoint: Path) -> None:
    logging.basicConfig(stream=sys.stderr)
    operations = StashcordOperations(
        MemoryFileSystem(), attr_timeout_s=3600, report=print, metrics=Metrics()
    )
    options = sort_options("memory", {}).kernel
    session = Session(operations, mountpoint, options=options)
    with session.mounted():
        print("ready", flush=True)
        trio.run(session.serve)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
