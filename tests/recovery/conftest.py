from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from stashcordfs.cache import folder_name, read_owners
from stashcordfs.errors import FsError
from stashcordfs.recovery import fsck

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "vfs"))
from harness import BLOCK, clock, volume

__all__ = ["clock"]

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = 1


@dataclass
class Unmounted:
    """A small volume that nobody has mounted: folders, files on Discord, one not sent yet."""

    folder: Path
    contents: dict[str, bytes] = field(default_factory=dict)
    inos: dict[str, int] = field(default_factory=dict)

    @property
    def journal(self) -> Path:
        return self.folder / "journal.sqlite"

    @property
    def place(self) -> fsck.Place:
        return fsck.Place(self.folder, BLOCK, 0)

    def check(self) -> fsck.Report:
        return fsck.check(self.place, mounted=False, progress=lambda *_: None)

    def repair(self) -> fsck.Report:
        return fsck.repair(self.place, progress=lambda *_: None)

    def local_file(self, name: str) -> Path:
        owners = {key: number for number, key in read_owners(self.folder / "blocks")}
        number = owners[self.inos[name], 0]
        return self.folder / "blocks" / folder_name(number) / f"{number:x}"

    def mounted(self, use: Callable, **options) -> object:
        """Mount, let `use` do something, unmount; what it returned."""

        async def main() -> object:
            async with volume(self.folder, **options) as v:
                return await use(v)

        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.02))

    def read(self, name: str) -> bytes | int | None:
        """What is in a file, or the errno of reading it."""

        async def use(v) -> bytes | int | None:
            try:
                return await v.read(self.inos[name])
            except FsError as error:
                return error.errno

        return self.mounted(use, deadline_s=2, upload=False)


@pytest.fixture
def unmounted(tmp_path: Path) -> Unmounted:
    made = Unmounted(tmp_path / "state")
    made.folder.mkdir()

    async def fill(v) -> None:
        made.inos["d"] = (await v.fs.mkdir(ROOT, b"d", 0o755, 0, 0)).ino
        made.inos["e"] = (await v.fs.mkdir(made.inos["d"], b"e", 0o755, 0, 0)).ino
        for number in range(4):
            name = f"d/f{number}"
            made.contents[name] = os.urandom(2 * BLOCK + number)
            made.inos[name] = await v.make(
                b"f%d" % number, made.contents[name], parent=made.inos["d"]
            )
        made.inos["link"] = (await v.fs.symlink(ROOT, b"link", b"target", 0, 0)).ino
        await v.fs.link(made.inos["d/f0"], ROOT, b"second")
        await v.fs.sync_remote()

    async def add_unsent(v) -> None:
        made.contents["unsent"] = os.urandom(BLOCK)
        made.inos["unsent"] = await v.make(b"unsent", made.contents["unsent"])
        await v.durability.sync()

    made.mounted(fill)
    made.mounted(add_unsent, upload=False)
    return made
