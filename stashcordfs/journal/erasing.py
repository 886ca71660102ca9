"""What a purge needs of the journal: what shall go, what others hold, what may yet be served."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stashcordfs.journal.sqlite.inspection import inspect
from stashcordfs.journal.trash import Trash
from stashcordfs.types import ChunkId, Ino, ObjectId

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

_LISTED = 100  # inodes of others that are told
_TABLES = (
    "CREATE TEMP TABLE gone (ino INTEGER PRIMARY KEY)",
    "CREATE TEMP TABLE names (chunk_id BLOB PRIMARY KEY)",
    "CREATE TEMP TABLE doomed (chunk INTEGER PRIMARY KEY)",
    "CREATE TEMP TABLE held (chunk INTEGER PRIMARY KEY)",
)
_FIND = """
INSERT OR IGNORE INTO temp.doomed SELECT c.id FROM temp.names n
CROSS JOIN chunks c INDEXED BY chunks_id ON c.chunk_id = n.chunk_id
"""
_HELD = """
INSERT OR IGNORE INTO temp.held SELECT chunk FROM chunk_list
WHERE chunk IN (SELECT chunk FROM temp.doomed) AND ino NOT IN (SELECT ino FROM temp.gone)
"""
_OWNERS = """
SELECT DISTINCT ino FROM chunk_list
WHERE chunk IN (SELECT chunk FROM temp.held) AND ino NOT IN (SELECT ino FROM temp.gone) LIMIT ?
"""
_SHARED_BYTES = """
SELECT coalesce(sum(plain), 0) FROM (SELECT max(plain_length) AS plain FROM chunks
  WHERE chunk_id IN (SELECT c.chunk_id FROM temp.held h JOIN chunks c ON c.id = h.chunk)
  GROUP BY chunk_id)
"""
_FREE = "SELECT chunk FROM temp.doomed WHERE chunk NOT IN (SELECT chunk FROM temp.held)"


class Erased(NamedTuple):
    """An attachment of a message that is deleted, or about to be. `gone`: Discord has confirmed."""

    channel: int
    message: int
    attachment: int
    url: str
    since_ns: int
    gone: bool


@dataclass(frozen=True, slots=True)
class Doomed:
    """Chunks of some inodes: rows that nothing else refers to, and what others hold as well."""

    rows: list[int]
    shared_bytes: int
    shared_with: list[Ino]


def take_doomed(path: Path, inos: Collection[int], chunk_ids: Collection[ChunkId]) -> Doomed:
    """Look at the journal at `path`, which may be in use, from a thread. JournalError.

    The same content may stand in several rows; those that another inode refers to stay.
    """
    with inspect(path) as look:
        for sql in _TABLES:
            look.run(sql)
        for ino in inos:
            look.run("INSERT OR IGNORE INTO temp.gone VALUES (?)", (ino,))
        for chunk_id in chunk_ids:
            look.run("INSERT OR IGNORE INTO temp.names VALUES (?)", (chunk_id,))
        look.run(_FIND)
        look.run(_HELD)
        size = look.number(_SHARED_BYTES)
        owners = [Ino(row[0]) for row in look.rows(_OWNERS, (_LISTED,))]
        rows = look.rows(_FREE)
        return Doomed([row[0] for row in rows], size, owners)


class Erasing(Trash):
    """Part of the journal."""

    @contextmanager
    def without_trash(self) -> Iterator[None]:
        """What is removed inside is forgotten at once. The caller does not suspend inside."""
        kept, self.keep_trash = self.keep_trash, False
        try:
            yield
        finally:
            self.keep_trash = kept

    async def chunk_ids_of(self, ino: Ino) -> set[ChunkId]:
        """The contents that an inode's chunk list names."""
        rows = self._db.all(
            "SELECT DISTINCT c.chunk_id FROM chunk_list l JOIN chunks c ON c.id = l.chunk"
            " WHERE l.ino = ?",
            (ino,),
        )
        return {ChunkId(bytes(row[0])) for row in rows}

    async def pack_places(self) -> dict[ObjectId, tuple[int, int, int]]:
        """Every pack that the journal knows and has not condemned: row, channel, message.

        message 0: on its way; below 0: it was found missing, as -message.
        """
        rows = self._db.all(
            "SELECT object_id, id, channel, message FROM packs p WHERE NOT EXISTS (SELECT 1"
            " FROM condemned k WHERE k.channel = p.channel AND k.message = -p.message)"
        )
        return {ObjectId(bytes(row[0])): (row[1], row[2], row[3]) for row in rows}

    async def add_erased(self, attachments: Iterable[Erased]) -> None:
        """Remember what is about to be deleted. Known ones keep what is known of them."""
        with self._db.operation:
            for one in attachments:
                self._db.run("INSERT OR IGNORE INTO erasing VALUES (?,?,?,?,?,?)", one)

    async def erased(self) -> list[Erased]:
        """What is not known to be gone from everywhere, oldest first."""
        rows = self._db.all("SELECT * FROM erasing ORDER BY since_ns, message, attachment")
        return [
            Erased(channel, message, attachment, url, since_ns, bool(gone))
            for channel, message, attachment, url, since_ns, gone in rows
        ]

    @property
    def erasing_count(self) -> int:
        """How many attachments that are."""
        row = self._db.one("SELECT count(*) FROM erasing")
        return 0 if row is None else int(row[0])

    async def note_gone(self, channel: int, message: int) -> None:
        """Discord shows this message no more; the CDN may."""
        with self._db.operation:
            self._db.run(
                "UPDATE erasing SET gone = 1 WHERE channel = ? AND message = ?", (channel, message)
            )

    async def forget_erased(self, one: Erased) -> None:
        """It is gone from everywhere."""
        with self._db.operation:
            self._db.run(
                "DELETE FROM erasing WHERE channel = ? AND message = ? AND attachment = ?", one[:3]
            )

    def scrub(self) -> None:
        """Leave nothing in the database's file of what was deleted. Blocks; see `Database`."""
        self._db.scrub()
