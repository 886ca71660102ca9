"""Checkpoints: when a copy of the journal is due, taking and posting it, and dropping old ones.

The mount goes on meanwhile: the copy is made by a second connection in a thread, its parts are
compressed and sealed one by one, and nothing counts until the manifest is there. Cut short, what
was posted of it is deleted, and the next one starts anew.

Kept are the two newest checkpoints, those that reach back `keep_s`, and all segments since the
oldest of them: what is older is deleted, and only when the newest is confirmed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from stashcordfs.crypto.keys import KIND_CHECKPOINT, KIND_CLAIM, KIND_MANIFEST, KIND_SEGMENT
from stashcordfs.errors import StashcordError
from stashcordfs.journal.changes import OwnObject
from stashcordfs.journal.snapshot import take_snapshot
from stashcordfs.store.checkpoint import Manifest, Part, compressed, encode_manifest
from stashcordfs.store.sealed import OVERHEAD_BYTES, SealedObject, seal_object

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Journal
    from stashcordfs.journal.snapshot import Snapshot
    from stashcordfs.store.api import Uploadable
    from stashcordfs.vfs.fencing import Fence
    from stashcordfs.vfs.journal_channel import JournalChannel

log = logging.getLogger(__name__)

_WANTED = "checkpoint_wanted"
_DELETES_AT_ONCE = 100
_SEGMENTS_A_PART = 4


@dataclass(frozen=True, slots=True)
class CheckpointSettings:
    """When a checkpoint is due: so many segments, or bytes of them, since the last one.

    The bytes count from `least_bytes` on, and only when they are more than the checkpoint itself:
    so that what is sent for checkpoints stays below what is sent for segments. At an unmount half
    of either is enough. One is due as well when a segment waits `every_s` for it, if there are
    `few_segments` by then, and more the more messages the checkpoint takes: segments that are
    superseded within 13 days go a hundred a request, later ones one by one.
    """

    segments: int = 400
    least_bytes: int = 4 << 20
    keep_s: float = 7 * 86_400.0
    every_s: float = 4 * 86_400.0
    few_segments: int = 12


class Checkpointer:
    """Used by `Publisher` alone, one at a time.

    The manifest is held back until a segment is there that holds what was copied, because segments
    tell which blocks only this machine had.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        path: Path,
        channel: JournalChannel,
        fence: Fence,
        keys: VolumeKeys,
        record: Uploadable | None,
        now_ns: Callable[[], int],
        settings: CheckpointSettings | None = None,
    ) -> None:
        """`path` is the journal's file; the copy lies beside it. `record` goes along."""
        self.settings = settings or CheckpointSettings()
        self._journal = journal
        self._path = path
        self._copy = path.with_name("checkpoint.sqlite")
        self._channel = channel
        self._fence = fence
        self._keys = keys
        self._record = record
        self._now_ns = now_ns
        self.cover: Callable[[int], Awaitable[None]] = self._uncovered  # the publisher's

    @staticmethod
    async def _uncovered(change: int) -> None:
        raise StashcordError(f"nobody posts the segment that holds change {change}")

    # ------------------------------------------------------------------ when

    async def is_due(self, *, closing: bool = False) -> bool:
        """Whether it is time. `closing`: the volume is about to be unmounted."""
        if await self._journal.get_local(_WANTED):
            return True
        newest = await self._newest()
        covered = newest.last_change if newest else 0
        segments = await self._journal.own_objects(KIND_SEGMENT)
        since = [o for o in segments if o.last_change > covered and o.location is not None]
        share = 2 if closing else 1
        size = sum(o.size for o in since)
        number = newest.number if newest else 0
        parts = await self._journal.own_objects(KIND_CHECKPOINT, after=number - 1)
        waited_s = (self._now_ns() - since[0].made_ns) / 1e9 if since else 0.0
        few = self.settings.few_segments + _SEGMENTS_A_PART * len(parts)
        if waited_s >= self.settings.every_s and len(since) >= few:
            return True
        enough = max(self.settings.least_bytes, sum(o.size for o in parts))
        return len(since) * share >= self.settings.segments or size * share >= enough

    async def _newest(self) -> OwnObject | None:
        """The newest checkpoint that counts, by its manifest."""
        known = await self._journal.own_objects(KIND_MANIFEST)
        return next((o for o in reversed(known) if o.location is not None), None)

    # ------------------------------------------------------------------ taking

    async def take(self) -> None:
        """Copy, seal, post; then drop what is superseded. StashcordError when cut short."""
        await self._drop_unfinished()
        try:
            snapshot = await trio.to_thread.run_sync(take_snapshot, self._path, self._copy)
            # What was copied may not be on the disk yet; what Discord has must be.
            await self._journal.wal_sync()
            await self._post(snapshot)
        finally:
            self._copy.unlink(missing_ok=True)
        await self._journal.set_local(_WANTED, "")
        await self._drop_superseded()

    async def _post(self, snapshot: Snapshot) -> None:
        newest = await self._journal.newest_object(KIND_MANIFEST)
        number = newest.number + 1 if newest else 1
        made_ns = self._now_ns()
        parts: list[Part] = []
        pieces = compressed(self._copy, self._channel.part_bytes - OVERHEAD_BYTES)
        while made := await trio.to_thread.run_sync(self._next_part, pieces, number):
            await self._add(made, number, len(parts), snapshot.last_change, made_ns)
            await self._channel.post(made)
            parts.append(Part(made.object_id, made.size, made.digest))
        await self.cover(snapshot.last_change)
        head_number, head_digest = snapshot.head or (0, self._fence.genesis)
        manifest = Manifest(
            number,
            self._journal.writer_epoch,
            self._journal.schema_version,
            made_ns,
            snapshot.last_change,
            head_number,
            head_digest,
            self._copy.stat().st_size,
            parts,
        )
        made = seal_object(self._keys, KIND_MANIFEST, number, encode_manifest(manifest))
        await self._add(made, number, 0, snapshot.last_change, made_ns)
        await self._channel.post(made, *([self._record] if self._record else []))
        log.info("checkpoint posted number=%d parts=%d", number, len(parts))

    def _next_part(self, pieces: Iterator[bytes], number: int) -> SealedObject | None:
        piece = next(pieces, None)
        if piece is None:
            return None
        return seal_object(self._keys, KIND_CHECKPOINT, number, piece, compress=False)

    async def _add(
        self, made: SealedObject, number: int, part: int, last_change: int, made_ns: int
    ) -> None:
        own = OwnObject(
            made.object_id, made.kind, number, part, last_change, made_ns, made.digest, made.size
        )
        await self._journal.add_object(own)
        await self._journal.wal_sync()

    # ------------------------------------------------------------------ dropping

    async def _drop_unfinished(self) -> None:
        """Delete what was posted of a checkpoint whose manifest never came."""
        whole = {
            o.number
            for o in await self._journal.own_objects(KIND_MANIFEST)
            if o.location is not None
        }
        for kind in (KIND_CHECKPOINT, KIND_MANIFEST):
            left = [o for o in await self._journal.own_objects(kind) if o.number not in whole]
            await self._drop(left)

    async def _drop_superseded(self) -> None:
        manifests = await self._journal.own_objects(KIND_MANIFEST)
        late_ns = self._now_ns() - int(self.settings.keep_s * 1e9)
        old_enough = [o for o in manifests[:-1] if o.made_ns <= late_ns]
        if not old_enough:
            return
        oldest = old_enough[-1]  # the newest one that reaches back far enough
        at = oldest.location.message if oldest.location else 0
        parts = await self._journal.own_objects(KIND_CHECKPOINT)
        segments = (await self._journal.own_objects(KIND_SEGMENT))[:-1]  # the head stays
        claims = (await self._journal.own_objects(KIND_CLAIM))[:-1]
        doomed = [
            *(o for o in [*manifests, *parts] if o.number < oldest.number),
            *(o for o in segments if o.last_change <= oldest.last_change),
            *(o for o in claims if o.location is None or o.location.message < at),
        ]
        await self._fence.check()  # a delete must not be another writer's loss
        if not self._fence.reason:
            await self._drop(doomed)

    async def _drop(self, doomed: list[OwnObject]) -> None:
        """Delete messages, then forget them; in batches, so that a later run goes on."""
        for at in range(0, len(doomed), _DELETES_AT_ONCE):
            some = doomed[at : at + _DELETES_AT_ONCE]
            where = [(o.location.channel, o.location.message) for o in some if o.location]
            if where:
                await self._channel.delete(where)
            await self._journal.drop_objects(o.object_id for o in some)
            await self._journal.wal_sync()
