"""The tree of `make soak-scale`, and a process that makes a part of it: through `vfs`, no kernel.

    python tests/soak/scale_making.py NAME FIRST|SECOND FILES SEED FROM UNTIL    make a part
    python tests/soak/scale_making.py NAME READ FILES SEED COUNT                 compare a sample

A file's number tells everything of it, so that a run goes on where another was interrupted: a
change that is made again changes nothing. FIRST makes 94 % of the files; what SECOND does, a tenth
as many changes as there are files, comes after the checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from stashcordfs.config import load_settings
from stashcordfs.daemon.opened import opened
from stashcordfs.errors import FsError
from stashcordfs.journal import Journal
from stashcordfs.types import ROOT_INO, Ino
from stashcordfs.volumes import VolumeDir

if TYPE_CHECKING:
    from stashcordfs.vfs.filesystem import FileSystem

MIB = 1 << 20
A_FOLDER = 300  # files
_FOLDERS_A_FOLDER = 50
_FIRST = 94  # of a hundred files; the others are made after the checkpoint
# Of 94 numbers, one each is renamed, removed and written anew after the checkpoint.
_RENAMED, _REMOVED, _REWRITTEN = 5, 17, 40
_TWIN, _TWINS_EVERY = 7, 50  # a file in fifty has the content of another one
_LARGE_EVERY = 2000


@dataclass(frozen=True)
class Tree:
    files: int  # that are there in the end
    seed: int

    @property
    def first(self) -> int:
        """So many files are made before the checkpoint."""
        return self.files * _FIRST // 100

    @property
    def last(self) -> int:
        """Numbers end here; as many as are removed come beyond `files`."""
        return self.files + len(range(_REMOVED, self.first, _FIRST))

    @property
    def changes(self) -> int:
        """So many files are made, renamed, removed and rewritten after the checkpoint."""
        kinds = (_RENAMED, _REMOVED, _REWRITTEN)
        return self.last - self.first + sum(len(range(k, self.first, _FIRST)) for k in kinds)

    def folder(self, number: int) -> tuple[bytes, bytes]:
        at = number // A_FOLDER
        return b"part-%03d" % (at // _FOLDERS_A_FOLDER), b"folder-%05d" % at

    def name(self, number: int, *, renamed: bool = False) -> bytes:
        chance = random.Random(f"{self.seed} name {number}")
        kind = chance.choice([b"jpg", b"txt", b"py", b"html", b"o", b"json"])
        return b"%s-%05d.%s%s" % (
            chance.randbytes(chance.randint(2, 8)).hex().encode(),
            number % 100_000,
            kind,
            b".old" if renamed else b"",
        )

    def content(self, number: int, *, rewritten: bool = False) -> bytes:
        """Mostly a few hundred bytes to some KiB; one in 2,000 has up to six blocks of 1 MiB."""
        if number % _TWINS_EVERY == _TWIN and not rewritten:
            number -= 1
        chance = random.Random(f"{self.seed} content {number} {rewritten}")
        if number % _LARGE_EVERY == 0:
            return chance.randbytes(chance.randint(MIB + 1, 6 * MIB))
        if number % 100 == 1:
            return b""
        return chance.randbytes(min(100_000, int(chance.lognormvariate(7.1, 1.4))))

    def expected(self, number: int) -> tuple[tuple[bytes, bytes], bytes, bytes] | None:
        """Folder, name and content in the end; None: it is removed."""
        kind = number % _FIRST if number < self.first else -1
        if kind == _REMOVED:
            return None
        name = self.name(number, renamed=kind == _RENAMED)
        return self.folder(number), name, self.content(number, rewritten=kind == _REWRITTEN)


class Maker:
    def __init__(self, fs: FileSystem, tree: Tree) -> None:
        self._fs = fs
        self._tree = tree
        self._known: dict[tuple[bytes, ...], Ino] = {(): ROOT_INO}

    async def folder(self, path: tuple[bytes, ...]) -> Ino:
        if path not in self._known:
            parent = await self.folder(path[:-1])
            try:
                made = await self._fs.mkdir(parent, path[-1], 0o755, 0, 0)
            except FsError:
                found = await self._fs.lookup(parent, path[-1])
                assert found is not None
                made = found
            self._known[path] = made.ino
        return self._known[path]

    async def make(self, number: int) -> None:
        parent = await self.folder(self._tree.folder(number))
        try:
            fh, _ = await self._fs.create(
                parent, self._tree.name(number), 0o644, os.O_RDWR | os.O_EXCL, 0, 0
            )
        except FsError:  # an interrupted run had made it
            found = await self._fs.lookup(parent, self._tree.name(number))
            assert found is not None
            fh = await self._fs.open(found.ino, os.O_RDWR)
        await self._write(fh, self._tree.content(number))

    async def _write(self, fh: int, data: bytes) -> None:
        for at in range(0, len(data), MIB):
            await self._fs.write(fh, at, data[at : at + MIB])
        await self._fs.release(fh)

    async def change(self, number: int) -> None:
        """What becomes of an earlier file after the checkpoint."""
        tree, fs = self._tree, self._fs
        parent = await self.folder(tree.folder(number))
        name = tree.name(number)
        found = await fs.lookup(parent, name)
        if found is None:
            return  # done by an interrupted run
        if number % _FIRST == _RENAMED:
            new = tree.name(number, renamed=True)
            await fs.rename(parent, name, parent, new, noreplace=False, exchange=False)
        elif number % _FIRST == _REMOVED:
            await fs.unlink(parent, name)
        else:
            fh = await fs.open(found.ino, os.O_RDWR)
            data = tree.content(number, rewritten=True)
            await fs.setattr(found.ino, size=len(data), fh=fh)
            await self._write(fh, data)

    async def read(self, number: int) -> bytes | None:
        """The content of the file that should be there; None: there is none."""
        wanted = self._tree.expected(number)
        assert wanted is not None
        ino = ROOT_INO
        for name in (*wanted[0], wanted[1]):
            found = await self._fs.lookup(ino, name)
            if found is None:
                return None
            ino = found.ino
        fh = await self._fs.open(ino, os.O_RDONLY)
        data = b""
        while piece := await self._fs.read(fh, len(data), MIB):
            data += piece
        await self._fs.release(fh)
        return data


def _changes(tree: Tree) -> Iterator[tuple[bool, int]]:
    """After the checkpoint: (made anew, number), mixed."""
    step = max(1, tree.first // max(1, tree.last - tree.first))
    made = iter(range(tree.first, tree.last))
    for number in range(tree.first):
        if number % _FIRST in (_RENAMED, _REMOVED, _REWRITTEN):
            yield False, number
        if number % step == 0 and (new := next(made, None)) is not None:
            yield True, new
    for new in made:
        yield True, new


async def make(name: str, part: str, tree: Tree, begin: int, until: int) -> None:
    """Make a part of the tree and wait until Discord has it."""
    settings = load_settings(volume=name)
    volume = VolumeDir(settings.state_dir, name)
    with volume.lock():
        async with opened(settings, volume, telling_too=True) as (made, _, _):
            made.nursery.start_soon(made.durability.run_syncs)  # else the WAL would only grow
            maker = Maker(made.filesystem, tree)
            if part == "FIRST":
                for number in range(begin, until):
                    await trio.lowlevel.checkpoint()
                    await maker.make(number)
            else:
                for at, (new, number) in enumerate(_changes(tree)):
                    if begin <= at < until:
                        await (maker.make(number) if new else maker.change(number))
            await made.filesystem.sync_remote()


async def want_checkpoint(name: str) -> None:
    """Let the next mount take a checkpoint at once."""
    volume = VolumeDir(load_settings(volume=name).state_dir, name)
    with volume.lock():
        journal = Journal.open(volume.path / "journal.sqlite", clock_ns=time.time_ns)
        try:
            await journal.set_local("checkpoint_wanted", "1")
            journal.commit()
        finally:
            journal.close()


async def compare(name: str, tree: Tree, count: int) -> list[str]:
    """Read a sample of the files through `vfs`; what is not as it was written."""
    settings = load_settings(volume=name)
    volume = VolumeDir(settings.state_dir, name)
    chance = random.Random(tree.seed)
    numbers = sorted(chance.sample(range(tree.last), min(count, tree.last)))
    problems = []
    with volume.lock():
        async with opened(settings, volume) as (made, _, _):
            maker = Maker(made.filesystem, tree)
            for number in numbers:
                wanted = tree.expected(number)
                if wanted is not None and await maker.read(number) != wanted[2]:
                    problems.append(f"file {number} is not as it was written")
    return problems


def main() -> None:
    name, part, files, seed, *rest = sys.argv[1:]
    tree = Tree(int(files), int(seed))
    if part == "WANT":
        trio.run(want_checkpoint, name)
    elif part == "READ":
        print(json.dumps(trio.run(compare, name, tree, int(rest[0]))))
    else:
        trio.run(make, name, part, tree, int(rest[0]), int(rest[1]))


if __name__ == "__main__":
    main()
