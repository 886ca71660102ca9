"""The facade of whole transactions. Each method is atomic and safe to retry.

Methods are awaited so that a shared database can stand behind them later; with SQLite they do not
suspend, but for `wal_sync`, `checkpoint` and the batches of `purge`, `truncate`.
"""

from __future__ import annotations

import errno
import stat
from contextlib import nullcontext
from typing import TYPE_CHECKING, Self

from stashcordfs.errors import FsError
from stashcordfs.journal import rules
from stashcordfs.journal.erasing import Erasing
from stashcordfs.journal.outbox import bitmap_of
from stashcordfs.journal.sqlite.database import Database
from stashcordfs.journal.sqlite.engine import SqliteEngine
from stashcordfs.journal.sqlite.reserve import FOR_CHANGES_BYTES, FOR_REMOVAL_BYTES
from stashcordfs.types import PAGE_BYTES, ROOT_INO, Attributes, Ino

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

XATTR_VALUE_MAX = 65_536  # XATTR_SIZE_MAX, linux/limits.h
_BATCH = 4000  # rows of a chunk list cut off before others get a turn
XATTRS_MAX = 1 << 20  # of one inode: they go at once with it, and a segment must hold that


class Journal(Erasing):
    """Names and attributes; `Outbox` adds chunk lists, uploads and what is cached.

    `Changes` adds what Discord is told of all this, `Trash` what becomes of the deleted.
    """

    def __init__(self, database: Database, clock_ns: Callable[[], int], writer_epoch: int) -> None:
        """Use `open` or `create`."""
        engine = SqliteEngine(database, writer_epoch=writer_epoch)
        super().__init__(database, engine, clock_ns)
        database.now_ns = clock_ns
        self._rules_engine = engine

    @classmethod
    def open(cls, path: Path, *, clock_ns: Callable[[], int]) -> Self:
        """Open an existing journal. JournalError when it is missing, damaged or newer."""
        database = Database(path, create=False)
        row = database.one("SELECT value FROM local WHERE key = 'writer_epoch'")
        return cls(database, clock_ns, int(row[0]) if row else 1)

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        clock_ns: Callable[[], int],
        uid: int,
        gid: int,
        writer_epoch: int = 1,
        facts: Mapping[str, str] | None = None,
    ) -> Self:
        """Make a new journal with an empty root folder, and facts of this machine (`local`)."""
        database = Database(path, create=True)
        journal = cls(database, clock_ns, writer_epoch)
        now = clock_ns()
        with database.operation:
            for key, value in {"writer_epoch": writer_epoch, **(facts or {})}.items():
                database.run("INSERT INTO local VALUES (?, ?)", (key, value))
            journal._rules_engine.insert_inode(
                Attributes(ROOT_INO, stat.S_IFDIR | 0o755, 2, uid, gid, 0, 0, now, now, now)
            )
        database.commit()
        return journal

    # ------------------------------------------------------------------ the group

    def on_first_write(self, call: Callable[[], None]) -> None:
        """Be told when a group has its first write, and so something to commit."""
        self._db.written = call

    def has_room(self, *, removing: bool) -> bool:
        """Whether the disk has room for a group of changes, and for what must go on besides.

        `removing`: for those that free something, which may still be made when others may not.
        """
        needed = FOR_REMOVAL_BYTES if removing else FOR_CHANGES_BYTES
        if self._db.reserve.ahead_bytes < needed:
            self._db.reserve.refill()
        return self._db.reserve.ahead_bytes >= needed

    def commit(self) -> None:
        """Commit the open group: safe against a killed process."""
        self._db.commit()

    async def wal_sync(self) -> None:
        """Commit and make durable: safe against a power cut."""
        await self._db.sync()

    async def checkpoint(self) -> None:
        """Let SQLite copy a long WAL back into the database, in a thread."""
        await self._db.checkpoint()

    def close(self) -> None:
        """Commit and close."""
        self._db.close()

    # ------------------------------------------------------------------ names

    async def lookup(self, parent: Ino, name: bytes) -> Attributes | None:
        """The inode that a name leads to, or None."""
        return self._engine.entry(parent, name)

    async def getattr(self, ino: Ino) -> Attributes:
        """The inode; ENOENT when there is none."""
        return self._inode(ino)

    def _inode(self, ino: Ino) -> Attributes:
        found = self._engine.inode(ino)
        if found is None:
            raise FsError(errno.ENOENT)
        return found

    async def create_node(
        self,
        parent: Ino,
        name: bytes,
        *,
        mode: int,
        uid: int,
        gid: int,
        now_ns: int,
        rdev: int = 0,
        target: bytes | None = None,
        xattrs: Mapping[bytes, bytes] | None = None,
    ) -> Attributes:
        """Make an inode of any kind with its first name, and maybe extended attributes."""
        with self._db.operation:
            self._db.names_changed = True
            made = rules.create(
                self._engine, parent, name,
                mode=mode, uid=uid, gid=gid, rdev=rdev, now_ns=now_ns, target=target,
            )  # fmt: skip
            for one, value in (xattrs or {}).items():
                self._engine.put_xattr(made.ino, one, value)
            return made

    async def link(self, ino: Ino, parent: Ino, name: bytes, *, now_ns: int) -> Attributes:
        """Give an inode one more name."""
        with self._db.operation:
            self._db.names_changed = True
            return rules.link(self._engine, ino, parent, name, now_ns=now_ns)

    async def unlink(
        self,
        parent: Ino,
        name: bytes,
        *,
        now_ns: int,
        kept: Callable[[Attributes], bool] = lambda _: True,
        local: Callable[[Ino], bool] = lambda _: True,
    ) -> Attributes:
        """Remove a name; the attributes after, whose nlink may be 0.

        An inode without a name that is not `kept` is forgotten in the same operation, as by
        `purge`: it should be small, since its chunk list goes in one statement. What goes into the
        trash stays.
        """
        with self._db.operation:
            self._db.names_changed = True
            found = rules.unlink(
                self._engine, parent, name, now_ns=now_ns,
                kept=(lambda left: self.trashes(left) or kept(left)) if self.keep_trash else kept,
            )  # fmt: skip
            if found.nlink:
                return found
            if self.trashes(found):
                self._engine.put_in_trash(found, parent, name, now_ns)
                if not kept(found):
                    self._forget_local(found.ino, local=local(found.ino))
            elif not kept(found):
                if found.blocks:
                    self._db.run("DELETE FROM chunk_list WHERE ino = ?", (found.ino,))
                self._forget(found, local=local(found.ino))
            return found

    async def rmdir(self, parent: Ino, name: bytes, *, now_ns: int) -> Attributes:
        """Remove an empty folder."""
        with self._db.operation:
            self._db.names_changed = True
            left = rules.rmdir(self._engine, parent, name, now_ns=now_ns)
            self._trash_folder(left, parent, name, now_ns)
            return left

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
        now_ns: int,
    ) -> Attributes | None:
        """Rename; what is left of a replaced inode, or None."""
        with self._db.operation:
            self._db.names_changed = True
            left = rules.rename(
                self._engine, old_parent, old_name, new_parent, new_name,
                noreplace=noreplace, exchange=exchange, whiteout=whiteout, now_ns=now_ns,
            )  # fmt: skip
            if left is not None and not left.nlink:
                if self.trashes(left):
                    self._engine.put_in_trash(left, new_parent, new_name, now_ns)
                elif stat.S_ISDIR(left.mode):
                    self._trash_folder(left, new_parent, new_name, now_ns)
            return left

    async def read_dir(
        self, ino: Ino, after: int, limit: int
    ) -> list[tuple[int, bytes, Attributes]]:
        """At most `limit` entries with a cookie greater than `after`, in order."""
        return self._engine.entries(ino, after, limit)

    async def readlink(self, ino: Ino) -> bytes:
        """A symbolic link's target; EINVAL for anything else."""
        row = self._db.one("SELECT target FROM symlinks WHERE ino = ?", (ino,))
        if row is None:
            raise FsError(errno.EINVAL)
        return bytes(row[0])

    async def parent_of(self, ino: Ino) -> Ino:
        """The folder that a folder is in; ENOENT when it was removed."""
        found = self._engine.folder_of(ino)
        if found is None:
            raise FsError(errno.ENOENT)
        return found

    async def names_of(self, ino: Ino) -> list[tuple[Ino, bytes]]:
        """Every name of an inode with its folder."""
        rows = self._db.all("SELECT parent, name FROM dirents WHERE ino = ?", (ino,))
        return [(Ino(parent), bytes(name)) for parent, name in rows]

    async def paths_of(self, ino: Ino) -> list[bytes]:
        """Every path of an inode from the root, without a leading slash."""
        if ino == ROOT_INO:
            return [b""]
        paths: list[bytes] = []
        for parent, name in await self.names_of(ino):
            parts, at = [name], parent
            while at != ROOT_INO:
                above = await self.names_of(at)  # one at most: folders have no further names
                if not above:
                    break  # below a folder without a name
                at, part = above[0]
                parts.append(part)
            else:
                paths.append(b"/".join(reversed(parts)))
        return paths

    async def told_path(self, ino: Ino) -> bytes:
        """A path of an inode for a person; of one without a name, where it was."""
        if paths := await self.paths_of(ino):
            return paths[0]
        entry = await self.trashed(ino)
        if entry is None:
            return b"(without a name) inode %d" % ino
        return b"(in the trash) " + (await self.trash_path(entry) or entry.name)

    async def is_below(self, ino: Ino, ancestor: Ino) -> bool:
        """Whether one of the inode's paths leads through `ancestor`."""
        if ino == ancestor:
            return True
        parents = [parent for parent, _ in await self.names_of(ino)]
        return any(rules.is_within(self._engine, parent, ancestor) for parent in parents)

    async def usage(self) -> tuple[int, int]:
        """How many inodes there are, and how many bytes the regular files hold."""
        return self._engine.inodes, self._engine.bytes

    async def stored_bytes(self) -> int:
        """How many bytes all chunk lists have together."""
        return self._engine.stored

    # ------------------------------------------------------------------ attributes

    async def set_attributes(
        self,
        ino: Ino,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        synced: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        ctime_ns: int | None = None,
        xattrs: Mapping[bytes, bytes | None] | None = None,
    ) -> Attributes:
        """Change what is given; the attributes after. The kind of an inode never changes.

        Of `xattrs` None removes one; more than the access time must be given with them.

        `synced` goes with a size that a write has made: so many of its bytes are on the disk. The
        access time alone is this machine's business: no segment carries it.
        """
        self._inode(ino)  # the kernel sends the last times of removed files: no savepoint for them
        told = (mode, uid, gid, size, mtime_ns, ctime_ns)
        aside = self._db.unrecorded if all(value is None for value in told) else nullcontext
        with self._db.operation, aside():
            after = self._change(
                ino, mode=mode, uid=uid, gid=gid, size=size,
                atime_ns=atime_ns, mtime_ns=mtime_ns, ctime_ns=ctime_ns,
            )  # fmt: skip
            for name, value in (xattrs or {}).items():
                self._engine.put_xattr(ino, name, value)
            if size is not None and synced is not None:
                self._put_synced_size(ino, synced, whole=synced >= size)
            return after

    async def size_synced(self, ino: Ino, size: int, *, whole: bool) -> None:
        """The first `size` bytes are durable; `whole`: so is everything that was written."""
        with self._db.operation:
            self._put_synced_size(ino, size, whole=whole)

    def _put_synced_size(self, ino: Ino, size: int, *, whole: bool) -> None:
        if whole:
            self._engine.drop_synced_size(ino)
        else:
            self._engine.put_synced_size(ino, size)

    async def synced_sizes(self) -> list[tuple[Ino, int]]:
        """Files that have grown since their bytes were synced, and their size then."""
        rows = self._db.all("SELECT ino, s.size FROM synced_sizes s JOIN inodes USING (ino)")
        return [(Ino(ino), size) for ino, size in rows]

    def _change(
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
    ) -> Attributes:
        """Within an operation of the caller's."""
        found = self._inode(ino)
        after = Attributes(
            ino=ino,
            mode=found.mode if mode is None else stat.S_IFMT(found.mode) | stat.S_IMODE(mode),
            nlink=found.nlink,
            uid=found.uid if uid is None else uid,
            gid=found.gid if gid is None else gid,
            rdev=found.rdev,
            size=found.size if size is None else size,
            atime_ns=found.atime_ns if atime_ns is None else atime_ns,
            mtime_ns=found.mtime_ns if mtime_ns is None else mtime_ns,
            ctime_ns=found.ctime_ns if ctime_ns is None else ctime_ns,
            blocks=found.blocks,
        )
        self._db.touched.add((ino, -1))
        self._engine.update_inode(found, after)
        return after

    async def truncate(self, ino: Ino, size: int, block_bytes: int, now_ns: int) -> None:
        """Set the size; what the chunk list and the dirty rows have beyond it goes.

        Cut from the end in steps, each of which is a truncation in itself: a group of changes must
        stay small enough for a segment.
        """
        row = self._db.one("SELECT max(idx) FROM chunk_list WHERE ino = ?", (ino,))
        last = (row and row[0]) or 0
        for index in range(last // _BATCH * _BATCH, size // block_bytes + 1, -_BATCH):
            await self._truncate(ino, index * block_bytes, block_bytes, now_ns)
        await self._truncate(ino, size, block_bytes, now_ns)

    async def _truncate(self, ino: Ino, size: int, block_bytes: int, now_ns: int) -> None:
        edge, cut = divmod(size, block_bytes)
        first = edge + bool(cut)
        with self._db.operation:
            changed = self._change(ino, size=size, mtime_ns=now_ns, ctime_ns=now_ns)
            self._db.run("DELETE FROM dirty WHERE ino = ? AND idx >= ?", (ino, first))
            if cut:
                self._cut_dirty(ino, edge, cut)
            if not changed.blocks:
                return  # nothing stored, so no chunk list
            before = self._stored_from(ino, edge)
            if cut:
                self._db.run(
                    "UPDATE chunk_list SET valid_length = min(valid_length, ?)"
                    " WHERE ino = ? AND idx = ?",
                    (cut, ino, edge),
                )
            self._db.run("DELETE FROM chunk_list WHERE ino = ? AND idx >= ?", (ino, first))
            self._engine.add_stored(ino, self._stored_from(ino, edge) - before)

    def _cut_dirty(self, ino: Ino, index: int, length: int) -> None:
        """The pages that end with this truncation must not count when the file grows again."""
        row = self._db.one("SELECT pages FROM dirty WHERE ino = ? AND idx = ?", (ino, index))
        kept = (1 << -(-length // PAGE_BYTES)) - 1
        if row is not None and (pages := int.from_bytes(row[0], "little")) & ~kept:
            self._db.run(
                "UPDATE dirty SET pages = ? WHERE ino = ? AND idx = ?",
                (bitmap_of(pages & kept), ino, index),
            )

    # ------------------------------------------------------------------ extended attributes

    async def get_xattr(self, ino: Ino, name: bytes) -> bytes:
        """A value; ENODATA when there is none."""
        row = self._db.one("SELECT value FROM xattrs WHERE ino = ? AND name = ?", (ino, name))
        if row is None:
            raise FsError(errno.ENODATA)
        return bytes(row[0])

    async def set_xattr(self, ino: Ino, name: bytes, value: bytes, *, now_ns: int) -> None:
        """Set a value. ERANGE for a name over 255 bytes, E2BIG for a value over 64 KiB.

        ENOSPC when the inode's attributes would be more than 1 MiB together, as file systems with
        such a bound have it (xattr(7)).
        """
        if len(name) > rules.NAME_MAX:
            raise FsError(errno.ERANGE)
        if len(value) > XATTR_VALUE_MAX:
            raise FsError(errno.E2BIG)
        others = self._db.one(
            "SELECT coalesce(sum(length(name) + length(value)), 0) FROM xattrs"
            " WHERE ino = ? AND name != ?",
            (ino, name),
        )
        assert others is not None
        if others[0] + len(name) + len(value) > XATTRS_MAX:
            raise FsError(errno.ENOSPC)
        with self._db.operation:
            self._change(ino, ctime_ns=now_ns)
            self._engine.put_xattr(ino, name, value)

    async def list_xattrs(self, ino: Ino) -> list[bytes]:
        """Names."""
        return [bytes(r[0]) for r in self._db.all("SELECT name FROM xattrs WHERE ino=?", (ino,))]

    async def inodes_with_xattr(self, name: bytes) -> list[tuple[Ino, bytes]]:
        """Every inode that has this attribute, with its value. Looks at all attributes."""
        rows = self._db.all("SELECT ino, value FROM xattrs WHERE name = ?", (name,))
        return [(Ino(ino), bytes(value)) for ino, value in rows]

    async def remove_xattr(self, ino: Ino, name: bytes, *, now_ns: int) -> None:
        """Remove one; ENODATA when there is none."""
        await self.get_xattr(ino, name)
        with self._db.operation:
            self._change(ino, ctime_ns=now_ns)
            self._engine.put_xattr(ino, name, None)
