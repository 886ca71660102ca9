"""Purging: a file's name and content leave Discord, its history, and this machine, for good.

    names -> packs -> history -> local -> audit log; then the CDN, until it serves nothing of it

1. *names*: files, folders and their versions in the trash are forgotten here.
2. *packs*: every pack that holds a chunk of theirs, or whose table tells of them, is packed anew
   without (the collector does it), and its message deleted. A table tells more than the journal
   knows (older contents, older names), so all tables are read.
3. *history*: a new checkpoint, and segments that tell nothing of before; all older ones deleted.
4. *local*: the journal's file is written anew, its WAL emptied, copies of it removed.

Where it stands is in the journal before anything happens: cut short anywhere, `run` goes on at the
next mount, and every step may be done twice. What is deleted was noted with its link before, and is
asked for until Discord shows it no more and the CDN does not serve it.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import stat
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import trio

from stashcordfs.crypto.keys import (
    KIND_CHECKPOINT,
    KIND_MANIFEST,
    KIND_PACK,
    KIND_SEGMENT,
    object_id_of,
)
from stashcordfs.errors import (
    CryptoError,
    DiscordError,
    FsError,
    LocalDiskError,
    StashcordError,
    StoreError,
)
from stashcordfs.journal.erasing import Erased, take_doomed
from stashcordfs.store.fetching import fetch_table
from stashcordfs.types import ROOT_INO, ChunkId, Ino
from stashcordfs.vfs.trash_can import plain, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from pathlib import Path

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Journal
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.store.pack import Table
    from stashcordfs.types import Attributes, Location
    from stashcordfs.vfs.blocks import Blocks
    from stashcordfs.vfs.collecting import Collector
    from stashcordfs.vfs.durability import Durability
    from stashcordfs.vfs.fencing import Fence
    from stashcordfs.vfs.publishing import Publisher
    from stashcordfs.vfs.uploading import Uploader

log = logging.getLogger(__name__)

Address = tuple[int, int]  # channel, message
Place = tuple[int, bytes]  # folder, name

_TASK = "purge"  # the journal's fact: where an unfinished purge stands
_PAGE = 500
_LISTED = 100
_FETCHES_AT_ONCE = 8
_TABLES = 100  # that are in memory at a time
_TRIES = 2
_ASKED_ONE_BY_ONE = 20  # messages; more of a channel are looked for in its listing
_FIRST_AGAIN_S, _LONGEST_AGAIN_S = 60.0, 3600.0
_HISTORY = (KIND_SEGMENT, KIND_CHECKPOINT, KIND_MANIFEST)
# Copies of the journal, and what recoveries and mounts of the past have left.
_COPIES = ("journal.before-*", "journal.sqlite.*", "recover", "at-*")


@dataclass(slots=True)
class Plan:
    """What a purge would end. `inos`: folders before what is in them."""

    paths: list[str] = field(default_factory=list)
    inos: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    chunk_ids: set[ChunkId] = field(default_factory=set)
    files: int = 0
    folders: int = 0
    trashed: int = 0
    bytes: int = 0
    other_names: list[str] = field(default_factory=list)
    shared_bytes: int = 0
    shared_with: list[str] = field(default_factory=list)
    known: set[int] = field(default_factory=set)

    def as_json(self) -> dict[str, object]:
        """For a person who is to confirm it, and for `--json`."""
        return {
            name: getattr(self, name)
            for name in (
                "paths", "files", "folders", "trashed", "bytes", "other_names", "shared_bytes",
                "shared_with",
            )
        }  # fmt: skip


@dataclass(slots=True)
class Done:
    """What a purge has done, without names: for the audit log and for the command."""

    files: int = 0
    folders: int = 0
    trashed: int = 0
    bytes: int = 0
    shared_bytes: int = 0
    rewritten_messages: int = 0
    history_messages: int = 0
    still_served: int = 0


class Eraser:
    """One volume's purges, one at a time. `run` is supervised by the daemon."""

    def __init__(
        self,
        *,
        journal: Journal,
        folder: Path,
        blocks: Blocks,
        store: ObjectStore,
        keys: VolumeKeys,
        journal_channel: int,
        uploader: Uploader,
        durability: Durability,
        publisher: Publisher,
        fence: Fence,
        collector: Collector,
        now_ns: Callable[[], int],
        audit: Callable[[dict[str, object]], None],
    ) -> None:
        """Take the collaborators. `audit` writes a line durably."""
        self._journal = journal
        self._folder = folder
        self._blocks = blocks
        self._store = store
        self._keys = keys
        self._journal_channel = journal_channel
        self._channels = sorted({*store.channels, journal_channel})
        self._uploader = uploader
        self._durability = durability
        self._publisher = publisher
        self._fence = fence
        self._collector = collector
        self._now_ns = now_ns
        self._audit = audit
        self._turn = trio.Lock()
        self.stage = ""
        self.unnamed: Callable[[Ino, bytes, Ino], None] = lambda *_: None  # the kernel must forget

    @property
    def pending(self) -> int:
        """Attachments that were purged, and are not known to be gone from everywhere."""
        return self._journal.erasing_count

    # ------------------------------------------------------------------ planning

    async def plan(self, path: str, *, recursive: bool) -> Plan:
        """What a purge of a path would end. StashcordError when it cannot be.

        The path may be a file, a folder, or what was there and is in the trash.
        """
        self._fence.require_writable()
        below = plain(path)
        if not below:
            raise StashcordError("the root cannot be purged: destroy the volume instead")
        plan = Plan()
        await self._plan_live(below, plan, recursive=recursive)
        await self._plan_trash(below, plan)
        if not plan.inos:
            raise StashcordError(f"{shown(below)}: there is no such file, in the trash neither")
        for ino in plan.inos:
            plan.chunk_ids |= await self._journal.chunk_ids_of(Ino(ino))
            await trio.lowlevel.checkpoint()
        self._journal.commit()
        doomed = await trio.to_thread.run_sync(
            take_doomed, self._path, set(plan.inos), plan.chunk_ids
        )
        plan.shared_bytes = doomed.shared_bytes
        plan.shared_with = [shown(await self._journal.told_path(i)) for i in doomed.shared_with]
        return plan

    @property
    def _path(self) -> Path:
        return self._folder / "journal.sqlite"

    async def _plan_live(self, path: bytes, plan: Plan, *, recursive: bool) -> None:
        at = await self._journal.getattr(ROOT_INO)
        for name in path.split(b"/"):
            found = await self._journal.lookup(at.ino, name)
            if found is None:
                return
            at = found
        if stat.S_ISDIR(at.mode) and not recursive:
            raise StashcordError(f"{shown(path)} is a folder: --recursive purges it with all in it")
        pending = [at]
        while pending:
            await self._plan_one(pending.pop(), path, plan, pending)
            await trio.lowlevel.checkpoint()

    async def _plan_one(
        self, found: Attributes, path: bytes, plan: Plan, pending: list[Attributes]
    ) -> None:
        if found.ino in plan.known:
            return  # one more name of a file
        plan.known.add(found.ino)
        live = self._blocks.live.get(found.ino)
        if live is not None and live.handles:
            told = shown(await self._journal.told_path(found.ino))
            raise StashcordError(f"{told} is open: close it first")
        plan.inos.append(found.ino)
        for place in await self._journal.names_of(found.ino):
            plan.places.append(place)
        for each in await self._journal.paths_of(found.ino):
            inside = each == path or each.startswith(path + b"/")
            told_in = plan.paths if inside else plan.other_names
            if len(told_in) < _LISTED:
                told_in.append(shown(each))
        if not stat.S_ISDIR(found.mode):
            plan.files += 1
            plan.bytes += found.size
            return
        plan.folders += 1
        after = 0
        while page := await self._journal.read_dir(found.ino, after, _PAGE):
            after = page[-1][0]
            pending += [child for _, _, child in page]

    async def _plan_trash(self, path: bytes, plan: Plan) -> None:
        known = plan.known
        at = 0
        while page := await self._journal.trash_page(at, _PAGE):
            at = page[-1].found.ino
            for entry in page:
                where = await self._journal.trash_path(entry)
                inside = where is not None and (where == path or where.startswith(path + b"/"))
                if (inside or entry.parent in known) and entry.found.ino not in known:
                    known.add(entry.found.ino)
                    plan.inos.append(entry.found.ino)
                    plan.places.append((entry.parent, entry.name))
                    plan.trashed += not entry.is_folder
            await trio.lowlevel.checkpoint()

    # ------------------------------------------------------------------ the steps

    async def purge(self, plan: Plan) -> Done:
        """End what the plan says. Returns when Discord shows nothing of it any more.

        Any StashcordError leaves it unfinished: it goes on at the next call, or by `run`.
        """
        async with self._turn:
            await self._unfinished()
            await self._save(_Task.of(plan))
            done = await self._finish()
        assert done is not None
        return done

    async def _unfinished(self) -> None:
        while await self._finish() is not None:
            pass

    async def _save(self, task: _Task | None) -> None:
        await self._journal.set_local(_TASK, "" if task is None else task.encode())
        await self._journal.wal_sync()

    async def _finish(self) -> Done | None:
        """Go on with the purge that the journal knows of; None: there is none."""
        text = await self._journal.get_local(_TASK)
        if not text:
            return None
        task = _Task.decode(text)
        await self._fence.check()
        self._fence.require_writable()
        for stage, step in (
            ("names", self._end_names),
            ("packs", self._end_packs),
            ("history", self._end_history),
        ):
            if task.stage == stage:
                self.stage = stage
                await step(task)
                await self._save(task)
        self.stage = "local"
        await trio.to_thread.run_sync(_remove_copies, self._folder)
        self._journal.scrub()
        self._audit({"action": "purge", **asdict(task.done)})
        await self._save(None)
        try:
            await self._confirm()
        except DiscordError as error:  # `run` asks again
            log.info("purge: whether all is gone is asked later: %s", error)
        task.done.still_served = self._journal.erasing_count
        self.stage = ""
        return task.done

    async def _end_names(self, task: _Task) -> None:
        for number in reversed(task.inos):  # what is in a folder before the folder
            ino = Ino(number)
            entry = await self._journal.trashed(ino)
            if entry is not None:
                await self._journal.drop_trashed(entry)
            else:
                try:
                    await self._end_name(ino)
                except FsError as error:
                    if error.errno != errno.ENOTEMPTY:
                        raise
                    log.warning("purge: a folder was filled meanwhile, and stays")
                    task.inos.remove(number)
                    task.places -= set(await self._journal.names_of(ino))
            await trio.lowlevel.checkpoint()
        await self._durability.sync()  # the local files go with it
        await self._uploader.landed()
        task.stage = "packs"

    async def _end_name(self, ino: Ino) -> None:
        try:
            found = await self._journal.getattr(ino)
        except FsError:
            return  # done before
        live = self._blocks.live.get(ino)
        if live is not None and live.handles:
            told = shown(await self._journal.told_path(ino))
            raise StashcordError(f"{told} was opened meanwhile: close it, the purge goes on then")
        now = self._now_ns()
        with self._journal.without_trash():
            for parent, name in await self._journal.names_of(ino):
                if stat.S_ISDIR(found.mode):
                    found = await self._journal.rmdir(parent, name, now_ns=now)
                else:
                    found = await self._journal.unlink(parent, name, now_ns=now)
                self.unnamed(parent, name, ino)
        local = await self._blocks.abandon(found)
        await self._journal.purge(found, local=local)

    async def _end_packs(self, task: _Task) -> None:
        clean: set[tuple[int, bytes]] = set()
        while True:
            known, strays = await self._scan(task, clean)
            # What was condemned before tells nothing to the journal any more: it goes as a whole.
            waiting = {(one.channel, one.message) for one in await self._journal.condemned()}
            self._journal.commit()
            doomed = await trio.to_thread.run_sync(
                take_doomed, self._path, set(task.inos), task.chunk_ids
            )
            if not (known or strays or doomed.rows or waiting):
                break
            addresses = waiting | set(await self._collector.expel(doomed.rows, packs=known))
            strays -= addresses
            await self._note(addresses | strays)
            await self._collector.delete(addresses)
            await self._delete(strays)
            task.done.rewritten_messages += len(addresses) + len(strays)
        task.stage = "history"

    async def _scan(
        self, task: _Task, clean: set[tuple[int, bytes]]
    ) -> tuple[set[int], set[Address]]:
        """Packs (rows) that tell of what shall go, and messages that the journal does not know.

        `clean` grows by those that tell nothing (message, pack's id): they are not read again.
        """
        places = await self._journal.pack_places()
        held = {(channel, message) for _, channel, message in places.values()}
        known: set[int] = set()
        strays: set[Address] = set()
        listed = await self._listed(self._channels, (KIND_PACK,))
        fresh = [at for at in listed if (at.message, object_id_of(at.filename)) not in clean]
        for some in (fresh[n : n + _TABLES] for n in range(0, len(fresh), _TABLES)):
            for at, table in (await self._tables(some)).items():
                object_id = object_id_of(at.filename)
                assert object_id is not None
                if table is not None and not task.is_told_in(table):
                    clean.add((at.message, object_id))
                    continue
                row, channel, message = places.get(object_id, (0, 0, 0))
                if row and message <= 0:
                    raise StashcordError(
                        "an upload is being settled, or a pack that was missing is there again: "
                        "run stashcordfs verify; the purge goes on then"
                    )
                if row and (channel, message) == (at.channel, at.message):
                    known.add(row)
                elif (at.channel, at.message) not in held:
                    strays.add((at.channel, at.message))
        return known, strays

    async def _tables(self, packs: Collection[Location]) -> dict[Location, Table | None]:
        """The packs' tables; None for one that cannot be read: who knows what it tells."""
        found: dict[Location, Table | None] = {}
        faults: list[DiscordError] = []
        limit = trio.CapacityLimiter(_FETCHES_AT_ONCE)

        async def one(at: Location) -> None:
            async with limit:
                try:
                    found[at] = await self._table(at)
                except DiscordError as error:  # as itself, not in a group of the nursery's
                    faults.append(error)

        async with trio.open_nursery() as nursery:
            for at in packs:
                nursery.start_soon(one, at)
        if faults:
            raise faults[0]
        return found

    async def _table(self, at: Location) -> Table | None:
        object_id = object_id_of(at.filename)
        assert object_id is not None
        for _ in range(_TRIES):
            try:
                return (await fetch_table(self._store, self._keys, object_id, at))[0]
            except (StoreError, CryptoError) as error:
                log.warning("the table of pack %s cannot be read: %s", at.filename, error)
        return None

    async def _listed(self, channels: Iterable[int], kinds: Collection[int]) -> list[Location]:
        """Objects of some kinds that bear this volume's names."""
        found: list[Location] = []
        for channel in channels:
            after: int | None = 0
            while after is not None:
                page = await self._store.page(channel, after)
                found += [at for at in page.attachments if self._kind(at) in kinds]
                after = page.last
        return found

    def _kind(self, at: Location) -> int | None:
        object_id = object_id_of(at.filename)
        if object_id is None:
            return None
        try:
            return self._keys.read_object_id(object_id)[0]
        except CryptoError:
            return None  # another's

    async def _end_history(self, task: _Task) -> None:
        await self._note_all(await self._listed([self._journal_channel], _HISTORY))
        first = await self._publisher.renew()
        kept = await self._kept(first)
        after = await self._listed([self._journal_channel], _HISTORY)
        doomed = [at for at in after if at.message not in kept and at.message < max(kept)]
        await self._note_all(doomed)
        await self._delete({(at.channel, at.message) for at in doomed})
        for kind in _HISTORY:
            newest = await self._journal.newest_object(kind)
            end = first if kind == KIND_SEGMENT else (newest.number if newest else 0) - 1
            old = [o.object_id for o in await self._journal.own_objects(kind) if o.number <= end]
            await self._journal.drop_objects(old)
        await self._journal.wal_sync()
        task.done.history_messages = len({at.message for at in doomed})
        task.places, task.chunk_ids = set(), set()  # what is kept names nothing any more
        task.stage = "local"

    async def _kept(self, first: int) -> set[int]:
        """The messages that are needed of the renewed history."""
        manifest = await self._journal.newest_object(KIND_MANIFEST)
        assert manifest is not None
        wanted = [
            manifest,
            *await self._journal.own_objects(KIND_SEGMENT, after=first),
            *await self._journal.own_objects(KIND_CHECKPOINT, after=manifest.number - 1),
        ]
        return {own.location.message for own in wanted if own.location is not None}

    # ------------------------------------------------------------------ deleted, and gone?

    async def _note(self, messages: Collection[Address]) -> None:
        """Remember all attachments of messages before they are deleted."""
        for channel, message in sorted(messages):
            await self._note_all(await self._store.attachments(channel, message) or ())

    async def _note_all(self, attachments: Iterable[Location]) -> None:
        rows = []
        for at in attachments:
            try:
                link = await self._store.link(at)
            except StoreError:
                continue  # gone already
            rows.append(
                Erased(at.channel, at.message, at.attachment, link, self._now_ns(), gone=False)
            )
        await self._journal.add_erased(rows)
        await self._journal.wal_sync()

    async def _delete(self, messages: Collection[Address]) -> None:
        if messages:
            await self._fence.check()
            self._fence.require_writable()
            await self._store.delete(sorted(messages))

    async def _confirm(self) -> None:
        """Ask Discord for what was deleted, and the CDN for what it may still serve."""
        pending = await self._journal.erased()
        by_channel: dict[int, set[int]] = {}
        for one in pending:
            if not one.gone:
                by_channel.setdefault(one.channel, set()).add(one.message)
        for channel, messages in by_channel.items():
            there = await self._still_there(channel, messages)
            await self._delete({(channel, message) for message in there})
            for message in messages - there:
                await self._journal.note_gone(channel, message)
        for one in await self._journal.erased():
            if one.gone and not await self._store.serves(one.url):
                await self._journal.forget_erased(one)
        await self._journal.wal_sync()

    async def _still_there(self, channel: int, messages: set[int]) -> set[int]:
        if len(messages) <= _ASKED_ONE_BY_ONE:
            return {
                message
                for message in messages
                if await self._store.attachments(channel, message) is not None
            }
        there: set[int] = set()
        after: int | None = min(messages) - 1
        while after is not None and after < max(messages):
            page = await self._store.page(channel, after)
            there |= {at.message for at in page.attachments} & messages
            after = page.last
        return there

    async def run(self) -> None:
        """Go on with what an earlier run has left; ask the CDN until it serves nothing of it."""
        delay_s = _FIRST_AGAIN_S
        while True:
            before = self._journal.erasing_count
            try:
                async with self._turn:
                    await self._unfinished()
                    if before:
                        await self._confirm()
            except (DiscordError, FsError) as error:  # no network, or another writer has the volume
                log.info("purge: tried again later: %s", error)
            left = self._journal.erasing_count
            delay_s = min(2 * delay_s, _LONGEST_AGAIN_S) if left else _FIRST_AGAIN_S
            await trio.sleep(delay_s)


@dataclass(slots=True)
class _Task:
    """A purge under way, as the journal keeps it."""

    stage: str
    inos: list[int]
    places: set[Place]
    chunk_ids: set[ChunkId]
    done: Done

    @classmethod
    def of(cls, plan: Plan) -> _Task:
        counted = Done(
            plan.files, plan.folders, plan.trashed, plan.bytes, shared_bytes=plan.shared_bytes
        )
        return cls("names", plan.inos, set(plan.places), set(plan.chunk_ids), counted)

    def encode(self) -> str:
        return json.dumps(
            [
                self.stage,
                self.inos,
                [[parent, name.hex()] for parent, name in self.places],
                [chunk_id.hex() for chunk_id in self.chunk_ids],
                asdict(self.done),
            ]
        )

    @classmethod
    def decode(cls, text: str) -> _Task:
        stage, inos, places, chunk_ids, done = json.loads(text)
        return cls(
            stage,
            inos,
            {(parent, bytes.fromhex(name)) for parent, name in places},
            {ChunkId(bytes.fromhex(chunk_id)) for chunk_id in chunk_ids},
            Done(**done),
        )

    def is_told_in(self, table: Table) -> bool:
        """Whether a pack's table tells of an inode or of a name that shall go.

        What it says of older contents of these inodes is doomed from here on, too. So is a chunk of
        which it does not say whose it is, unless something refers to it: only history, which ends,
        can need that, and it may be an older content of what shall go.
        """
        inos = set(self.inos)
        mine = {ref.chunk_id for ref in table.references if ref.ino in inos}
        unowned = {chunk.chunk_id for chunk in table.chunks}
        unowned -= {ref.chunk_id for ref in table.references}
        self.chunk_ids |= mine | unowned
        return bool(mine) or any(
            note.ino in inos or (note.parent, note.name) in self.places for note in table.files
        )


def _remove_copies(folder: Path) -> None:
    """LocalDiskError."""
    try:
        for pattern in _COPIES:
            for path in folder.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    except OSError as error:
        raise LocalDiskError(error.errno or errno.EIO, f"copies of the journal: {error}") from error
