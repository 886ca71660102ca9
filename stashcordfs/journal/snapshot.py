"""Copies of the journal for Discord, and journals out of them. For threads and for commands.

A copy holds the replicated tables alone, as they are at one moment: it is taken by a second
connection in a read transaction, which hinders no writer, and closed soon, as a long reader keeps
the WAL from starting anew. Indexes are left out, as they are made again faster than they are sent.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import apsw

from stashcordfs.errors import JournalError
from stashcordfs.journal.sqlite import checksums, schema
from stashcordfs.journal.sqlite.database import prepare_apsw

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_KIND_SEGMENT = 2
_ATIME = 7  # of `inodes`: not recorded when it changes alone, so a copy may be behind in it
_LAST_CHANGE = """
SELECT max((SELECT coalesce(max(id), 0) FROM j.changes),
           (SELECT coalesce(max(last_change), 0) FROM j.objects))
"""
_HEAD = """
SELECT number, digest FROM j.objects WHERE kind = ? ORDER BY number DESC LIMIT 1
"""

_CONDEMNS = 6  # the format that has the table
_HAS_CONDEMNED = "SELECT count(*) FROM n.sqlite_schema WHERE name = 'condemned'"
_TAKE_CONDEMNED = "INSERT OR IGNORE INTO condemned SELECT * FROM n.condemned"
_LOCATE = """
CREATE TEMP TABLE gone AS SELECT id FROM main.packs p WHERE p.message != 0 AND NOT EXISTS (
  SELECT 1 FROM n.packs q WHERE q.object_id = p.object_id AND q.message > 0);
UPDATE main.packs SET (channel, message, attachment, filename) = (
    SELECT q.channel, q.message, q.attachment, q.filename FROM n.packs q
    WHERE q.object_id = packs.object_id)
  WHERE object_id IN (SELECT object_id FROM n.packs WHERE message != 0);
UPDATE main.packs SET message = -abs(message) WHERE id IN (SELECT id FROM temp.gone);
INSERT OR IGNORE INTO main.packs SELECT * FROM n.packs WHERE message != 0;
INSERT OR IGNORE INTO main.chunks SELECT c.* FROM n.chunks c JOIN n.packs q ON q.id = c.pack
  WHERE q.message != 0 AND c.pack IN (SELECT id FROM main.packs);
CREATE TEMP TABLE moved AS SELECT c.id AS old, min(o.id) AS new
  FROM main.chunks c JOIN main.chunks o ON o.chunk_id = c.chunk_id
    JOIN main.packs p ON p.id = o.pack
  WHERE c.pack IN (SELECT id FROM temp.gone) AND p.message > 0 GROUP BY c.id;
CREATE UNIQUE INDEX temp.moved_old ON moved (old);
UPDATE main.chunk_list SET chunk = (SELECT new FROM temp.moved WHERE old = chunk)
  WHERE chunk IN (SELECT old FROM temp.moved);
DELETE FROM main.chunks WHERE pack IN (SELECT id FROM temp.gone)
  AND id NOT IN (SELECT chunk FROM main.chunk_list);
DELETE FROM main.packs WHERE id IN (SELECT id FROM temp.gone)
  AND id NOT IN (SELECT pack FROM main.chunks);
DROP TABLE temp.gone;
DROP TABLE temp.moved;
"""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a copy holds: all changes up to `last_change`, and the newest segment cut before it."""

    last_change: int
    head: tuple[int, bytes] | None


def take_snapshot(journal: Path, target: Path) -> Snapshot:
    """Copy a journal that may be in use to `target`. JournalError."""
    target.unlink(missing_ok=True)
    with opened(target) as db:
        unkept(db)
        db.execute("ATTACH ? AS j", (str(journal),))
        db.execute("BEGIN")
        made = db.execute("SELECT sql FROM j.sqlite_schema WHERE sql NOT NULL ORDER BY rowid")
        statements = [str(row[0]) for row in made]
        db.execute("CREATE TABLE checkpoint_indexes (sql TEXT NOT NULL)")
        for sql in statements:
            if sql.startswith("CREATE TABLE"):
                db.execute(sql)
            else:
                db.execute("INSERT INTO checkpoint_indexes VALUES (?)", (sql,))
        for table in schema.REPLICATED_TABLES:
            db.execute(f"INSERT INTO main.{table} SELECT * FROM j.{table}")  # noqa: S608  constants
        last_change = _value(db, _LAST_CHANGE)
        head = db.execute(_HEAD, (_KIND_SEGMENT,)).fetchone()
        db.pragma("application_id", schema.APPLICATION_ID)
        db.pragma("user_version", schema.VERSION)
        db.execute("COMMIT")
        db.execute("DETACH j")
    return Snapshot(last_change, head and (head[0], bytes(head[1])))


class Rebuild:
    """A journal that is being made out of a copy and of changes. Use as a context manager."""

    def __init__(self, db: apsw.Connection) -> None:
        """Use `from_nothing` or `from_snapshot`."""
        self._db = db

    @classmethod
    @contextmanager
    def from_nothing(cls, path: Path) -> Iterator[Rebuild]:
        """An empty journal at `path`, as it is before the first change."""
        path.unlink(missing_ok=True)
        with opened(path) as db:
            checksums.begin(db)
            db.execute(schema.SCHEMA)
            db.pragma("application_id", schema.APPLICATION_ID)
            db.pragma("user_version", schema.VERSION)
            yield cls(db)

    @classmethod
    @contextmanager
    def from_snapshot(cls, path: Path, copy: Path) -> Iterator[Rebuild]:
        """A journal at `path` out of the copy. JournalError when that is none.

        A new file, since checksums can be given to an empty one only.
        """
        path.unlink(missing_ok=True)
        with opened(path) as db:
            checksums.begin(db)
            db.execute("ATTACH ? AS c", (str(copy),))
            if db.execute("PRAGMA c.application_id").get != schema.APPLICATION_ID:
                raise JournalError("a checkpoint does not hold a journal")
            version = db.execute("PRAGMA c.user_version").get
            schema.check_version(int(version))
            with db:
                _copy_out(db)
            db.execute("DETACH c")
            db.pragma("application_id", schema.APPLICATION_ID)
            db.pragma("user_version", version)
            yield cls(db)

    @property
    def schema_version(self) -> int:
        """The format of this journal: changes must be of the same."""
        return int(self._db.pragma("user_version") or 0)

    def apply(self, changesets: Iterable[bytes]) -> None:
        """Apply changes in order, all or none. JournalError at the first that does not fit."""
        misfit = ""

        def conflict(kind: int, change: apsw.TableChange) -> int:
            nonlocal misfit
            if kind == apsw.SQLITE_CHANGESET_DATA and _differs_in_atime_alone(change):
                return apsw.SQLITE_CHANGESET_REPLACE
            name = apsw.mapping_session_conflict[kind]
            misfit = f"{change.op} in {change.name}: {str(name).removeprefix('SQLITE_CHANGESET_')}"
            return apsw.SQLITE_CHANGESET_ABORT

        with as_ours(), self._db:
            for changeset in changesets:
                try:
                    apsw.Changeset.apply(changeset, self._db, conflict=conflict)
                except apsw.AbortError as error:
                    raise JournalError(f"a change does not fit the journal ({misfit})") from error

    def execute(self, sql: str, bindings: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Run a statement of recovery's own; its rows."""
        with as_ours():
            return self._db.execute(sql, bindings).fetchall()

    def locate(self, newest: Path) -> None:
        """Let this state of the past refer to where its chunks are now, by a newer journal.

        What has been repacked since is found by its chunk id. What the newer journal has no more is
        lost, and an error when it is read. Its other packs are taken over: they are on Discord, and
        somebody must know them to collect them one day. No segment tells of it: a checkpoint must.
        """
        with as_ours():
            self._db.execute("ATTACH ? AS n", (str(newest),))
            try:
                with self._db:
                    self._db.execute(_LOCATE)
                    self._db.execute(schema.WANT_CHECKPOINT)
                    if self.schema_version >= _CONDEMNS and _value(self._db, _HAS_CONDEMNED):
                        self._db.execute(_TAKE_CONDEMNED)
            finally:
                self._db.execute("DETACH n")

    def finish(self, facts: dict[str, object]) -> None:
        """Store facts of the new machine (`local`) and let the file be complete by itself."""
        with as_ours(), self._db:
            for key, value in facts.items():
                self._db.execute("INSERT OR REPLACE INTO local VALUES (?,?)", (key, value))


def _copy_out(db: apsw.Connection) -> None:
    """Tables with their rows, then their indexes, out of the attached copy."""
    tables = db.execute("SELECT name, sql FROM c.sqlite_schema WHERE sql LIKE 'CREATE TABLE%'")
    for name, sql in tables.fetchall():
        if name != "checkpoint_indexes":
            db.execute(str(sql))
            db.execute(f"INSERT INTO main.{name} SELECT * FROM c.{name}")  # noqa: S608  our own names
    for row in db.execute("SELECT sql FROM c.checkpoint_indexes").fetchall():
        db.execute(str(row[0]))


def _differs_in_atime_alone(change: apsw.TableChange) -> bool:
    if change.name != "inodes" or change.old is None or change.conflict is None:
        return False
    return all(
        at == _ATIME or old is apsw.no_change or old == found
        for at, (old, found) in enumerate(zip(change.old, change.conflict, strict=True))
    )


def _value(db: apsw.Connection, sql: str) -> int:
    return int(db.execute(sql).get)


def unkept(db: apsw.Connection) -> None:
    """Let SQLite spare what keeps a file through a crash: nobody will want it then."""
    # One by one: apsw stops before a statement while the rows of the one before are not read.
    db.pragma("journal_mode", "off")
    db.pragma("synchronous", "off")


@contextmanager
def as_ours() -> Iterator[None]:
    """What SQLite raises inside is a JournalError."""
    try:
        yield
    except apsw.Error as error:
        raise JournalError(f"journal: {error}") from error


@contextmanager
def opened(path: Path) -> Iterator[apsw.Connection]:
    """A connection to a file that only this user may read; closed afterwards."""
    prepare_apsw()
    with as_ours():
        db = apsw.Connection(str(path))
        try:
            path.chmod(0o600)
            yield db
        finally:
            db.close()
