"""Getting a volume's journal back from Discord alone: find the newest state, fetch it, rebuild it.

`Recovery.find` reads the journal channel backwards until what it has seen is enough; `build` makes
the journal file of it. What was fetched is kept in a folder, so that a recovery that was cut short
fetches only the rest when it is called again. Nothing is changed on Discord here.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

import trio

from stashcordfs.crypto.keys import (
    KIND_CHECKPOINT,
    KIND_CLAIM,
    KIND_MANIFEST,
    KIND_SEGMENT,
    object_filename,
)
from stashcordfs.errors import (
    CryptoError,
    ObjectCorrupt,
    ObjectMissing,
    StashcordError,
    StoreError,
    first_of,
)
from stashcordfs.journal.changes import OwnObject
from stashcordfs.journal.snapshot import Rebuild
from stashcordfs.recovery.catalog import Catalog, Seen
from stashcordfs.recovery.chain import Base, Chain, Gap, Link, find_chain
from stashcordfs.store.checkpoint import Manifest, decode_manifest, expand_to
from stashcordfs.store.sealed import open_object
from stashcordfs.store.segment import decode_claim, decode_segment
from stashcordfs.vfs.journal_channel import FETCH_TRIES, OVERLAP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.store.segment import Segment
    from stashcordfs.types import Ino, ObjectId
    from stashcordfs.vfs.journal_channel import Foreign

    Progress = Callable[[str, int, int], None]  # stage, how much of it is done, of how much

_FETCHES_AT_ONCE = 8
_NOWHERE = 1 << 64  # above all ids: the first pass need not look back further than its chain


class NothingFound(StashcordError):
    """The channel holds no journal of this volume: no segment, and no checkpoint."""


@dataclass(slots=True)
class Found:
    """The state that would come back."""

    chain: Chain
    writer_epoch: int  # the highest that was seen
    newest_message: int
    notes: list[str] = field(default_factory=list)
    newest: Chain | None = None  # of a state of the past: what tells where its content is now

    @property
    def head(self) -> Link:
        """The newest segment of the state."""
        return self.chain.links[-1]


@dataclass(frozen=True, slots=True)
class Built:
    """What was made: the blocks that only the lost machine had at the end."""

    dirty: Sequence[tuple[Ino, int]]
    changes: int


class Recovery:
    """One volume's recovery. `store` is bound to the journal channel alone."""

    def __init__(
        self,
        *,
        store: ObjectStore,
        keys: VolumeKeys,
        genesis: bytes,
        folder: Path,
        progress: Progress,
    ) -> None:
        """`folder` keeps what was fetched."""
        self._store = store
        self._keys = keys
        self._genesis = genesis
        self._folder = folder
        self._progress = progress
        self._links: dict[ObjectId, Link] = {}
        self._bases: dict[ObjectId, Base] = {}
        self._bad: dict[ObjectId, str] = {}
        self._excluded: dict[ObjectId, str] = {}
        self._looked_to = _NOWHERE  # a message id up to which an earlier pass has looked
        self._epochs = {1}
        self._catalog = Catalog(store, keys)
        self._limit = trio.CapacityLimiter(_FETCHES_AT_ONCE)

    # ------------------------------------------------------------------ finding

    async def find(self, *, at_ns: int | None = None, expect: int | None = None) -> Found:
        """Look for the newest state (of `at_ns` or before). StashcordError: why there is none.

        Called again, it looks at all that has come since, too.
        """
        catalog = self._catalog = Catalog(self._store, self._keys)
        self._bad = dict(self._excluded)  # what could not be had before is tried again
        while True:
            await catalog.read_page()
            self._progress("looking through the channel", catalog.pages, 0)
            await self._open_new(catalog)
            chain = find_chain(
                self._links.values(), self._usable(catalog), self._genesis, at_ns=at_ns
            )
            enough = isinstance(chain, Chain) and catalog.reaches(self._looked_to)
            if enough or catalog.complete:
                break
        self._looked_to = max(0, catalog.newest_message - OVERLAP)
        if not isinstance(chain, Chain):
            raise self._why_not(chain, at_ns)
        found = Found(chain, max(self._epochs), catalog.newest_message, self._notes(chain))
        if at_ns is not None:
            found.newest = self._newest(chain)
        newest = chain.links[-1].number
        if expect is not None and newest < expect:
            raise StashcordError(
                f"the newest segment is number {newest}, {expect} was expected: the channel is "
                "older than it should be, or its newest messages are withheld"
            )
        return found

    def is_newer(self, segment: Foreign) -> bool:
        """Whether a segment, listed meanwhile, would be the newest of all that were found."""
        known = [(link.writer_epoch, link.number) for link in self._links.values()]
        return (segment.writer_epoch, segment.number) > max(known, default=(0, 0))

    def note_epoch(self, writer_epoch: int) -> None:
        """An epoch that is taken, whether or not the channel's list shows that already."""
        self._epochs.add(writer_epoch)

    def _newest(self, chain: Chain) -> Chain | None:
        """The newest state, if it is another: packs have been collected and repacked since."""
        newest = find_chain(self._links.values(), self._usable(self._catalog), self._genesis)
        if not isinstance(newest, Chain) or newest.links[-1].digest == chain.links[-1].digest:
            return None
        return newest

    async def _open_new(self, catalog: Catalog) -> None:
        """Fetch and read what the last page has brought. DiscordError."""
        known = self._links.keys() | self._bases.keys() | self._bad.keys()
        wanted = [
            seen
            for kind in (KIND_SEGMENT, KIND_MANIFEST, KIND_CLAIM)
            for seen in catalog.of_kind(kind)
            if seen.object_id not in known
        ]
        try:
            async with trio.open_nursery() as nursery:
                for seen in wanted:
                    nursery.start_soon(self._open_one, seen)
        except BaseExceptionGroup as group:
            raise first_of(group) from group

    async def _open_one(self, seen: Seen) -> None:
        try:
            data = await self.fetch(seen)
            body = open_object(self._keys, seen.kind, seen.object_id, data)
            if seen.kind == KIND_SEGMENT:
                segment = decode_segment(body)
                digest = sha256(data).digest()
                self._links[seen.object_id] = Link.of(seen, segment, digest, len(data))
                self._epochs.add(segment.writer_epoch)
            elif seen.kind == KIND_MANIFEST:
                self._bases[seen.object_id] = Base(seen, decode_manifest(body))
                self._epochs.add(self._bases[seen.object_id].manifest.writer_epoch)
            else:
                self._epochs.add(decode_claim(body).writer_epoch)
        except (StoreError, CryptoError) as error:
            self._bad[seen.object_id] = str(error)

    async def fetch(self, seen: Seen) -> bytes:
        """The object's bytes, of whichever message still has them. ObjectMissing, ObjectCorrupt."""
        kept = self._folder / object_filename(seen.object_id)
        data = await trio.to_thread.run_sync(self._kept, kept, seen)
        if data is not None:
            return data
        fault: StoreError = ObjectMissing(f"object {object_filename(seen.object_id)} is missing")
        async with self._limit:
            for at in seen.places * FETCH_TRIES:  # it may be damaged on its way
                try:
                    data = await self._store.fetch(at, 0, at.size_bytes)
                    open_object(self._keys, seen.kind, seen.object_id, data)
                except StoreError as error:
                    fault = error
                    continue
                await trio.to_thread.run_sync(self._keep, kept, data)
                return data
        raise fault

    def _kept(self, path: Path, seen: Seen) -> bytes | None:
        """What an earlier run has fetched, if it is whole: a power cut may have come since."""
        try:
            data = path.read_bytes()
            open_object(self._keys, seen.kind, seen.object_id, data)
        except (FileNotFoundError, StoreError, CryptoError):
            return None
        return data

    @staticmethod
    def _keep(path: Path, data: bytes) -> None:
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.replace(path)

    def _usable(self, catalog: Catalog) -> list[Base]:
        """Checkpoints all of whose parts were seen."""
        return [
            base
            for base in self._bases.values()
            if all(part.object_id in catalog.objects for part in base.manifest.parts)
            and base.seen.object_id not in self._bad
        ]

    def _why_not(self, chain: Gap | None, at_ns: int | None) -> StashcordError:
        if chain is None:
            return NothingFound(
                "the journal channel holds no segment of this volume: is it the right channel?"
            )
        if at_ns is not None and not any(
            link.made_ns <= at_ns and link.complete for link in self._links.values()
        ):
            return StashcordError("no state of that time or before is on Discord any more")
        hint = ""
        older = [link for link in self._links.values() if link.number < chain.missing]
        if older:
            last = max(older, key=lambda link: link.number)
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(last.made_ns // 10**9))
            hint = f" An earlier state is there: --at {when} (segment {last.number})."
        return StashcordError(
            f"segment {chain.missing} is missing, and no checkpoint is there in its place; "
            f"the newest segment is {chain.newest.number}.{hint} To rebuild names and contents "
            "from the packs alone: --from-packs"
        )

    def _notes(self, chain: Chain) -> list[str]:
        notes = []
        if chain.beside:
            numbers = sorted(link.number for link in chain.beside)
            notes.append(
                f"{len(numbers)} segments ({numbers[0]} to {numbers[-1]}) were posted by a writer "
                "that had been replaced, and are left out"
            )
        if chain.unfinished:
            notes.append(f"the last {chain.unfinished} segments are not of a whole and left out")
        if self._bad:
            why = next(iter(self._bad.values()))
            notes.append(f"{len(self._bad)} objects cannot be read: {why}")
        return notes

    # ------------------------------------------------------------------ building

    async def build(self, found: Found, path: Path) -> Built:
        """Make the journal of a found state at `path`. A damaged checkpoint: see `exclude`.

        Of a state of the past: its names and contents, and where the newest state has these now.
        """
        for chain in (found.chain, found.newest):
            if chain is not None and chain.base is not None:
                await self._fetch_parts(chain.base.manifest)
        return await trio.to_thread.run_sync(self._build, found, path)

    def exclude(self, found: Found, why: str) -> None:
        """Do without the checkpoint of a state that could not be built; then `find` again."""
        for chain in (found.newest, found.chain):  # one at a time: either may be the damaged one
            if chain is not None and chain.base is not None:
                self._excluded[chain.base.seen.object_id] = why
                return

    async def _fetch_parts(self, manifest: Manifest) -> None:
        total = sum(part.size for part in manifest.parts)
        done = 0
        for part in manifest.parts:
            self._progress("fetching the checkpoint", done, total)
            await self.fetch(self._catalog.objects[part.object_id])
            done += part.size
        self._progress("fetching the checkpoint", done, total)

    def _build(self, found: Found, path: Path) -> Built:
        newest = path.with_name(path.name + ".newest")
        try:
            if found.newest is not None:
                with self._begun(found.newest, newest) as rebuild:
                    self._apply(rebuild, found.newest)
            with self._begun(found.chain, path) as rebuild:
                last, applied = self._apply(rebuild, found.chain)
                if found.newest is not None:
                    rebuild.locate(newest)
                self._take_over(rebuild, found, last)
            return Built(self._segment(found.head).dirty, applied)
        finally:
            newest.unlink(missing_ok=True)

    @contextmanager
    def _begun(self, chain: Chain, path: Path) -> Iterator[Rebuild]:
        """A journal as the chain's checkpoint has it, or an empty one."""
        if chain.base is None:
            with Rebuild.from_nothing(path) as rebuild:
                yield rebuild
            return
        manifest = chain.base.manifest
        copy = path.with_name(path.name + ".copy")
        try:
            expand_to(copy, self._pieces(manifest), manifest.plain_bytes)
            with Rebuild.from_snapshot(path, copy) as rebuild:
                yield rebuild
        finally:
            copy.unlink(missing_ok=True)

    def _pieces(self, manifest: Manifest) -> Iterator[bytes]:
        for part in manifest.parts:
            data = (self._folder / object_filename(part.object_id)).read_bytes()
            if sha256(data).digest() != part.digest:
                raise ObjectCorrupt("a part of the checkpoint is not the one its manifest names")
            yield open_object(self._keys, KIND_CHECKPOINT, part.object_id, data)

    def _segment(self, link: Link) -> Segment:
        data = (self._folder / object_filename(link.seen.object_id)).read_bytes()
        return decode_segment(open_object(self._keys, KIND_SEGMENT, link.seen.object_id, data))

    def _apply(self, rebuild: Rebuild, chain: Chain) -> tuple[int, int]:
        """Apply the chain's segments: the last change, and how many were applied."""
        links = chain.links
        last = chain.base.manifest.last_change if chain.base else 0
        applied = 0
        for at, link in enumerate(links):
            self._progress("applying changes", at, len(links))
            segment = self._segment(link)
            if segment.schema_version != rebuild.schema_version and segment.changes:
                raise StashcordError(
                    f"segment {link.number} is of the journal's format {segment.schema_version}, "
                    f"what precedes it of {rebuild.schema_version}; use a newer program"
                )
            fresh = [change for change in segment.changes if change.id > last]
            if fresh and fresh[0].id != last + 1:
                raise StashcordError(f"changes {last + 1} to {fresh[0].id - 1} are missing")
            rebuild.apply(change.changeset for change in fresh)
            applied += len(fresh)
            last = fresh[-1].id if fresh else last
        self._progress("applying changes", len(links), len(links))
        return last, applied

    def _take_over(self, rebuild: Rebuild, found: Found, last_change: int) -> None:
        """Let the new writer know what is on Discord, so that he goes on from there."""
        for own in self._known(found, last_change):
            at = own.location
            assert at is not None
            rebuild.execute(
                "INSERT OR REPLACE INTO objects VALUES (?,?,?,?,?,?,?,?,NULL,?,?,?)",
                (
                    own.object_id, own.kind, own.number, own.part, own.last_change, own.made_ns,
                    own.digest, own.size, at.channel, at.message, at.attachment,
                ),
            )  # fmt: skip
        rebuild.finish(
            {
                "writer_epoch": found.writer_epoch + 1,
                "journal_seen": str(found.newest_message),
            }
        )

    def _known(self, found: Found, last_change: int) -> Iterator[OwnObject]:
        covered = found.chain.base.manifest.last_change if found.chain.base else 0
        for link in [*found.chain.before, *found.chain.links]:
            covered = max(covered, link.last)
            is_head = link is found.head
            yield OwnObject(
                link.seen.object_id, KIND_SEGMENT, link.number, 0,
                max(link.last, last_change) if is_head else link.last or covered,
                link.made_ns, link.digest, link.size, link.seen.places[0],
            )  # fmt: skip
        for base in self._bases.values():
            manifest = base.manifest
            if manifest.last_change > last_change:
                continue
            data = (self._folder / object_filename(base.seen.object_id)).read_bytes()
            yield OwnObject(
                base.seen.object_id, KIND_MANIFEST, manifest.number, 0, manifest.last_change,
                manifest.made_ns, sha256(data).digest(), len(data), base.seen.places[0],
            )  # fmt: skip
            for number, part in enumerate(manifest.parts):
                seen = self._catalog.objects.get(part.object_id)
                if seen is not None:
                    yield OwnObject(
                        part.object_id, KIND_CHECKPOINT, manifest.number, number,
                        manifest.last_change, manifest.made_ns, part.digest, part.size,
                        seen.places[0],
                    )  # fmt: skip
