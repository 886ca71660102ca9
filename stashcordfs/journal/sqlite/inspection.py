"""A second look at a journal: a read-only connection, one snapshot, rows in slices.

It works beside a mounted volume (another process reads the last committed state; the WAL cannot be
taken back while it looks) and on a journal that nobody has open. It changes nothing, and streams:
no table is held in memory.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import apsw

from stashcordfs.errors import JournalError
from stashcordfs.journal.sqlite import schema
from stashcordfs.journal.sqlite.database import prepare_apsw
from stashcordfs.types import ROOT_INO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

_SLICE_ROWS = 10_000
_DEEPEST = 4096  # folders in each other that a path is followed through; a ring ends here
# Where a name is, or was: what is in the trash comes second.
_PLACE = (
    "SELECT parent, name FROM dirents WHERE ino = ?1"
    " UNION ALL SELECT parent, name FROM trash WHERE ino = ?1 LIMIT 1"
)
# Rows by their table and key, so that a check covers a bounded part of it at a time.
DRIVING = {
    "inodes": "ino",
    "dirents": "parent",
    "chunk_list": "ino",
    "chunks": "pack",
    "packs": "id",
}


class Fault(NamedTuple):
    """Something that should not be. A note is what the next mount tidies by itself."""

    check: str
    text: str
    note: bool = False


class Inspection:
    """One snapshot of a journal. JournalError when SQLite cannot read it."""

    def __init__(self, connection: apsw.Connection) -> None:
        """Use `inspect`."""
        self.connection = connection
        self.version = int(connection.pragma("user_version") or 0)
        self.tick: Callable[[int], None] = lambda _: None  # so many rows were looked at

    def rows(self, sql: str, bindings: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """Rows one by one."""
        try:
            yield from self.connection.execute(sql, bindings)
        except apsw.Error as error:
            raise JournalError(f"the journal cannot be read: {error}") from error

    def run(self, sql: str, bindings: Sequence[Any] = ()) -> int:
        """Execute one statement; how many rows it changed."""
        try:
            self.connection.execute(sql, bindings)
        except apsw.Error as error:
            raise JournalError(f"the journal cannot be read: {error}") from error
        return self.connection.changes()

    def number(self, sql: str, bindings: Sequence[Any] = ()) -> int:
        """The first column of the first row; 0 without one."""
        row = next(self.rows(sql, bindings), None)
        return int(row[0]) if row and isinstance(row[0], int) else 0

    def sliced(self, table: str, sql: str, more: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """Rows of a query over `table` whose key is BETWEEN ?1 AND ?2, slice by slice."""
        key = DRIVING[table]
        at: int | None = None
        while True:
            low = "" if at is None else f"WHERE {key} > {at}"
            bounds = next(
                self.rows(
                    f"SELECT min(k), max(k), count(*) FROM (SELECT {key} AS k FROM {table} {low}"
                    f" ORDER BY {key} LIMIT {_SLICE_ROWS})"
                )
            )
            if not bounds[2]:
                return
            yield from self.rows(sql, (bounds[0], bounds[1], *more))
            self.tick(bounds[2])
            at = bounds[1]

    def local(self, key: str) -> int:
        """A counter of this machine; 0 when it is not there or no number."""
        return self.number("SELECT value FROM local WHERE key = ?", (key,))

    def text(self, key: str) -> str | None:
        """A fact of this machine."""
        row = next(self.rows("SELECT value FROM local WHERE key = ?", (key,)), None)
        return None if row is None else str(row[0])

    def path(self, ino: int) -> str:
        """A path of an inode as a person reads it; its number when no path leads to it."""
        parts: list[str] = []
        at = ino
        for _ in range(_DEEPEST):
            if at == ROOT_INO:
                return "/" + "/".join(reversed(parts))
            row = next(self.rows(_PLACE, (at,)), None)
            if row is None:
                break
            at = row[0]
            parts.append(readable(row[1]))
        return f"inode {ino}"

    def integrity(self) -> list[str]:
        """What SQLite itself finds wrong with the file: pages, cells, indexes. Empty: nothing."""
        try:
            rows = self.connection.execute("PRAGMA integrity_check(20)").fetchall()
        except apsw.Error as error:
            return [str(error)]
        return [str(row[0]) for row in rows if row[0] != "ok"]


def readable(name: object) -> str:
    """A name's bytes for a terminal and for JSON: what is no printable UTF-8 is escaped."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def inspect(path: Path) -> Iterator[Inspection]:
    """Look at the journal as it is at this moment. JournalError when it cannot be read."""
    prepare_apsw()
    if not path.exists():
        raise JournalError(f"the journal {path} is missing: recover it from Discord")
    connection = None
    try:
        try:
            connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
            connection.pragma("cache_size", -16_000)  # KiB
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()  # the snapshot
            found = connection.pragma("application_id")
        except apsw.Error as error:
            raise JournalError(f"the journal {path} cannot be read: {error}") from error
        if found != schema.APPLICATION_ID:
            raise JournalError(f"{path} is no journal of StashcordFS")
        yield Inspection(connection)
    finally:
        if connection is not None:
            connection.close()
