"""Many processes at once on one tree, in the manner of fsstress.

Each makes chaos where all do, and keeps files of its own whose bytes it knows. Errors that such
chaos explains are none; any other is a problem, and so are own files that are not what they were,
at once or after a remount without local data.

    python fsstress.py MOUNT SEED SECONDS    one of the processes
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[1] / "support")]
from mounted import NAME, DemoVolume

_EXPLAINED = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR,
              errno.EINVAL, errno.ELOOP, errno.EPERM, errno.ENODATA, errno.EBUSY,
              errno.EMLINK}  # fmt: skip
_OWN_BYTES = 300_000


@dataclass
class Result:
    seed: int
    processes: int
    operations: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    own_files: int = 0
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Worker:
    def __init__(self, mount: Path, seed: int) -> None:
        self._chance = random.Random(seed)
        self._seed = seed
        self._common = mount / "common"
        self._own = mount / f"own-{seed}"
        self._own.mkdir()
        self._known: dict[str, tuple[int, int]] = {}  # name: seed of its bytes, size
        self._made = 0
        self.operations: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, seconds: float) -> None:
        ways = [self.create] * 4 + [self.remove] * 2 + [self.rename, self.rename, self.link]
        ways += [self.make_folder, self.remove_folder, self.listing, self.soft, self.cut]
        ways += [self.attributes, self.read, self.sync, self.keep, self.keep, self.look]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            way = self._chance.choice(ways)
            try:
                way()
                self.operations[way.__name__] += 1
            except OSError as error:
                name = errno.errorcode.get(error.errno or 0, str(error))
                self.refused[f"{way.__name__} {name}"] += 1
                if error.errno not in _EXPLAINED | {None}:  # None: rmtree's own words
                    self.problems.append(f"{way.__name__}: {error}")
            except AssertionError as error:
                self.problems.append(f"{way.__name__}: {error}")

    # ------------------------------------------------------------------ where all are

    def _any(self) -> Path:
        depth = self._chance.choice([1, 1, 2, 2, 3])
        return self._common.joinpath(*(f"n{self._chance.randrange(12)}" for _ in range(depth)))

    def create(self) -> None:
        with self._any().open("r+b" if self._chance.random() < 0.3 else "wb") as file:
            file.seek(self._chance.choice([0, 0, 100, 5000, 1 << 20]))
            file.write(self._chance.randbytes(self._chance.choice([0, 10, 4096, 20_000])))

    def remove(self) -> None:
        self._any().unlink()

    def rename(self) -> None:
        self._any().rename(self._any())

    def link(self) -> None:
        self._any().hardlink_to(self._any())

    def make_folder(self) -> None:
        self._any().mkdir()

    def remove_folder(self) -> None:
        path = self._any()
        if self._chance.random() < 0.2 and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.rmdir()

    def listing(self) -> None:
        for entry in os.scandir(self._any()):
            with contextlib.suppress(FileNotFoundError):
                entry.stat(follow_symlinks=False)

    def soft(self) -> None:
        self._any().symlink_to(f"n{self._chance.randrange(12)}")

    def cut(self) -> None:
        os.truncate(self._any(), self._chance.choice([0, 1, 4096, 100_000]))

    def attributes(self) -> None:
        path = self._any()
        path.chmod(self._chance.choice([0o644, 0o755]))
        os.utime(path)
        os.setxattr(path, "user.a", self._chance.randbytes(20))
        os.removexattr(path, "user.a")

    def read(self) -> None:
        self._any().read_bytes()

    def sync(self) -> None:
        path = self._any()
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    # ------------------------------------------------------------------ what is its own

    def keep(self) -> None:
        self._made += 1
        name = f"kept-{self._made % 40}"
        size = self._chance.randrange(_OWN_BYTES)
        new = self._own / "new"
        new.write_bytes(bytes_of(self._seed, self._made, size))
        new.rename(self._own / name)
        self._known[name] = (self._made, size)

    def look(self) -> None:
        if not self._known:
            return
        name = self._chance.choice(sorted(self._known))
        number, size = self._known[name]
        assert (self._own / name).read_bytes() == bytes_of(self._seed, number, size), name

    def told(self) -> dict[str, Any]:
        return {
            "operations": self.operations,
            "refused": self.refused,
            "problems": self.problems[:20],
            "own": {name: [self._seed, *what] for name, what in self._known.items()},
        }


def bytes_of(seed: int, number: int, size: int) -> bytes:
    return random.Random(f"{seed} {number}").randbytes(size)


def soak_fsstress(folder: Path, *, minutes: float, seed: int, processes: int = 6) -> Result:
    result = Result(seed, processes)
    with DemoVolume.running(folder, server=("--no-rate-limits",)) as volume:
        (volume.mountpoint / "common").mkdir()
        workers = [_start(volume, seed * 100 + n, minutes * 60) for n in range(processes)]
        own: dict[Path, tuple[int, int, int]] = {}
        for number, worker in enumerate(workers):
            out, _ = worker.communicate(timeout=minutes * 60 + 300)
            told = json.loads(out) if not worker.returncode else {}
            if not told:
                result.problems.append(f"a process ended with {worker.returncode}")
                continue
            result.operations.update(told["operations"])
            result.refused.update(told["refused"])
            result.problems += told["problems"]
            place = volume.mountpoint / f"own-{seed * 100 + number}"
            own.update({place / name: what for name, what in told["own"].items()})
        tree = _tree(volume.mountpoint)
        volume.remount(without_cache=True)
        if _tree(volume.mountpoint) != tree:
            result.problems.append("the tree is another after a remount without local data")
        for path, what in own.items():
            result.own_files += 1
            if path.read_bytes() != bytes_of(*what):
                result.problems.append(f"{path.name} reads back wrong")
        log = (volume.state / NAME / "log").read_text(errors="replace")
        if "handler failed" in log:
            result.problems.append("a handler failed: " + log[log.index("handler failed") :][:1500])
    return result


def _start(volume: DemoVolume, seed: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(volume.mountpoint), str(seed), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _tree(root: Path) -> dict[str, tuple[int, int, int, int]]:
    found = {}
    for path in root.rglob("*"):
        seen = path.lstat()
        size = 0 if path.is_dir() and not path.is_symlink() else seen.st_size
        found[str(path)] = (seen.st_ino, seen.st_mode, seen.st_nlink, size)
    return found


if __name__ == "__main__":
    worker = Worker(Path(sys.argv[1]), int(sys.argv[2]))
    worker.run(float(sys.argv[3]))
    json.dump(worker.told(), sys.stdout)
