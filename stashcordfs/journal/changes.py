"""What Discord must still be told of the journal, and what it was told: changes, own objects.

Part of `Journal`. Changes gather in rows, a segment takes a run of them over, and from then on its
sealed bytes stand for them until Discord has it.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from stashcordfs.crypto.keys import KIND_SEGMENT, object_filename
from stashcordfs.journal.outbox import Outbox
from stashcordfs.types import DAMAGED_CHUNK, Location, ObjectId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from stashcordfs.journal.sqlite.database import Recorded
    from stashcordfs.types import Attributes, Ino

_REMEMBER_NS = 30 * 86_400 * 10**9
_COLUMNS = (
    "object_id, kind, number, part, last_change, made_ns, digest, size, channel, message,"
    " attachment"
)


# The oldest segment that stands carries a copy of the one before, for as long as it stands.
_FORGET = """
DELETE FROM objects WHERE message < 0 AND made_ns < ?1 AND NOT (kind = ?2 AND number >= (
    SELECT coalesce(min(number), 1 << 62) - 1 FROM objects WHERE kind = ?2 AND message > 0))
"""


@dataclass(frozen=True, slots=True)
class Lost:
    """So many bytes of a block that never reached Discord. `cut`: the file ends before them now."""

    ino: Ino
    index: int
    size_bytes: int
    cut: bool = False


@dataclass(frozen=True, slots=True)
class OwnObject:
    """A sealed object of the journal channel. `location` is None until Discord has confirmed it."""

    object_id: ObjectId
    kind: int
    number: int
    part: int
    last_change: int
    made_ns: int
    digest: bytes
    size: int
    location: Location | None = None


class Changes(Outbox):
    """Changes, segments, checkpoints and claims, as far as the journal keeps them."""

    @property
    def writer_epoch(self) -> int:
        """Which writer of the volume this is: raised by each recovery."""
        row = self._db.one("SELECT value FROM local WHERE key = 'writer_epoch'")
        return int(row[0]) if row else 1

    @property
    def schema_version(self) -> int:
        """The journal's format, which its changes are of."""
        return self._db.schema_version

    @property
    def last_change(self) -> int:
        """The newest committed row of changes that there ever was."""
        return self._db.last_change

    def on_recorded(self, call: Callable[[Recorded], None]) -> None:
        """Be told of each row of changes, after its commit."""
        self._db.recorded = call

    async def changes_until(self, last: int, max_bytes: int) -> list[tuple[int, int, bytes]]:
        """The oldest rows (id, made, changeset) up to `last`: one, or what `max_bytes` hold."""
        found: list[tuple[int, int, bytes]] = []
        size = 0
        lengths = self._db.all(
            "SELECT id, length(changeset) FROM changes WHERE id <= ? ORDER BY id LIMIT 4096",
            (last,),
        )
        for number, length in lengths:
            size += length
            if found and size > max_bytes:
                break
            row = self._db.one("SELECT made_ns, changeset FROM changes WHERE id = ?", (number,))
            assert row is not None
            found.append((number, row[0], row[1]))
        return found

    async def oldest_change_ns(self) -> int | None:
        """When the oldest change was made that no confirmed segment holds; None without one."""
        row = self._db.one(
            "SELECT min(made_ns) FROM (SELECT made_ns FROM (SELECT made_ns FROM changes"
            " ORDER BY id LIMIT 1) UNION ALL SELECT made_ns FROM objects"
            " WHERE sealed IS NOT NULL AND message = 0)"
        )
        return None if row is None else row[0]

    async def note_renewal(self) -> None:
        """Make a change that means nothing: a checkpoint is found by a segment that has a change.

        Segments without one do not say how far the journal had come.
        """
        with self._db.operation:
            self._db.run(
                "INSERT OR REPLACE INTO volume VALUES ('renewed', ?)", (str(self._clock_ns()),)
            )

    async def want_checkpoint(self) -> None:
        """Have a checkpoint posted soon, also by the next mount, after a segment of its own."""
        await self.note_renewal()
        with self._db.operation:
            self._db.run("INSERT OR REPLACE INTO local VALUES ('checkpoint_wanted', 1)")

    # ------------------------------------------------------------------ after a recovery

    async def note_losses(
        self, dirty: Iterable[tuple[Ino, int]], block_bytes: int
    ) -> tuple[list[Lost], list[tuple[Ino, int]]]:
        """Settle what a lost machine alone had, as `lose_blocks`. Uploads under way are no more."""
        settled = await self.lose_blocks(dirty, block_bytes)
        with self._db.operation:
            self._db.run(
                "DELETE FROM chunks WHERE pack IN (SELECT id FROM packs WHERE message = 0)"
            )
            self._db.run("DELETE FROM packs WHERE message = 0")
        return settled

    async def lose_blocks(
        self, dirty: Iterable[tuple[Ino, int]], block_bytes: int
    ) -> tuple[list[Lost], list[tuple[Ino, int]]]:
        """Do without blocks (inode, index, in order) that Discord does not have: lost, and older.

        What never reached Discord is an error when it is read, never zeros. Only where a file had
        grown at its end, it ends where its content ends. Of older blocks Discord has what they were
        before.
        """
        lost: list[Lost] = []
        older: list[tuple[Ino, int]] = []
        for ino, group in groupby(dirty, key=lambda block: block[0]):
            found = self._engine.inode(ino)
            if found is None:
                continue
            before = len(lost), len(older)
            await self._lose(found, [index for _, index in group], block_bytes, lost, older)
            here = {(one.ino, one.index) for one in lost[before[0] :]} | set(older[before[1] :])
            if not found.nlink and here:
                with self._db.operation:
                    self._db.run("UPDATE trash SET lost = lost + ? WHERE ino = ?", (len(here), ino))
        return lost, older

    async def _lose(
        self,
        found: Attributes,
        indexes: Iterable[int],
        block_bytes: int,
        lost: list[Lost],
        older: list[tuple[Ino, int]],
    ) -> None:
        for index in indexes:
            ino = found.ino
            end = min(block_bytes, found.size - index * block_bytes)
            valid = await self.valid_length(ino, index)
            if valid:
                older.append((ino, index))
            if valid >= end:
                continue
            beyond = self._db.one(
                "SELECT 1 FROM chunk_list WHERE ino = ? AND idx > ? LIMIT 1", (ino, index)
            )
            if valid and not beyond:
                size = index * block_bytes + valid
                lost.append(Lost(ino, index, found.size - size, cut=True))
                with self._db.operation:
                    self._engine.update_inode(found, found._replace(size=size))
                return  # what follows was beyond this end
            lost.append(Lost(ino, index, end))
            with self._db.operation:
                self._damage(ino, index, valid, end)

    async def damage_block(self, ino: Ino, index: int, version: int, block_bytes: int) -> None:
        """A block that was synced up to this version and is nowhere: an error when it is read.

        Also where Discord has an older content: what was acknowledged must not read as what it was
        before. History keeps that one, for its time.
        """
        found = self._engine.inode(ino)
        if found is None:
            return
        valid = await self.valid_length(ino, index)
        with self._db.operation:
            self._damage(ino, index, valid, min(block_bytes, found.size - index * block_bytes))
            self._drop_dirty(ino, index, version)

    def _damage(self, ino: Ino, index: int, valid: int, end: int) -> None:
        """Within an operation. `valid`: the bytes that the block has; `end`: those it must have."""
        self._db.run(
            "INSERT OR REPLACE INTO chunk_list VALUES (?,?,?,?)", (ino, index, DAMAGED_CHUNK, end)
        )
        self._engine.add_stored(ino, end - valid)

    async def adopt_nodes(
        self, nodes: Iterable[tuple[Attributes, Sequence[tuple[Ino, bytes]]]]
    ) -> None:
        """Inodes with the numbers that they had, and their names; link counts are made here.

        A name that is taken gets the inode's number behind it. Not one transaction: of a new
        journal alone, which counts only when it is whole.
        """
        for attributes, names in nodes:
            with self._db.operation:  # groups of them are segments' pieces, so none may be large
                folder = stat.S_ISDIR(attributes.mode)
                links = 2 if folder else len(names)
                self._engine.insert_inode(attributes._replace(nlink=links))
                for parent, name in names:
                    taken = self._engine.entry(parent, name) is not None
                    free = b"%b~%d" % (name[:200], attributes.ino) if taken else name
                    self._engine.insert_entry(parent, free, attributes.ino)
        with self._db.operation:
            self._db.run(
                "UPDATE inodes SET nlink = 2 + (SELECT count(*) FROM dirents d JOIN inodes i"
                " ON i.ino = d.ino WHERE d.parent = inodes.ino AND (i.mode & ?1) = ?2)"
                " WHERE (mode & ?1) = ?2",
                (stat.S_IFMT(0o170000), stat.S_IFDIR),
            )
            self._engine.forget()

    # ------------------------------------------------------------------ own objects

    async def add_object(self, made: OwnObject, sealed: bytes | None = None) -> None:
        """Record an object that is about to be posted, or that was found to be ours.

        With `sealed`, it is a segment that takes the place of the changes that it holds.
        """
        at = made.location or Location(0, 0, 0, "", 0)
        with self._db.operation:
            self._db.run(
                "INSERT INTO objects VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    made.object_id, made.kind, made.number, made.part, made.last_change,
                    made.made_ns, made.digest, made.size, sealed,
                    at.channel, at.message, at.attachment,
                ),
            )  # fmt: skip
            if sealed is not None:
                self._db.run("DELETE FROM changes WHERE id <= ?", (made.last_change,))

    async def confirm_object(self, object_id: ObjectId, at: Location) -> None:
        """Discord has it, here."""
        with self._db.operation:
            self._db.run(
                "UPDATE objects SET channel=?, message=?, attachment=? WHERE object_id=?",
                (at.channel, at.message, at.attachment, object_id),
            )

    async def unconfirmed(self) -> set[ObjectId]:
        """Own objects that Discord may have or not."""
        return {
            ObjectId(bytes(r[0]))
            for r in self._db.all("SELECT object_id FROM objects WHERE message = 0")
        }

    async def own_objects(self, kind: int, *, after: int = -1) -> list[OwnObject]:
        """Those of a kind, with a number greater than `after`, in order."""
        rows = self._db.all(
            f"SELECT {_COLUMNS} FROM objects WHERE kind = ? AND number > ? AND message >= 0"  # noqa: S608  constants
            " ORDER BY number, part",
            (kind, after),
        )
        return [_to_object(row) for row in rows]

    async def newest_object(self, kind: int, *, dropped: bool = False) -> OwnObject | None:
        """The one with the highest number; with `dropped` also of those that are no more."""
        row = self._db.one(
            f"SELECT {_COLUMNS} FROM objects WHERE kind = ? AND message >= ?"  # noqa: S608  constants
            " ORDER BY number DESC, part DESC LIMIT 1",
            (kind, -1 if dropped else 0),
        )
        return None if row is None else _to_object(row)

    async def sealed_bytes(self, object_id: ObjectId) -> bytes | None:
        """The bytes of a segment that is kept here."""
        row = self._db.one("SELECT sealed FROM objects WHERE object_id = ?", (object_id,))
        return None if row is None else row[0]

    async def drop_sealed(self, kind: int, before: int) -> None:
        """Segments below this number are on Discord twice: keep their names alone."""
        with self._db.operation:
            self._db.run(
                "UPDATE objects SET sealed = NULL"
                " WHERE kind = ? AND number < ? AND message != 0 AND sealed IS NOT NULL",
                (kind, before),
            )

    async def is_own(self, object_id: ObjectId) -> bool:
        """Whether this writer knows the object: made by it, or taken over by it."""
        return self._db.one("SELECT 1 FROM objects WHERE object_id = ?", (object_id,)) is not None

    async def drop_objects(self, ids: Iterable[ObjectId]) -> None:
        """They are no more: deleted, or never sent. Their names stay ours for a month at least.

        A list may still show them, a copy may ride in a message that is kept, and what was never
        answered may appear: none of it is another writer's.
        """
        late_ns = self._clock_ns() - _REMEMBER_NS
        with self._db.operation:
            for object_id in ids:
                self._db.run(
                    "UPDATE objects SET message = -1, sealed = NULL WHERE object_id = ?",
                    (object_id,),
                )
            self._db.run(_FORGET, (late_ns, KIND_SEGMENT))


def _to_object(row: tuple[Any, ...]) -> OwnObject:
    raw, kind, number, part, last_change, made_ns, digest, size, *where = row
    object_id = ObjectId(bytes(raw))
    channel, message, attachment = where
    at = None
    if message:
        at = Location(channel, message, attachment, object_filename(object_id), size)
    return OwnObject(object_id, kind, number, part, last_change, made_ns, digest, size, at)
