"""A folder of very many entries: made, listed while it changes, asked for, removed.

The daemon's memory is read on the way. While one thread lists, another makes, renames and removes
entries of the same folder: of those that are there all along none may be missing or come twice.
"""

from __future__ import annotations

import os
import random
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[1] / "support")]
from mounted import DemoVolume

_LOOK_EVERY = 10_000
_REWRITTEN = 64  # names that the other thread changes


@dataclass
class Result:
    """What was found. Seconds by phase, the daemon's memory in MiB."""

    entries: int
    problems: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    changes_while_listing: int = 0
    memory_mib: dict[str, int] = field(default_factory=dict)
    most_memory_mib: int = 0
    growth_while_listing_mib: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Soak:
    def __init__(self, volume: DemoVolume, entries: int, seed: int) -> None:
        self._volume = volume
        self._folder = volume.mountpoint / "many"
        self._status = Path(f"/proc/{volume.pid()}/status")
        self._random = random.Random(seed)
        self.result = Result(entries)

    def run(self) -> Result:
        self._folder.mkdir()
        self.result.memory_mib["at the start"] = self._memory("VmRSS")
        with self._phase("made"):
            for number in self._numbers():
                os.mknod(self._name(number), stat.S_IFREG | 0o644)
        before = self._memory("VmRSS")
        with self._phase("listed"), self._changing():
            self._list()
        self.result.growth_while_listing_mib = self._memory("VmRSS") - before
        with self._phase("asked for"):
            for number in self._numbers():
                if os.lstat(self._name(number)).st_nlink != 1:
                    self.result.problems.append(f"links of {number}")
        with self._phase("removed"):
            for number in self._numbers():
                os.unlink(self._name(number))  # noqa: PTH108  a Path would take as long again
        self._folder.rmdir()  # so nothing is left
        self.result.most_memory_mib = self._memory("VmHWM")
        return self.result

    def _numbers(self) -> Iterator[int]:
        """All, in an order of blocks by chance, as programs come upon names."""
        blocks = list(range(0, self.result.entries, _LOOK_EVERY))
        self._random.shuffle(blocks)
        for first in blocks:
            yield from range(first, min(first + _LOOK_EVERY, self.result.entries))

    def _name(self, number: int) -> str:
        return f"{self._folder}/entry-{number:07}"

    def _memory(self, which: str) -> int:
        line = next(x for x in self._status.read_text().splitlines() if x.startswith(which))
        return int(line.split()[1]) >> 10

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.result.seconds[name] = round(time.monotonic() - begun, 1)
        self.result.memory_mib[name] = self._memory("VmRSS")
        print(f"{name}: {self.result.seconds[name]} s", flush=True)

    def _list(self) -> None:
        seen = bytearray(self.result.entries)
        with os.scandir(self._folder) as listing:
            for entry in listing:
                if entry.name.startswith("entry-"):
                    seen[int(entry.name[6:])] += 1
        if seen.count(1) != self.result.entries:
            self.result.problems.append(f"missing: {seen.count(0)}, more than once: some")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Another thread makes, renames and removes further names meanwhile."""
        ended = threading.Event()

        def change() -> None:
            chance = random.Random(1)
            while not ended.is_set():
                name = f"{self._folder}/other-{chance.randrange(_REWRITTEN)}"
                os.mknod(f"{name}-new")
                os.rename(f"{name}-new", name)  # noqa: PTH104  as above
                if chance.random() < 0.5:
                    os.unlink(name)  # noqa: PTH108
                self.result.changes_while_listing += 1

        thread = threading.Thread(target=change)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        for number in range(_REWRITTEN):
            (self._folder / f"other-{number}").unlink(missing_ok=True)


def soak_directory(folder: Path, *, entries: int, seed: int) -> Result:
    """Run it over a sandbox and a mount of its own in `folder`."""
    with DemoVolume.running(folder) as volume:
        return Soak(volume, entries, seed).run()
