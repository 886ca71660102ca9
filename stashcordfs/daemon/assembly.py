"""The parts of one mounted volume, built and tied together: once, for the daemon and for tests.

No kernel and no signals here; store, clocks and the verdict on a power cut are arguments.
"""

from __future__ import annotations

import errno
import logging
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from stashcordfs.cache import LocalFiles, Marks
from stashcordfs.errors import FsError, JournalError, StashcordError
from stashcordfs.journal import Journal
from stashcordfs.ops.audit import AuditLog
from stashcordfs.vfs.blocks import Blocks
from stashcordfs.vfs.checkpointing import Checkpointer, CheckpointSettings
from stashcordfs.vfs.collecting import Collector
from stashcordfs.vfs.durability import Durability, Levels
from stashcordfs.vfs.erasing import Eraser
from stashcordfs.vfs.fencing import Fence
from stashcordfs.vfs.filesystem import FileSystem
from stashcordfs.vfs.garbage_plan import CollectSettings
from stashcordfs.vfs.journal_channel import JournalChannel
from stashcordfs.vfs.network import Network
from stashcordfs.vfs.orphans import Orphans
from stashcordfs.vfs.publishing import Publisher, PublishSettings
from stashcordfs.vfs.reading import Reader
from stashcordfs.vfs.repacking import Repacker
from stashcordfs.vfs.settling import Settler
from stashcordfs.vfs.telling import Telltale
from stashcordfs.vfs.trash_can import TrashCan
from stashcordfs.vfs.uploading import Uploader, UploadSettings
from stashcordfs.vfs.usage import Usage
from stashcordfs.vfs.xattrs import Xattrs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.store.api import ObjectStore, Uploadable
    from stashcordfs.vfs.live import Spawn
    from stashcordfs.vfs.room import CacheLimits

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """How a volume is mounted. Bytes and seconds. `history_s`: of the trash, 0: it is off."""

    block_bytes: int
    limits: CacheLimits
    upload: UploadSettings
    read_ahead_bytes: int
    deadline_s: float
    max_file_bytes: int
    settle_delay_s: float = 20.0
    durability: str = "local"
    atime: str = "relatime"
    max_bytes: int = 0
    read_only: bool = False
    history_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Telling:
    """What telling Discord of the journal needs. `store` is bound to the journal channel.

    `genesis` is what the first segment is chained to, `record` goes along with each checkpoint,
    `host` names this machine in its claim, `requests` counts all that were made.
    """

    store: ObjectStore
    genesis: bytes
    record: Uploadable | None = None
    host: str = ""
    requests: Callable[[], int] = lambda: 0
    settings: PublishSettings | None = None
    checkpoints: CheckpointSettings | None = None
    garbage: CollectSettings | None = None


@dataclass(frozen=True, slots=True)
class Assembly:
    """The parts, tied together. Without a `publisher` Discord is not told of the journal."""

    journal: Journal
    blocks: Blocks
    reader: Reader
    uploader: Uploader
    settler: Settler
    durability: Durability
    levels: Levels
    filesystem: FileSystem
    trash: TrashCan
    nursery: trio.Nursery
    publisher: Publisher | None = None
    fence: Fence | None = None
    collector: Collector | None = None
    eraser: Eraser | None = None


def _spawn_in(nursery: trio.Nursery, report: Callable[[str], None]) -> Spawn:
    """A way to start tasks whose faults are reported and do not take the mount along."""

    async def guarded(task: Callable[..., Awaitable[None]], args: tuple[object, ...]) -> None:
        try:
            await task(*args)
        except StashcordError as error:
            report(f"{task.__qualname__}: {error}")
        except Exception as error:
            log.exception("task failed task=%s", task.__qualname__)
            report(f"{task.__qualname__} failed: {error!r}")

    def spawn(task: Callable[..., Awaitable[None]], *args: object) -> None:
        nursery.start_soon(guarded, task, args)

    return spawn


async def _told(
    telling: Telling,
    folder: Path,
    journal: Journal,
    blocks: Blocks,
    durability: Durability,
    uploader: Uploader,
    keys: VolumeKeys,
    clock: Callable[[], float],
    now_ns: Callable[[], int],
    report: Callable[[str], None],
) -> tuple[Fence, Publisher]:
    """The parts that tell Discord of the journal, and keep it to one writer."""
    channel = JournalChannel(journal=journal, store=telling.store, keys=keys, clock=clock)
    fence = Fence(
        journal=journal,
        channel=channel,
        keys=keys,
        genesis=telling.genesis,
        host=telling.host,
        now_ns=now_ns,
        report=report,
    )
    checkpointer = Checkpointer(
        journal=journal,
        path=folder / "journal.sqlite",
        channel=channel,
        fence=fence,
        keys=keys,
        record=telling.record,
        now_ns=now_ns,
        settings=telling.checkpoints,
    )
    publisher = Publisher(
        journal=journal,
        blocks=blocks,
        durability=durability,
        channel=channel,
        fence=fence,
        checkpointer=checkpointer,
        keys=keys,
        clock=clock,
        now_ns=now_ns,
        report=report,
        requests=telling.requests,
        backlog=lambda: uploader.backlog,
        settings=telling.settings,
    )
    await fence.load()
    await publisher.load()
    uploader.halted = lambda: bool(fence.reason)
    uploader.head = publisher.head
    uploader.committed = publisher.uploaded
    fence.on_fenced = uploader.look_again
    durability.published = publisher.flush
    return fence, publisher


def _collecting(
    telling: Telling,
    folder: Path,
    journal: Journal,
    store: ObjectStore,
    keys: VolumeKeys,
    uploader: Uploader,
    settler: Settler,
    publisher: Publisher,
    fence: Fence,
    network: Network,
    clock: Callable[[], float],
    now_ns: Callable[[], int],
) -> Collector:
    """The parts that collect garbage: only a volume that tells Discord of its journal may."""
    settings = telling.garbage or CollectSettings()
    repacker = Repacker(
        journal=journal,
        store=store,
        keys=keys,
        settler=settler,
        head=publisher.head,
        compress=lambda: uploader.settings.compress,
    )
    orphans = Orphans(
        journal=journal,
        store=store,
        keys=keys,
        now_ns=now_ns,
        grace_s=settings.history_s,
        every_s=settings.orphans_every_s,
    )
    return Collector(
        journal=journal,
        path=folder / "journal.sqlite",
        store=store,
        uploader=uploader,
        publisher=publisher,
        fence=fence,
        repacker=repacker,
        orphans=orphans,
        now_ns=now_ns,
        clock=clock,
        requests=telling.requests,
        offline=lambda: network.gone,
        settings=settings,
    )


def _gate(options: Options, fence: Fence | None) -> Callable[[], None]:
    """What raises EROFS. The kernel would let a read-only mount be remounted for writing."""

    def refuse() -> None:
        raise FsError(errno.EROFS)

    if options.read_only:
        return refuse
    return fence.require_writable if fence is not None else lambda: None


@asynccontextmanager
async def assembled(
    folder: Path,
    options: Options,
    *,
    store: ObjectStore,
    keys: VolumeKeys,
    clock: Callable[[], float],
    now_ns: Callable[[], int],
    power_lost: Callable[[Journal], Awaitable[bool]],
    begun: Callable[[Journal], Awaitable[None]],
    ended: Callable[[Journal], Awaitable[None]],
    report: Callable[[str], None],
    last_error: Callable[[], str] = lambda: "",
    telling: Telling | None = None,
) -> AsyncIterator[Assembly]:
    """The parts over the local state in `folder`, loaded and ready to serve.

    `begun` is told when what the last run left is taken up, `ended` when everything is durable here
    and the tasks have ended; then all is closed.
    """
    async with AsyncExitStack() as stack:
        journal = Journal.open(folder / "journal.sqlite", clock_ns=now_ns)
        stack.callback(journal.close)
        files = LocalFiles(folder / "blocks")
        stack.callback(files.close)
        marks = Marks(folder / "marks.map", options.block_bytes)
        stack.callback(marks.close)
        blocks = Blocks(
            files=files,
            marks=marks,
            journal=journal,
            block_bytes=options.block_bytes,
            limits=options.limits,
            clock=clock,
        )
        lost = await power_lost(journal)
        if not lost and any(mark.version > journal.versions_given() for mark in marks):
            text = "the journal is older than the data beside it: run stashcordfs fsck --repair"
            raise JournalError(text)  # else unsent data that it does not know would be removed
        for left in await journal.nameless():
            await journal.purge(left)
        await blocks.load(power_lost=lost)
        await begun(journal)
        await journal.wal_sync()
        network = Network(probe=store.ping, clock=clock)
        levels = Levels(journal, options.durability)
        await levels.load()
        async with trio.open_nursery() as nursery:
            spawn = _spawn_in(nursery, report)
            reader = Reader(
                blocks=blocks,
                journal=journal,
                store=store,
                keys=keys,
                spawn=spawn,
                answered=network.answered,
                read_ahead_bytes=options.read_ahead_bytes,
                deadline_s=options.deadline_s,
                report=report,
            )
            settler = Settler(
                journal=journal,
                store=store,
                network=network,
                clock=clock,
                now_ns=now_ns,
                report=report,
                listing_s=options.settle_delay_s,
            )
            uploader = Uploader(
                blocks=blocks,
                journal=journal,
                store=store,
                keys=keys,
                settler=settler,
                network=network,
                settings=options.upload,
                clock=clock,
                report=report,
            )
            durability = Durability(
                blocks=blocks, journal=journal, uploader=uploader, deadline_s=options.deadline_s
            )
            publisher, fence, collector, eraser = None, None, None, None
            if telling is not None:
                fence, publisher = await _told(
                    telling,
                    folder,
                    journal,
                    blocks,
                    durability,
                    uploader,
                    keys,
                    clock,
                    now_ns,
                    report,
                )
                collector = _collecting(
                    telling, folder, journal, store, keys, uploader, settler, publisher, fence,
                    network, clock, now_ns,
                )  # fmt: skip
                eraser = Eraser(
                    journal=journal,
                    folder=folder,
                    blocks=blocks,
                    store=store,
                    keys=keys,
                    journal_channel=telling.store.channels[0],
                    uploader=uploader,
                    durability=durability,
                    publisher=publisher,
                    fence=fence,
                    collector=collector,
                    now_ns=now_ns,
                    audit=AuditLog(folder / "audit.log"),
                )
            telltale = Telltale(
                journal=journal, blocks=blocks, told=publisher, last_error=last_error
            )
            xattrs = Xattrs(
                journal=journal, blocks=blocks, levels=levels, telltale=telltale, now_ns=now_ns
            )
            await xattrs.load()
            filesystem = FileSystem(
                journal=journal,
                blocks=blocks,
                reader=reader,
                uploader=uploader,
                durability=durability,
                levels=levels,
                xattrs=xattrs,
                usage=Usage(journal=journal, blocks=blocks, max_bytes=options.max_bytes),
                spawn=spawn,
                now_ns=now_ns,
                max_file_bytes=options.max_file_bytes,
                atime=options.atime,
                require_writable=_gate(options, fence),
                published=None if publisher is None else publisher.flush,
            )
            trash = TrashCan(
                journal=journal,
                blocks=blocks,
                levels=levels,
                now_ns=now_ns,
                require_writable=_gate(options, fence),
                keep_s=options.history_s,
            )
            yield Assembly(
                journal, blocks, reader, uploader, settler, durability, levels, filesystem, trash,
                nursery, publisher, fence, collector, eraser,
            )  # fmt: skip
            nursery.cancel_scope.cancel()
        await durability.sync()
        await ended(journal)
