"""What must hold of what Discord is told, and of what may be deleted there.

`check_told`: changes that no segment holds yet, and the own objects of the journal channel.
`check_garbage`: messages that are condemned, and chunks that only history needs.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import apsw

from stashcordfs.crypto.keys import KIND_CLAIM, KIND_MANIFEST, KIND_SEGMENT
from stashcordfs.journal.sqlite.inspection import Fault
from stashcordfs.journal.sqlite.schema import REPLICATED_TABLES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stashcordfs.journal.sqlite.inspection import Inspection

# What --repair puts in the place of changes that are lost: whoever rebuilds a state without the
# checkpoint that stands for them is refused here, and is not led past them.
LOST_CHANGES = b"lost changes"

_DROPPED = -1  # an object that is no more, and is remembered
BAD_OBJECT = (
    "(typeof(object_id) != 'blob' OR length(object_id) != 16 OR typeof(digest) != 'blob'"
    " OR length(digest) != 32 OR kind NOT BETWEEN"
    f" {KIND_SEGMENT} AND {KIND_CLAIM} OR "
    + " OR ".join(
        f"typeof({column}) != 'integer' OR {column} < {least}"
        for column, least in (
            ("kind", 0), ("number", 0), ("part", 0), ("last_change", 0), ("made_ns", 0),
            ("size", 1), ("message", _DROPPED), ("channel", 0), ("attachment", 0),
        )
    )
    + " OR (message > 0 AND channel = 0) OR typeof(sealed) NOT IN ('null', 'blob'))"
)  # fmt: skip
BAD_CHANGE = (
    "(typeof(made_ns) != 'integer' OR made_ns < 0 OR typeof(changeset) != 'blob'"
    " OR length(changeset) = 0)"
)
BAD_CONDEMNED = (
    "(typeof(since_ns) != 'integer' OR typeof(size) != 'integer' OR size < 0"
    " OR channel <= 0 OR message <= 0)"
)
# Condemned, and yet something counts on it: deleting it would lose data.
NEEDED_CONDEMNED = """
SELECT k.channel, k.message FROM condemned k WHERE EXISTS (
  SELECT 1 FROM packs p WHERE p.channel = k.channel AND p.message = k.message)
UNION SELECT k.channel, k.message FROM chunk_list l CROSS JOIN chunks c ON c.id = l.chunk
  CROSS JOIN packs p ON p.id = c.pack
  CROSS JOIN condemned k ON k.channel = p.channel AND k.message = abs(p.message)
"""
# Chunks whose time in history runs though a file that is not in the trash refers to them.
USED_UNUSED = """
SELECT DISTINCT n.chunk FROM chunk_list l CROSS JOIN unused n ON n.chunk = l.chunk
WHERE l.ino NOT IN (SELECT ino FROM trash)
"""
_SEGMENTS = f"""
SELECT number, last_change, message, size, digest, sealed FROM objects
WHERE kind = {KIND_SEGMENT} AND message > {_DROPPED} AND NOT {BAD_OBJECT} ORDER BY number
"""
# No row of `changes` may have a number up to this one.
GIVEN = "SELECT max(last_change) FROM objects WHERE typeof(last_change) = 'integer'"
COVERED = f"""
SELECT coalesce(max(last_change), 0) FROM objects
WHERE kind = {KIND_SEGMENT} AND typeof(last_change) = 'integer'
"""


def is_readable(changeset: bytes) -> bool:
    """Whether a recorded changeset can be applied, as far as it can tell by itself."""
    try:
        return all(change.name in REPLICATED_TABLES for change in apsw.Changeset.iter(changeset))
    except (apsw.Error, ValueError):
        return False


def broken_changes(look: Inspection) -> Iterator[tuple[int, str]]:
    """Changes (row, why) that no segment could carry, in order."""
    wanted = look.number(COVERED) + 1
    for row, bad in look.rows(f"SELECT id, {BAD_CHANGE} FROM changes ORDER BY id"):
        if row < wanted:
            yield row, "a segment holds it already"
            continue
        if row > wanted:
            yield row, f"changes {wanted} to {row - 1} before it are lost"
        wanted = row + 1
        if bad:
            yield row, "its values cannot be"
            continue
        changeset = next(look.rows("SELECT changeset FROM changes WHERE id = ?", (row,)))[0]
        if not is_readable(bytes(changeset)):
            yield row, "it cannot be read"


def lost_segments(look: Inspection) -> Iterator[tuple[int, str]]:
    """Segments (number, why) that were not posted, and cannot be any more."""
    for number, _, message, size, digest, sealed in look.rows(_SEGMENTS):
        if message:
            continue
        if sealed is None:
            yield number, "its bytes are gone"
        elif len(sealed) != size or sha256(sealed).digest() != digest:
            yield number, "its bytes are not what they were"


def check_told(look: Inspection) -> Iterator[Fault]:
    """Changes go on from where segments end; objects have values that can be."""
    awaited = look.number("SELECT value FROM local WHERE key = 'checkpoint_wanted'")
    for row, why in broken_changes(look):
        mended = bool(awaited) and bool(
            look.number("SELECT changeset = ? FROM changes WHERE id = ?", (LOST_CHANGES, row))
        )
        text = "the next checkpoint stands for what was lost" if mended else why
        yield Fault("changes", f"change {row} that Discord is not told of yet: {text}", mended)
    for kind, number in look.rows(f"SELECT kind, number FROM objects WHERE {BAD_OBJECT}"):
        yield Fault("objects", f"object {number} of kind {kind}: its values cannot be")
    for number, why in lost_segments(look):
        yield Fault("objects", f"segment {number} was not posted yet: {why}")
    yield from _check_order(look)
    parts = (
        "SELECT m.number FROM objects m WHERE m.kind = ?1 AND m.message > 0 AND NOT EXISTS"
        " (SELECT 1 FROM objects p WHERE p.kind = ?1 - 1 AND p.number = m.number AND p.part = 0)"
    )
    for (number,) in look.rows(parts, (KIND_MANIFEST,)):
        yield Fault("objects", f"checkpoint {number}: its parts are not known any more", note=True)


def _check_order(look: Inspection) -> Iterator[Fault]:
    before, last = None, 0
    for number, last_change, *_ in look.rows(_SEGMENTS):
        if number == before:
            yield Fault("objects", f"segment {number}: there are two of this number")
        elif before is not None and number != before + 1:
            # after a loss that was mended, or a `recover --at`: nothing that is kept needs them
            text = f"segments {before + 1} to {number - 1} are not known"
            yield Fault("objects", text, note=True)
        if last_change < last:
            yield Fault("objects", f"segment {number} ends before the one that precedes it")
        before, last = number, max(last, last_change)


def check_garbage(look: Inspection) -> Iterator[Fault]:
    """What is condemned is needed by nothing; history's time runs for unused chunks alone."""
    for (message,) in look.rows(f"SELECT message FROM condemned WHERE {BAD_CONDEMNED}"):
        yield Fault("condemned", f"message {message}, to be deleted: its values cannot be")
    for _, message in look.rows(NEEDED_CONDEMNED):
        yield Fault("condemned", f"message {message} is to be deleted, and is still needed")
    odd = "SELECT chunk FROM unused WHERE typeof(since_ns) != 'integer' OR since_ns < 0"
    for (chunk,) in look.rows(odd):
        yield Fault("unused", f"chunk {chunk}, which only history needs: its time cannot be")
    for (chunk,) in look.rows(USED_UNUSED):
        yield Fault("unused", f"chunk {chunk}: history's time runs, and a file refers to it")
    gone = "SELECT chunk FROM unused WHERE chunk NOT IN (SELECT id FROM chunks)"
    for (chunk,) in look.rows(gone):
        yield Fault("leftovers", f"history's time of chunk {chunk}, which is no more", note=True)
