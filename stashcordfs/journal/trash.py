"""What has lost its last name: forgotten, or kept in the trash for a while. Part of `Journal`.

In the trash are files whose content Discord has, if only in part, and folders that held such files.
Nothing is moved: the inode, its chunk list and attributes stay as they are, without a name, and one
row says where it was. An overwritten file keeps its number, so that its old content gets another.
"""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import FsError
from stashcordfs.journal import rules
from stashcordfs.journal.changes import Changes
from stashcordfs.types import ROOT_INO, Attributes, Ino

if TYPE_CHECKING:
    from collections.abc import Iterable

_BATCH = 4000  # rows of a chunk list deleted before others get a turn
_DEEPEST = 4096  # folders in each other that a path is followed through
_COPY_XATTRS = "INSERT INTO xattrs SELECT ?2, name, value FROM xattrs WHERE ino = ?1"
_COPY_LIST = """
INSERT INTO chunk_list SELECT ?2, idx, chunk, valid_length FROM chunk_list
WHERE ino = ?1 AND idx >= ?3 AND idx < ?4
"""
_TRASHED = "SELECT ino, parent, name, deleted_ns, lost FROM trash WHERE"


@dataclass(frozen=True, slots=True)
class Trashed:
    """An inode in the trash: where it was and when it was deleted.

    `lost_blocks`: so many of its blocks Discord did not have then, or not in their last version.
    """

    found: Attributes
    parent: Ino
    name: bytes
    deleted_ns: int
    lost_blocks: int

    @property
    def is_folder(self) -> bool:
        """A folder is in the trash only for what it held."""
        return stat.S_ISDIR(self.found.mode)


class Trash(Changes):
    """Forgetting inodes, and the trash."""

    keep_trash = False  # set by who mounts: whether what is deleted goes into the trash

    # ------------------------------------------------------------------ forgetting

    async def purge(
        self,
        found: Attributes,
        *,
        local: bool = True,
        only_here: Iterable[int] = (),
        block_bytes: int = 0,
    ) -> None:
        """Forget an inode without a name, its chunk list in batches so that others get a turn.

        `local`: this machine may know dirty or cached blocks of it. Of what is in the trash only
        the local rows are forgotten; `only_here` are its blocks that Discord does not have.
        """
        if self._engine.is_trashed(found.ino):
            await self.lose_trashed([(found.ino, index) for index in only_here], block_bytes)
            with self._db.operation:
                self._forget_local(found.ino, local=local)
            return
        if found.blocks:
            await self._purge_list(found)
        with self._db.operation:
            self._forget(found, local=local)

    async def _purge_list(self, found: Attributes) -> None:
        while True:
            with self._db.operation:
                self._db.run(
                    "DELETE FROM chunk_list WHERE ino = ?1 AND idx IN"
                    " (SELECT idx FROM chunk_list WHERE ino = ?1 LIMIT ?2)",
                    (found.ino, _BATCH),
                )
                gone = self._db.changes()
            if gone < _BATCH:
                break
            await trio.lowlevel.checkpoint()

    def _forget(self, found: Attributes, *, local: bool) -> None:
        self._forget_local(found.ino, local=local)
        self._engine.delete_inode(found)

    def _forget_local(self, ino: Ino, *, local: bool) -> None:
        self._engine.drop_synced_size(ino)
        for table in ("dirty", "cached", "generations") if local else ():
            self._db.run(f"DELETE FROM {table} WHERE ino = ?", (ino,))  # noqa: S608  constants

    async def nameless(self) -> list[Attributes]:
        """Inodes that an earlier run left without a name, and that are not in the trash."""
        rows = self._db.all(
            "SELECT ino FROM inodes WHERE nlink = 0"
            " AND NOT EXISTS (SELECT 1 FROM trash t WHERE t.ino = inodes.ino)"
        )
        return [found for row in rows if (found := self._engine.inode(Ino(row[0])))]

    # ------------------------------------------------------------------ into the trash

    def trashes(self, found: Attributes) -> bool:
        """Whether a file goes into the trash with its last name: when Discord has some of it."""
        return self.keep_trash and found.blocks > 0 and stat.S_ISREG(found.mode)

    def _trash_folder(self, found: Attributes, parent: Ino, name: bytes, now_ns: int) -> None:
        """An empty folder goes there when what it held is there. Within an operation."""
        if self.keep_trash and self._engine.trash_parents[found.ino]:
            self._engine.put_in_trash(found, parent, name, now_ns)

    async def keep_version(
        self, ino: Ino, *, only_here: Iterable[int], block_bytes: int, now_ns: int
    ) -> None:
        """Put a copy of a file that is about to be emptied into the trash, as Discord has it.

        In batches; until the last one it is an inode without a name, which a start would purge.
        """
        found = self._engine.inode(ino)
        place = self._db.one("SELECT parent, name FROM dirents WHERE ino = ? LIMIT 1", (ino,))
        if found is None or place is None or not self.trashes(found):
            return
        end = self._last_index(ino)
        with self._db.operation:
            copy = self._engine.new_ino()
            self._engine.insert_inode(found._replace(ino=copy, nlink=0, ctime_ns=now_ns))
            self._engine.bytes += found.size
            self._db.run(_COPY_XATTRS, (ino, copy))
        for start in range(0, end + 1, _BATCH):
            if start:
                await trio.lowlevel.checkpoint()
            with self._db.operation:
                self._db.run(_COPY_LIST, (ino, copy, start, start + _BATCH))
                self._note_references(copy, range(start, min(end + 1, start + _BATCH)))
        with self._db.operation:
            self._engine.add_stored(copy, self._stored_from(copy, 0))
            self._db.names_changed = True
            self._engine.put_in_trash(
                found._replace(ino=copy), Ino(place[0]), bytes(place[1]), now_ns
            )
        await self.lose_trashed([(copy, index) for index in only_here], block_bytes)

    def _last_index(self, ino: Ino) -> int:
        """The last block of a chunk list; -1 without any."""
        row = self._db.one("SELECT max(idx) FROM chunk_list WHERE ino = ?", (ino,))
        return -1 if row is None or row[0] is None else int(row[0])

    def _stored_from(self, ino: Ino, first: int) -> int:
        row = self._db.one(
            "SELECT coalesce(sum(valid_length), 0) FROM chunk_list WHERE ino = ? AND idx >= ?",
            (ino, first),
        )
        assert row is not None
        return int(row[0])

    async def lose_trashed(self, blocks: Iterable[tuple[Ino, int]], block_bytes: int) -> None:
        """Blocks that were only here, of whatever inodes: those in the trash do without them.

        Reading them is an error then, never zeros.
        """
        gone = sorted({block for block in blocks if self._engine.is_trashed(block[0])})
        if gone:
            await self.lose_blocks(gone, block_bytes)
            with self._db.operation:
                for ino in {ino for ino, _ in gone}:
                    self._db.run("DELETE FROM dirty WHERE ino = ?", (ino,))

    # ------------------------------------------------------------------ looking

    async def trashed(self, ino: Ino) -> Trashed | None:
        """What is in the trash under this number."""
        row = self._db.one(f"{_TRASHED} ino = ?", (ino,))
        return None if row is None else self._to_trashed(*row)

    async def trash_page(self, after: int, limit: int) -> list[Trashed]:
        """Some entries with a number above `after`, in that order."""
        rows = self._db.all(f"{_TRASHED} ino > ? ORDER BY ino LIMIT ?", (after, limit))
        return [one for row in rows if (one := self._to_trashed(*row))]

    def _to_trashed(
        self, ino: int, parent: int, name: bytes, deleted_ns: int, lost: int
    ) -> Trashed | None:
        found = self._engine.inode(Ino(ino))
        return found and Trashed(found, Ino(parent), bytes(name), deleted_ns, lost)

    async def trash_path(self, entry: Trashed) -> bytes | None:
        """Where it would be now, from the root; None when its folder is not known any more."""
        parts, at = [entry.name], entry.parent
        for _ in range(_DEEPEST):
            if at == ROOT_INO:
                return b"/".join(reversed(parts))
            row = self._db.one(
                "SELECT parent, name FROM dirents WHERE ino = ?1"
                " UNION ALL SELECT parent, name FROM trash WHERE ino = ?1 LIMIT 1",
                (at,),
            )
            if row is None:
                return None
            at = Ino(row[0])
            parts.append(bytes(row[1]))
        return None

    @property
    def trash_usage(self) -> tuple[int, int]:
        """How many inodes are in the trash, and how many bytes."""
        return self._engine.trash_inodes, self._engine.trash_bytes

    # ------------------------------------------------------------------ out of the trash

    async def revive(self, entry: Trashed, parent: Ino, name: bytes, *, now_ns: int) -> Attributes:
        """Give an inode of the trash a name. EEXIST, ENOENT, ENOTDIR as for any new name."""
        ino = entry.found.ino
        # Ahead of the step that counts, which then finds little left to do.
        for start in range(_BATCH, self._last_index(ino) + 1, _BATCH):
            with self._db.operation:
                self._note_revived(ino, first=start, end=start + _BATCH)
            await trio.lowlevel.checkpoint()
        with self._db.operation:
            if not self._engine.is_trashed(ino):
                raise FsError(errno.ENOENT)
            self._db.names_changed = True
            after = rules.revive(self._engine, entry.found, parent, name, now_ns=now_ns)
            self._engine.take_out_of_trash(entry.found)
            self._note_revived(ino)
            return after

    async def drop_trashed(self, entry: Trashed) -> None:
        """Forget it for good, and the trashed folders above that held nothing else."""
        with self._db.operation:
            self._engine.take_out_of_trash(entry.found)
        if entry.found.blocks:
            await self._purge_list(entry.found)
        with self._db.operation:
            self._engine.delete_inode(entry.found)
        await self.prune_trash(entry.parent)

    async def prune_trash(self, folder: Ino) -> None:
        """Forget a folder of the trash of which nothing is there any more, and so on upwards."""
        while (entry := await self.trashed(folder)) is not None and entry.is_folder:
            if self._engine.trash_parents[folder]:
                return
            with self._db.operation:
                self._engine.take_out_of_trash(entry.found)
                self._engine.delete_inode(entry.found)
            folder = entry.parent
