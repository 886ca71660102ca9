"""A whole vfs over a folder store, in one process, on a virtual clock: no kernel, no network."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from stashcordfs.crypto.keys import VolumeKeys
from stashcordfs.daemon.assembly import Options, Telling, assembled
from stashcordfs.errors import DiscordUnavailable, ObjectMissing
from stashcordfs.journal import Journal
from stashcordfs.store.folder_store import FolderStore
from stashcordfs.types import ROOT_INO, Ino
from stashcordfs.vfs.blocks import Blocks
from stashcordfs.vfs.collecting import Collector
from stashcordfs.vfs.durability import Durability
from stashcordfs.vfs.erasing import Eraser
from stashcordfs.vfs.fencing import Fence
from stashcordfs.vfs.filesystem import FileSystem
from stashcordfs.vfs.publishing import Publisher
from stashcordfs.vfs.room import CacheLimits
from stashcordfs.vfs.settling import Settler
from stashcordfs.vfs.trash_can import TrashCan
from stashcordfs.vfs.uploading import Uploader, UploadSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from stashcordfs.store.api import ObjectStore

BLOCK = 64 << 10


async def inline(work, *args, **_):
    """In place of `trio.to_thread.run_sync`: virtual time must not pass while a thread works."""
    await trio.lowlevel.checkpoint()
    return work(*args)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    """A virtual clock; what threads do is done on the loop, or it would jump meanwhile."""
    monkeypatch.setattr(trio.to_thread, "run_sync", inline)
    return trio.testing.MockClock(autojump_threshold=0)


KEYS = VolumeKeys(bytes(16), {0: bytes(range(32))})


class FaultyStore(FolderStore):
    """A folder store that can be cut off, and that counts."""

    offline = False
    missing = False
    puts = 0
    lists = 0
    fetched = 0
    pings = 0

    async def ping(self):
        await trio.lowlevel.checkpoint()
        self.pings += 1
        if self.offline:
            raise DiscordUnavailable("no network", offline=True)

    async def put(self, packs, *, nonce):
        await trio.lowlevel.checkpoint()
        if self.offline:
            raise DiscordUnavailable("no network", offline=True)
        self.puts += 1
        return await super().put(packs, nonce=nonce)

    async def listed(self, after):
        await trio.lowlevel.checkpoint()
        if self.offline:
            raise DiscordUnavailable("no network")
        self.lists += 1
        return await super().listed(after)

    async def fetch(self, location, start, length):
        await trio.lowlevel.checkpoint()
        if self.offline:
            raise DiscordUnavailable("no network", offline=True)
        if self.missing:
            raise ObjectMissing("deleted by hand")
        self.fetched += length
        return await super().fetch(location, start, length)


@dataclass
class Volume:
    fs: FileSystem
    blocks: Blocks
    uploader: Uploader
    durability: Durability
    journal: Journal
    store: FaultyStore
    settler: Settler
    nursery: trio.Nursery
    trash: TrashCan
    reports: list[str] = field(default_factory=list)
    publisher: Publisher | None = None
    fence: Fence | None = None
    collector: Collector | None = None
    eraser: Eraser | None = None

    async def make(self, name: bytes, data: bytes = b"", *, parent: Ino = ROOT_INO) -> Ino:
        fh, made = await self.fs.create(parent, name, 0o644, 2, 0, 0)
        if data:
            await self.write(fh, 0, data)
        await self.fs.release(fh)
        return made.ino

    async def write(self, fh: int, offset: int, data: bytes) -> None:
        """As the kernel does: in pieces of at most 1 MiB."""
        for at in range(0, len(data), 1 << 20):
            await self.fs.write(fh, offset + at, data[at : at + (1 << 20)])

    async def read(self, ino: Ino) -> bytes:
        fh = await self.fs.open(ino, 0)
        data = b""
        while piece := await self.fs.read(fh, len(data), 128 << 10):
            data += piece
        await self.fs.release(fh)
        return data


async def until(condition: Callable[[], object], *, within_s: float = 86_400) -> None:
    """Wait for what threads bring about: the virtual clock may jump while they work."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  nothing tells, in most cases
            await trio.sleep(1)


async def _nothing(_: Journal) -> None:
    """No ground to stand on here."""


@asynccontextmanager
async def volume(
    folder: Path,
    *,
    cache_bytes: int = 1 << 30,
    dirty_bytes: int = 1 << 29,
    deadline_s: float = 60.0,
    min_free_bytes: int = 0,
    power_lost: bool = False,
    upload: bool = True,
    settings: UploadSettings | None = None,
    other_store: ObjectStore | None = None,
    durability: str = "local",
    telling: Telling | None = None,
    begun: Callable[[Journal], Awaitable[None]] = _nothing,
    history_s: float = 0.0,
) -> AsyncIterator[Volume]:
    """Mounted inside; what is left stays under `folder` for the next one.

    With `telling`, Discord is told of the journal, through the same store unless it names one.
    """
    folder.mkdir(exist_ok=True)  # noqa: ASYNC240  a test may wait for its own disk
    path = folder / "journal.sqlite"
    now = lambda: int((1 + trio.current_time()) * 1e9)  # noqa: E731
    if not path.exists():
        Journal.create(path, clock_ns=now, uid=0, gid=0).close()
    store = FaultyStore(folder / "store")
    reports: list[str] = []

    async def verdict(_: Journal) -> bool:
        return power_lost

    async with assembled(
        folder,
        Options(
            block_bytes=BLOCK,
            limits=CacheLimits(cache_bytes, min_free_bytes, dirty_bytes, deadline_s),
            upload=settings or UploadSettings(),
            read_ahead_bytes=4 * BLOCK,
            deadline_s=deadline_s,
            max_file_bytes=1 << 41,
            durability=durability,
            history_s=history_s,
        ),
        store=other_store or store,
        keys=KEYS,
        clock=trio.current_time,
        now_ns=now,
        power_lost=verdict,
        begun=begun,
        ended=_nothing,
        report=reports.append,
        telling=telling and replace(telling, store=telling.store or store),
    ) as made:
        if upload:
            made.nursery.start_soon(made.uploader.run)
        if made.publisher is not None:
            made.nursery.start_soon(made.durability.run_commits)
            made.nursery.start_soon(made.publisher.run)
        yield Volume(
            made.filesystem,
            made.blocks,
            made.uploader,
            made.durability,
            made.journal,
            store,
            made.settler,
            made.nursery,
            made.trash,
            reports,
            made.publisher,
            made.fence,
            made.collector,
            made.eraser,
        )
