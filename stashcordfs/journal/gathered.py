"""What packs tell of a volume, in a scratch file: chunks, and the newest of each block and name.

For a rebuild from packs alone, whose memory must not grow with the volume. It is no journal, and
nothing in it has to survive; a command fills it, settles it, and reads it in order.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from stashcordfs.journal.snapshot import as_ours, opened, unkept
from stashcordfs.types import ROOT_INO, ChunkId, ChunkRef, Ino

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import apsw

    from stashcordfs.types import ObjectId

    Block = tuple[Ino, int, int, ChunkId, int]  # inode, index, sequence, chunk, valid length
    Name = tuple[Ino, Ino, bytes, int, int]  # inode, parent, name, size, mode

_CACHE_KIB = 32_000
_SCHEMA = """
CREATE TABLE chunks (
    pack INTEGER, number INTEGER, chunk_id BLOB, offset INTEGER, length INTEGER,
    plain_length INTEGER, codec INTEGER, PRIMARY KEY (pack, number)) WITHOUT ROWID;
CREATE TABLE blocks (
    ino INTEGER, idx INTEGER, sequence INTEGER, chunk_id BLOB, valid_length INTEGER,
    PRIMARY KEY (ino, idx)) WITHOUT ROWID;
CREATE TABLE names (
    ino INTEGER, told INTEGER, parent INTEGER, name BLOB, size INTEGER, mode INTEGER,
    PRIMARY KEY (ino, told, parent, name)) WITHOUT ROWID;
"""
_BLOCK = """
INSERT INTO blocks VALUES (?,?,?,?,?) ON CONFLICT DO UPDATE
SET sequence = excluded.sequence, chunk_id = excluded.chunk_id, valid_length = excluded.valid_length
WHERE excluded.sequence > sequence
"""
_SETTLE = """
CREATE INDEX chunks_id ON chunks (chunk_id);
DELETE FROM names WHERE told < (SELECT max(told) FROM names n WHERE n.ino = names.ino);
"""
_BLOCKS = """
SELECT ino, idx, chunk_id, valid_length,
  EXISTS (SELECT 1 FROM chunks c WHERE c.chunk_id = blocks.chunk_id)
FROM blocks ORDER BY ino, idx
"""
_NAMELESS = """
SELECT ino, max(folder), max(content_end) FROM (
  SELECT parent AS ino, 1 AS folder, 0 AS content_end FROM names UNION ALL
  SELECT ino, 0, idx * ?1 + valid_length FROM blocks)
WHERE ino != ?2 AND ino NOT IN (SELECT ino FROM names) GROUP BY ino ORDER BY ino
"""
_HIGHEST = """
SELECT max(coalesce((SELECT max(ino) FROM names), 0), coalesce((SELECT max(parent) FROM names), 0),
           coalesce((SELECT max(ino) FROM blocks), 0))
"""


class Gathered:
    """Made by `begun`. JournalError when the disk refuses."""

    def __init__(self, db: apsw.Connection) -> None:
        """Use `begun`."""
        self._db = db

    @classmethod
    @contextmanager
    def begun(cls, path: Path) -> Iterator[Gathered]:
        """Nothing gathered yet, in a new file that is removed afterwards."""
        path.unlink(missing_ok=True)
        try:
            with opened(path) as db:
                unkept(db)
                db.pragma("cache_size", -_CACHE_KIB)
                db.execute(_SCHEMA)
                yield cls(db)
        finally:
            path.unlink(missing_ok=True)

    def add(
        self,
        pack: int,
        told: int,
        chunks: Iterable[ChunkRef],
        blocks: Iterable[Block],
        names: Iterable[Name],
    ) -> None:
        """Take one pack in, under a number of its own. `told`: what orders packs by their age."""
        with as_ours(), self._db:
            self._db.executemany(
                "INSERT INTO chunks VALUES (?,?,?,?,?,?,?)",
                (
                    (pack, c.number, c.chunk_id, c.offset, c.length, c.plain_length, c.codec)
                    for c in chunks
                ),
            )
            self._db.executemany(_BLOCK, blocks)
            self._db.executemany(
                "INSERT OR REPLACE INTO names VALUES (?,?,?,?,?,?)",
                ((ino, told, parent, name, size, mode) for ino, parent, name, size, mode in names),
            )

    def settle(self) -> None:
        """All is added: of a file's names those of one pack count, the newest."""
        with as_ours(), self._db:
            self._db.execute(_SETTLE)

    def highest_ino(self) -> int:
        """The highest number of an inode that anything tells of; 0: none does."""
        with as_ours():
            return int(self._db.execute(_HIGHEST).get)

    def chunks(self, pack: int, object_id: ObjectId, epoch: int) -> list[ChunkRef]:
        """The chunks of one pack, in order."""
        with as_ours():
            rows = self._db.execute(
                "SELECT chunk_id, number, offset, length, plain_length, codec FROM chunks"
                " WHERE pack = ? ORDER BY number",
                (pack,),
            )
            return [
                ChunkRef(ChunkId(bytes(chunk_id)), object_id, epoch, *rest)
                for chunk_id, *rest in rows
            ]

    def names(self) -> Iterator[tuple[Ino, int, int, list[tuple[Ino, bytes]]]]:
        """Each inode that has names: itself, size, mode, (parent, name)."""
        with as_ours():
            rows = self._db.execute(
                "SELECT ino, size, mode, parent, name FROM names ORDER BY ino, parent, name"
            )
            for ino, group in groupby(rows, itemgetter(0)):
                found = list(group)
                _, size, mode, _, _ = found[0]
                yield Ino(ino), size, mode, [(Ino(row[3]), bytes(row[4])) for row in found]

    def nameless(self, block_bytes: int) -> list[tuple[Ino, bool, int]]:
        """Inodes of which something is known but a name: is it a folder, where its content ends."""
        with as_ours():
            rows = self._db.execute(_NAMELESS, (block_bytes, ROOT_INO))
            return [(Ino(ino), bool(folder), end) for ino, folder, end in rows]

    def blocks(self) -> Iterator[tuple[Ino, int, ChunkId, int, bool]]:
        """Blocks in order: inode, index, chunk, valid length, and whether a pack has that chunk."""
        with as_ours():
            for ino, index, chunk_id, valid, known in self._db.execute(_BLOCKS):
                yield Ino(ino), index, ChunkId(bytes(chunk_id)), valid, bool(known)
