"""The engine over SQLite: each primitive of `journal.engine.Engine` is one indexed statement."""

from __future__ import annotations

import stat
from collections import Counter as Counts
from typing import TYPE_CHECKING

from stashcordfs.types import ROOT_INO, Attributes, Ino

if TYPE_CHECKING:
    from stashcordfs.journal.sqlite.database import Database

_AS_STORED = "ino, mode, nlink, uid, gid, rdev, size, atime_ns, mtime_ns, ctime_ns"
_COLUMNS = f"{_AS_STORED}, (stored + 511) / 512"  # st_blocks counts in 512 bytes
_NUMBERS_AT_ONCE = 4096
_KNOWN_MOST = 4096  # inodes in memory; 1 MiB


class Counter:
    """Numbers never used twice. A range is reserved in the journal before its first is given."""

    def __init__(self, database: Database, key: str, *, first: int) -> None:
        """`key` is its row in the table `local`."""
        self._database = database
        self._key = key
        self._next = self._end = 0
        self._first = first
        self._seen_rollbacks = 0

    def take(self, count: int = 1) -> int:
        """The first of `count` numbers in a row."""
        if self._seen_rollbacks != self._database.rollbacks:
            self._seen_rollbacks = self._database.rollbacks
            if self._stored() < self._end:  # the reservation was rolled back
                self._next = self._end = 0
        if self._next + count > self._end:
            self.reserve(max(count, _NUMBERS_AT_ONCE))
        self._next += count
        return self._next - count

    def reserve(self, count: int) -> None:
        """Begin a new range, past everything reserved before."""
        first = self._stored()
        end = first + count
        self._database.begin()
        self._database.run("INSERT OR REPLACE INTO local VALUES (?, ?)", (self._key, end))
        self._next, self._end = first, end

    def _stored(self) -> int:
        row = self._database.one("SELECT value FROM local WHERE key = ?", (self._key,))
        return int(row[0]) if row else self._first


class SqliteEngine:
    """Satisfies `journal.engine.Engine`. Keeps the counts for statfs as it goes."""

    def __init__(self, database: Database, *, writer_epoch: int) -> None:
        """Numbers carry the writer epoch, so that two writers never make the same."""
        self._db = database
        high = writer_epoch << 40
        self.inos = Counter(database, "next_ino", first=high | 2)
        self.ids = Counter(database, "next_id", first=high | 16)
        self.versions = Counter(database, "next_version", first=1)
        self.inodes = self.bytes = self.stored = 0  # `stored` without what is in the trash
        self.trash_inodes = self.trash_bytes = 0
        self.trash_parents: Counts[int] = Counts()  # how many of a folder's are there
        self.grown: set[int] = set()  # those with a row in `synced_sizes`
        self.has_xattrs = False  # whether there ever was one: most volumes have none
        self._known: dict[Ino, Attributes] = {}
        self._seen_rollbacks = database.rollbacks
        self.recount()
        database.undone = self.recount

    def recount(self) -> None:
        """Count anew: at the start, and when what was counted has been rolled back."""
        row = self._db.one(
            "SELECT count(*), coalesce(sum(size) FILTER (WHERE mode & ?1 = ?2), 0),"
            " coalesce(sum(stored), 0) FROM inodes",
            (stat.S_IFMT(0o170000), stat.S_IFREG),
        )
        assert row is not None
        self.inodes, self.bytes, stored = (int(count) for count in row)
        row = self._db.one(
            "SELECT count(*), coalesce(sum(i.stored), 0) FROM trash CROSS JOIN inodes i USING (ino)"
        )
        assert row is not None
        self.trash_inodes, self.trash_bytes = int(row[0]), int(row[1])
        self.stored = stored - self.trash_bytes
        parents = self._db.all("SELECT parent, count(*) FROM trash GROUP BY parent")
        self.trash_parents = Counts(dict(parents))
        self.grown = {row[0] for row in self._db.all("SELECT ino FROM synced_sizes")}
        self.has_xattrs = self._db.one("SELECT 1 FROM xattrs LIMIT 1") is not None

    def inode(self, ino: Ino) -> Attributes | None:
        """The inode, or None. Those asked for lately are in memory: the kernel asks in bursts."""
        if self._seen_rollbacks != self._db.rollbacks:
            self.forget()
        found = self._known.get(ino)
        if found is None:
            row = self._db.one(f"SELECT {_COLUMNS} FROM inodes WHERE ino = ?", (ino,))  # noqa: S608  constants
            if row is None:
                return None
            found = self._know(Attributes._make(row))
        return found

    def _know(self, found: Attributes) -> Attributes:
        if len(self._known) >= _KNOWN_MOST:
            self._known.clear()
        self._known[found.ino] = found
        return found

    def forget(self) -> None:
        """Inodes were changed past this engine, or a change was taken back: ask SQLite again."""
        self._seen_rollbacks = self._db.rollbacks
        self._known.clear()

    def new_ino(self) -> Ino:
        """A number never used before."""
        return Ino(self.inos.take())

    def insert_inode(self, attributes: Attributes) -> None:
        """Store a new inode."""
        self._db.run(
            f"INSERT INTO inodes ({_AS_STORED}) VALUES (?,?,?,?,?,?,?,?,?,?)",  # noqa: S608
            attributes[:10],
        )
        self._know(attributes._replace(blocks=0) if attributes.blocks else attributes)
        self.inodes += 1

    def update_inode(self, found: Attributes, after: Attributes) -> None:
        """Store an inode anew, but for its stored bytes."""
        self._db.run(
            "UPDATE inodes SET mode=?2, nlink=?3, uid=?4, gid=?5, rdev=?6, size=?7,"
            " atime_ns=?8, mtime_ns=?9, ctime_ns=?10 WHERE ino=?1",
            after[:10],
        )
        self._know(after)
        if after.size != found.size and stat.S_ISREG(found.mode):
            self.bytes += after.size - found.size

    def touch_folder(self, ino: Ino, now_ns: int, *, subfolders: int = 0) -> None:
        """A name in the folder changed: mtime and ctime; a link for each subfolder more or less."""
        self._db.run(
            "UPDATE inodes SET mtime_ns=?1, ctime_ns=?1, nlink=nlink+?2 WHERE ino=?3",
            (now_ns, subfolders, ino),
        )
        found = self._known.get(ino)
        if found is not None:
            nlink = found.nlink + subfolders
            self._known[ino] = found._replace(mtime_ns=now_ns, ctime_ns=now_ns, nlink=nlink)

    def set_links(self, ino: Ino, nlink: int, now_ns: int) -> None:
        """Store how many links an inode has, and its ctime."""
        self._db.run("UPDATE inodes SET nlink=?, ctime_ns=? WHERE ino=?", (nlink, now_ns, ino))
        self._known.pop(ino, None)

    def add_stored(self, ino: Ino, shift: int) -> None:
        """The chunk list has so many bytes more, or less."""
        if shift:
            self._db.run("UPDATE inodes SET stored = stored + ? WHERE ino = ?", (shift, ino))
            if self.is_trashed(ino):
                self.trash_bytes += shift
            else:
                self.stored += shift
            self._known.pop(ino, None)

    def delete_inode(self, found: Attributes) -> None:
        """Forget the inode with its link target and extended attributes."""
        ino = found.ino
        self._known.pop(ino, None)
        gone = self._db.all("DELETE FROM inodes WHERE ino = ? RETURNING stored", (ino,))
        if not gone:
            return  # done before
        self.stored -= gone[0][0]
        if self.has_xattrs:
            self._db.run("DELETE FROM xattrs WHERE ino = ?", (ino,))
        if stat.S_ISLNK(found.mode):
            self._db.run("DELETE FROM symlinks WHERE ino = ?", (ino,))
        self.inodes -= 1
        if stat.S_ISREG(found.mode):
            self.bytes -= found.size

    def put_xattr(self, ino: Ino, name: bytes, value: bytes | None) -> None:
        """Store an extended attribute; None removes it."""
        if value is None:
            self._db.run("DELETE FROM xattrs WHERE ino = ? AND name = ?", (ino, name))
        else:
            self._db.run("INSERT OR REPLACE INTO xattrs VALUES (?,?,?)", (ino, name, value))
            self.has_xattrs = True

    def put_synced_size(self, ino: Ino, size: int) -> None:
        """Of a file that has grown, so many bytes are on the disk."""
        self._db.run("INSERT OR REPLACE INTO synced_sizes VALUES (?,?)", (ino, size))
        self.grown.add(ino)

    def drop_synced_size(self, ino: Ino) -> None:
        """All of the file is on the disk, or it is forgotten."""
        if ino in self.grown:
            self._db.run("DELETE FROM synced_sizes WHERE ino = ?", (ino,))
            self.grown.discard(ino)

    def is_trashed(self, ino: Ino) -> bool:
        """Whether an inode without a name is in the trash."""
        if not self.trash_inodes:
            return False
        return self._db.one("SELECT 1 FROM trash WHERE ino = ?", (ino,)) is not None

    def put_in_trash(self, found: Attributes, parent: Ino, name: bytes, now_ns: int) -> None:
        """An inode that has just lost its last name stays, to come back."""
        rows = self._db.all(
            "INSERT INTO trash VALUES (?1,?2,?3,?4,0)"
            " RETURNING (SELECT stored FROM inodes WHERE ino = ?1)",
            (found.ino, parent, name, now_ns),
        )
        self._count_trash(1, rows[0][0] or 0)
        self.trash_parents[parent] += 1

    def take_out_of_trash(self, found: Attributes) -> None:
        """It is about to get a name again, or to be forgotten."""
        gone = self._db.all("DELETE FROM trash WHERE ino = ? RETURNING parent", (found.ino,))
        if gone:
            parent = gone[0][0]
            self.trash_parents[parent] -= 1
            if not self.trash_parents[parent]:
                del self.trash_parents[parent]
            row = self._db.one("SELECT stored FROM inodes WHERE ino = ?", (found.ino,))
            self._count_trash(-1, row[0] if row else 0)

    def _count_trash(self, sign: int, stored: int) -> None:
        self.trash_inodes += sign
        self.trash_bytes += sign * stored
        self.stored -= sign * stored

    def entry(self, parent: Ino, name: bytes) -> Attributes | None:
        """The inode that a name leads to."""
        # Two point queries cost less than one join, and leave the planner nothing to choose.
        row = self._db.one("SELECT ino FROM dirents WHERE parent = ? AND name = ?", (parent, name))
        return None if row is None else self.inode(Ino(row[0]))

    def entries(self, parent: Ino, after: int, limit: int) -> list[tuple[int, bytes, Attributes]]:
        """At most `limit` entries with a cookie greater than `after`, in order."""
        rows = self._db.all(
            "SELECT cookie, name, ino FROM dirents INDEXED BY dirents_order"
            " WHERE parent = ? AND cookie > ? ORDER BY cookie LIMIT ?",
            (parent, after, limit),
        )
        return [(cookie, name, found) for cookie, name, ino in rows if (found := self.inode(ino))]

    def insert_entry(self, parent: Ino, name: bytes, ino: Ino) -> None:
        """Store a name, after all others of its folder."""
        self._db.run("INSERT INTO dirents VALUES (?,?,?,?)", (parent, name, self.ids.take(), ino))

    def delete_entry(self, parent: Ino, name: bytes) -> None:
        """Remove a name."""
        self._db.run("DELETE FROM dirents WHERE parent=? AND name=?", (parent, name))

    def set_entry(self, parent: Ino, name: bytes, ino: Ino) -> None:
        """Let an existing name lead elsewhere."""
        self._db.run("UPDATE dirents SET ino=? WHERE parent=? AND name=?", (ino, parent, name))

    def has_entries(self, parent: Ino) -> bool:
        """Whether a folder holds anything."""
        return self._db.one("SELECT 1 FROM dirents WHERE parent=? LIMIT 1", (parent,)) is not None

    def folder_of(self, ino: Ino) -> Ino | None:
        """A folder that holds the inode, None without one."""
        if ino == ROOT_INO:
            return ROOT_INO
        row = self._db.one("SELECT parent FROM dirents WHERE ino=? LIMIT 1", (ino,))
        return None if row is None else Ino(row[0])

    def set_target(self, ino: Ino, target: bytes) -> None:
        """Store a symbolic link's target."""
        self._db.run("INSERT INTO symlinks VALUES (?,?)", (ino, target))
