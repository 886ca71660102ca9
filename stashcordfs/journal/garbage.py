"""What the journal keeps for garbage collection: what nothing refers to, what is condemned.

The census (`journal.census`) looks at a snapshot from a thread. What happens on the loop meanwhile
is known by `noting`: every reference made since. So nothing here needs an index of what refers to a
chunk, which each upload and each unlink would have to keep.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from stashcordfs.journal.holdings import Holdings
from stashcordfs.types import ChunkId

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from stashcordfs.types import Ino, ObjectId

Block = tuple[int, int]  # inode, index

_ROWS_AT_ONCE = 500
_NOT_UNUSED = """
DELETE FROM unused WHERE chunk = (SELECT chunk FROM chunk_list WHERE ino = ? AND idx = ?)
"""
_REVIVED = """
DELETE FROM unused
WHERE chunk IN (SELECT chunk FROM chunk_list WHERE ino = ? AND idx >= ? AND idx < ?)
"""
_INDEXES = "SELECT idx FROM chunk_list WHERE ino = ? AND idx >= ? AND idx < ?"
_MOVE = "UPDATE chunk_list SET chunk = ? WHERE ino = ? AND idx = ? AND chunk = ?"
_COPIES = """
SELECT c.id, c.pack FROM chunks c JOIN packs p ON p.id = c.pack
WHERE c.chunk_id = ? AND p.message > 0
"""
_CONDEMNED_PACKS = """
SELECT p.id FROM packs p WHERE p.message < 0 AND EXISTS (
  SELECT 1 FROM condemned k WHERE k.channel = p.channel AND k.message = -p.message)
"""


class Condemned(NamedTuple):
    """A message that is to be deleted, since when, and how many bytes of packs it carries."""

    channel: int
    message: int
    since_ns: int
    size_bytes: int


class Move(NamedTuple):
    """A block that refers to one row of `chunks` and shall refer to another of the same content."""

    ino: int
    block: int
    old: int
    new: int


class Garbage(Holdings):
    """Part of the journal: shares its database."""

    _clock_ns: Callable[[], int]

    def __init__(self) -> None:
        """Nobody takes notes."""
        self._noted: list[set[Block]] = []

    # ------------------------------------------------------------------ references

    @contextmanager
    def noting(self) -> Iterator[set[Block]]:
        """Inside, the set grows by each block that was made to refer to a chunk.

        Whoever begins this, commits, and then takes a census, knows all references: those that the
        census saw, and these. An operation that was undone may stay among them.
        """
        noted: set[Block] = set()
        self._noted.append(noted)
        try:
            yield noted
        finally:
            self._noted = [each for each in self._noted if each is not noted]

    def _note_reference(self, ino: Ino, index: int) -> None:
        """A block refers to a chunk anew: it is not unused any more. Within an operation."""
        self._db.run(_NOT_UNUSED, (ino, index))
        for noted in self._noted:
            noted.add((ino, index))

    def _note_references(self, ino: Ino, indexes: Iterable[int]) -> None:
        """Blocks refer to chunks that others refer to as well. Within an operation."""
        if self._noted:
            blocks = [(ino, index) for index in indexes]
            for noted in self._noted:
                noted.update(blocks)

    def _note_revived(self, ino: Ino, *, first: int = 0, end: int = 1 << 62) -> None:
        """Blocks of an inode count again: their chunks' time begins anew when they go once more.

        In the operation that lets them count; slices may come before it.
        """
        self._db.run(_REVIVED, (ino, first, end))
        if self._noted:  # a census under way has seen them as they were
            rows = self._db.all(_INDEXES, (ino, first, end))
            self._note_references(ino, (row[0] for row in rows))

    async def referred_chunks(self, blocks: Iterable[Block]) -> dict[Block, tuple[int, int]]:
        """What these blocks refer to now: the row of the chunk, and of its pack."""
        found = {}
        for block in blocks:
            row = self._db.one(
                "SELECT l.chunk, c.pack FROM chunk_list l JOIN chunks c ON c.id = l.chunk"
                " WHERE l.ino = ? AND l.idx = ?",
                block,
            )
            if row is not None:
                found[block] = int(row[0]), int(row[1])
        return found

    async def note_unused(self, chunks: Sequence[int], since_ns: int) -> None:
        """Nothing refers to these rows of chunks since then, unless it was known before."""
        with self._db.operation:
            for chunk in chunks:
                self._db.run("INSERT OR IGNORE INTO unused VALUES (?,?)", (chunk, since_ns))

    async def note_used(self, chunks: Sequence[int]) -> None:
        """These are referred to again, or are no more."""
        with self._db.operation:
            for chunk in chunks:
                self._db.run("DELETE FROM unused WHERE chunk = ?", (chunk,))

    # ------------------------------------------------------------------ repacking

    async def copies_of(self, chunk_id: ChunkId) -> list[tuple[int, int]]:
        """Rows of a chunk that Discord is known to have, each with its pack's row."""
        return [(chunk, pack) for chunk, pack in self._db.all(_COPIES, (chunk_id,))]

    async def packs_of(self, chunks: Iterable[int]) -> set[int]:
        """The rows of the packs that hold these rows of chunks."""
        sql = "SELECT pack FROM chunks WHERE id = ?"
        rows = (self._db.one(sql, (chunk,)) for chunk in chunks)
        return {row[0] for row in rows if row is not None}

    async def chunk_rows(self, object_id: ObjectId) -> dict[ChunkId, int]:
        """The rows of a pack's chunks."""
        rows = self._db.all(
            "SELECT c.chunk_id, c.id FROM packs p JOIN chunks c ON c.pack = p.id"
            " WHERE p.object_id = ?",
            (object_id,),
        )
        return {ChunkId(bytes(chunk_id)): row for chunk_id, row in rows}

    async def move_blocks(self, moves: Sequence[Move]) -> None:
        """Let blocks refer to the same content elsewhere. What has changed since stays as it is."""
        with self._db.operation:
            for move in moves:
                self._db.run(_MOVE, (move.new, move.ino, move.block, move.old))
                if self._db.changes():
                    self._db.touched.add((move.ino, move.block))
                    self._db.run("DELETE FROM unused WHERE chunk = ?", (move.new,))

    async def keep_unused(self, chunks: Iterable[tuple[int, int]]) -> None:
        """Chunks (old row, new row) that only history needs: known as long as the old ones were.

        Of a new row that nothing has referred to yet: called in the step that makes it known.
        """
        with self._db.operation:
            for old, new in chunks:
                self._db.run(
                    "INSERT OR IGNORE INTO unused SELECT ?, since_ns FROM unused WHERE chunk = ?",
                    (new, old),
                )

    async def prolong_unused(self, old: int, other: int) -> None:
        """What only history needs is another row's to keep, if that is not in use itself."""
        with self._db.operation:
            self._db.run(
                "UPDATE unused SET since_ns = max(since_ns,"
                " coalesce((SELECT o.since_ns FROM unused o WHERE o.chunk = ?), 0))"
                " WHERE chunk = ?",
                (old, other),
            )

    # ------------------------------------------------------------------ condemning

    async def packs_on_their_way(self) -> set[int]:
        """Rows of packs whose upload is not closed."""
        return {row[0] for row in self._db.all("SELECT pack FROM intent_packs")}

    async def packs_with_more(self, packs: Iterable[int], excused: Collection[int]) -> set[int]:
        """Those of the packs (rows) with a chunk that is not known as unused, nor excused."""
        found = set()
        for pack in packs:
            rows = self._db.all(
                "SELECT id FROM chunks c WHERE pack = ?"
                " AND NOT EXISTS (SELECT 1 FROM unused n WHERE n.chunk = c.id)",
                (pack,),
            )
            if any(row[0] not in excused for row in rows):
                found.add(pack)
        return found

    async def condemn(self, channel: int, message: int, packs: Iterable[int], size: int) -> None:
        """Nothing in a message is needed any more: from here on nothing refers to its chunks.

        `packs`: the rows of all its packs. The caller knows that no block refers to them; their
        rows go by `clear_condemned`, the message's own by `forget_condemned` when it is deleted.
        """
        with self._db.operation:
            self._db.run(
                "INSERT OR IGNORE INTO condemned VALUES (?,?,?,?)",
                (channel, message, self._clock_ns(), size),
            )
            for pack in packs:
                self._db.run("UPDATE packs SET message = -abs(message) WHERE id = ?", (pack,))

    async def clear_condemned(self) -> bool:
        """Remove some rows of chunks and packs that are condemned; False: there were none."""
        row = self._db.one(f"{_CONDEMNED_PACKS} LIMIT 1")
        if row is None:
            return False
        some = [
            chunk[0]
            for chunk in self._db.all(
                "SELECT id FROM chunks WHERE pack = ? LIMIT ?", (row[0], _ROWS_AT_ONCE)
            )
        ]
        with self._db.operation:
            for chunk in some:
                self._db.run("DELETE FROM unused WHERE chunk = ?", (chunk,))
                self._db.run("DELETE FROM chunks WHERE id = ?", (chunk,))
            if len(some) < _ROWS_AT_ONCE:
                self._db.run("DELETE FROM packs WHERE id = ?", (row[0],))
        return True

    async def condemned(self) -> list[Condemned]:
        """Messages to be deleted, oldest first."""
        return [
            Condemned(*row)
            for row in self._db.all("SELECT * FROM condemned ORDER BY since_ns, message")
        ]

    async def forget_condemned(self, messages: Iterable[tuple[int, int]]) -> None:
        """These (channel, id) are deleted.

        No segment tells of it: a recovery that deletes them once more does no harm.
        """
        with self._db.operation, self._db.unrecorded():
            for where in messages:
                self._db.run("DELETE FROM condemned WHERE channel = ? AND message = ?", where)
