"""Mending what Discord is told, and what may be deleted there. Part of `repairs.mend`.

What is lost here is told by the next checkpoint, which `mend` asks for; nothing is deleted on
Discord that may be needed: what is in doubt counts again, and `verify` or `gc` look at it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from stashcordfs.crypto.keys import KIND_SEGMENT
from stashcordfs.journal.sqlite import schema
from stashcordfs.journal.sqlite.telling_checks import (
    BAD_CONDEMNED,
    BAD_OBJECT,
    GIVEN,
    LOST_CHANGES,
    NEEDED_CONDEMNED,
    USED_UNUSED,
    broken_changes,
    lost_segments,
)

if TYPE_CHECKING:
    from stashcordfs.journal.sqlite.inspection import Inspection

_DROPPED = -1


def mend_telling(look: Inspection) -> list[str]:
    """Mend within the caller's transaction; what was done, in words."""
    return [*_objects(look), *_changes(look), *_condemned(look), *_unused(look)]


def _told(count: int, what: str) -> list[str]:
    return [f"{count} {what}"] if count else []


def _objects(look: Inspection) -> list[str]:
    """A name stays known as ours, else its object on Discord would be another writer's."""
    lost = [number for number, _ in lost_segments(look)]
    for number in lost:
        look.run(
            f"UPDATE objects SET message = {_DROPPED}, sealed = NULL"
            f" WHERE kind = {KIND_SEGMENT} AND number = ? AND message = 0",
            (number,),
        )
    now = time.time_ns()
    unknown = look.run(
        "DELETE FROM objects WHERE typeof(object_id) != 'blob' OR length(object_id) != 16"
        " OR typeof(kind) != 'integer'"
    )
    if unknown:
        look.connection.execute(schema.DOUBT)
    bad = look.run(
        f"UPDATE objects SET message = {_DROPPED}, sealed = NULL, channel = 0, attachment = 0,"
        " kind = CASE WHEN kind BETWEEN 2 AND 5 THEN kind ELSE 5 END, number = max(0,"
        " CAST(number AS INTEGER)), part = max(0, CAST(part AS INTEGER)), size = 1,"
        " last_change = max(0, CAST(last_change AS INTEGER)), digest = CASE WHEN"
        " typeof(digest) = 'blob' AND length(digest) = 32 THEN digest ELSE zeroblob(32) END,"
        f" made_ns = ? WHERE {BAD_OBJECT}",
        (now,),
    )
    doubles = look.run(
        f"UPDATE objects SET message = {_DROPPED}, sealed = NULL WHERE kind = {KIND_SEGMENT}"
        f" AND message > {_DROPPED} AND EXISTS (SELECT 1 FROM objects o WHERE o.kind = objects.kind"
        f" AND o.number = objects.number AND o.message > {_DROPPED}"
        " AND (o.last_change, o.object_id) > (objects.last_change, objects.object_id))"
    )
    backwards = look.run(
        f"UPDATE objects SET last_change = (SELECT max(o.last_change) FROM objects o"
        f" WHERE o.kind = {KIND_SEGMENT} AND o.number <= objects.number)"
        f" WHERE kind = {KIND_SEGMENT} AND last_change < (SELECT max(o.last_change) FROM objects o"
        f" WHERE o.kind = {KIND_SEGMENT} AND o.number <= objects.number)"
    )
    return [
        *_told(len(lost), "segments forgotten that cannot be posted any more"),
        *_told(unknown, "objects of the journal channel forgotten"),
        *_told(bad + doubles, "objects of the journal channel kept as names alone"),
        *_told(backwards, "segments got the end of the one before"),
    ]


def _changes(look: Inspection) -> list[str]:
    """All of a broken run goes, and one row that cannot be passed over takes its place."""
    if not any(broken_changes(look)):
        return []
    last = look.number("SELECT max(id) FROM changes")
    gone = look.run("DELETE FROM changes")
    row = max(last, look.number(GIVEN) + 1)
    look.run("INSERT INTO changes VALUES (?,?,?)", (row, time.time_ns(), LOST_CHANGES))
    return [f"{gone} changes that Discord was not told of forgotten: a checkpoint will tell"]


def _condemned(look: Inspection) -> list[str]:
    """What is needed is not deleted."""
    spared = list(look.rows(NEEDED_CONDEMNED))
    for where in spared:
        look.run("DELETE FROM condemned WHERE channel = ? AND message = ?", where)
        look.run(
            "UPDATE packs SET message = abs(message) WHERE channel = ? AND abs(message) = ?", where
        )
    bad = look.run(f"DELETE FROM condemned WHERE {BAD_CONDEMNED}")
    return [
        *_told(len(spared), "messages are not deleted, as something needs them"),
        *_told(bad, "messages are not deleted, as their rows could not be"),
    ]


def _unused(look: Inspection) -> list[str]:
    odd = look.run(
        "DELETE FROM unused WHERE typeof(since_ns) != 'integer' OR since_ns < 0"
        f" OR chunk IN ({USED_UNUSED})"
    )
    return _told(odd, "chunks' time in history begins anew")
