"""In which order the kernel sends a file's pages to FUSE: not by their place.

    python tests/crash/writeback_order.py

A page that is on its way, and is written again meanwhile, is sent again only afterwards; the pages
behind it go first. So a file that is cut within a page and grows by a write over that page has, for
a moment, its new size, and in that page the old bytes and then zeros. The model allows for that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

import pyfuse3
import trio

PAGE = 4096
_CUT = 3878
_BEGIN = 2  # SYNC_FILE_RANGE_WRITE: begin to write back, do not wait


class OneFile(pyfuse3.Operations):
    """A file `f` whose writes take a while, and are told."""

    enable_writeback_cache = True

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self.begun = threading.Event()

    async def getattr(self, inode, ctx=None):
        found = pyfuse3.EntryAttributes()
        found.st_ino, found.st_nlink, found.st_blksize = inode, 1, PAGE
        found.entry_timeout = found.attr_timeout = 1000
        folder = inode == pyfuse3.ROOT_INODE
        found.st_mode = stat.S_IFDIR | 0o755 if folder else stat.S_IFREG | 0o644
        found.st_size = 0 if folder else self.size
        return found

    async def lookup(self, parent_inode, name, ctx=None):
        if name != b"f":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(2)

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def setattr(self, inode, attr, fields, fh, ctx):
        if fields.update_size:
            self.size = attr.st_size
        return await self.getattr(inode)

    async def write(self, fh, off, buf):
        self.begun.set()
        await trio.sleep(0.2)  # on its way
        self.size = max(self.size, off + len(buf))
        print(f"written: {len(buf)} bytes at {off}; size {self.size}", flush=True)
        return len(buf)

    async def read(self, fh, off, size):
        return b""

    async def flush(self, fh):
        pass

    async def release(self, fh):
        pass

    async def fsync(self, fh, datasync):
        pass


def _use(mount: Path, served: OneFile) -> None:
    begin = ctypes.CDLL(None).sync_file_range
    begin.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    fd = os.open(mount / "f", os.O_RDWR)
    os.pwrite(fd, b"o" * PAGE, 0)
    os.ftruncate(fd, _CUT)
    os.fsync(fd)
    os.pwrite(fd, b"o", 0)
    served.begun.clear()
    begin(fd, 0, PAGE, _BEGIN)
    served.begun.wait()
    os.pwrite(fd, b"n" * 4 * PAGE, 0)  # the first page is on its way
    begin(fd, 0, 4 * PAGE, _BEGIN)
    os.fsync(fd)
    os.close(fd)
    subprocess.run(["fusermount3", "-u", str(mount)], check=True)


def main() -> None:
    served = OneFile()
    with tempfile.TemporaryDirectory() as name:
        pyfuse3.init(served, name, {"fsname=order"})
        user = threading.Thread(target=_use, args=(Path(name), served))
        user.start()
        trio.run(pyfuse3.main)
        pyfuse3.close(unmount=False)
        user.join()


if __name__ == "__main__":
    main()
