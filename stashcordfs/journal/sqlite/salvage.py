"""Reading what can be read of a journal whose pages are damaged, into a new one.

Each table is walked along its key, from both ends; where SQLite cannot read on,
the walk leaps over the damage, doubling its leaps and halving them again, so that it loses hardly
more than the rows of the damaged pages. What a table lost but an index still covers (names; which
pack a chunk is in) is taken from the index. The first page is the exception: without it there is
no schema, and nothing can be read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import apsw

from stashcordfs.errors import JournalError
from stashcordfs.journal.sqlite import schema
from stashcordfs.journal.sqlite.database import prepare_apsw

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FARTHEST = 1 << 62
_FROM_INDEX = {
    # WITHOUT ROWID: this index holds all columns of the table.
    "dirents": "SELECT parent, name, cookie, ino FROM dirents INDEXED BY dirents_order",
}

Row = tuple[Any, ...]


def salvage(damaged: Path, new: Path) -> dict[str, int]:
    """Copy every readable row into the new journal; how many by table. JournalError without any."""
    prepare_apsw()
    new.unlink(missing_ok=True)
    try:
        source = apsw.Connection(str(damaged))
        tables = [row[0] for row in source.execute("SELECT name FROM sqlite_schema")]
    except apsw.Error as error:
        text = f"{damaged}: not even its first page can be read ({error}): recover from Discord"
        raise JournalError(text) from error
    target = apsw.Connection(str(new))
    new.chmod(0o600)
    found: dict[str, int] = {}
    try:
        with target:
            target.execute(schema.SCHEMA)
            target.pragma("user_version", schema.VERSION)
            target.pragma("application_id", schema.APPLICATION_ID)
            made = target.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
            for table in [str(row[0]) for row in made]:
                if table in tables:
                    found[table] = _copy(source, target, table)
    finally:
        source.close()
        target.close()
    return found


def _copy(source: apsw.Connection, target: apsw.Connection, table: str) -> int:
    columns = [row[1] for row in target.execute(f"PRAGMA table_info({table})")]
    keys = [row[1] for row in target.execute(f"PRAGMA table_info({table})") if row[5] == 1]
    places = ",".join("?" * len(columns))
    put = f"INSERT OR IGNORE INTO {table} ({','.join(columns)}) VALUES ({places})"
    before = target.total_changes()
    select = f"SELECT {','.join(columns)} FROM {table}"
    for row in _walk(source, select, table, keys[0], columns.index(keys[0])):
        target.execute(put, row)
    if table in _FROM_INDEX:
        for row in _until_fault(source, _FROM_INDEX[table], ()):
            target.execute(put, row)
    return target.total_changes() - before


def _until_fault(source: apsw.Connection, sql: str, bindings: tuple[Any, ...]) -> Iterator[Row]:
    try:
        yield from source.execute(sql, bindings)
    except apsw.Error:
        return


def _walk(source: apsw.Connection, select: str, table: str, key: str, place: int) -> Iterator[Row]:
    """Rows along the key: forward with leaps, then backward from the end; some come twice."""
    at: Any = None
    while True:
        low = "" if at is None else f"WHERE {key} > ?"
        last, broken = at, False
        try:
            for row in source.execute(
                f"{select} {low} ORDER BY {key}", () if at is None else (at,)
            ):
                last = row[place]
                yield row
        except apsw.Error:
            broken = True
        if not broken:
            break
        at = _beyond(source, table, key, last)
        if at is None:
            break
    yield from _until_fault(source, f"{select} ORDER BY {key} DESC", ())


def _beyond(source: apsw.Connection, table: str, key: str, last: Any) -> int | None:
    """The smallest integer key after which reading works again; None when there is none."""
    start = last if isinstance(last, int) else 0
    leap = 1
    while not _readable(source, table, key, start + leap):
        leap *= 2
        if start + leap > _FARTHEST:
            return None
    low, high = leap // 2, leap  # unreadable after low, readable after high
    while high - low > 1:
        middle = (low + high) // 2
        if _readable(source, table, key, start + middle):
            high = middle
        else:
            low = middle
    return start + high


def _readable(source: apsw.Connection, table: str, key: str, after: int) -> bool:
    """Whether the first row after a key can be read; an empty rest counts as read."""
    try:
        source.execute(
            f"SELECT * FROM {table} WHERE {key} > ? ORDER BY {key} LIMIT 1",
            (after,),
        ).fetchall()
    except apsw.Error:
        return False
    return True
