"""The file system as a facade: what `fuse` serves and what tests drive without a kernel.

Names, attributes and folders are the journal's; bytes are the blocks'. lookup, getattr, readdir
and open never wait for the network: the kernel holds a folder's lock meanwhile. Only `read` and
`write` may wait. Permissions are the kernel's to check (`default_permissions`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from stashcordfs.errors import ContentLost, FsError
from stashcordfs.types import ROOT_INO, Attributes, Ino
from stashcordfs.vfs.live import Handle, Live
from stashcordfs.vfs.table import clean_key
from stashcordfs.vfs.usage import fresh_bytes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from stashcordfs.journal import Journal
    from stashcordfs.vfs.blocks import Blocks
    from stashcordfs.vfs.durability import Durability, Levels
    from stashcordfs.vfs.live import Spawn
    from stashcordfs.vfs.reading import Reader
    from stashcordfs.vfs.uploading import Uploader
    from stashcordfs.vfs.usage import StatFs, Usage
    from stashcordfs.vfs.xattrs import Xattrs

_FIRST_COOKIES = 16  # below: "." and ".."; the journal's own ids start here
_PURGE_INLINE_BLOCKS = 256
_DAY_NS = 86_400 * 10**9
_LATEST_NS = (1 << 63) - 1  # SQLite's integers, and so 1677 to 2262; the kernel cuts elsewhere too
_GHOSTS = 1024
_EVICTED_FOR_NAMES_BYTES = 64 << 20  # at once, when the local disk is full


def _storable(time_ns: int | None) -> int | None:
    return None if time_ns is None else max(-_LATEST_NS, min(_LATEST_NS, time_ns))


class FileSystem:
    """One mounted volume. Errors that a program should see are FsError."""

    def __init__(
        self,
        *,
        journal: Journal,
        blocks: Blocks,
        reader: Reader,
        uploader: Uploader,
        durability: Durability,
        levels: Levels,
        xattrs: Xattrs,
        usage: Usage,
        spawn: Spawn,
        now_ns: Callable[[], int],
        max_file_bytes: int,
        atime: str = "relatime",
        require_writable: Callable[[], None],
        published: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Take the parts; they share one event loop.

        `atime` says when reading updates the access time: "relatime", "nodiratime" (files alone),
        "noatime".
        `require_writable` raises when another writer has the volume; `published` returns when
        Discord knows all that the journal holds.
        """
        self._journal = journal
        self._blocks = blocks
        self._reader = reader
        self._uploader = uploader
        self._durability = durability
        self._levels = levels
        self._xattrs = xattrs
        self.usage = usage
        self._spawn = spawn
        self._now_ns = now_ns
        self._max_file_bytes = max_file_bytes
        self._atime = atime
        self._require_writable = require_writable
        self._published = published
        self._handles: dict[int, Handle] = {}
        self._folders: dict[int, Ino] = {}
        self._ghosts: OrderedDict[Ino, Attributes] = OrderedDict()
        self._next_fh = 1

    async def _may_change(self, *, removing: bool = False) -> None:
        """Raise when another writer has the volume, or ENOSPC when the disk has no room for it.

        Clean blocks give way. A write asks for room of its own: see `vfs.room`.
        """
        self._require_writable()
        if not self._journal.has_room(removing=removing):
            await self._blocks.evict(_EVICTED_FOR_NAMES_BYTES)
            if not self._journal.has_room(removing=removing):
                raise FsError(errno.ENOSPC, "the local disk is full")

    # ------------------------------------------------------------------ names

    async def lookup(self, parent: Ino, name: bytes) -> Attributes | None:
        """The entry's attributes, or None. ENAMETOOLONG over 255 bytes."""
        if len(name) > 255:  # the kernel lets longer names through (PYFUSE3.md)
            raise FsError(errno.ENAMETOOLONG)
        found = await self._journal.lookup(parent, name)
        return None if found is None else await self._complete(found)

    async def mknod(
        self, parent: Ino, name: bytes, mode: int, rdev: int, uid: int, gid: int
    ) -> Attributes:
        """Make a file, FIFO, socket or device node. ENOSPC when the volume is full."""
        await self._may_change()
        await self.usage.require_any()
        mode, lists = await self._xattrs.for_new(parent, mode)
        made = await self._journal.create_node(
            parent,
            name,
            mode=mode,
            uid=uid,
            gid=gid,
            rdev=rdev,
            now_ns=self._now_ns(),
            xattrs=lists,
        )
        if lists:
            self._xattrs.made(made, lists)
        return made

    async def mkdir(self, parent: Ino, name: bytes, mode: int, uid: int, gid: int) -> Attributes:
        """Make a folder."""
        mode = stat.S_IFDIR | stat.S_IMODE(mode)
        return await self.mknod(parent, name, mode, 0, uid, gid)

    async def symlink(
        self, parent: Ino, name: bytes, target: bytes, uid: int, gid: int
    ) -> Attributes:
        """Make a symbolic link."""
        await self._may_change()
        if len(target) > 4095:  # PATH_MAX less the NUL
            raise FsError(errno.ENAMETOOLONG)
        return await self._journal.create_node(
            parent,
            name,
            mode=stat.S_IFLNK | 0o777,
            uid=uid,
            gid=gid,
            now_ns=self._now_ns(),
            target=target,
        )

    async def readlink(self, ino: Ino) -> bytes:
        """A symbolic link's target."""
        target = await self._journal.readlink(ino)
        if self._atime != "noatime":
            await self._touch(ino)
        return target

    async def link(self, ino: Ino, parent: Ino, name: bytes) -> Attributes:
        """Give a file one more name."""
        await self._may_change()
        return await self._complete(
            await self._journal.link(ino, parent, name, now_ns=self._now_ns())
        )

    async def unlink(self, parent: Ino, name: bytes) -> None:
        """Remove a name; the file goes with its last name and its last handle."""
        await self._may_change(removing=True)
        left = await self._journal.unlink(
            parent, name, now_ns=self._now_ns(), kept=self._kept, local=self._blocks.is_local
        )
        if left.nlink or self._kept(left):
            await self._after_removal(left)
        else:  # the journal has forgotten it at once
            self._remember(left)
            blocks = range(-(-left.size // self._blocks.block_bytes))
            self._blocks.drop(left.ino, (clean_key(left.ino, index) for index in blocks))

    def _kept(self, found: Attributes) -> bool:
        """Whether an inode without a name stays: it is open, live, or long to forget."""
        return found.ino in self._blocks.live or self._is_long(found)

    def _is_long(self, found: Attributes) -> bool:
        return found.size > _PURGE_INLINE_BLOCKS * self._blocks.block_bytes

    async def rmdir(self, parent: Ino, name: bytes) -> None:
        """Remove an empty folder."""
        await self._may_change(removing=True)
        await self._after_removal(await self._journal.rmdir(parent, name, now_ns=self._now_ns()))

    async def rename(
        self,
        old_parent: Ino,
        old_name: bytes,
        new_parent: Ino,
        new_name: bytes,
        *,
        noreplace: bool,
        exchange: bool,
        whiteout: tuple[int, int] | None = None,
    ) -> None:
        """Rename in one transaction, whatever it replaces or leaves: a `whiteout` of that owner."""
        await self._may_change()
        replaced = await self._journal.rename(
            old_parent,
            old_name,
            new_parent,
            new_name,
            noreplace=noreplace,
            exchange=exchange,
            whiteout=whiteout,
            now_ns=self._now_ns(),
        )
        if replaced is not None:
            await self._after_removal(replaced)

    async def _after_removal(self, attributes: Attributes) -> None:
        folder = stat.S_ISDIR(attributes.mode)
        if attributes.nlink and not folder:
            return
        self._remember(attributes)
        self._levels.note(attributes.ino, None)
        live = self._blocks.live.get(attributes.ino)
        if live is not None and live.handles:
            live.nameless = True
        else:
            await self._purge(attributes)

    def _remember(self, gone: Attributes) -> None:
        """What has lost its last name may still be a program's working folder, or be held open.

        The kernel alone knows: it asks for the attributes of what it has cached so long. Nothing
        else of it can be reached, unless it is an open file, which the journal keeps.
        """
        self._ghosts[gone.ino] = gone._replace(nlink=0)
        if len(self._ghosts) > _GHOSTS:
            self._ghosts.popitem(last=False)

    async def _purge(self, found: Attributes) -> None:
        only_here = self._blocks.only_here(found.ino)
        local = await self._blocks.abandon(found)
        if self._is_long(found):
            self._spawn(self._forget, found, local, only_here)  # in batches, off this request
        else:
            await self._forget(found, local, only_here)

    async def _forget(self, found: Attributes, local: bool, only_here: Sequence[int]) -> None:
        await self._journal.purge(
            found, local=local, only_here=only_here, block_bytes=self._blocks.block_bytes
        )

    # ------------------------------------------------------------------ attributes

    def is_written(self, ino: Ino) -> bool:
        """Whether it is open for writing."""
        live = self._blocks.live.get(ino)
        return live is not None and live.writers > 0

    async def getattr(self, ino: Ino) -> Attributes:
        """Attributes as a program should see them: with writes that the journal will learn of."""
        try:
            found = await self._journal.getattr(ino)
        except FsError:
            if ino in self._ghosts:
                return self._ghosts[ino]
            raise
        return await self._complete(found)

    async def _complete(self, found: Attributes) -> Attributes:
        """Add what only the vfs knows: the size in memory, and the blocks in use."""
        if not stat.S_ISREG(found.mode):
            return found
        live = self._blocks.live.get(found.ino)
        size = found.size if live is None else live.size
        if not size:
            return found if found.size == size else found._replace(size=size, blocks=0)
        if live is None:
            return found
        return found._replace(size=size, blocks=found.blocks + fresh_bytes(live) // 512)

    async def setattr(
        self,
        ino: Ino,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        ctime_ns: int | None = None,
        fh: int | None = None,
    ) -> Attributes:
        """Change what is given; times that are not given stay, but ctime follows any change."""
        await self._may_change(removing=size is not None)
        if size is not None:
            await self._truncate(await self._enter(ino), size, mtime_ns)
        live = self._blocks.live.get(ino)
        grown = live if live is not None and live.size_changed else None
        given = {
            "mode": mode,
            "uid": uid,
            "gid": gid,
            "atime_ns": _storable(atime_ns),
            "mtime_ns": _storable(mtime_ns),
            "ctime_ns": self._now_ns() if ctime_ns is None else _storable(ctime_ns),
        }
        try:
            changed = await self._journal.set_attributes(
                ino,
                size=None if grown is None else grown.size,
                synced=None if grown is None else grown.synced_size,
                xattrs=None if mode is None else await self._xattrs.for_mode(ino, mode),
                **given,
            )
        except FsError:
            if ino not in self._ghosts:
                raise
            return self._change_ghost(ino, given)
        if grown is not None:  # one change less for the commit
            grown.size_changed = False
        return await self._complete(changed)

    def _change_ghost(self, ino: Ino, given: Mapping[str, int | None]) -> Attributes:
        """As fchmod(2) does of an open FIFO or folder that has been removed."""
        changes: dict[str, Any] = {n: v for n, v in given.items() if v is not None}
        ghost = self._ghosts[ino]
        if "mode" in changes:
            changes["mode"] = stat.S_IFMT(ghost.mode) | stat.S_IMODE(changes["mode"])
        self._ghosts[ino] = ghost._replace(**changes)
        return self._ghosts[ino]

    async def _truncate(self, live: Live, size: int, mtime_ns: int | None) -> None:
        """`mtime_ns`: None leaves it to whether the size changes, as truncate(2) has it."""
        if size > self._max_file_bytes:
            raise FsError(errno.EFBIG)
        if size == 0 and live.size and not live.nameless:
            await self._journal.keep_version(
                live.ino,
                only_here=self._blocks.only_here(live.ino),
                block_bytes=self._blocks.block_bytes,
                now_ns=self._now_ns(),
            )
        if size != live.size or mtime_ns is not None:
            await self._blocks.truncate(live, size, self._now_ns())

    async def _enter(self, ino: Ino) -> Live:
        live = await self._blocks.enter(ino)
        assert live is not None
        return live

    # ------------------------------------------------------------------ files

    async def create(
        self, parent: Ino, name: bytes, mode: int, flags: int, uid: int, gid: int
    ) -> tuple[int, Attributes]:
        """Make a regular file and open it."""
        made = await self.mknod(parent, name, stat.S_IFREG | stat.S_IMODE(mode), 0, uid, gid)
        live = Live(made.ino, 0, 0, bare=not self._xattrs.has_default(parent))
        self._blocks.live[made.ino] = live
        return self._new_handle(live, flags), made

    async def open(self, ino: Ino, flags: int, *, privileged: bool = True) -> int:
        """Open a file. O_TRUNC is ours to do: the kernel passes it on (atomic_o_trunc).

        With it, for who is not `privileged`, setuid and setgid go: the kernel leaves them then.
        """
        if flags & os.O_TRUNC:
            await self._may_change(removing=True)
        elif flags & (os.O_WRONLY | os.O_RDWR):
            self._require_writable()
        live = await self._enter(ino)
        if flags & os.O_TRUNC:
            live.handles += 1  # keeps it live over the truncation
            try:
                if not privileged:
                    await self._drop_privileges(ino)
                await self._truncate(live, 0, self._now_ns())
            finally:
                live.handles -= 1
        return self._new_handle(live, flags)

    async def _drop_privileges(self, ino: Ino) -> None:
        """As a write by somebody else does: setgid counts where the group may execute."""
        mode = (await self._journal.getattr(ino)).mode
        kept = mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            kept &= ~stat.S_ISGID
        if kept != mode:
            await self._journal.set_attributes(ino, mode=kept)

    def _new_handle(self, live: Live, flags: int) -> int:
        fh = self._next_fh
        self._next_fh += 1
        handle = Handle(fh, live, flags)
        self._handles[fh] = handle
        live.handles += 1
        live.writers += handle.writable
        return fh

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        """Bytes at `offset`; fewer than asked only at the end of the file."""
        handle = self._handles[fh]
        data = await self._reader.read(handle, offset, size)
        if self._atime != "noatime":
            await self._touch(handle.live.ino)
        return data

    async def _touch(self, ino: Ino) -> None:
        """The access time by the rule of `relatime`: when it is older than a change, or a day.

        A time that was set to the future counts for nothing: every read would be a write.
        """
        now = self._now_ns()
        found = await self._journal.getattr(ino)
        changes = (at for at in (found.mtime_ns, found.ctime_ns, now - _DAY_NS) if at <= now)
        if found.atime_ns <= max(changes):
            await self._journal.set_attributes(ino, atime_ns=now)

    def limit_reads(self, deadline_s: float) -> None:
        """Let reads from here on wait for the network so long, in seconds."""
        self._reader.deadline_s = deadline_s

    def watch_reads(self, watched: Callable[[int], AbstractContextManager[None]]) -> None:
        """Let reads wait for the network inside `watched(fh)`, and only then: it costs time."""
        self._reader.watched = watched

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        """Write all of `data`. Times are the kernel's to send, as its cache writes back."""
        self._require_writable()
        if offset + len(data) > self._max_file_bytes:
            raise FsError(errno.EFBIG)
        live = self._handles[fh].live
        await self.usage.require(live, offset, len(data))
        await self._blocks.write(live, offset, data)
        if live.size_changed:
            self._durability.resized(live)
        return len(data)

    async def flush(self, fh: int) -> None:
        """close(2) was called on one descriptor of the handle. Nothing waits for it."""

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Return when the file's bytes and its name are on this machine's disk.

        Where durability is remote, its bytes are on Discord too; DiscordUnavailable if they don't
        get there.
        """
        live = self._handles[fh].live
        await self._durability.sync([live])
        if await self._levels.is_remote(live.ino):
            await self._durability.remote({live})

    async def release(self, fh: int) -> None:
        """The last descriptor of the handle is closed."""
        handle = self._handles.pop(fh)
        live = handle.live
        live.handles -= 1
        live.writers -= handle.writable
        if live.nameless and not live.handles:
            await self._purge(await self._journal.getattr(live.ino))
        else:
            self._blocks.leave(live)

    # ------------------------------------------------------------------ folders

    async def opendir(self, ino: Ino) -> int:
        """Open a folder."""
        fh = self._next_fh
        self._next_fh += 1
        self._folders[fh] = ino
        return fh

    async def readdir(
        self, fh: int, after_id: int, limit: int
    ) -> list[tuple[int, bytes, Attributes]]:
        """Entries after a cookie: it stays good while the folder changes."""
        ino = self._folders[fh]
        if after_id < 1 and self._atime == "relatime":
            await self._touch(ino)
        page: list[tuple[int, bytes, Attributes]] = []
        if after_id < 1:
            page.append((1, b".", await self._journal.getattr(ino)))
        if after_id < 2:
            parent = ROOT_INO if ino == ROOT_INO else await self._journal.parent_of(ino)
            page.append((2, b"..", await self._journal.getattr(parent)))
        for cookie, name, found in await self._journal.read_dir(
            ino, max(after_id, _FIRST_COOKIES - 1), limit
        ):
            page.append((cookie, name, await self._complete(found)))
        return page

    async def releasedir(self, fh: int) -> None:
        """Close a folder."""
        self._folders.pop(fh, None)

    async def fsyncdir(self, fh: int) -> None:
        """Return when every name is on this machine's disk.

        Where durability is remote, what is below is on Discord too, as `sync_remote` has it, but
        for what asks for local durability.
        """
        await self._durability.sync([])
        folder = self._folders[fh]
        if await self._levels.is_remote(folder):
            await self._durability.remote(
                {v for v in await self._dirty_below(folder) if await self._levels.is_remote(v.ino)}
            )

    # ------------------------------------------------------------------ the rest

    async def getxattr(self, ino: Ino, name: bytes) -> bytes:
        """An extended attribute's value; ENODATA if there is none."""
        return await self._xattrs.get(ino, name)

    async def setxattr(
        self,
        ino: Ino,
        name: bytes,
        value: bytes,
        *,
        in_group: Callable[[int], bool] = lambda _: True,
    ) -> None:
        """Set an extended attribute. `in_group`: whether the caller may act for a group."""
        await self._may_change()
        await self._xattrs.set(ino, name, value, in_group=in_group)

    async def listxattr(self, ino: Ino, *, trusted: bool = True) -> Sequence[bytes]:
        """Names of the extended attributes, those of `trusted.` only where they may be seen."""
        return await self._xattrs.list(ino, trusted=trusted)

    async def removexattr(self, ino: Ino, name: bytes) -> None:
        """Remove an extended attribute; ENODATA if there is none."""
        await self._may_change(removing=True)
        await self._xattrs.remove(ino, name)

    async def statfs(self) -> StatFs:
        """What is used and what is free."""
        return await self.usage.statfs()

    async def access(self, ino: Ino, mode: int, uid: int, gid: int, groups: Sequence[int]) -> bool:
        """Not asked while the kernel checks permissions; the file must exist."""
        await self._journal.getattr(ino)
        return True

    async def forget(self, inodes: Sequence[tuple[Ino, int]]) -> None:
        """The kernel dropped inodes from its cache: nothing of ours hangs on that."""

    # ------------------------------------------------------------------ for the daemon

    async def open_for_writing(self, below: Ino = ROOT_INO) -> list[bytes]:
        """Paths, from the root, of files open for writing below an inode."""
        paths: list[bytes] = []
        for live in list(self._blocks.live.values()):
            if live.writers and not live.nameless and await self.is_below(live.ino, below):
                paths.extend((await self._journal.paths_of(live.ino))[:1])
        return paths

    async def is_below(self, ino: Ino, ancestor: Ino) -> bool:
        """Whether an inode is the ancestor or lies below it."""
        return ancestor == ROOT_INO or await self._journal.is_below(ino, ancestor)

    async def resolve(self, path: bytes) -> Ino:
        """The inode at a path from the root, links not followed. ENOENT."""
        ino = ROOT_INO
        for name in path.split(b"/"):
            if name in {b"", b"."}:
                continue
            found = await self._journal.lookup(ino, name)
            if found is None:
                raise FsError(errno.ENOENT)
            ino = found.ino
        return ino

    async def sync_remote(self, below: Ino = ROOT_INO) -> None:
        """Return when everything below is on Discord as it is now, or newer, and named there.

        EROFS when another writer has the volume: it will not get there. ContentLost when all is
        there but what cannot be sent.
        """
        self._require_writable()
        lives = await self._dirty_below(below)
        lost = None
        try:
            await self._uploader.flush(lambda live: live in lives)
        except ContentLost as error:
            lost = error
        await self._durability.sync()
        if self._published is not None:
            await self._published()
        if lost is not None:
            raise lost

    async def _dirty_below(self, folder: Ino) -> set[Live]:
        return {
            live
            for live in list(self._blocks.live.values())
            if live.dirty and await self.is_below(live.ino, folder)
        }
