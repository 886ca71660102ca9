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
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from stashcordfs.crypto.keys import KIND_CLAIM, KIND_PACK, object_id_of
from stashcordfs.errors import CryptoError, StoreError, first_of
from stashcordfs.journal import Journal
from stashcordfs.journal.gathered import Gathered
from stashcordfs.store.fetching import fetch_table
from stashcordfs.store.sealed import open_object
from stashcordfs.store.segment import decode_claim
from stashcordfs.types import ROOT_INO, Attributes, Ino
from stashcordfs.vfs.orphans import SPARED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.store.pack import Table
    from stashcordfs.types import ChunkId, Location, ObjectId

    Progress = Callable[[str, int, int], None]

_FETCHES_AT_ONCE = 8
_CLAIMS = 16  # of the newest: the last writer's is among them
_BLOCKS_AT_ONCE = 128
_LOST_FOUND = b"lost+found"


@dataclass(slots=True)
class Outcome:
    """What was made of the packs."""

    writer_epoch: int = 2
    packs: int = 0
    notes: list[str] = field(default_factory=list)


_Packs = dict[int, tuple["ObjectId", "Location", int]]  # by number here: id, place, key epoch


async def rebuild_from_packs(
    store: ObjectStore,
    keys: VolumeKeys,
    path: Path,
    *,
    channels: Sequence[int],
    block_bytes: int,
    progress: Progress,
) -> Outcome:
    """Make the journal at `path` out of all packs in the channels. DiscordError, StashcordError."""
    places, claims = await _listed(store, keys, channels, progress)
    epoch = await _highest_epoch(store, keys, claims)
    with Gathered.begun(path.with_name(path.name + ".gathered")) as gathered:
        packs = await _gather(store, keys, places, gathered, progress)
        progress("making the journal", 0, 0)
        gathered.settle()
        bad = len(places) - len(packs)
        outcome = await _make(gathered, packs, path, block_bytes, epoch, whole=not bad)
    if bad:
        outcome.notes.append(f"{bad} packs could not be read")
    return outcome


async def _gather(
    store: ObjectStore,
    keys: VolumeKeys,
    places: dict[ObjectId, tuple[int, Location]],
    gathered: Gathered,
    progress: Progress,
) -> _Packs:
    """Read all tables; the packs that have one. DiscordError, JournalError."""
    limit = trio.CapacityLimiter(_FETCHES_AT_ONCE)
    packs: _Packs = {}
    done = 0

    async def one(object_id: ObjectId, number: int, at: Location) -> None:
        nonlocal done
        async with limit:
            with suppress(StoreError):  # it is not among `packs` then
                table, epoch = await fetch_table(store, keys, object_id, at)
                _add(gathered, len(packs), number, table)
                packs[len(packs)] = (object_id, at, epoch)
            done += 1
            progress("reading the packs' tables", done, len(places))

    try:
        async with trio.open_nursery() as nursery:
            for object_id, (number, at) in places.items():
                nursery.start_soon(one, object_id, number, at)
    except BaseExceptionGroup as group:
        raise first_of(group) from group
    return packs


def _add(gathered: Gathered, pack: int, told: int, table: Table) -> None:
    gathered.add(
        pack,
        told,
        table.chunks,
        ((r.ino, r.index, r.sequence, r.chunk_id, r.valid_length) for r in table.references),
        ((f.ino, f.parent, f.name, f.size, f.mode) for f in table.files),
    )


async def _listed(
    store: ObjectStore, keys: VolumeKeys, channels: Sequence[int], progress: Progress
) -> tuple[dict[ObjectId, tuple[int, Location]], dict[ObjectId, Location]]:
    """All packs, by number and place, and all claims."""
    found: dict[ObjectId, tuple[int, Location]] = {}
    claims: dict[ObjectId, Location] = {}
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
                elif kind == KIND_CLAIM:
                    claims[object_id] = at
    return found, claims


async def _highest_epoch(
    store: ObjectStore, keys: VolumeKeys, claims: dict[ObjectId, Location]
) -> int:
    """Of the writers so far: the next one must be above all, or he would not be heeded."""
    highest = 1
    newest = sorted(claims.items(), key=lambda item: item[1].message)[-_CLAIMS:]
    for object_id, at in newest:
        try:
            data = await store.fetch(at, 0, at.size_bytes)
            claim = decode_claim(open_object(keys, KIND_CLAIM, object_id, data))
        except StoreError:
            continue
        highest = max(highest, claim.writer_epoch)
    return highest


async def _make(
    gathered: Gathered, packs: _Packs, path: Path, block_bytes: int, claimed: int, *, whole: bool
) -> Outcome:
    epoch = max(claimed, gathered.highest_ino() >> 40) + 1
    outcome = Outcome(epoch, len(packs))
    outcome.notes.append(
        f"rebuilt from the tables of {len(packs)} packs: names, sizes and contents as of "
        "the last upload of each file; owners, times and attributes are new"
    )
    journal = Journal.create(
        path, clock_ns=time.time_ns, uid=os.getuid(), gid=os.getgid(), writer_epoch=epoch
    )
    try:
        await _put_names(journal, gathered, block_bytes, outcome)
        await _put_packs(journal, gathered, packs)
        await _put_blocks(journal, gathered, block_bytes, outcome)
        if not whole:  # packs that cannot be read now may be read one day
            await journal.set_local(SPARED, "1")
        journal.commit()
    finally:
        journal.close()
    return outcome


async def _put_names(
    journal: Journal, gathered: Gathered, block_bytes: int, outcome: Outcome
) -> None:
    now = time.time_ns()
    nameless = gathered.nameless(block_bytes)
    lost = ROOT_INO
    if nameless:  # made first: what was called so gets another name
        made = await journal.create_node(
            ROOT_INO, _LOST_FOUND, mode=stat.S_IFDIR | 0o700, uid=os.getuid(), gid=os.getgid(),
            now_ns=now,
        )  # fmt: skip
        lost = made.ino
        outcome.notes.append(f"{len(nameless)} names are lost: see lost+found")
    await journal.adopt_nodes(
        (_attributes(ino, mode, size, now), names)
        for ino, size, mode, names in gathered.names()
        if ino != ROOT_INO
    )
    await journal.adopt_nodes(
        (
            _attributes(ino, stat.S_IFDIR | 0o755, 0, now)
            if folder
            else _attributes(ino, stat.S_IFREG | 0o600, end, now),
            [(lost, b"inode-%d" % ino)],
        )
        for ino, folder, end in nameless
    )


def _attributes(ino: Ino, mode: int, size: int, now_ns: int) -> Attributes:
    uid, gid = os.getuid(), os.getgid()
    return Attributes(ino, mode, 0, uid, gid, 0, size, now_ns, now_ns, now_ns)


async def _put_packs(journal: Journal, gathered: Gathered, packs: _Packs) -> None:
    for number, (object_id, at, epoch) in packs.items():
        chunks = gathered.chunks(number, object_id, epoch)
        intent = await journal.add_intent(
            nonce="", channel=0, after_message=0,
            packs=[(object_id, epoch, at.size_bytes, at.filename, chunks)],
        )  # fmt: skip
        await journal.confirm_intent_packs(intent, {object_id: at})
        await journal.close_intent(intent)


async def _put_blocks(
    journal: Journal, gathered: Gathered, block_bytes: int, outcome: Outcome
) -> None:
    unknown = 0
    items: list[tuple[Ino, int, ChunkId, int]] = []
    for ino, index, chunk_id, valid, known in gathered.blocks():
        end = (await journal.getattr(ino)).size - index * block_bytes
        if end <= 0:
            continue  # it was cut off since
        if not known:
            unknown += 1
            continue
        items.append((ino, index, chunk_id, min(end, valid)))
        if len(items) == _BLOCKS_AT_ONCE:
            await journal.commit_chunks(items)
            items.clear()
    await journal.commit_chunks(items)
    if unknown:
        outcome.notes.append(f"{unknown} blocks are in packs that are missing")
