"""What is needed of what Discord holds: one snapshot of the journal, counted in a thread.

A chunk is *live* while a chunk list refers to it, of a file that has a name or lies in the trash.
When nothing does but the trash, the time begins for which history keeps it (`unused`); when that
has passed, and nothing at all refers to it, it is *dead*. A second, read-only connection: writers
are not hindered, and no index is there that they would have to keep. The counting is SQLite's, not
Python's, so that the loop gets its turns.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stashcordfs.journal.garbage import Move
from stashcordfs.journal.sqlite.inspection import Inspection, inspect
from stashcordfs.types import ChunkId, ChunkRef, Location, ObjectId

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

_USED = """
INSERT INTO temp.used SELECT chunk, max({named}) FROM chunk_list WHERE chunk > 0 GROUP BY chunk
"""
_FRESH = """
SELECT c.id FROM packs p CROSS JOIN chunks c INDEXED BY chunks_pack ON c.pack = p.id
WHERE p.message > 0 AND p.id NOT IN (SELECT pack FROM intent_packs)
  AND c.id NOT IN (SELECT chunk FROM unused)
  AND NOT EXISTS (SELECT 1 FROM temp.used u WHERE u.chunk = c.id AND u.named)
"""
_REVIVED = """
SELECT n.chunk FROM unused n WHERE EXISTS (
    SELECT 1 FROM temp.used u WHERE u.chunk = n.chunk AND u.named)
  OR NOT EXISTS (SELECT 1 FROM chunks c WHERE c.id = n.chunk)
"""
_PACKS = """
SELECT p.channel, p.message, p.id, p.size, p.id IN (SELECT pack FROM intent_packs),
  coalesce(sum(c.length) FILTER (WHERE u.chunk NOT NULL), 0),
  coalesce(sum(c.length) FILTER (WHERE u.chunk IS NULL AND coalesce(n.since_ns, ?1) >= ?1), 0)
FROM packs p LEFT JOIN chunks c ON c.pack = p.id LEFT JOIN temp.used u ON u.chunk = c.id
  LEFT JOIN unused n ON n.chunk = c.id
WHERE p.message > 0 GROUP BY p.id
"""
_NEEDED = """
SELECT c.id, c.chunk_id, p.object_id, p.epoch, c.number, c.offset, c.length, c.plain_length,
  c.codec, p.id, u.chunk IS NULL
FROM packs p CROSS JOIN chunks c INDEXED BY chunks_pack ON c.pack = p.id
  LEFT JOIN temp.used u ON u.chunk = c.id LEFT JOIN unused n ON n.chunk = c.id
WHERE p.id = ?1 AND (u.chunk NOT NULL OR coalesce(n.since_ns, ?2) >= ?2) ORDER BY c.number
"""
_REFERENCES = """
SELECT ino, idx, chunk FROM chunk_list WHERE chunk IN (SELECT chunk FROM temp.wanted)
"""


@dataclass(slots=True)
class HeldMessage:
    """A message of packs. Bytes: of its attachments, of chunks that are live, of history's."""

    channel: int
    message: int
    packs: list[int]
    size_bytes: int = 0
    live_bytes: int = 0
    history_bytes: int = 0
    pinned: bool = False  # an upload of it is not closed

    @property
    def address(self) -> tuple[int, int]:
        """Channel and id."""
        return self.channel, self.message

    @property
    def needed_bytes(self) -> int:
        """What would have to be kept of it."""
        return self.live_bytes + self.history_bytes

    @property
    def share(self) -> float:
        """How much of it is needed, from 0 to 1."""
        return self.needed_bytes / max(1, self.size_bytes)


@dataclass(frozen=True, slots=True)
class Census:
    """What a snapshot shows. `fresh`: unused, and not known as such; `revived`: the reverse."""

    messages: Sequence[HeldMessage]
    fresh: Sequence[int]
    revived: Sequence[int]
    next_expiry_ns: int  # when history lets go of the next chunk, 0: it holds none

    @property
    def held_bytes(self) -> int:
        """All messages of packs together."""
        return sum(each.size_bytes for each in self.messages)

    @property
    def needed_bytes(self) -> int:
        """What is needed of them."""
        return sum(each.needed_bytes for each in self.messages)


@dataclass(frozen=True, slots=True)
class Needed:
    """A chunk of a message that shall be emptied. `row` is that of `chunks`, `pack` of `packs`."""

    row: int
    ref: ChunkRef
    pack: int
    unused: bool  # only history needs it


@dataclass(frozen=True, slots=True)
class Contents:
    """What must be kept of some packs, and the blocks that refer to it (`new` still 0).

    `excepted`: blocks that refer to what was to be left out.
    """

    packs: dict[int, tuple[ObjectId, int, Location]]  # by row: id, epoch, place
    needed: Sequence[Needed]
    blocks: Sequence[Move]
    excepted: Sequence[Move]


def take_census(path: Path, *, kept_since_ns: int) -> Census:
    """Count the journal at `path`, which may be in use. JournalError.

    What is unused since `kept_since_ns` or later is history's.
    """
    with _counted(path) as look:
        fresh = [row[0] for row in look.rows(_FRESH)]
        revived = [row[0] for row in look.rows(_REVIVED)]
        messages: dict[tuple[int, int], HeldMessage] = {}
        for channel, message, pack, size, on_its_way, live, history in look.rows(
            _PACKS, (kept_since_ns,)
        ):
            found = messages.setdefault((channel, message), HeldMessage(channel, message, []))
            found.packs.append(pack)
            found.size_bytes += size
            found.live_bytes += live
            found.history_bytes += history
            found.pinned = found.pinned or bool(on_its_way)
        oldest = look.number(
            "SELECT min(since_ns) FROM unused WHERE since_ns >= ?", (kept_since_ns,)
        )
    return Census(list(messages.values()), fresh, revived, oldest)


def take_contents(
    path: Path, packs: Sequence[int], *, kept_since_ns: int, without: Collection[int] = ()
) -> Contents:
    """What must be kept of these packs; not the chunks (rows) of `without`. JournalError."""
    with _counted(path) as look:
        known = {}
        for row in packs:
            for object_id, epoch, *where in look.rows(
                "SELECT object_id, epoch, channel, abs(message), attachment, filename, size"
                " FROM packs WHERE id = ?", (row,),
            ):  # fmt: skip
                known[row] = ObjectId(bytes(object_id)), epoch, Location(*where)
        needed = [
            Needed(row, ChunkRef(ChunkId(bytes(chunk_id)), ObjectId(bytes(pack_id)), *place),
                   pack, bool(unused))
            for each in packs
            for row, chunk_id, pack_id, *place, pack, unused in look.rows(
                _NEEDED, (each, kept_since_ns)
            )
            if row not in without
        ]  # fmt: skip
        look.run("CREATE TEMP TABLE wanted (chunk INTEGER PRIMARY KEY)")
        for row in (*(chunk.row for chunk in needed), *without):
            look.run("INSERT OR IGNORE INTO temp.wanted VALUES (?)", (row,))
        blocks = [Move(ino, index, chunk, 0) for ino, index, chunk in look.rows(_REFERENCES)]
    return Contents(
        known,
        needed,
        [block for block in blocks if block.old not in without],
        [block for block in blocks if block.old in without],
    )


@contextmanager
def _counted(path: Path) -> Iterator[Inspection]:
    """A look at the journal with the table `used`: chunks that something refers to."""
    with inspect(path) as look:
        look.run("CREATE TEMP TABLE used (chunk INTEGER PRIMARY KEY, named)")
        look.run(_USED.format(named=_named(look)))
        yield look


def _named(look: Inspection) -> str:
    """Whether an entry of a chunk list is of more than the trash."""
    has_trash = look.number("SELECT 1 FROM sqlite_schema WHERE name = 'trash'")
    return "ino NOT IN (SELECT ino FROM trash)" if has_trash else "1"
