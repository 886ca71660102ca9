"""A journal out of the packs' own tables, when no checkpoint and no segments are left.

Each pack tells its chunks, which blocks of which inodes they are, and of each file (and the folders
above it) name, parent, size and mode. What is known is as old as the pack: a file deleted later
comes back, one renamed later has its old name, and one that was never uploaded is unknown. What has
no known parent goes under lost+found.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from stashcordfs.crypto.keys import KIND_PACK, object_id_of
from stashcordfs.errors import CryptoError, StoreError
from stashcordfs.journal import Journal
from stashcordfs.store.fetching import fetch_table
from stashcordfs.types import ROOT_INO, Attributes, Ino
from stashcordfs.vfs.orphans import SPARED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.store.pack import FileNote, Reference, Table
    from stashcordfs.types import ChunkId, Location, ObjectId

    Progress = Callable[[str, int, int], None]

_FETCHES_AT_ONCE = 8
_LOST_FOUND = b"lost+found"


@dataclass(slots=True)
class Outcome:
    """What was made of the packs."""

    writer_epoch: int = 2
    packs: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Gathered:
    """What the packs say, the newest of each."""

    packs: dict[ObjectId, tuple[Location, int, Table]] = field(default_factory=dict)
    files: dict[Ino, dict[tuple[Ino, bytes], FileNote]] = field(default_factory=dict)
    told: dict[Ino, int] = field(default_factory=dict)  # the number of the pack that tells of it
    blocks: dict[tuple[Ino, int], Reference] = field(default_factory=dict)
    bad: int = 0

    def add(self, object_id: ObjectId, number: int, at: Location, table: Table, epoch: int) -> None:
        """Take one pack in. Of a file's names those of one pack count, the newest."""
        self.packs[object_id] = (at, epoch, table)
        for ref in table.references:
            known = self.blocks.get((ref.ino, ref.index))
            if known is None or known.sequence < ref.sequence:
                self.blocks[ref.ino, ref.index] = ref
        for note in table.files:
            if self.told.get(note.ino, -1) < number:
                self.told[note.ino] = number
                self.files[note.ino] = {}
            if self.told[note.ino] == number:
                self.files[note.ino][note.parent, note.name] = note

    def end_of(self, ino: Ino, block_bytes: int) -> int:
        """Where the content ends that is known of an inode, in bytes."""
        return max(
            index * block_bytes + ref.valid_length
            for (owner, index), ref in self.blocks.items()
            if owner == ino
        )


async def rebuild_from_packs(
    store: ObjectStore,
    keys: VolumeKeys,
    path: Path,
    *,
    channels: Sequence[int],
    block_bytes: int,
    progress: Progress,
    last_epoch: int = 1,
) -> Outcome:
    """Make the journal at `path` out of all packs in the channels. DiscordError, StashcordError.

    `last_epoch`: the highest writer epoch that anything else tells of.
    """
    gathered = _Gathered()
    places = await _list_packs(store, keys, channels, progress)
    limit = trio.CapacityLimiter(_FETCHES_AT_ONCE)
    done = 0

    async def one(object_id: ObjectId, number: int, at: Location) -> None:
        nonlocal done
        async with limit:
            try:
                table, epoch = await fetch_table(store, keys, object_id, at)
                gathered.add(object_id, number, at, table, epoch)
            except StoreError:
                gathered.bad += 1
            done += 1
            progress("reading the packs' tables", done, len(places))

    async with trio.open_nursery() as nursery:
        for object_id, (number, at) in places.items():
            nursery.start_soon(one, object_id, number, at)
    progress("making the journal", 0, 0)
    return await _make(gathered, path, block_bytes, last_epoch)


async def _list_packs(
    store: ObjectStore, keys: VolumeKeys, channels: Sequence[int], progress: Progress
) -> dict[ObjectId, tuple[int, Location]]:
    found: dict[ObjectId, tuple[int, Location]] = {}
    pages = 0
    for channel in channels:
        after: int | None = 0
        while after is not None:
            page = await store.page(channel, after)
            after = page.last
            pages += 1
            progress("looking through the channels", pages, 0)
            for at in page.attachments:
                object_id = object_id_of(at.filename)
                if object_id is None:
                    continue
                try:
                    kind, number = keys.read_object_id(object_id)
                except CryptoError:
                    continue
                if kind == KIND_PACK:
                    found[object_id] = (number, at)
    return found


async def _make(gathered: _Gathered, path: Path, block_bytes: int, last_epoch: int) -> Outcome:
    inos = {*gathered.files, *(ino for ino, _ in gathered.blocks)}
    inos |= {parent for names in gathered.files.values() for parent, _ in names}
    epoch = max([last_epoch, *(ino >> 40 for ino in inos)]) + 1
    outcome = Outcome(epoch, len(gathered.packs))
    journal = Journal.create(
        path, clock_ns=time.time_ns, uid=os.getuid(), gid=os.getgid(), writer_epoch=epoch
    )
    try:
        await _put_names(journal, gathered, block_bytes, outcome)
        known = await _put_packs(journal, gathered)
        await _put_blocks(journal, gathered, known, block_bytes, outcome)
        if gathered.bad:  # what cannot be read now may be read one day
            await journal.set_local(SPARED, "1")
        journal.commit()
    finally:
        journal.close()
    outcome.notes.insert(
        0,
        f"rebuilt from the tables of {len(gathered.packs)} packs: names, sizes and contents as of "
        "the last upload of each file; owners, times and attributes are new",
    )
    if gathered.bad:
        outcome.notes.append(f"{gathered.bad} packs could not be read")
    return outcome


async def _put_names(
    journal: Journal, gathered: _Gathered, block_bytes: int, outcome: Outcome
) -> None:
    folders = {ino for ino, names in gathered.files.items() if _is_folder(names)}
    folders |= {parent for names in gathered.files.values() for parent, _ in names}
    folders.discard(ROOT_INO)
    nameless = (folders | {ino for ino, _ in gathered.blocks}) - gathered.files.keys()
    now = time.time_ns()
    nodes = [
        (_attributes(ino, note.mode, note.size, now), list(names))
        for ino, names in gathered.files.items()
        for note in [next(iter(names.values()))]
        if ino != ROOT_INO
    ]
    if nameless:
        lost = await journal.create_node(
            ROOT_INO, _LOST_FOUND, mode=stat.S_IFDIR | 0o700, uid=os.getuid(), gid=os.getgid(),
            now_ns=now,
        )  # fmt: skip
        for ino in sorted(nameless):
            mode = stat.S_IFDIR | 0o755 if ino in folders else stat.S_IFREG | 0o600
            size = 0 if ino in folders else gathered.end_of(ino, block_bytes)
            nodes.append((_attributes(ino, mode, size, now), [(lost.ino, b"inode-%d" % ino)]))
        outcome.notes.append(f"{len(nameless)} names are lost: see lost+found")
    await journal.adopt_nodes(nodes)


def _attributes(ino: Ino, mode: int, size: int, now_ns: int) -> Attributes:
    uid, gid = os.getuid(), os.getgid()
    return Attributes(ino, mode, 0, uid, gid, 0, size, now_ns, now_ns, now_ns)


def _is_folder(names: dict[tuple[Ino, bytes], FileNote]) -> bool:
    return any(stat.S_ISDIR(note.mode) for note in names.values())


async def _put_packs(journal: Journal, gathered: _Gathered) -> set[ChunkId]:
    known: set[ChunkId] = set()
    for object_id, (at, epoch, table) in gathered.packs.items():
        intent = await journal.add_intent(
            nonce="", channel=0, after_message=0,
            packs=[(object_id, epoch, at.size_bytes, at.filename, table.chunks)],
        )  # fmt: skip
        await journal.confirm_intent_packs(intent, {object_id: at})
        await journal.close_intent(intent)
        known |= {chunk.chunk_id for chunk in table.chunks}
    return known


async def _put_blocks(
    journal: Journal,
    gathered: _Gathered,
    known: set[ChunkId],
    block_bytes: int,
    outcome: Outcome,
) -> None:
    unknown = 0
    for (ino, index), ref in sorted(gathered.blocks.items()):
        end = (await journal.getattr(ino)).size - index * block_bytes
        if end <= 0:
            continue  # it was cut off since
        if ref.chunk_id not in known:
            unknown += 1
            continue
        await journal.commit_chunks([(ino, index, ref.chunk_id, min(end, ref.valid_length))])
    if unknown:
        outcome.notes.append(f"{unknown} blocks are in packs that are missing")
