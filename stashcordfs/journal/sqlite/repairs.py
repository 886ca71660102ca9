"""Mending a journal that nobody has open: everything that can be kept is kept.

One transaction, after the caller has copied the journal. Inodes without a name get one under
`lost+found`; an inode that is missing, but of which there are blocks or entries, is made anew;
counts are counted; an entry whose content cannot be found is marked damaged, so that reading it
is an error and never zeros. Nothing that is only on this machine is deleted.
"""

from __future__ import annotations

import stat
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import apsw

from stashcordfs.errors import JournalError
from stashcordfs.journal.sqlite import schema
from stashcordfs.journal.sqlite.checks import (
    BAD_INODE,
    BAD_NAME,
    BAD_TRASH,
    COUNTED,
    FORMAT_MASK,
    IS_FOLDER,
    KINDS,
    first_number,
    misplaced_chunks,
    reach_folders,
)
from stashcordfs.journal.sqlite.database import prepare_apsw
from stashcordfs.journal.sqlite.inspection import Inspection, readable
from stashcordfs.journal.sqlite.telling_repairs import mend_telling
from stashcordfs.types import DAMAGED_CHUNK, ROOT_INO

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

LOST_AND_FOUND = b"lost+found"
_TOLD = 1000  # mended things that are kept in words
_GAP = 1 << 16  # counters go on this far beyond what is in use: some numbers may be lost to us

_FILE_END = (
    "max(coalesce((SELECT max(idx * ?2 + valid_length) FROM chunk_list WHERE ino = ?1), 0),"
    " coalesce((SELECT (max(idx) + 1) * ?2 FROM dirty WHERE ino = ?1), 0))"
)


class LostFile(NamedTuple):
    """A local file with unsent data, and the newest version among its marks."""

    ino: int
    generation: int
    size: int
    version: int


class Repairs:
    """What was mended, in words, in `done`."""

    def __init__(self, look: Inspection, block_bytes: int) -> None:
        """Use `mend`."""
        self.done: list[str] = []
        self._look = look
        self._block_bytes = block_bytes
        self._lost_and_found = 0

    def take_in(self, lost: Iterable[LostFile]) -> None:
        """Make inodes for local files of which the journal, older than they are, knows nothing."""
        for file in lost:
            if not self._all("SELECT 1 FROM inodes WHERE ino = ?", (file.ino,)):
                self._make(file.ino, stat.S_IFREG | 0o600, file.size)
                self._run(
                    "INSERT OR REPLACE INTO generations VALUES (?,?)", (file.ino, file.generation)
                )
                self._say(f"inode {file.ino} made anew: its data is only on this machine")
            self._least("next_version", file.version)

    def _least(self, key: str, number: int) -> None:
        """A counter goes on beyond a number that is in use."""
        if (self._look.local(key) or first_number(self._look, key)) <= number:
            self._run("INSERT OR REPLACE INTO local VALUES (?,?)", (key, number + _GAP))
            self._say(f"the counter {key} set beyond what is in use")

    def all(self) -> None:
        """Mend in the order in which one thing needs another."""
        self._root()
        self._counters()
        self._values()
        self._missing_inodes()
        self._names()
        self._chunks()
        self._gaps()
        self._outbox()
        self._reach()
        self._orphans()
        self._counts()
        self._trash()
        for text in mend_telling(self._look):
            self._say(text)
        if self.done:  # no segment holds what was changed here
            self._run("INSERT OR REPLACE INTO local VALUES ('checkpoint_wanted', 1)")

    def _run(self, sql: str, bindings: Sequence[Any] = ()) -> int:
        return self._look.run(sql, bindings)

    def _all(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return list(self._look.rows(sql, bindings))

    def _say(self, text: str) -> None:
        if len(self.done) < _TOLD:
            self.done.append(text)
        elif len(self.done) == _TOLD:
            self.done.append("... and more")

    def _count(self, count: int, what: str) -> None:
        if count:
            self._say(f"{count} {what}")

    # ------------------------------------------------------------------ numbers and inodes

    def _take(self, key: str) -> int:
        value = self._look.local(key) or first_number(self._look, key)
        self._run("INSERT OR REPLACE INTO local VALUES (?,?)", (key, value + 1))
        return value

    def _counters(self) -> None:
        in_use = {
            "next_ino": "SELECT max(n) FROM (SELECT max(ino) AS n FROM inodes UNION ALL"
            " SELECT max(ino) FROM dirents UNION ALL SELECT max(ino) FROM chunk_list)",
            "next_id": "SELECT max(n) FROM (SELECT max(id) AS n FROM packs UNION ALL"
            " SELECT max(id) FROM chunks UNION ALL SELECT max(id) FROM intents UNION ALL"
            " SELECT max(chunk) FROM chunk_list)",
            "next_version": "SELECT max(version) FROM dirty",
        }
        for key, sql in in_use.items():
            self._least(key, self._look.number(sql))

    def _root(self) -> None:
        if not self._all(f"SELECT 1 FROM inodes WHERE ino = ? AND {IS_FOLDER}", (ROOT_INO,)):
            self._make(ROOT_INO, stat.S_IFDIR | 0o755, 0)
            self._say("the root folder made anew")

    def _make(self, ino: int, mode: int, size: int) -> None:
        now = time.time_ns()
        nlink = 2 if stat.S_ISDIR(mode) else 1
        self._run(
            "INSERT OR REPLACE INTO inodes (ino, mode, nlink, uid, gid, rdev, size, atime_ns,"
            " mtime_ns, ctime_ns, stored) VALUES (?,?,?,0,0,0,?,?,?,?,0)",
            (ino, mode, nlink, size, now, now, now),
        )

    def _kind_of(self, ino: int) -> tuple[int, int]:
        """Mode and size that fit what there is of an inode. Private: whose it was is not known."""
        if self._all("SELECT 1 FROM dirents WHERE parent = ? LIMIT 1", (ino,)):
            return stat.S_IFDIR | 0o700, 0
        target = self._look.number("SELECT length(target) FROM symlinks WHERE ino = ?", (ino,))
        if target:
            return stat.S_IFLNK | 0o777, target
        end = self._look.number(f"SELECT {_FILE_END}", (ino, self._block_bytes))
        return stat.S_IFREG | 0o600, end

    def _values(self) -> None:
        for (ino,) in self._all(f"SELECT ino FROM inodes WHERE {BAD_INODE}"):
            mode, size = self._kind_of(ino)
            for column in COUNTED:
                self._run(
                    f"UPDATE inodes SET {column} = 0 WHERE ino = ?"
                    f" AND (typeof({column}) != 'integer' OR {column} < 0)",
                    (ino,),
                )
            self._run("UPDATE inodes SET stored = 0 WHERE ino = ?", (ino,))
            kinds = ",".join(map(str, KINDS))
            self._run(
                "UPDATE inodes SET mode = ?2 WHERE ino = ?1"
                f" AND (mode & {FORMAT_MASK}) NOT IN ({kinds})",
                (ino, mode),
            )
            self._run(
                f"UPDATE inodes SET size = ?2 WHERE ino = ?1 AND size NOT BETWEEN 1 AND {1 << 62}",
                (ino, size),
            )
            self._say(f"{self._look.path(ino)}: values that could not be were replaced")

    def _missing_inodes(self) -> None:
        """What is there of an inode, its names or blocks, says what it was."""
        missing = (
            "SELECT parent FROM dirents WHERE parent NOT IN (SELECT ino FROM inodes) UNION"
            " SELECT ino FROM chunk_list WHERE ino NOT IN (SELECT ino FROM inodes) UNION"
            " SELECT ino FROM dirty WHERE ino NOT IN (SELECT ino FROM inodes) UNION"
            " SELECT ino FROM symlinks WHERE ino NOT IN (SELECT ino FROM inodes) UNION"
            " SELECT ino FROM dirents WHERE ino NOT IN (SELECT ino FROM inodes)"
        )
        for (ino,) in self._all(missing):
            self._make(ino, *self._kind_of(ino))
            self._say(f"inode {ino} made anew from what there is of it")

    # ------------------------------------------------------------------ names

    def _names(self) -> None:
        misplaced = self._all(
            "SELECT parent, name, ino FROM dirents d WHERE"
            f" {BAD_NAME} OR NOT EXISTS (SELECT 1 FROM inodes WHERE ino = d.parent AND {IS_FOLDER})"
        )
        for parent, name, ino in misplaced:  # without a name, it gets one under lost+found
            self._say(f"'{readable(name)}' of inode {ino} could not be a name: removed")
            self._drop(parent, name, ino)
        several = self._all(
            f"SELECT d.ino FROM dirents d JOIN inodes USING (ino) WHERE {IS_FOLDER}"
            " GROUP BY d.ino HAVING count(*) > 1"
        )
        for (ino,) in several:
            for parent, name in self._all("SELECT parent, name FROM dirents WHERE ino=?", (ino,))[
                1:
            ]:
                self._drop(parent, name, ino)
            self._say(f"{self._look.path(ino)}: further names of the folder removed")
        unordered = self._all(
            "SELECT parent, name FROM dirents d WHERE typeof(cookie) != 'integer' OR cookie < 16"
            " OR EXISTS (SELECT 1 FROM dirents e INDEXED BY dirents_order WHERE"
            " e.parent = d.parent AND e.cookie = d.cookie AND e.name < d.name)"
        )
        for parent, name in unordered:
            self._run(
                "UPDATE dirents SET cookie = ? WHERE parent = ? AND name = ?",
                (self._take("next_id"), parent, name),
            )
        self._count(len(unordered), "names got a new place in their folder's order")

    def _drop(self, parent: int, name: object, ino: int) -> None:
        self._run(
            "DELETE FROM dirents WHERE parent = ? AND name = ? AND ino = ?", (parent, name, ino)
        )

    def _adopt(self, ino: int) -> None:
        """Give an inode a name under lost+found."""
        if not self._lost_and_found:
            self._lost_and_found = self._find_lost_and_found()
        name = b"inode-%d" % ino
        self._run(
            "INSERT OR IGNORE INTO dirents VALUES (?,?,?,?)",
            (self._lost_and_found, name, self._take("next_id"), ino),
        )
        self._say(f"inode {ino} is now /{readable(LOST_AND_FOUND)}/{readable(name)}")

    def _find_lost_and_found(self) -> int:
        name = LOST_AND_FOUND
        while row := self._all(
            "SELECT ino, mode FROM dirents JOIN inodes USING (ino) WHERE parent = ? AND name = ?",
            (ROOT_INO, name),
        ):
            if stat.S_ISDIR(row[0][1]):
                return int(row[0][0])
            name += b"_"
        ino = self._take("next_ino")
        self._make(ino, stat.S_IFDIR | 0o700, 0)
        self._run(
            "INSERT INTO dirents VALUES (?,?,?,?)", (ROOT_INO, name, self._take("next_id"), ino)
        )
        return ino

    def _reach(self) -> None:
        """Cut rings of folders: one of each ring moves to lost+found, and the rest with it."""
        lost = (
            f"SELECT i.ino FROM inodes i WHERE {IS_FOLDER} AND i.ino NOT IN"
            " (SELECT ino FROM temp.reached) AND EXISTS (SELECT 1 FROM dirents d WHERE"
            " d.ino = i.ino) ORDER BY i.ino"
        )
        while True:
            reach_folders(self._look)
            row = self._all(f"{lost} LIMIT 1")
            if not row:
                return
            at, seen = row[0][0], set()
            while at not in seen:  # upwards, until the ring closes or a folder without a name
                seen.add(at)
                above = self._all("SELECT parent FROM dirents WHERE ino = ?", (at,))
                if not above:
                    break
                at = above[0][0]
            self._run("DELETE FROM dirents WHERE ino = ?", (at,))
            self._adopt(at)

    def _orphans(self) -> None:
        for (ino,) in self._all(
            "SELECT ino FROM inodes i WHERE ino != ? AND nlink > 0"
            " AND NOT EXISTS (SELECT 1 FROM dirents d WHERE d.ino = i.ino)",
            (ROOT_INO,),
        ):
            self._adopt(ino)

    # ------------------------------------------------------------------ data

    def _chunks(self) -> None:
        reasons: Counter[str] = Counter()
        for row, _, why in list(misplaced_chunks(self._look)):
            # Deduplication must not choose it; what refers to it could not be opened anyway.
            self._run("DELETE FROM chunks WHERE id = ?", (row,))
            reasons[why] += 1
        for why, count in reasons.items():
            self._count(count, f"chunks forgotten: {why}")
        self._count(
            self._run(
                "DELETE FROM packs WHERE message = 0 AND id NOT IN (SELECT pack FROM intent_packs)"
            ),
            "packs forgotten that were neither confirmed nor on their way",
        )
        self._run("DELETE FROM chunks WHERE pack NOT IN (SELECT id FROM packs)")
        self._count(
            self._run(
                "UPDATE chunk_list SET chunk = ?1 WHERE chunk != ?1 AND NOT EXISTS (SELECT 1 FROM"
                " chunks c JOIN packs p ON p.id = c.pack WHERE c.id = chunk AND p.message != 0)",
                (DAMAGED_CHUNK,),
            ),
            "blocks marked damaged: where their content lies is not known",
        )
        self._count(
            self._run(
                "UPDATE chunk_list SET valid_length = min(?, (SELECT plain_length FROM chunks"
                " WHERE id = chunk)) WHERE chunk != ? AND (typeof(valid_length) != 'integer'"
                " OR valid_length < 0 OR valid_length > min(?1, (SELECT plain_length FROM chunks"
                " WHERE id = chunk)))",
                (self._block_bytes, DAMAGED_CHUNK),
            ),
            "blocks cut to what their chunks hold",
        )
        self._run(
            f"DELETE FROM chunk_list WHERE ino IN (SELECT ino FROM inodes WHERE (mode & {FORMAT_MASK})"  # noqa: E501
            f" != {stat.S_IFREG})"
        )

    def _gaps(self) -> None:
        """Lost entries of chunk lists: the inode still counts their bytes.

        A gap is a hole or lost content; in a file that lost some, no gap may read as zeros.
        """
        short = self._all(
            "SELECT ino, size FROM inodes i"
            f" WHERE (mode & {FORMAT_MASK}) = {stat.S_IFREG} AND stored >"
            " (SELECT coalesce(sum(valid_length), 0) FROM chunk_list l WHERE l.ino = i.ino)"
        )
        for ino, size in short:
            lost = self._run(
                "WITH RECURSIVE n(idx) AS (SELECT 0 UNION ALL SELECT idx + 1 FROM n"
                " WHERE (idx + 1) * ?2 < ?3) INSERT OR IGNORE INTO chunk_list"
                " SELECT ?1, idx, ?4, min(?2, ?3 - idx * ?2) FROM n WHERE idx * ?2 < ?3",
                (ino, self._block_bytes, size, DAMAGED_CHUNK),
            )
            if lost:
                self._say(
                    f"{self._look.path(ino)}: {lost} blocks marked damaged: their entries are lost"
                )

    def _outbox(self) -> None:
        self._count(
            self._run(
                "DELETE FROM intent_packs WHERE intent NOT IN (SELECT id FROM intents)"
                " OR pack NOT IN (SELECT id FROM packs)"
            ),
            "entries of uploads forgotten that led nowhere",
        )
        self._count(
            self._run(
                "DELETE FROM watched WHERE typeof(filename) != 'text'"
                " OR typeof(after_message) != 'integer' OR typeof(given_up_ns) != 'integer'"
            ),
            "entries of the watch list forgotten that could not be",
        )
        for table in ("xattrs", "cached", "generations", "synced_sizes"):
            self._run(f"DELETE FROM {table} WHERE ino NOT IN (SELECT ino FROM inodes)")
        self._count(
            self._run(
                "INSERT OR REPLACE INTO symlinks SELECT ino, CAST('damaged' AS BLOB) FROM inodes i"
                f" WHERE (mode & {FORMAT_MASK}) = {stat.S_IFLNK}"
                " AND NOT EXISTS (SELECT 1 FROM symlinks s WHERE s.ino = i.ino)"
            ),
            "symbolic links whose target is lost now lead to 'damaged'",
        )

    def _trash(self) -> None:
        self._count(
            self._run(
                "DELETE FROM trash WHERE ino IN (SELECT t.ino FROM trash t"
                f" LEFT JOIN inodes i ON i.ino = t.ino WHERE {BAD_TRASH})"
            ),
            "entries of the trash forgotten: no such file, or it has a name",
        )

    def _counts(self) -> None:
        for what, column, is_right in (
            ("links", "nlink", self._links_sql()),
            (
                "stored bytes",
                "stored",
                "coalesce((SELECT sum(valid_length) FROM chunk_list l WHERE l.ino = inodes.ino),0)",
            ),
        ):
            changed = self._run(
                f"UPDATE inodes SET {column} = {is_right} WHERE {column} IS NOT {is_right}"
            )
            self._count(changed, f"inodes' {what} counted anew")
        grown = (
            "UPDATE inodes SET size = (SELECT max(idx * ?1 + valid_length) FROM chunk_list l"
            f" WHERE l.ino = inodes.ino) WHERE (mode & {FORMAT_MASK}) = {stat.S_IFREG}"
            " AND size < (SELECT max(idx * ?1 + valid_length) FROM chunk_list l"
            " WHERE l.ino = inodes.ino)"
        )
        self._count(
            self._run(grown, (self._block_bytes,)), "files set to the size that their blocks have"
        )
        self._run(
            "UPDATE inodes SET size = (SELECT length(target) FROM symlinks s"
            f" WHERE s.ino = inodes.ino) WHERE (mode & {FORMAT_MASK}) = {stat.S_IFLNK}"
        )

    @staticmethod
    def _links_sql() -> str:
        names = "(SELECT count(*) FROM dirents d WHERE d.ino = inodes.ino)"
        subfolders = (
            "(SELECT count(*) FROM dirents d JOIN inodes s ON s.ino = d.ino"
            f" WHERE d.parent = inodes.ino AND (s.mode & {FORMAT_MASK}) = {stat.S_IFDIR})"
        )
        return (
            f"CASE WHEN NOT ({IS_FOLDER}) THEN {names}"
            f" WHEN ino = {ROOT_INO} OR {names} > 0 THEN 2 + {subfolders} ELSE 0 END"
        )


@contextmanager
def writable(path: Path) -> Iterator[apsw.Connection]:
    """A connection of its own to a journal that nobody has open."""
    prepare_apsw()
    connection = apsw.Connection(str(path))
    try:
        yield connection
    finally:
        connection.close()


def mend(path: Path, block_bytes: int, lost: Iterable[LostFile] = ()) -> list[str]:
    """Mend the journal at `path` in one transaction; what was done, in words. JournalError.

    `lost`: local files with unsent data that the journal does not know. The caller holds the
    volume's lock and has copied the journal.
    """
    try:
        with writable(path) as connection:
            connection.pragma("synchronous", "full")
            with connection:
                repairs = Repairs(Inspection(connection), block_bytes)
                repairs.take_in(lost)
                repairs.all()
                if repairs.done:  # in no segment: Discord learns of it by a checkpoint
                    connection.execute(schema.WANT_CHECKPOINT)
                    connection.execute("DELETE FROM unused")  # history's time begins anew
            return repairs.done
    except apsw.Error as error:
        raise JournalError(f"the journal {path} cannot be mended: {error}") from error


def rebuild_indexes(path: Path) -> None:
    """Make all indexes anew from the tables. JournalError when the tables cannot be read."""
    try:
        with writable(path) as connection:
            connection.execute("REINDEX")
    except apsw.Error as error:
        raise JournalError(f"the journal's indexes cannot be made anew: {error}") from error
