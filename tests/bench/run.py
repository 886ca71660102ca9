"""The mount, a do-nothing pyfuse3 file system and a local directory, side by side.

Every case runs in each of the three within a round, the first in turn changing, and rounds follow
each other: what disturbs the machine disturbs all three. A ratio is the mount's speed by the speed
of the slower of the two others, in the same round; the median over the rounds counts. Exit code 1
when one is below 0.5. As root the kernel's caches are dropped before each reading case.

The caller and both FUSE processes are pinned to one core. Where the scheduler puts them is chance,
and decides more than the programs do: on one core a look-up of the floor took 29 us, on two 57.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "support"))
from mounted import DemoVolume, fuse_missing  # noqa: E402  the folder above is no package

MIB = 1 << 20
LEAST = 0.5
_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class Sizes:
    files: int
    read_bytes: int
    write_bytes: int
    reads: int


FULL = Sizes(files=1000, read_bytes=256 * MIB, write_bytes=64 * MIB, reads=2000)
QUICK = Sizes(files=200, read_bytes=32 * MIB, write_bytes=8 * MIB, reads=200)


class Cases:
    """Each case works in a folder of its own file system; returns nothing, is timed as a whole."""

    def __init__(self, sizes: Sizes, archive: Path) -> None:
        self.sizes = sizes
        self.archive = archive
        self.names = [f"file-{number:05}" for number in range(sizes.files)]
        self.order = random.Random(1).sample(self.names, len(self.names))
        self.contents = [random.Random(name).randbytes(4096) for name in self.names]
        pages = sizes.read_bytes // 4096
        self.offsets = [
            offset * 4096 for offset in random.Random(2).choices(range(pages), k=sizes.reads)
        ]

    def prepare(self, folder: Path) -> None:
        """The large file of the reading cases: the same for all rounds."""
        generator = random.Random(3)
        with (folder / "large").open("wb") as file:
            for _ in range(self.sizes.read_bytes // MIB):
                file.write(generator.randbytes(MIB))
            os.fsync(file.fileno())

    def create(self, folder: Path) -> None:
        (folder / "made").mkdir()
        for name in self.names:
            os.close(os.open(folder / "made" / name, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644))

    def small_files(self, folder: Path) -> None:
        (folder / "small").mkdir()
        for name, data in zip(self.names, self.contents, strict=True):
            with (folder / "small" / name).open("wb", buffering=0) as file:
                file.write(data)

    def stat(self, folder: Path) -> None:
        for name in self.order:
            (folder / "small" / name).stat()

    def listing(self, folder: Path) -> None:
        for entry in os.scandir(folder / "small"):
            entry.stat()

    def rename(self, folder: Path) -> None:
        (folder / "moved").mkdir()
        for name in self.order:
            (folder / "made" / name).rename(folder / "moved" / name)

    def unlink(self, folder: Path) -> None:
        for name in self.order:
            (folder / "moved" / name).unlink()

    def unpack(self, folder: Path) -> None:
        (folder / "tree").mkdir()
        subprocess.run(["tar", "-xf", self.archive, "-C", folder / "tree"], check=True)

    def read_sequential(self, folder: Path) -> None:
        with (folder / "large").open("rb", buffering=0) as file:
            while file.read(MIB):
                pass

    def read_random(self, folder: Path) -> None:
        descriptor = os.open(folder / "large", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in self.offsets:
            os.pread(descriptor, 4096, offset)
        os.close(descriptor)

    def write_fsync(self, folder: Path) -> None:
        data = random.Random(5).randbytes(MIB)
        with (folder / "written").open("wb", buffering=0) as file:
            for _ in range(self.sizes.write_bytes // MIB):
                file.write(data)
            os.fsync(file.fileno())

    def tidy(self, folder: Path) -> None:
        """Make room for the next round."""
        for name in ("made", "moved", "small", "tree"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "written").unlink(missing_ok=True)


CASES = (
    "create", "small_files", "stat", "listing", "rename", "unlink", "unpack",
    "read_sequential", "read_random", "write_fsync",
)  # fmt: skip
COLD = {"stat", "listing", "read_sequential", "read_random"}
Round = dict[str, float]


def drop_caches(large: Path) -> None:
    """What the kernel keeps; as another user only the pages of one file can be given up."""
    if os.access(_CACHES, os.W_OK):
        os.sync()
        _CACHES.write_text("3\n", encoding="ascii")
    else:
        descriptor = os.open(large, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(
    cases: Cases, folders: dict[str, Path], *, rounds: int, settle: Callable[[], None]
) -> dict[str, list[Round]]:
    """Seconds of each case: one mapping of target -> seconds a round."""
    taken: dict[str, list[Round]] = {case: [] for case in CASES}
    targets = list(folders)
    for number in range(rounds):
        for case in CASES:
            this: Round = {}
            for step in range(len(targets)):
                target = targets[(number + step) % len(targets)]
                if case in COLD:
                    drop_caches(folders[target] / "large")
                started = time.perf_counter()
                getattr(cases, case)(folders[target])
                this[target] = time.perf_counter() - started
                if target == "mount":
                    settle()
            taken[case].append(this)
        for folder in folders.values():
            cases.tidy(folder)
    return taken


def ratios(rounds: list[Round]) -> dict[str, float]:
    """Medians over rounds: seconds by target, and the mount's speed in parts of the others'."""
    middle = statistics.median
    return {
        **{f"{target}_s": middle(r[target] for r in rounds) for target in rounds[0]},
        "to_floor": middle(r["floor"] / r["mount"] for r in rounds),
        "to_local": middle(r["local"] / r["mount"] for r in rounds),
        "to_slower": middle(max(r["floor"], r["local"]) / r["mount"] for r in rounds),
    }


def show(results: dict[str, dict[str, float]], *, local_type: str) -> None:
    table = Table("case", "mount s", "floor s", f"{local_type} s", "to floor", f"to {local_type}",
                  f"to the slower (least {LEAST})")  # fmt: skip
    for case, found in results.items():
        colour = "green" if found["to_slower"] >= LEAST else "red"
        table.add_row(
            case.replace("_", " "),
            *(f"{found[key]:.3f}" for key in ("mount_s", "floor_s", "local_s")),
            *(f"{found[key]:.2f}" for key in ("to_floor", "to_local")),
            f"[{colour}]{found['to_slower']:.2f}[/]",
        )
    Console(width=110).print(table)


def pin(pid: int, core: int) -> None:
    """All threads of a process, and those that they will make."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


@contextlib.contextmanager
def floor(mountpoint: Path) -> Iterator[int]:
    """Mounted inside; the process's number."""
    mountpoint.mkdir()
    program = [sys.executable, str(HERE / "floor.py"), str(mountpoint)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the floor did not mount")
        try:
            yield process.pid
        finally:
            subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True)
            process.stdout.read()


def pack_library(archive: Path) -> None:
    """The standard library's source, without its tests and what is installed beside it."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = [f"--exclude={name}" for name in ("site-packages", "test", "tests", "__pycache__")]
    subprocess.run(["tar", "-cf", archive, *left_out, "-C", library, "."], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the bench itself")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if reason := fuse_missing():
        print(f"bench: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stashcordfs-bench-") as name:
        results, local_type = run(Path(name), options.rounds, QUICK if options.quick else FULL)
    show(results, local_type=local_type)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return int(any(found["to_slower"] < LEAST for found in results.values()))


def run(folder: Path, rounds: int, sizes: Sizes) -> tuple[dict[str, dict[str, float]], str]:
    archive = folder / "library.tar"
    pack_library(archive)
    local = folder / "local"
    local.mkdir()
    told = subprocess.run(
        ["stat", "-f", "-c", "%T", local], capture_output=True, text=True, check=True
    )
    local_type = "ext4" if told.stdout.startswith("ext2/ext3") else told.stdout.strip()
    cases = Cases(sizes, archive)
    with floor(folder / "floor") as least, DemoVolume.running(folder / "volume") as volume:
        folders = {"mount": volume.mountpoint, "floor": folder / "floor", "local": local}
        for place in folders.values():
            cases.prepare(place)
        volume.sync()
        for pid in (least, volume.pid(), os.getpid()):
            pin(pid, min(os.sched_getaffinity(0)))
        taken = measure(cases, folders, rounds=rounds, settle=volume.sync)
    return {case: ratios(found) for case, found in taken.items()}, local_type


if __name__ == "__main__":
    sys.exit(main())
