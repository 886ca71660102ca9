"""Emptying messages: what is needed of them is packed anew, and the blocks refer to that.

The new packs go the way of every upload: an intent, one message, settled exactly once. Only when
Discord has them do blocks move, each only if it still refers to what was moved. Nothing is
condemned here: until then the old message is whole, so a run that was cut short leaves two copies,
and the next one finds the newer and moves the rest.

The tables of the emptied packs are read, so that the new ones tell the same of the blocks: the
sequence of a reference is kept, else an older content could pass for newer in a rebuild from packs.
"""

from __future__ import annotations

import logging
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import CryptoError, StoreError
from stashcordfs.journal.garbage import Move
from stashcordfs.store.fetching import fetch_chunks, fetch_table, runs
from stashcordfs.store.packer import RequestBuilder
from stashcordfs.vfs.posting import file_notes, post_packs

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Journal
    from stashcordfs.journal.census import Contents, Needed
    from stashcordfs.journal.garbage import Block
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.store.pack import Head, Reference
    from stashcordfs.types import ChunkId
    from stashcordfs.vfs.settling import Settler

log = logging.getLogger(__name__)

_GAP_BYTES = 256 << 10  # of what is not needed, cheaper to fetch than to ask once more
_AT_ONCE = 128  # rows in a transaction; look-ups before others get a turn


@dataclass(slots=True)
class Emptied:
    """What became of some packs' contents. `moved`: rows of chunks, from the old to the new."""

    moved: dict[int, int] = field(default_factory=dict)
    unreadable: set[int] = field(default_factory=set)  # rows of packs, which stay as they are
    posted_bytes: int = 0


class Repacker:
    """Used by the collector, one run at a time."""

    def __init__(
        self,
        *,
        journal: Journal,
        store: ObjectStore,
        keys: VolumeKeys,
        settler: Settler,
        head: Callable[[], Awaitable[Head | None]],
        compress: Callable[[], bool],
    ) -> None:
        """Take the collaborators. `head`: the newest segment."""
        self._journal = journal
        self._store = store
        self._keys = keys
        self._settler = settler
        self._head = head
        self._compress = compress

    async def empty(self, contents: Contents) -> Emptied:
        """Let everything that is needed of some packs be elsewhere. DiscordError, LocalDiskError.

        Blocks that were made to refer to the old chunks since `contents` was taken are the caller's
        to move, by `moved`.
        """
        done = Emptied()
        left = await self._elsewhere(contents, done)
        told = await self._references(contents) if left else []
        posted = {chunk.ref.chunk_id for chunk in left}
        builder = self._builder()
        group: list[Needed] = []
        async with aclosing(self._opened(contents, left, done)) as opened:
            async for chunk, plain in opened:
                if not await builder.add(chunk.row, plain, chunk.ref.chunk_id):
                    await self._send(builder, group, told, posted, done)
                    builder, group = self._builder(), []
                    if not await builder.add(chunk.row, plain, chunk.ref.chunk_id):
                        raise StoreError("a chunk does not fit into a message any more")
                group.append(chunk)
        if group:
            await self._send(builder, group, told, posted, done)
        await self._move(contents, done)
        return done

    def _builder(self) -> RequestBuilder:
        return RequestBuilder(self._keys, self._store.limits, compress=self._compress())

    async def _elsewhere(self, contents: Contents, done: Emptied) -> list[Needed]:
        """What another pack has as well needs no message; the rest."""
        left = []
        for chunk in contents.needed:
            copies = await self._journal.copies_of(chunk.ref.chunk_id)
            other = next((row for row, pack in copies if pack not in contents.packs), None)
            if other is None:
                left.append(chunk)
                continue
            done.moved[chunk.row] = other
            if chunk.unused:
                await self._journal.prolong_unused(chunk.row, other)
        return left

    async def _opened(
        self, contents: Contents, left: Sequence[Needed], done: Emptied
    ) -> AsyncGenerator[tuple[Needed, bytes], None]:
        """The chunks with their plaintext. Packs with one that cannot be had are left alone."""
        for pack, (_, _, at) in contents.packs.items():
            mine = [(chunk, chunk.ref) for chunk in left if chunk.pack == pack]
            for run in runs(mine, gap_bytes=_GAP_BYTES):
                try:
                    plains = await fetch_chunks(
                        self._store, self._keys, at, [ref for _, ref in run]
                    )
                except (StoreError, CryptoError) as error:
                    log.warning("not repacked: pack %s: %s", at.filename, error)
                    done.unreadable.add(pack)
                    break
                for (chunk, _), plain in zip(run, plains, strict=True):
                    yield chunk, plain

    async def _references(self, contents: Contents) -> list[Reference]:
        """What the packs' tables say of blocks that still are what they say."""
        told: list[Reference] = []
        for object_id, _, at in contents.packs.values():
            try:
                table, _ = await fetch_table(self._store, self._keys, object_id, at)
            except (StoreError, CryptoError) as error:  # segments tell the same
                log.warning("the table of pack %s cannot be read: %s", at.filename, error)
                continue
            for count, reference in enumerate(table.references):
                if count % _AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
                entry = await self._journal.chunk_at(reference.ino, reference.index)
                if entry is not None and entry.ref.chunk_id == reference.chunk_id:
                    told.append(reference)
        return told

    async def _send(
        self,
        builder: RequestBuilder,
        group: Sequence[Needed],
        told: list[Reference],
        posted: set[ChunkId],
        done: Emptied,
    ) -> None:
        """Post one message, and know its chunks. `told` loses what its tables tell."""
        ours = {chunk.ref.chunk_id for chunk in group}
        here = [ref for ref in told if ref.chunk_id in ours or ref.chunk_id not in posted]
        told[:] = [ref for ref in told if ref.chunk_id in posted and ref.chunk_id not in ours]
        files = await file_notes(self._journal, {ref.ino: None for ref in here})
        packs = await builder.finish(here, files, head=await self._head())
        intent, places = await post_packs(
            packs, journal=self._journal, store=self._store, settler=self._settler
        )
        await self._journal.confirm_intent_packs(intent, places)
        rows: dict[ChunkId, int] = {}
        for pack in packs:
            rows |= await self._journal.chunk_rows(pack.object_id)
            done.posted_bytes += pack.size
        new = {chunk.row: rows[chunk.ref.chunk_id] for chunk in group}
        await self._journal.keep_unused((c.row, new[c.row]) for c in group if c.unused)
        await self._journal.close_intent(intent)
        await self._journal.wal_sync()
        done.moved |= new

    async def move_late(self, referred: Mapping[Block, tuple[int, int]], done: Emptied) -> None:
        """Blocks that came since, with the rows of their chunk and its pack. Never suspends."""
        late = [
            Move(*block, row, done.moved[row])
            for block, (row, _) in referred.items()
            if row in done.moved
        ]
        if late:
            await self._journal.move_blocks(late)

    async def _move(self, contents: Contents, done: Emptied) -> None:
        """Let blocks refer to the new rows, a few at a time."""
        moves = [
            move._replace(new=done.moved[move.old])
            for move in contents.blocks
            if move.old in done.moved
        ]
        for at in range(0, len(moves), _AT_ONCE):
            await self._journal.move_blocks(moves[at : at + _AT_ONCE])
            await trio.lowlevel.checkpoint()
