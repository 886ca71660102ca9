"""Programs that people use, run on a mount: what each is, and how its result is checked.

A program is a generator of sentences: each names a check that has just passed. It works in `at`, a
folder of its own on the mount, and may use `work`, one on the local disk. What it leaves is looked
at again by a mount without local data: all of its tree, and its own `again`.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Checks = Iterator[str]
Run = Callable[["Place"], Checks]
_PATIENCE_S = 1200


@dataclass(frozen=True)
class Place:
    """Where a program works: on the mount, and beside it on the local disk. `scale` 1 is a soak."""

    at: Path
    work: Path
    scale: float = 1.0

    def many(self, number: int) -> int:
        """A number of things, fewer in a short run."""
        return max(2, round(number * self.scale))


@dataclass
class Program:
    name: str
    packages: tuple[str, ...]
    version: tuple[str, ...]
    run: Run
    quick: bool = False
    again: Run = field(default=lambda place: iter(()))


PROGRAMS: dict[str, Program] = {}


def program(
    name: str, *, packages: tuple[str, ...], version: tuple[str, ...], quick: bool = False
) -> Callable[[Run], Program]:
    """Register a program. `packages`: Debian's, `version`: the command that tells it."""

    def register(run: Run) -> Program:
        PROGRAMS[name] = Program(name, packages, version, run, quick)
        return PROGRAMS[name]

    return register


def again(first: Program) -> Callable[[Run], Run]:
    """What a program checks once more when nothing is kept locally."""

    def register(run: Run) -> Run:
        first.again = run
        return run

    return register


def call(
    *command: str | os.PathLike[str],
    cwd: Path | None = None,
    fed: str | None = None,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
) -> str:
    """Run it; its output. AssertionError with its words when it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        input=fed,
        env=None if environment is None else {**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_PATIENCE_S,
        user=user,
        check=False,
    )
    told = " ".join(map(str, command))[:200]
    assert done.returncode == 0, f"{told} ended with {done.returncode}: {done.stdout[-2000:]}"
    return done.stdout


def wait_until(true: Callable[[], bool], what: str, patience_s: float = 120) -> None:
    """For another program to come so far."""
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, f"not within {patience_s:g} s: {what}"
        time.sleep(0.1)


def bytes_of(seed: object, size: int) -> bytes:
    return random.Random(str(seed)).randbytes(size)


def make_tree(root: Path, *, files: int, seed: int = 1) -> None:
    """Files of many sizes, with links, modes, times and attributes that a copy must keep."""
    chance = random.Random(seed)
    for number in range(files):
        folder = root.joinpath(f"folder {number % 7}", *["below"] * (number % 3))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"file-{number}é"
        path.write_bytes(bytes_of(number, chance.choice([0, 1, 100, 4096, 10_000, 200_000])))
        path.chmod(chance.choice([0o644, 0o600, 0o755, 0o444]))
        os.utime(path, ns=(10**18 + number, 1_500_000_000_123_456_789 + number))
        if number % 5 == 0:
            (folder / f"hard-{number}").hardlink_to(path)
            (folder / f"soft-{number}").symlink_to(path.name)
        if number % 4 == 0:
            os.setxattr(path, "user.origin", b"place %d" % number)
    os.mkfifo(root / "fifo", 0o640)
    (root / "empty folder").mkdir(mode=0o750)
    with (root / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(3 << 20)
        file.write(b"middle")
        file.truncate(5 << 20)
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):  # folders after theirs
        if path.is_dir() or path.is_symlink() or path.is_fifo():
            os.utime(path, ns=(10**18, 1_400_000_000_987_654_321 + number), follow_symlinks=False)


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those that are missing."""
    form = "${db:Status-Status}"
    gone = []
    for name in packages:
        query = ["dpkg-query", "-W", "-f", form, name]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        if done.stdout != "installed":
            gone.append(name)
    return gone
