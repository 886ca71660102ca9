"""The data half of the journal: chunk lists, packs, uploads under way, and what is cached here."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from stashcordfs.errors import JournalError
from stashcordfs.journal.engine import ChunkEntry, Intent
from stashcordfs.journal.garbage import Garbage
from stashcordfs.types import ChunkId, ChunkRef, Ino, Location, ObjectId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from stashcordfs.journal.sqlite.database import Database
    from stashcordfs.journal.sqlite.engine import SqliteEngine

_ENTRY = """
SELECT c.chunk_id, p.object_id, p.epoch, c.number, c.offset, c.length, c.plain_length, c.codec,
       p.channel, p.message, p.attachment, p.filename, p.size, l.valid_length
FROM chunk_list l LEFT JOIN chunks c ON c.id = l.chunk LEFT JOIN packs p ON p.id = c.pack
WHERE l.ino = ? AND l.idx = ?
"""

# A chunk twice in one pack is the same bytes: its first place serves both.
_INTENDED_CHUNK = "INSERT OR IGNORE INTO chunks VALUES (?,?,?,?,?,?,?,?)"

_VALID = "SELECT valid_length FROM chunk_list WHERE ino = ? AND idx = ?"
_REFER = """
INSERT OR REPLACE INTO chunk_list
SELECT ?1, ?2, c.id, ?4 FROM chunks c JOIN packs p ON p.id = c.pack
WHERE c.chunk_id = ?3 AND p.message > 0 AND EXISTS (SELECT 1 FROM inodes WHERE ino = ?1)
LIMIT 1
"""

_NO_CHUNK = ChunkRef(ChunkId(b""), ObjectId(b""), 0, 0, 0, 0, 0, 0)
_NOWHERE = Location(0, 0, 0, "", 0)

Pack = tuple[ObjectId, int, int, str, "Sequence[ChunkRef]"]  # id, epoch, size, filename, chunks


def bitmap_of(pages: int) -> bytes:
    """A page bitmap as a dirty row has it."""
    return pages.to_bytes((pages.bit_length() + 7) // 8, "little")


class Outbox(Garbage):
    """What uploading, reading and the block cache keep in the journal."""

    def __init__(
        self, database: Database, engine: SqliteEngine, clock_ns: Callable[[], int]
    ) -> None:
        """Share the database with the names."""
        self._db = database
        self._engine = engine
        self._clock_ns = clock_ns
        super().__init__()

    # ------------------------------------------------------------------ chunk lists

    async def chunk_at(self, ino: Ino, index: int) -> ChunkEntry | None:
        """The chunk list's entry of a block; None is a hole.

        An entry whose content is lost is `damaged`: it must not be taken for a hole.
        """
        row = self._db.one(_ENTRY, (ino, index))
        if row is None:
            return None
        chunk_id, pack, epoch, number, offset, length, plain, codec, *where, valid = row
        channel, message, attachment, filename, size = where
        if pack is None:
            return ChunkEntry(_NO_CHUNK, _NOWHERE, valid)
        return ChunkEntry(
            ChunkRef(
                ChunkId(bytes(chunk_id)), ObjectId(bytes(pack)), epoch, number,
                offset, length, plain, codec,
            ),
            Location(channel, message, attachment, filename, size),
            valid,
        )  # fmt: skip

    async def valid_length(self, ino: Ino, index: int) -> int:
        """How many bytes of a block its chunk gives; 0 for a hole. Cheaper than `chunk_at`."""
        found = self._engine.inode(ino)
        if found is not None and not found.blocks:
            return 0  # nothing stored: no need to ask for it
        row = self._db.one(_VALID, (ino, index))
        return 0 if row is None else int(row[0])

    async def find_chunk(self, chunk_id: ChunkId) -> int | None:
        """A chunk that Discord is known to have, by its keyed hash."""
        row = self._db.one(
            "SELECT c.id FROM chunks c JOIN packs p ON p.id = c.pack"
            " WHERE c.chunk_id = ? AND p.message > 0",
            (chunk_id,),
        )
        return None if row is None else int(row[0])

    async def commit_chunks(self, items: Iterable[tuple[Ino, int, ChunkId, int]]) -> None:
        """Let blocks (ino, index, chunk, valid length) refer to confirmed chunks.

        One transaction: the caller keeps it at 128 at most. An inode that is gone is passed over.
        JournalError, and nothing changed, for a chunk that no confirmed pack holds: a block must
        not be taken for uploaded then.
        """
        with self._db.operation:
            grown: Counter[Ino] = Counter()
            for item in items:
                ino, index, _, valid = item
                before = self._db.one(_VALID, (ino, index))
                self._db.run(_REFER, item)
                if self._db.changes():
                    self._db.touched.add((ino, index))
                    self._note_reference(ino, index)
                    grown[ino] += valid - (before[0] if before else 0)
                elif self._engine.inode(ino) is not None:
                    raise JournalError(f"block {index} of inode {ino}: its chunk is unknown")
            for ino, shift in grown.items():
                self._engine.add_stored(ino, shift)

    # ------------------------------------------------------------------ uploads

    async def add_intent(
        self, *, nonce: str, channel: int, after_message: int, packs: Sequence[Pack]
    ) -> int:
        """Record packs that are about to be posted. Durable after the next `wal_sync`."""
        ids = self._engine.ids
        with self._db.operation:
            intent = ids.take()
            self._db.run(
                "INSERT INTO intents VALUES (?,?,?,?,?)",
                (intent, nonce, channel, after_message, self._clock_ns()),
            )
            for object_id, epoch, size, filename, chunks in packs:
                pack = ids.take()
                self._db.run(
                    "INSERT INTO packs VALUES (?,?,?,?,0,0,0,?)",
                    (pack, object_id, epoch, size, filename),
                )
                self._db.run("INSERT INTO intent_packs VALUES (?,?)", (intent, pack))
                for c in chunks:
                    self._db.run(
                        _INTENDED_CHUNK,
                        (
                            ids.take(), c.chunk_id, pack, c.number, c.offset, c.length,
                            c.plain_length, c.codec,
                        ),
                    )  # fmt: skip
        return intent

    async def confirm_intent_packs(
        self, intent: int, locations: Mapping[ObjectId, Location]
    ) -> None:
        """Discord has these packs, here. Their chunks may be referred to."""
        with self._db.operation:
            for object_id, at in locations.items():
                self._db.run(
                    "UPDATE packs SET channel=?, message=?, attachment=?, filename=?"
                    " WHERE object_id=? AND id IN (SELECT pack FROM intent_packs WHERE intent=?)",
                    (at.channel, at.message, at.attachment, at.filename, object_id, intent),
                )

    async def close_intent(self, intent: int) -> None:
        """The upload is settled: nothing more hangs on it."""
        with self._db.operation:
            self._forget_intent(intent)

    def _forget_intent(self, intent: int) -> None:
        self._db.run("DELETE FROM intent_packs WHERE intent = ?", (intent,))
        self._db.run("DELETE FROM intents WHERE id = ?", (intent,))

    async def abandon_intent(self, intent: int) -> None:
        """The upload did not happen: its packs are no more, its chunks unknown."""
        with self._db.operation:
            doomed = (
                "SELECT pack FROM intent_packs JOIN packs p ON p.id = pack"
                " WHERE intent = ? AND p.message = 0"
            )
            self._db.run(f"DELETE FROM chunks WHERE pack IN ({doomed})", (intent,))  # noqa: S608
            self._db.run(f"DELETE FROM packs WHERE id IN ({doomed})", (intent,))  # noqa: S608
            self._forget_intent(intent)

    async def watch(self, names: Iterable[str], after_message: int) -> None:
        """Attachments that may still appear, though their upload was given up."""
        with self._db.operation:
            for name in names:
                self._db.run(
                    "INSERT OR REPLACE INTO watched VALUES (?,?,?)",
                    (name, after_message, self._clock_ns()),
                )

    async def watched(self) -> list[tuple[str, int, int]]:
        """Their names, a message id before theirs, and when they were given up, in ns."""
        return [
            (name, after, at)
            for name, after, at in self._db.all("SELECT * FROM watched ORDER BY given_up_ns")
        ]

    async def messages_of(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Channel and message of the packs by these names; message 0: not known yet.

        Without an index, for it is asked for seldom: what has no pack is not among them.
        """
        rows = self._db.all(
            "SELECT filename, channel, abs(message) FROM packs"
            " WHERE filename IN (SELECT value FROM json_each(?))",
            (json.dumps(sorted(names)),),
        )
        return {name: (channel, message) for name, channel, message in rows}

    async def unwatch(self, names: Iterable[str]) -> None:
        """They were deleted, or will not come any more."""
        with self._db.operation:
            for name in names:
                self._db.run("DELETE FROM watched WHERE filename = ?", (name,))

    async def open_intents(self) -> list[Intent]:
        """Uploads whose outcome the journal does not know, oldest first."""
        found = []
        for intent, nonce, after, since_ns in self._db.all(
            "SELECT id, nonce, after_message, created_ns FROM intents ORDER BY id"
        ):
            packs = self._db.all(
                "SELECT p.object_id, p.filename, p.size FROM intent_packs i"
                " JOIN packs p ON p.id = i.pack"
                " WHERE i.intent = ?",
                (intent,),
            )
            chunks = self._db.all(
                "SELECT c.chunk_id FROM intent_packs i JOIN chunks c ON c.pack = i.pack"
                " WHERE i.intent = ?",
                (intent,),
            )
            wanted = {ObjectId(bytes(oid)): (name, size) for oid, name, size in packs}
            chunk_ids = frozenset(ChunkId(bytes(row[0])) for row in chunks)
            found.append(Intent(intent, nonce, after, since_ns, wanted, chunk_ids))
        return found

    # ------------------------------------------------------------------ what is only here

    async def put_dirty(self, ino: Ino, rows: Iterable[tuple[int, int, int]]) -> None:
        """Blocks (index, version, page bitmap) whose local bytes have just been synced."""
        with self._db.operation:
            for index, version, pages in rows:
                self._db.run(
                    "INSERT OR REPLACE INTO dirty VALUES (?,?,?,?)",
                    (ino, index, version, bitmap_of(pages)),
                )

    async def drop_dirty(self, ino: Ino, rows: Iterable[tuple[int, int]]) -> None:
        """Blocks (index, version) that Discord has up to this version."""
        with self._db.operation:
            for index, version in rows:
                self._drop_dirty(ino, index, version)

    def _drop_dirty(self, ino: Ino, index: int, version: int) -> None:
        self._db.run(
            "DELETE FROM dirty WHERE ino = ? AND idx = ? AND version <= ?", (ino, index, version)
        )

    async def all_dirty(self) -> list[tuple[Ino, int, int, int]]:
        """Every synced block that is not on Discord: inode, index, version, page bitmap."""
        rows = self._db.all("SELECT ino, idx, version, pages FROM dirty ORDER BY version")
        return [(Ino(i), n, v, int.from_bytes(bytes(pages), "little")) for i, n, v, pages in rows]

    async def local_generations(self) -> list[tuple[Ino, int]]:
        """Local files that are not of generation 0."""
        rows = self._db.all("SELECT ino, generation FROM generations")
        return [(Ino(ino), generation) for ino, generation in rows]

    async def set_local_generation(self, ino: Ino, generation: int) -> None:
        """Another local file is the inode's own from now on."""
        with self._db.operation:
            self._db.run("INSERT OR REPLACE INTO generations VALUES (?,?)", (ino, generation))

    async def cached_add(self, key: int, length: int = 0, sums: bytes = b"") -> None:
        """A block (`ino << 32 | index`) of which every byte is in the local file.

        A clean one with the checksums of its first `length` bytes.
        """
        with self._db.operation:
            self._db.run(
                "INSERT OR REPLACE INTO cached VALUES (?,?,?,?)",
                (key >> 32, key & 0xFFFFFFFF, length, sums),
            )

    async def cached_sums(self, key: int) -> tuple[int, bytes] | None:
        """How many bytes of a cached block have checksums, and these."""
        row = self._db.one(
            "SELECT length, sums FROM cached WHERE ino = ? AND idx = ?",
            (key >> 32, key & 0xFFFFFFFF),
        )
        return None if row is None else (row[0], row[1])

    async def cached_remove(self, keys: Iterable[int]) -> None:
        """Forget that these blocks are here."""
        with self._db.operation:
            for key in keys:
                self._db.run(
                    "DELETE FROM cached WHERE ino = ? AND idx = ?", (key >> 32, key & 0xFFFFFFFF)
                )

    async def cached_page(self, after: int, count: int) -> list[tuple[int, int]]:
        """Blocks that are here whole, and how many of their bytes have checksums: some, in order.

        Those after a block (`ino << 32 | index`; -1: from the first on), at most `count`.
        """
        rows = self._db.all(
            "SELECT ino, idx, length FROM cached WHERE (ino, idx) > (?,?)"
            " ORDER BY ino, idx LIMIT ?",
            (after >> 32, after & 0xFFFFFFFF, count),
        )
        return [(ino << 32 | n, length) for ino, n, length in rows]

    async def cached_beyond(self, ino: Ino, first: int) -> list[int]:
        """Blocks of an inode that are here whole, from an index on."""
        rows = self._db.all("SELECT idx FROM cached WHERE ino = ? AND idx >= ?", (ino, first))
        return [ino << 32 | row[0] for row in rows]

    async def reserve_versions(self, count: int) -> int:
        """The start of a range of `count` versions, never given before; durable at once enough.

        A range that a power cut takes back was used for marks that the same cut made void.
        """
        self._engine.versions.reserve(count)
        self._db.commit()
        return self._engine.versions.take(count)

    def versions_given(self) -> int:
        """No version above this one has ever been given."""
        row = self._db.one("SELECT value FROM local WHERE key = 'next_version'")
        return int(row[0]) if row else 1

    async def get_local(self, key: str) -> str | None:
        """A fact of this machine."""
        row = self._db.one("SELECT value FROM local WHERE key = ?", (key,))
        return None if row is None else str(row[0])

    async def set_local(self, key: str, value: str) -> None:
        """Keep a fact of this machine."""
        with self._db.operation:
            self._db.run("INSERT OR REPLACE INTO local VALUES (?,?)", (key, value))
