"""The handlers: each translates one request for the vfs and its answer for the kernel."""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from stashcordfs.errors import FsError
from stashcordfs.fuse.guard import guard
from stashcordfs.fuse.interrupts import Interrupts
from stashcordfs.types import Attributes, Ino

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from pyfuse3 import ReaddirToken, RequestContext, SetattrFields, StatvfsData

    from stashcordfs.ops.metrics import Metrics
    from stashcordfs.vfs.filesystem import FileSystem

_PAGE_ENTRIES = 64
_RENAME_WHITEOUT = 4  # linux/fs.h; pyfuse3 passes it on, but has no name for it
_RENAME_KNOWN = pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE | _RENAME_WHITEOUT
_RIGHTS = 0o777
# Of a file that is open for writing the kernel knows size and times itself, but not its blocks;
# those it asks for again at the close (fs/fuse/file.c, fuse_flush), or when this has passed.
_WRITTEN_TIMEOUT_S = 1.0
_ACLS = b"system.posix_acl_"


@dataclass(frozen=True, slots=True)
class Shown:
    """What every file is shown with, and so checked by: owner, group, rights. None: its own.

    Stored is what programs set, as with other FUSE file systems that have these options.
    """

    uid: int | None = None
    gid: int | None = None
    umask: int | None = None


def _show(entry: EntryAttributes, shown: Shown) -> None:
    if shown.uid is not None:
        entry.st_uid = shown.uid
    if shown.gid is not None:
        entry.st_gid = shown.gid
    if shown.umask is not None:
        entry.st_mode = stat.S_IFMT(entry.st_mode) | _RIGHTS & ~shown.umask


def _is_in_group(ctx: RequestContext, gid: int) -> bool:
    """Whether the caller is in a group, or is root, who need not be."""
    if ctx.uid == 0 or ctx.gid == gid:
        return True
    try:
        return gid in pyfuse3.get_sup_groups(ctx.pid)
    except (OSError, RuntimeError):  # it is gone
        return False


def _writes_back_times(fields: SetattrFields) -> bool:
    """Whether this is how the kernel's flusher brings the times of what was written.

    It may come after the file is gone, and does not look at the answer's attributes; an error would
    come out of the next syncfs(2) (fs/fuse/inode.c, fuse_flush_times).
    """
    others = (fields.update_mode, fields.update_uid, fields.update_gid, fields.update_size)
    return fields.update_mtime and not fields.update_atime and not any(others)


def _gone(inode: int) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = inode
    entry.st_mode = stat.S_IFREG
    entry.st_nlink = 0
    return entry


class StashcordOperations(pyfuse3.Operations):
    """What pyfuse3 calls. `report` hears faults, `metrics` counts what should never happen."""

    supports_dot_lookup = False
    enable_writeback_cache = True
    enable_acl = True

    def __init__(
        self,
        filesystem: FileSystem,
        *,
        attr_timeout_s: float,
        report: Callable[[str], None],
        metrics: Metrics,
        shown: Shown | None = None,
    ) -> None:
        """Serve `filesystem`; the kernel keeps names and attributes for `attr_timeout_s`."""
        super().__init__()
        self._fs = filesystem
        self._timeout_s = attr_timeout_s
        self._shown = shown
        self.enable_acl = shown is None  # what is shown to all alike is checked alike
        self._metrics = metrics
        self.timed = metrics.operation_seconds.observe
        self.report = report
        self.interrupts = Interrupts()
        self._openers: dict[int, int] = {}  # by file handle: read and fsync are not told who asks
        filesystem.watch_reads(self._watched)

    def _watched(self, fh: int) -> AbstractContextManager[None]:
        return self.interrupts.watched(self._openers.get(fh, 0))

    def fault(self, name: str, error: Exception) -> None:
        """A handler raised what it should not."""
        self._metrics.guarded_faults.labels(name).inc()
        self.report(f"{name}: internal error {type(error).__name__}; see the log")

    def named(self, parent: Ino, name: bytes) -> None:
        """A name has come that the kernel did not ask for: it must forget that there is none."""
        pyfuse3.invalidate_entry_async(parent, name, ignore_enoent=True)

    def unnamed(self, parent: Ino, name: bytes, ino: Ino) -> None:
        """A name has gone that the kernel did not remove: it must forget it and its file."""
        pyfuse3.invalidate_entry_async(parent, name, deleted=ino, ignore_enoent=True)

    def _entry(self, found: Attributes) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = found.ino
        entry.st_mode = found.mode
        entry.st_nlink = found.nlink
        entry.st_uid = found.uid
        entry.st_gid = found.gid
        entry.st_rdev = found.rdev
        entry.st_size = found.size
        entry.st_blksize = 4096
        entry.st_blocks = found.blocks
        entry.st_atime_ns = found.atime_ns
        entry.st_mtime_ns = found.mtime_ns
        entry.st_ctime_ns = found.ctime_ns
        entry.entry_timeout = entry.attr_timeout = self._timeout_s
        if self._fs.is_written(found.ino):
            entry.attr_timeout = min(self._timeout_s, _WRITTEN_TIMEOUT_S)
        if self._shown is not None:
            _show(entry, self._shown)
        return entry

    # ------------------------------------------------------------------ names

    @guard
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Negative answers are kept by the kernel too: inode 0 with a timeout."""
        found = await self._fs.lookup(Ino(parent_inode), name)
        if found is None:
            missing = EntryAttributes()
            missing.st_ino = 0
            missing.entry_timeout = self._timeout_s
            return missing
        return self._entry(found)

    @guard
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        mode = stat.S_IFMT(mode) | stat.S_IMODE(mode) & ~ctx.umask
        return self._entry(
            await self._fs.mknod(Ino(parent_inode), name, mode, rdev, ctx.uid, ctx.gid)
        )

    @guard
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(
            await self._fs.mkdir(Ino(parent_inode), name, mode & ~ctx.umask, ctx.uid, ctx.gid)
        )

    @guard
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(
            await self._fs.symlink(Ino(parent_inode), name, target, ctx.uid, ctx.gid)
        )

    @guard
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self._fs.readlink(Ino(inode))

    @guard
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._fs.link(Ino(inode), Ino(new_parent_inode), new_name))

    @guard
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._fs.unlink(Ino(parent_inode), name)

    @guard
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._fs.rmdir(Ino(parent_inode), name)

    @guard
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        if flags & ~_RENAME_KNOWN:
            raise FUSEError(errno.EINVAL)
        await self._fs.rename(
            Ino(parent_inode_old),
            name_old,
            Ino(parent_inode_new),
            name_new,
            noreplace=bool(flags & pyfuse3.RENAME_NOREPLACE),
            exchange=bool(flags & pyfuse3.RENAME_EXCHANGE),
            whiteout=(ctx.uid, ctx.gid) if flags & _RENAME_WHITEOUT else None,
        )

    # ------------------------------------------------------------------ attributes

    @guard
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self._fs.getattr(Ino(inode)))

    @guard
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """With the write-back cache the kernel owns mtime and ctime: what it sends is taken."""
        try:
            changed = await self._fs.setattr(
                Ino(inode),
                mode=attr.st_mode if fields.update_mode else None,
                uid=attr.st_uid if fields.update_uid else None,
                gid=attr.st_gid if fields.update_gid else None,
                size=attr.st_size if fields.update_size else None,
                atime_ns=attr.st_atime_ns if fields.update_atime else None,
                mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
                ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
                fh=fh,
            )
        except FsError as error:
            if error.errno == errno.ENOENT and _writes_back_times(fields):
                return _gone(inode)
            raise
        return self._entry(changed)

    @guard
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return await self._fs.access(Ino(inode), mode, ctx.uid, ctx.gid, ())

    # ------------------------------------------------------------------ files

    @guard
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        fh, made = await self._fs.create(
            Ino(parent_inode), name, mode & ~ctx.umask, flags, ctx.uid, ctx.gid
        )
        self._openers[fh] = ctx.pid
        return FileInfo(fh=fh, keep_cache=True), self._entry(made)

    @guard
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        fh = await self._fs.open(Ino(inode), flags, privileged=ctx.uid == 0)
        self._openers[fh] = ctx.pid
        return FileInfo(fh=fh, keep_cache=True)

    @guard
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self._fs.read(fh, off, size)

    @guard
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._fs.write(fh, off, buf)

    @guard
    async def flush(self, fh: int) -> None:
        """Nothing waits for a close, so the kernel need not ask: after ENOSYS it does not.

        Errors of its write-back still come out of close(2) (PYFUSE3 measurements).
        """
        raise FUSEError(errno.ENOSYS)

    @guard
    async def fsync(self, fh: int, datasync: bool) -> None:
        with self._watched(fh):
            await self._fs.fsync(fh, datasync)

    @guard
    async def release(self, fh: int) -> None:
        self._openers.pop(fh, None)
        await self._fs.release(fh)

    # ------------------------------------------------------------------ folders

    @guard
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        fh = await self._fs.opendir(Ino(inode))
        self._openers[fh] = ctx.pid
        return fh

    @guard
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        after = start_id
        while True:
            page = await self._fs.readdir(fh, after, _PAGE_ENTRIES)
            for cookie, name, found in page:
                if not pyfuse3.readdir_reply(token, name, self._entry(found), cookie):
                    return
                after = cookie
            if len(page) < _PAGE_ENTRIES:
                return

    @guard
    async def releasedir(self, fh: int) -> None:
        self._openers.pop(fh, None)
        await self._fs.releasedir(fh)

    @guard
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        with self._watched(fh):
            await self._fs.fsyncdir(fh)

    # ------------------------------------------------------------------ the rest

    def _check_acl(self, name: bytes) -> None:
        if not self.enable_acl and name.startswith(_ACLS):
            raise FUSEError(errno.EOPNOTSUPP)

    @guard
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        self._check_acl(name)
        return await self._fs.getxattr(Ino(inode), name)

    @guard
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        self._check_acl(name)
        await self._fs.setxattr(Ino(inode), name, value, in_group=partial(_is_in_group, ctx))

    @guard
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        names = await self._fs.listxattr(Ino(inode), trusted=ctx.uid == 0)
        return names if self.enable_acl else [n for n in names if not n.startswith(_ACLS)]

    @guard
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self._check_acl(name)
        await self._fs.removexattr(Ino(inode), name)

    @guard
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        told = await self._fs.statfs()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = told.block_bytes
        data.f_blocks = told.blocks
        data.f_bfree = told.free
        data.f_bavail = told.available
        data.f_files = told.files
        data.f_ffree = data.f_favail = told.files_free
        data.f_namemax = told.name_max
        return data

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing hangs on it, and it must not raise."""
