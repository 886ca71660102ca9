"""A mount and a plain folder that get the same operations and must stay alike."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import visible
from mounted import NAME, DemoVolume
from shrunk import ShrunkVolume
from sides import Side

from stashcordfs.ops.control import ControlClient
from stashcordfs.volumes import VolumeDir

BLOCK_BYTES = 64 << 10  # the smallest, so that small files have several
_SETTINGS = {
    "block_size": str(BLOCK_BYTES),
    "min_free_bytes": "0",
    "upload_delay_s": "0.1",
}
_FILLER_BYTES = 5 << 20  # more than the block cache takes


class Difference(AssertionError):
    """The mount and the plain folder are not alike."""


class Rig:
    """One volume, and the folders that were played with on it. Beside it the plain ones."""

    def __init__(self, volume: DemoVolume, plain: Path) -> None:
        self.volume = volume
        self.plain = plain
        self.games: list[Game] = []
        self.steps = 0
        self.remounts = 0
        self._begun = 0
        self.difference = ""  # the first one, with the steps that led to it
        plain.mkdir()
        self._fill()

    @classmethod
    @contextlib.contextmanager
    def running(cls, folder: Path) -> Iterator[Rig]:
        server = ("--no-rate-limits",)
        with ShrunkVolume.running(folder / "volume", settings=_SETTINGS, server=server) as volume:
            yield cls(volume, folder / "plain")

    def _fill(self) -> None:
        with (self.volume.mountpoint / "filler").open("wb") as file:
            for number in range(_FILLER_BYTES // BLOCK_BYTES):  # small when packed, quick to fetch
                file.write(b"%08d" % number * (BLOCK_BYTES // 8))

    def game(self) -> Game:
        self._begun += 1
        name = f"game-{self._begun:05}"
        sides = [Side(at / name) for at in (self.volume.mountpoint, self.plain)]
        for side in sides:
            side.root.mkdir()
        self.games.append(Game(self, *sides))
        return self.games[-1]

    def sync(self) -> None:
        """Discord gets everything: what follows changes clean blocks."""
        control = ControlClient(VolumeDir(self.volume.state, NAME).control_path, timeout_s=120)
        for name in control.call("open_for_writing", path="")["paths"]:
            with contextlib.suppress(OSError):
                fd = os.open(self.volume.mountpoint / str(name), os.O_RDONLY | os.O_NONBLOCK)
                os.fsync(fd)
                os.close(fd)
        for _ in control.stream("sync", path=""):
            pass

    def press(self) -> None:
        """Read what fills the block cache: clean blocks of all others go."""
        path = self.volume.mountpoint / "filler"
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for at in range(0, _FILLER_BYTES, 1 << 20):
                os.pread(fd, 1 << 20, at)
        finally:
            os.close(fd)

    def all_again(self) -> None:
        """Every game's folder by a mount without local data."""
        for game in self.games:
            game.close_all()
        self.volume.remount(without_cache=True)
        for game in self.games:
            game.compare(visible.look(game.mount), visible.look(game.plain))


class Game:
    """Two sides of one example. Keeps what was done, for whoever looks into a difference."""

    def __init__(self, rig: Rig, mount: Side, plain: Side) -> None:
        self.rig = rig
        self.mount = mount
        self.plain = plain
        self.done: list[tuple[Any, ...]] = []
        self.since_remount = self.since_sync = self.since_press = 0
        self._seen = (visible.look(mount), visible.look(plain))

    def do(self, name: str, *args: Any) -> None:
        """One operation on both sides; then they must look alike."""
        self.done.append((name, *args))
        self.rig.steps += 1
        self.since_remount += 1
        self.since_sync += 1
        self.since_press += 1
        begun_ns = time.time_ns()
        outcomes = [side.do(name, *args) for side in (self.mount, self.plain)]
        if outcomes[0] != outcomes[1]:
            self._fail([f"the mount gave {outcomes[0]}, the plain folder {outcomes[1]}"])
        now = (visible.look(self.mount), visible.look(self.plain))
        self.compare(*now)
        wrong = visible.times(self._seen, now, begun_ns)
        if wrong:
            self._fail(wrong)
        self._seen = now

    def compare(self, mount: visible.Tree, plain: visible.Tree) -> None:
        if wrong := visible.differences(mount, plain):
            self._fail(wrong)

    def forget_pages(self, *, wait: bool) -> None:
        """Let the kernel ask again for the bytes of all files. `wait`: also for the dirty ones."""
        self.done.append(("forget_pages", wait))
        for path, _, names in os.walk(self.mount.root):
            for name in names:
                with contextlib.suppress(OSError):
                    fd = os.open(os.path.join(path, name), os.O_RDONLY | os.O_NONBLOCK)
                    with contextlib.suppress(OSError):
                        if wait:
                            os.fdatasync(fd)
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(fd)
        self.look_again()

    def sync(self) -> None:
        self.done.append(("sync",))
        self.since_sync = 0
        self.rig.sync()
        self.look_again()

    def press(self) -> None:
        self.done.append(("press",))
        self.since_press = 0
        self.rig.press()
        self.look_again()

    def look_again(self) -> None:
        now = (visible.look(self.mount), visible.look(self.plain))
        self.compare(*now)
        if wrong := visible.times(self._seen, now, time.time_ns()):
            self._fail(wrong)
        self._seen = now

    def remount(self, *, without_cache: bool) -> None:
        self.done.append(("remount", without_cache))
        self.since_remount = 0
        self.rig.remounts += 1
        self.close_all()
        before = visible.look(self.mount)
        self.rig.volume.remount(without_cache=without_cache)
        after = visible.look(self.mount)
        if wrong := visible.changed(before, after):
            self._fail(wrong)
        self._seen = (after, visible.look(self.plain))
        self.compare(*self._seen)

    def close_all(self) -> None:
        self.mount.close_all()
        self.plain.close_all()

    def _fail(self, wrong: list[str]) -> None:
        told = "\n".join(wrong[:20])
        if not self.rig.difference:
            self.rig.difference = told + "\n" + "\n".join(map(repr, self.done))
            (self.rig.plain.parent / "difference.json").write_text(
                json.dumps(self.done, default=lambda b: {"bytes": b.decode("latin-1")})
            )
        raise Difference(f"after {self.done[-1]}:\n{told}")
