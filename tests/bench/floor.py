"""The binding's floor: the least that a pyfuse3 file system can do. `floor.py MOUNTPOINT`.

Names and attributes in memory, negative entries, readdir and rename; what is written is thrown
away, what is read is zeros. It has the options and timeouts of the real mount and none of its
adapter: no guard, no translation, attributes kept as pyfuse3 sends them.
"""

from __future__ import annotations

import errno
import itertools
import stat
import sys
import time
from pathlib import Path

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from stashcordfs.fuse.options import sort_options
from stashcordfs.fuse.session import Session

_TIMEOUT_S = 3600.0
_ZEROS = memoryview(bytes(1 << 20))


class Floor(pyfuse3.Operations):
    supports_dot_lookup = False
    enable_writeback_cache = True

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(2)
        self.nodes: dict[int, EntryAttributes] = {}
        self.folders: dict[int, dict[bytes, int]] = {}
        self.targets: dict[int, bytes] = {}
        self.lists: dict[int, list[tuple[bytes, int]]] = {}
        self.missing = EntryAttributes()
        self.missing.st_ino = 0
        self.missing.entry_timeout = _TIMEOUT_S
        self._make(1, stat.S_IFDIR | 0o755, None)

    def _make(self, ino, mode, ctx):
        made = EntryAttributes()
        made.st_ino = ino
        made.st_mode = mode
        made.st_nlink = 1
        if ctx is not None:
            made.st_uid, made.st_gid = ctx.uid, ctx.gid
        made.st_blksize = 4096
        made.st_atime_ns = made.st_mtime_ns = made.st_ctime_ns = time.time_ns()
        made.entry_timeout = made.attr_timeout = _TIMEOUT_S
        self.nodes[ino] = made
        if stat.S_ISDIR(mode):
            self.folders[ino] = {}
        return made

    def _add(self, parent, name, mode, ctx):
        if name in self.folders[parent]:
            raise FUSEError(errno.EEXIST)
        ino = next(self.numbers)
        self.folders[parent][name] = ino
        return self._make(ino, mode, ctx)

    async def lookup(self, parent_inode, name, ctx):
        ino = self.folders[parent_inode].get(name)
        return self.missing if ino is None else self.nodes[ino]

    async def getattr(self, inode, ctx):
        return self.nodes[inode]

    async def setattr(self, inode, attr, fields, fh, ctx):
        node = self.nodes[inode]
        if fields.update_mode:
            node.st_mode = stat.S_IFMT(node.st_mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_size:
            node.st_size = attr.st_size
        if fields.update_uid:
            node.st_uid = attr.st_uid
        if fields.update_gid:
            node.st_gid = attr.st_gid
        if fields.update_atime:
            node.st_atime_ns = attr.st_atime_ns
        if fields.update_mtime:
            node.st_mtime_ns = attr.st_mtime_ns
        if fields.update_ctime:
            node.st_ctime_ns = attr.st_ctime_ns
        return node

    async def mknod(self, parent_inode, name, mode, rdev, ctx):
        return self._add(parent_inode, name, mode & ~ctx.umask, ctx)

    async def mkdir(self, parent_inode, name, mode, ctx):
        return self._add(parent_inode, name, stat.S_IFDIR | mode & ~ctx.umask, ctx)

    async def symlink(self, parent_inode, name, target, ctx):
        made = self._add(parent_inode, name, stat.S_IFLNK | 0o777, ctx)
        self.targets[made.st_ino] = target
        return made

    async def readlink(self, inode, ctx):
        return self.targets[inode]

    async def link(self, inode, new_parent_inode, new_name, ctx):
        self.folders[new_parent_inode][new_name] = inode
        self.nodes[inode].st_nlink += 1
        return self.nodes[inode]

    async def create(self, parent_inode, name, mode, flags, ctx):
        made = self._add(parent_inode, name, stat.S_IFREG | mode & ~ctx.umask, ctx)
        return FileInfo(fh=made.st_ino, keep_cache=True), made

    async def unlink(self, parent_inode, name, ctx):
        del self.folders[parent_inode][name]

    async def rmdir(self, parent_inode, name, ctx):
        if self.folders[self.folders[parent_inode][name]]:
            raise FUSEError(errno.ENOTEMPTY)
        del self.folders[parent_inode][name]

    async def rename(self, parent_old, name_old, parent_new, name_new, flags, ctx):
        self.folders[parent_new][name_new] = self.folders[parent_old].pop(name_old)

    async def open(self, inode, flags, ctx):
        return FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh, off, size):
        return _ZEROS[: max(0, min(size, self.nodes[fh].st_size - off))]

    async def write(self, fh, off, buf):
        node = self.nodes[fh]
        node.st_size = max(node.st_size, off + len(buf))
        return len(buf)

    async def flush(self, fh):
        raise FUSEError(errno.ENOSYS)  # as the real mount: the kernel stops asking

    async def fsync(self, fh, datasync):
        pass

    async def release(self, fh):
        pass

    async def opendir(self, inode, ctx):
        fh = next(self.numbers)
        self.lists[fh] = list(self.folders[inode].items())
        return fh

    async def readdir(self, fh, start_id, token):
        entries = self.lists[fh]
        for number in range(start_id, len(entries)):
            name, ino = entries[number]
            if not pyfuse3.readdir_reply(token, name, self.nodes[ino], number + 1):
                return

    async def releasedir(self, fh):
        del self.lists[fh]

    async def fsyncdir(self, fh, datasync):
        pass

    async def getxattr(self, inode, name, ctx):
        raise FUSEError(errno.ENODATA)

    async def listxattr(self, inode, ctx):
        return []

    async def statfs(self, ctx):
        told = pyfuse3.StatvfsData()
        told.f_bsize = told.f_frsize = 4096
        told.f_blocks = told.f_bfree = told.f_bavail = 1 << 30
        told.f_namemax = 255
        return told

    async def access(self, inode, mode, ctx):
        return True

    async def forget(self, inode_list):
        pass


def main(mountpoint: Path) -> None:
    session = Session(Floor(), mountpoint, options=sort_options("floor", {}).kernel)
    with session.mounted():
        print("ready", flush=True)
        trio.run(session.serve)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
