"""A whole vfs over a folder store, in one process, on a virtual clock: no kernel, no network."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from stashcordfs.cache import LocalFiles, Marks
from stashcordfs.crypto.keys import VolumeKeys
from stashcordfs.errors import DiscordUnavailable, ObjectMissing
from stashcordfs.journal import Journal
from stashcordfs.store.folder_store import FolderStore
from stashcordfs.types import ROOT_INO, Ino
from stashcordfs.vfs.blocks import Blocks, CacheLimits
from stashcordfs.vfs.durability import Durability
from stashcordfs.vfs.filesystem import FileSystem
from stashcordfs.vfs.reading import Reader
from stashcordfs.vfs.uploading import Uploader, UploadSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

BLOCK = 64 << 10
KEYS = VolumeKeys(bytes(16), {0: bytes(range(32))})


class FaultyStore(FolderStore):
    """A folder store that can be cut off, and that counts."""

    offline = False
    missing = False
    puts = 0
    fetched = 0

    async def put(self, packs, *, nonce):
        await trio.lowlevel.checkpoint()
        if self.offline:
            raise DiscordUnavailable("no network")
        self.puts += 1
        return await super().put(packs, nonce=nonce)

    async def fetch(self, location, start, length):
        await trio.lowlevel.checkpoint()
        if self.offline:
            raise DiscordUnavailable("no network")
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
    reports: list[str] = field(default_factory=list)

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


@asynccontextmanager
async def volume(
    folder: Path,
    *,
    cache_bytes: int = 1 << 30,
    dirty_bytes: int = 1 << 29,
    deadline_s: float = 60.0,
    power_lost: bool = False,
    upload: bool = True,
    settings: UploadSettings | None = None,
) -> AsyncIterator[Volume]:
    """Mounted inside; what is left stays under `folder` for the next one."""
    path = folder / "journal.sqlite"
    now = lambda: 1_000_000_000  # noqa: E731
    if not path.exists():
        Journal.create(path, clock_ns=now, uid=0, gid=0).close()
    journal = Journal.open(path, clock_ns=now)
    files = LocalFiles(folder / "blocks")
    marks = Marks(folder / "marks.map", BLOCK)
    (folder / "store").mkdir(exist_ok=True)
    store = FaultyStore(folder / "store")
    reports: list[str] = []
    blocks = Blocks(
        files=files,
        marks=marks,
        journal=journal,
        block_bytes=BLOCK,
        limits=CacheLimits(cache_bytes, 0, dirty_bytes, deadline_s),
        clock=trio.current_time,
    )
    for left in await journal.nameless():
        await journal.purge(left)
    await blocks.load(power_lost=power_lost)
    async with trio.open_nursery() as nursery:
        reader = Reader(
            blocks=blocks,
            journal=journal,
            store=store,
            keys=KEYS,
            nursery=nursery,
            read_ahead_bytes=4 * BLOCK,
            deadline_s=deadline_s,
            report=reports.append,
        )
        uploader = Uploader(
            blocks=blocks,
            journal=journal,
            store=store,
            keys=KEYS,
            settings=settings or UploadSettings(),
            clock=trio.current_time,
            report=reports.append,
        )
        durability = Durability(blocks=blocks, journal=journal)
        fs = FileSystem(
            journal=journal,
            blocks=blocks,
            reader=reader,
            uploader=uploader,
            durability=durability,
            nursery=nursery,
            now_ns=now,
            max_file_bytes=1 << 41,
        )
        if upload:
            nursery.start_soon(uploader.run)
        yield Volume(fs, blocks, uploader, durability, journal, store, reports)
        nursery.cancel_scope.cancel()
    await durability.commit()
    journal.close()
    marks.close()
    files.close()
