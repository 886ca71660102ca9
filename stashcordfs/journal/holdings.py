"""What the journal believes that Discord holds, for `verify`: packs, their chunks, lost blocks.

A pack that is found missing keeps its rows; its message's number turns negative. Nothing refers to
it anew, reading its chunks is an error, and should it be there again, its number turns back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stashcordfs.types import ChunkId, ChunkRef, Ino, Location, ObjectId

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stashcordfs.journal.sqlite.database import Database

_BLOCKS_AT_ONCE = 2000
_PACKS_AT_ONCE = 1000

_HELD = """
SELECT id, object_id, epoch, channel, abs(message), attachment, filename, size, message < 0
FROM packs WHERE id > ? AND message != 0 AND NOT EXISTS (
  SELECT 1 FROM condemned k WHERE k.channel = packs.channel AND k.message = abs(packs.message))
ORDER BY id LIMIT ?
"""
_CHUNKS = """
SELECT id, chunk_id, number, offset, length, plain_length, codec FROM chunks
WHERE pack = ? ORDER BY number
"""
_BLOCKS = """
SELECT l.ino, l.idx, (c.id IS NULL OR p.id IS NULL OR p.message <= 0)
  AND (l.chunk != 0 OR NOT EXISTS (SELECT 1 FROM trash t WHERE t.ino = l.ino)), p.id
FROM chunk_list l LEFT JOIN chunks c ON c.id = l.chunk LEFT JOIN packs p ON p.id = c.pack
WHERE (l.ino, l.idx) > (?, ?) ORDER BY l.ino, l.idx LIMIT ?
"""
_OTHER_COPY = """
UPDATE chunk_list SET chunk = (
  SELECT o.id FROM chunks c JOIN chunks o ON o.chunk_id = c.chunk_id JOIN packs p ON p.id = o.pack
  WHERE c.id = chunk AND p.message > 0 LIMIT 1)
WHERE ino = ?1 AND idx = ?2 AND EXISTS (
  SELECT 1 FROM chunks c JOIN chunks o ON o.chunk_id = c.chunk_id JOIN packs p ON p.id = o.pack
  WHERE c.id = chunk AND p.message > 0)
"""


class HeldPack(NamedTuple):
    """A pack that Discord should have. `lost`: it was found missing before."""

    row: int
    object_id: ObjectId
    epoch: int
    location: Location
    lost: bool


class Holdings:
    """Part of the journal: shares its database."""

    _db: Database

    def _note_reference(self, ino: Ino, index: int) -> None:
        """A block refers to a chunk anew. Within an operation."""
        raise NotImplementedError

    async def held_packs(self, after: int) -> list[HeldPack]:
        """Some packs with a row number above `after`, in that order; none: no more."""
        return [
            HeldPack(row, ObjectId(bytes(object_id)), epoch, Location(*where), bool(lost))
            for row, object_id, epoch, *where, lost in self._db.all(_HELD, (after, _PACKS_AT_ONCE))
        ]

    async def still_held(self, packs: Iterable[HeldPack]) -> list[HeldPack]:
        """Those that nobody has condemned since."""
        return [
            pack
            for pack in packs
            if self._db.one("SELECT 1 FROM packs WHERE id = ?", (pack.row,)) is not None
            and self._db.one(
                "SELECT 1 FROM condemned WHERE channel = ? AND message = ?",
                (pack.location.channel, pack.location.message),
            )
            is None
        ]

    async def chunks_of(self, pack: HeldPack) -> list[tuple[int, ChunkRef]]:
        """The chunks of a pack with their row numbers, in the pack's order."""
        return [
            (row, ChunkRef(ChunkId(bytes(chunk_id)), pack.object_id, pack.epoch, *place))
            for row, chunk_id, *place in self._db.all(_CHUNKS, (pack.row,))
        ]

    async def set_lost(self, packs: Iterable[HeldPack], *, lost: bool) -> None:
        """Packs are not on Discord, or are there again."""
        sign = -1 if lost else 1
        with self._db.operation:
            for pack in packs:
                self._db.run(
                    "UPDATE packs SET message = ? * abs(message) WHERE id = ?", (sign, pack.row)
                )

    async def forget_chunks(self, rows: Iterable[int]) -> None:
        """These chunks cannot be opened: nothing may refer to them, what does is damaged."""
        with self._db.operation:
            for row in rows:
                self._db.run("DELETE FROM chunks WHERE id = ?", (row,))

    async def correct_chunk(self, row: int, ref: ChunkRef) -> None:
        """The pack's own table says where the chunk lies."""
        with self._db.operation:
            self._db.run(
                "UPDATE chunks SET chunk_id=?, number=?, offset=?, length=?, plain_length=?,"
                " codec=? WHERE id = ?",
                (
                    ref.chunk_id, ref.number, ref.offset, ref.length, ref.plain_length,
                    ref.codec, row,
                ),
            )  # fmt: skip

    async def damaged_blocks(
        self, after: tuple[int, int]
    ) -> tuple[list[tuple[Ino, int, int | None]], tuple[int, int] | None]:
        """Blocks whose content is lost, among the next entries, with their pack's row if known.

        What a file in the trash never had on Discord is not among them. Also where to go on, None
        at the end.
        """
        rows = self._db.all(_BLOCKS, (*after, _BLOCKS_AT_ONCE))
        damaged = [(Ino(ino), index, pack) for ino, index, lost, pack in rows if lost]
        return damaged, (rows[-1][0], rows[-1][1]) if rows else None

    async def forget_packs(self, rows: Iterable[int]) -> None:
        """Lost packs that nothing refers to."""
        with self._db.operation:
            for row in rows:
                self._db.run("DELETE FROM chunks WHERE pack = ?", (row,))
                self._db.run("DELETE FROM packs WHERE id = ? AND message < 0", (row,))

    async def use_other_copy(self, ino: Ino, index: int) -> bool:
        """Let a damaged block refer to the same content in another pack, if there is one."""
        with self._db.operation:
            self._db.run(_OTHER_COPY, (ino, index))
            found = self._db.changes() > 0
            if found:
                self._note_reference(ino, index)
            return found
