"""Power cuts and kills of a vfs in this process, on a virtual clock: thousands in minutes.

    python tests/vfs/cuts.py --seeds 1000 [--first 0]

What a disk must have after a cut is what was synced; what it may have is that or anything written
since, for each file on its own. So a cut is a copy of the state, made of pieces chosen by chance:
the journal as it was at its last fdatasync or as it is, each local file as it was at its last one
or as it is. Work in threads takes virtual time, before and after, so that everything else comes in
between. What may be there then is told by the model of `tests/crash`.

No kernel here, so names, mappings and what the page cache does are left to `tests/crash`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import trio
import trio.testing

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "crash")]
from checker import Checker, Verdict  # noqa: E402
from harness import BLOCK, Volume, volume  # noqa: E402
from ledger import Operation  # noqa: E402
from model import Cut, State, allowed  # noqa: E402
from pages import PAGE_BYTES, PageMaker  # noqa: E402

from stashcordfs.cache import LocalFiles  # noqa: E402
from stashcordfs.errors import ContentLost  # noqa: E402
from stashcordfs.journal.sqlite.database import Database  # noqa: E402
from stashcordfs.vfs.uploading import UploadSettings  # noqa: E402

_MOST_PAGES = 5 * BLOCK // PAGE_BYTES // 2
_ROUNDS = 4
_JOURNAL = ("journal.sqlite", "journal.sqlite-wal")


SYNCS = ("journal", "owners", "files")


class Disk:
    """What the disk below `folder` has for certain. `without`: a kind of sync that does nothing."""

    def __init__(self, folder: Path, *, without: str = "") -> None:
        self.folder = folder
        self._without = without
        self._journal = self._read_journal()
        self._files = {path: path.read_bytes() for path in self._local_files()}

    def _read_journal(self) -> dict[str, bytes]:
        paths = [self.folder / name for name in _JOURNAL]
        return {path.name: path.read_bytes() for path in paths if path.exists()}

    def _local_files(self) -> list[Path]:
        return [path for path in self.folder.glob("blocks/**/*") if path.is_file()]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take note of every sync inside."""
        sync_wal, sync = Database._sync_wal, LocalFiles._sync_owners
        sync_files = LocalFiles.sync

        def wal(database: Database) -> None:
            sync_wal(database)
            if self._without != "journal":
                self._journal = self._read_journal()

        def owners(files: LocalFiles) -> None:
            sync(files)
            if self._without != "owners":
                path = self.folder / "blocks" / "owners"
                self._files[path] = path.read_bytes()

        def some(files: LocalFiles, keys: list[Any]) -> None:
            sync_files(files, keys)
            for key in keys:
                if files.exists(key) and self._without != "files":
                    path = Path(files.path(key))
                    self._files[path] = path.read_bytes()

        with (
            mock.patch.object(Database, "_sync_wal", wal),
            mock.patch.object(LocalFiles, "_sync_owners", owners),
            mock.patch.object(LocalFiles, "sync", some),
        ):
            yield

    def cut(self, target: Path, chance: random.Random, *, power: bool) -> None:
        """What is left goes to `target`."""
        target.mkdir()
        (target / "store").symlink_to((self.folder / "store").resolve())
        shutil.copyfile(self.folder / "marks.map", target / "marks.map")
        lost = power and chance.random() < 0.5
        for name, data in (self._journal if lost else self._read_journal()).items():
            (target / name).write_bytes(data)
        for path in self._local_files():
            lost = power and chance.random() < 0.5
            data = self._files.get(path, b"") if lost else path.read_bytes()
            new = target / path.relative_to(self.folder)
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(data)


class Writer:
    """Works on one file, and notes what it did as the crash tester's writers do."""

    def __init__(
        self, v: Volume, name: str, start: State, maker: PageMaker, chance: random.Random
    ) -> None:
        self.name = name
        self.operations: list[Operation] = []
        self.wrong: list[str] = []
        self.busy = False
        self.fh = -1
        self._v = v
        self._maker = maker
        self._chance = chance
        self.file = start.names[name]
        size, pages = start.files[self.file]
        self.size, self.pages = size, list(pages)

    def begin(self, kind: str, **about: Any) -> Operation:
        about = {"file": self.file, **about}
        op = Operation(len(self.operations) + 1, kind, about, trio.current_time())
        self.operations.append(op)
        return op

    async def run(self, versions: Iterator[int]) -> None:
        acts = {
            self._overwrite: 6, self._append: 5, self._cut: 3, self._empty: 2, self._grow: 2,
            self._fsync: 5, self._reopen: 2, self._read: 3, self._evict: 1, self._rest: 4,
        }  # fmt: skip
        self._versions = versions
        self.ino = await self._v.fs.resolve(self.name.encode())
        self.fh = await self._v.fs.open(self.ino, os.O_RDWR)
        while True:
            await self._chance.choices(list(acts), list(acts.values()))[0]()

    async def _write(self, first: int, count: int) -> None:
        version, end = next(self._versions), (first + count) * PAGE_BYTES
        op = self.begin("write", first=first, count=count, version=version, end=end, direct=False)
        self.busy = True
        self.pages[first : first + count] = [version] * count
        self.size = max(self.size, end)
        data = self._maker.make_run(self.file, first, count, version)
        await self._v.fs.write(self.fh, first * PAGE_BYTES, data)
        self._done(op)

    def _done(self, op: Operation) -> None:
        op.done = trio.current_time()
        self.busy = False

    async def _overwrite(self) -> None:
        if whole := self.size // PAGE_BYTES:
            first = self._chance.randrange(whole)
            await self._write(first, min(self._chance.randrange(1, 12), whole - first))

    async def _append(self) -> None:
        first = self.size // PAGE_BYTES
        if room := _MOST_PAGES - first:
            await self._write(first, min(room, self._chance.randrange(1, 20)))

    async def _truncate(self, size: int) -> None:
        op = self.begin("truncate", size=size)
        self.busy = True
        del self.pages[-(-size // PAGE_BYTES) :]
        self.pages += [0] * (-(-size // PAGE_BYTES) - len(self.pages))
        self.size = size
        if size or self._chance.random() < 0.5:
            await self._v.fs.setattr(self.ino, size=size)
        else:
            await self._v.fs.release(await self._v.fs.open(self.ino, os.O_RDWR | os.O_TRUNC))
        self._done(op)

    async def _cut(self) -> None:
        size = self._chance.randrange(self.size + 1)
        await self._truncate(self._chance.choice([size, size // PAGE_BYTES * PAGE_BYTES]))

    async def _empty(self) -> None:
        await self._truncate(0)
        await self._append()

    async def _grow(self) -> None:
        whole = self.size // PAGE_BYTES
        if not self.size % PAGE_BYTES and whole < _MOST_PAGES:
            more = self._chance.randrange(1, _MOST_PAGES - whole + 1)
            await self._truncate((whole + more) * PAGE_BYTES)

    async def _fsync(self) -> None:
        await self.fsync(self.fh)

    async def fsync(self, fh: int) -> None:
        """Also for who fsyncs another's file: what is half-way is not covered then."""
        if not self.busy:
            op = self.begin("fsync")
            await self._v.fs.fsync(fh, False)
            op.done = trio.current_time()

    async def _reopen(self) -> None:
        op = self.begin("close")
        await self._v.fs.release(self.fh)
        op.done = trio.current_time()
        self.fh = await self._v.fs.open(self.ino, os.O_RDWR)

    async def _read(self) -> None:
        got = b""
        while piece := await self._v.fs.read(self.fh, len(got), 32 << 10):
            got += piece
        wanted = [self._maker.make(self.file, n, v) for n, v in enumerate(self.pages)]
        if got != b"".join(wanted)[: self.size]:
            at = next((n for n, p in enumerate(wanted) if got[n * 4096 : n * 4096 + 4096] != p), -1)
            self.wrong.append(f"{self.name} is read otherwise than written, from page {at} on")

    async def _evict(self) -> None:
        await self._v.blocks.evict(1 << 30)

    async def _rest(self) -> None:
        await trio.sleep(self._chance.choice([0.001, 0.02, 0.2]))


async def _syncs(v: Volume, writers: list[Writer], chance: random.Random) -> None:
    """The timer's sync, and fsyncs of other programs."""
    while True:
        await trio.sleep(chance.choice([0.005, 0.05, 0.3]))
        if chance.random() < 0.4:
            await v.durability.sync()
        else:
            writer = chance.choice(writers)
            if writer.fh >= 0:
                fh = await v.fs.open(writer.ino, os.O_RDWR)
                await writer.fsync(fh)
                await v.fs.release(fh)


def _slowly(chance: random.Random) -> Any:
    """In place of `trio.to_thread.run_sync`: takes a while, and then lets others come first."""

    async def run(work: Any, *args: Any, **_: Any) -> Any:
        await trio.sleep(chance.choice([0, 0.001, 0.01, 0.03]))
        result = work(*args)
        await trio.sleep(chance.choice([0, 0.001, 0.01, 0.03]))
        return result

    return run


async def _load(
    folder: Path, start: State, chance: random.Random, power: bool, now: Any, without: str
) -> Any:
    """Work on it until a moment of chance; the state is left at `folder`, with what was cut."""
    maker, versions = now
    settings = UploadSettings(delay_s=chance.choice([0.01, 0.1, 3.0]), concurrency=2)
    disk = Disk(folder, without=without)
    with disk.watched():
        async with volume(folder, settings=settings, power_lost=power, cache_bytes=12 * BLOCK) as v:
            await v.durability.sync()  # what a kill has left is not yet safe from a power cut
            writers = [Writer(v, name, start, maker, chance) for name in sorted(start.names)]
            with trio.move_on_after(chance.choice([0.05, 0.3, 1.5])):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(v.durability.run_commits)
                    for _ in range(2):
                        nursery.start_soon(_syncs, v, writers, chance)
                    for writer in writers:
                        nursery.start_soon(writer.run, versions)
            at = trio.current_time()
            power = chance.random() < 0.7
            after = folder.with_name(f"{folder.name}x")
            disk.cut(after, chance, power=power)
    wrong = [text for writer in writers for text in writer.wrong]
    return after, Cut(at, power=power), {w.name: w.operations for w in writers}, wrong


async def _check(
    folder: Path, start: State, cut: Cut, told: dict[str, list[Operation]], maker: PageMaker
) -> Verdict:
    """Copy all out of a copy of the state, and judge that."""
    aside, out = folder.with_name("aside"), folder.with_name("out")
    for old in (aside, out):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(folder, aside, symlinks=True)
    out.mkdir()
    verdict = Verdict()
    async with volume(aside, power_lost=cut.power, upload=False) as v:
        for name, file in start.names.items():
            try:
                data = await v.read(await v.fs.resolve(name.encode()))
            except ContentLost as error:
                verdict.wrong.append(f"{name}: {error}")
                continue
            (out / name).write_bytes(data)
            may = allowed(file, start, told[name], cut)
            Checker(out, maker)._check_file(name, file, may, verdict)
    return verdict


async def rounds(folder: Path, seed: int, without: str) -> list[str]:
    """A few rounds, each upon what the last one has left. What was wrong, if anything."""
    chance = random.Random(seed)
    trio._core._run._r.seed(seed)
    maker, versions = PageMaker(seed), iter(range(1, 1 << 30))
    state = State({"a": 10, "b": 11}, {10: (0, []), 11: (0, [])})
    at, power = folder / "s", False
    async with volume(at, upload=False) as v:
        for name in state.names:
            await v.make(name.encode())
    with mock.patch.object(trio.to_thread, "run_sync", _slowly(chance)):
        for number in range(_ROUNDS):
            at, cut, told, wrong = await _load(at, state, chance, power, (maker, versions), without)
            verdict = await _check(at, state, cut, told, maker)
            if wrong := wrong + verdict.wrong:
                kind = "power cut" if cut.power else "kill"
                return [f"seed {seed}, round {number}, {kind}: {text}" for text in wrong]
            if verdict.damaged:  # ends inside a page: no version says what is there
                return []
            state, power = State(state.names, verdict.state.files), cut.power
    return []


def run(seed: int, *, without: str = "") -> list[str]:
    """All of one seed, on a virtual clock. `without`: of `SYNCS`, one that must not be missed."""
    with tempfile.TemporaryDirectory(prefix="cuts-") as folder:
        clock = trio.testing.MockClock(autojump_threshold=0)
        with mock.patch.object(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True):
            return trio.run(rounds, Path(folder), seed, without, clock=clock)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--without", choices=SYNCS, default="", help="a sync to do without: fails")
    options = parser.parse_args()
    failed = 0
    for seed in range(options.first, options.first + options.seeds):
        if wrong := run(seed, without=options.without):
            failed += 1
            print(*wrong, sep="\n", flush=True)
    print(f"{options.seeds} seeds, {failed} of them failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
