"""Reading what can be read of a journal whose pages are damaged, into a new one.

Each table is walked along its key, from both ends; where SQLite cannot read on,
the walk leaps over the damage, doubling its leaps and halving them again, so that it loses hardly
more than the rows of the damaged pages. What a table lost but an index still covers (names; which
pack a chunk is in) is taken from the index. The first page is the exception: without it there is
no schema, and nothing can be read.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import apsw

from stashcordfs.errors import JournalError
from stashcordfs.journal.sqlite import checksums, schema
from stashcordfs.journal.sqlite.database import prepare_apsw
from stashcordfs.journal.sqlite.telling_checks import GIVEN, LOST_CHANGES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FARTHEST = 1 << 62
_LARGEST = 1 << 40  # a damaged header asks for no more; the padding is a hole
_FROM_INDEX = {
    # WITHOUT ROWID: this index holds all columns of the table.
    "dirents": "SELECT parent, name, cookie, ino FROM dirents INDEXED BY dirents_order",
}

_LOSE_CHANGES = f"INSERT INTO changes SELECT coalesce(({GIVEN}), 0) + 1, ?, ?"

Row = tuple[Any, ...]


def salvage(damaged: Path, new: Path) -> dict[str, int]:
    """Copy every readable row into the new journal; how many by table. JournalError without any."""
    prepare_apsw()
    new.unlink(missing_ok=True)
    _pad(damaged)
    try:
        source = apsw.Connection(str(damaged))
        tables = [row[0] for row in source.execute("SELECT name FROM sqlite_schema")]
    except apsw.Error as error:
        text = f"{damaged}: not even its first page can be read ({error}): recover from Discord"
        raise JournalError(text) from error
    if "inodes" not in tables:
        source.close()
        raise JournalError(f"{damaged} holds no journal any more: recover from Discord")
    target = apsw.Connection(str(new))
    new.chmod(0o600)
    found: dict[str, int] = {}
    try:
        checksums.begin(target)
        with target:
            target.execute(schema.SCHEMA)
            target.pragma("user_version", schema.VERSION)
            target.pragma("application_id", schema.APPLICATION_ID)
            made = target.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
            # A run of changes with gaps is worth nothing: a checkpoint tells Discord instead, and
            # nobody is led past them without it.
            target.execute(schema.WANT_CHECKPOINT)
            for table in [str(row[0]) for row in made]:
                if table in tables and table != "changes":
                    found[table] = _copy(source, target, table)
            if checksums.has_checksums(source):
                # Pages with a wrong checksum may still tell rows that nothing else does.
                source.execute("PRAGMA checksum_verification = 0")
                for table in found:
                    found[table] += _copy(source, target, table)
            target.execute(schema.DOUBT)
            target.execute(_LOSE_CHANGES, (time.time_ns(), LOST_CHANGES))
    finally:
        source.close()
        target.close()
    return found


def _pad(path: Path) -> None:
    """Fill a file that was cut up to the length of its header: else SQLite reads nothing at all."""
    with path.open("r+b") as file:
        head = file.read(100)
        page = int.from_bytes(head[16:18], "big")
        wanted = (65536 if page == 1 else page) * int.from_bytes(head[28:32], "big")
        if len(head) == 100 and wanted <= _LARGEST and path.stat().st_size < wanted:
            file.truncate(wanted)


def _copy(source: apsw.Connection, target: apsw.Connection, table: str) -> int:
    info: list[Row] = target.execute(f"PRAGMA table_info({table})").fetchall()
    columns = [str(row[1]) for row in info]
    keys = [str(row[1]) for row in sorted(info, key=lambda row: row[5]) if row[5]]
    places = ",".join("?" * len(columns))
    put = f"INSERT OR IGNORE INTO {table} ({','.join(columns)}) VALUES ({places})"
    before = target.total_changes()
    for row in _Walk(source, table, columns, keys).rows():
        target.execute(put, row)
    if table in _FROM_INDEX:
        for row in _until_fault(source, _FROM_INDEX[table], ()):
            target.execute(put, row)
    return target.total_changes() - before


def _until_fault(source: apsw.Connection, sql: str, bindings: Row) -> Iterator[Row]:
    try:
        yield from source.execute(sql, bindings)
    except apsw.Error:
        return


class _Walk:
    """One table along its key. In the key's whole order: else SQLite may read an index instead."""

    def __init__(
        self, source: apsw.Connection, table: str, columns: list[str], keys: list[str]
    ) -> None:
        self._source = source
        self._key = keys[0]
        self._place = columns.index(keys[0])
        self._select = f"SELECT {','.join(columns)} FROM {table}"
        self._order = f"ORDER BY {','.join(keys)}"
        self._backward = f"ORDER BY {','.join(key + ' DESC' for key in keys)}"

    def rows(self) -> Iterator[Row]:
        """Forward with leaps, then backward from the end; some rows come twice."""
        at: Any = None
        while True:
            low = "" if at is None else f"WHERE {self._key} > ?"
            last, broken = at, False
            try:
                for row in self._source.execute(
                    f"{self._select} {low} {self._order}", () if at is None else (at,)
                ):
                    last = row[self._place]
                    yield row
            except apsw.Error:
                broken = True
            if not broken or (at := self._beyond(last)) is None:
                break
        yield from _until_fault(self._source, f"{self._select} {self._backward}", ())

    def _beyond(self, last: Any) -> int | None:
        """The smallest integer key after which reading works again; None when there is none."""
        start = last if isinstance(last, int) else 0
        leap = 1
        while not self._readable(start + leap):
            leap *= 2
            if start + leap > _FARTHEST:
                return None
        low, high = leap // 2, leap  # unreadable after low, readable after high
        while high - low > 1:
            middle = (low + high) // 2
            if self._readable(start + middle):
                high = middle
            else:
                low = middle
        return start + high

    def _readable(self, after: int) -> bool:
        """Whether the first row after a key can be read; an empty rest counts as read."""
        sql = f"{self._select} WHERE {self._key} > ? {self._order} LIMIT 1"
        try:
            self._source.execute(sql, (after,)).fetchall()
        except apsw.Error:
            return False
        return True
