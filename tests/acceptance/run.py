"""What the first version must show, on a demo volume: each check prints what it measured.

    python tests/acceptance/run.py [--scale 1.0] [--dir DIR]

A sandbox with its rate limits on, the program's own commands, programs that people use (tar, git,
sqlite3), and counts that the sandbox takes itself. At full scale it needs 8 GiB of disk and some
ten minutes. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import mmap
import os
import random
import select
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Self

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from mounted import NAME, DemoVolume, fetch_json, fuse_missing

MIB = 1 << 20
REQUEST_BYTES = 25 * MIB
CHANNEL_MESSAGES_S = 1.0  # what a channel takes, and the sandbox's limit
BLOCK_BYTES = MIB
CHUNK_SLACK = 4096  # a sealed chunk's tag, and the headers of its answer
RSS_LIMIT = 250 * MIB
SECRET = "a-name-that-must-not-be-seen"


class Manifest(dict[str, tuple[object, ...]]):
    """Every path below a folder: kind, mode, owner, size, mtime, and the bytes' hash or target."""

    @classmethod
    def of(cls, folder: Path) -> Manifest:
        found = cls()
        for path in sorted(folder.rglob("*")):
            status = path.lstat()
            content: object = None
            if stat.S_ISREG(status.st_mode):
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = str(path.readlink())
            size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            found[str(path.relative_to(folder))] = (
                status.st_mode, status.st_uid, status.st_gid, size, status.st_mtime_ns, content
            )  # fmt: skip
        return found

    def difference(self, other: Manifest) -> list[str]:
        return sorted(k for k in self.keys() | other.keys() if self.get(k) != other.get(k))


class MemoryWatch:
    """The largest resident size of a process while inside."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            for line in self._status.read_text(encoding="ascii").splitlines():
                if line.startswith("VmRSS:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        self._thread.join()


class Run:
    def __init__(self, volume: DemoVolume, *, folder: Path, scale: float, port: int) -> None:
        self.volume = volume
        self.mnt = volume.mountpoint
        self.folder = folder
        self.scale = scale
        self.port = port
        self.failed: list[str] = []
        self.manifest = Manifest()
        self.samples: list[bytes] = []

    def check(self, name: str, passed: bool, measured: str) -> None:
        print(f"{'pass' if passed else 'FAIL'}  {name}: {measured}", flush=True)
        if not passed:
            self.failed.append(name)

    def step(self, name: str, work: Callable[[], None]) -> None:
        started = time.monotonic()
        try:
            work()
        except Exception as error:  # noqa: BLE001  the other checks are still wanted
            traceback.print_exc()
            self.check(name, False, f"{type(error).__name__}: {error}")
        print(f"      ({name} took {time.monotonic() - started:.1f} s)", flush=True)

    # ------------------------------------------------------------ contents

    def small_tree(self) -> None:
        """The standard library with its tests, and the documents of the system's packages."""
        wanted = 5000
        place = self.mnt / "tree"
        place.mkdir()
        archive = self.folder / "tree.tar"
        library = sysconfig.get_path("stdlib")
        sources = ["--exclude=__pycache__", "--exclude=site-packages", "-C", library, "."]
        if self.scale < 1:
            sources = ["-C", library, "--exclude=__pycache__", "email", "json", "asyncio"]
        elif Path("/usr/share/doc").is_dir():
            sources += ["-C", "/usr/share", "doc"]
        subprocess.run(["tar", "-cf", archive, *sources], check=True)
        started = time.monotonic()
        subprocess.run(["tar", "-xf", archive, "-C", place], check=True)
        taken = time.monotonic() - started
        count = sum(path.is_file() for path in place.rglob("*"))
        text = next(path for path in place.rglob("*.py") if path.stat().st_size > 4000)
        self.samples += [text.read_bytes()[at : at + 48] for at in (0, 1000, 3000)]
        enough = count >= wanted or self.scale < 1
        self.check("unpack a real tree", enough, f"{count} files in {taken:.1f} s")

    def git(self) -> None:
        place = self.mnt / "tree"
        told = ""
        for args in (
            ["init", "-q"],
            ["add", "-A"],
            ["-c", "user.name=a", "-c", "user.email=a@localhost", "commit", "-qm", "All"],
            ["fsck", "--full"],
            ["status", "--porcelain"],
        ):
            done = subprocess.run(
                ["git", "-c", "gc.auto=0", *args],
                cwd=place, capture_output=True, text=True, check=True,
            )  # fmt: skip
            told = done.stdout
        self.check("git init, add, commit, fsck", told == "", "clean afterwards")

    def sqlite(self) -> None:
        count = max(50, int(1000 * self.scale))
        started = time.monotonic()
        database = sqlite3.connect(self.mnt / "db.sqlite", isolation_level=None)
        database.execute("create table t (id integer primary key, data blob)")
        for number in range(count):
            database.execute("begin")
            database.execute("insert into t values (?, ?)", (number, b"%d" % number * 40))
            database.execute("commit")
        rows = database.execute("select count(*) from t").fetchone()[0]
        sound = database.execute("pragma integrity_check").fetchone()[0]
        database.close()
        taken = time.monotonic() - started
        self.check(
            "SQLite", (rows, sound) == (count, "ok"), f"{rows} transactions in {taken:.1f} s"
        )

    def rewritten(self) -> None:
        """An 8 MiB file rewritten at random places, sent in between, beside its local twin."""
        generator = random.Random(11)
        twin = bytearray(generator.randbytes(8 * MIB))
        path = self.mnt / "rewritten"
        path.write_bytes(twin)
        for turn in range(4):
            with path.open("r+b", buffering=0) as file:
                for _ in range(100):
                    at, data = generator.randrange(8 * MIB - 9000), generator.randbytes(9000)
                    data = data[: generator.randrange(1, 9000)]
                    file.seek(at)
                    file.write(data)
                    twin[at : at + len(data)] = data
            if turn == 1:
                self.volume.sync()
        same = path.read_bytes() == twin
        self.check("8 MiB rewritten at random places", same, "400 writes, as its local twin")

    def large(self) -> None:
        """The copy in: memory, speed, how full the requests are."""
        size = int(1024 * MIB * self.scale) // MIB * MIB
        source = self.folder / "large"
        generator = random.Random(12)
        with source.open("wb") as file:
            for _ in range(size // MIB):
                file.write(generator.randbytes(MIB))
        self.samples.append(random.Random(12).randbytes(MIB)[5000:5048])
        self.volume.sync()
        before, started = self.volume.status(), time.monotonic()
        with MemoryWatch(self.volume.pid()) as memory:
            shutil.copyfile(source, self.mnt / "large")
            copied = time.monotonic() - started
            self.volume.sync()
        busy = time.monotonic() - started
        after = self.volume.status()
        sent = after["uploaded_bytes"] - before["uploaded_bytes"]
        messages = after["messages_sent"] - before["messages_sent"]
        self.check(
            "memory while copying in", memory.peak < RSS_LIMIT, f"{memory.peak / MIB:.0f} MiB"
        )
        permitted = busy * CHANNEL_MESSAGES_S * REQUEST_BYTES
        self.check(
            "a request is filled",
            sent / permitted >= 0.9,
            f"{sent / permitted:.3f} of what {busy:.1f} s permit; {messages} messages, "
            f"{sent / max(1, messages) / REQUEST_BYTES:.3f} full; {size / MIB:.0f} MiB written in "
            f"{copied:.1f} s",
        )

    # ------------------------------------------------------------ back again

    def same_after_remount(self) -> None:
        self.volume.sync()
        self.manifest = Manifest.of(self.mnt)
        self.volume.remount()
        wrong = self.manifest.difference(Manifest.of(self.mnt))
        self.check("unmount, mount, compare", not wrong, f"{len(self.manifest)} paths; {wrong[:5]}")

    def same_without_cache(self) -> None:
        self.volume.remount(without_cache=True)
        received = self.volume.status()["bytes_received"]
        with MemoryWatch(self.volume.pid()) as memory:
            started = time.monotonic()
            shutil.copyfile(self.mnt / "large", self.folder / "back")
            taken = time.monotonic() - started
            different = subprocess.run(
                ["cmp", self.folder / "large", self.folder / "back"], check=False
            ).returncode
        self.check(
            "memory while copying out", memory.peak < RSS_LIMIT, f"{memory.peak / MIB:.0f} MiB"
        )
        size = (self.folder / "back").stat().st_size
        self.check(
            "large file from the CDN",
            not different,
            f"{size / MIB:.0f} MiB in {taken:.1f} s ({size / MIB / taken:.0f} MiB/s)",
        )
        wrong = self.manifest.difference(Manifest.of(self.mnt))
        received = self.volume.status()["bytes_received"] - received
        self.check(
            "block cache removed, compare",
            not wrong and received > size,
            f"{len(self.manifest)} paths, {received / MIB:.0f} MiB received; {wrong[:5]}",
        )

    def part(self) -> None:
        """4 KiB in the middle of the large file, nothing cached."""
        self.volume.remount(without_cache=True)
        before = self.volume.server_stats()
        with (self.folder / "large").open("rb") as file:
            at = (self.folder / "large").stat().st_size // 2 + 12288
            file.seek(at)
            expected = file.read(4096)
        descriptor = os.open(self.mnt / "large", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        data = os.pread(descriptor, 4096, at)
        os.close(descriptor)
        after = self.volume.server_stats()
        received = after["cdn_bytes"] - before["cdn_bytes"]
        requests = after["requests"] - before["requests"]
        self.check(
            "reading a part",
            data == expected and received <= BLOCK_BYTES + CHUNK_SLACK,
            f"{received} bytes from the CDN, {requests} API requests",
        )

    def packing(self) -> None:
        count = max(100, int(5000 * self.scale))
        self.volume.sync()
        before, counted = self.volume.status(), self.server_messages()
        generator = random.Random(13)
        total = 0
        (self.mnt / SECRET).mkdir()
        for number in range(count):
            data = generator.randbytes(generator.randrange(1024, 16385))
            total += len(data)
            (self.mnt / SECRET / f"{SECRET}-{number}").write_bytes(data)
        self.volume.sync()
        after = self.volume.status()
        messages = after["messages_sent"] - before["messages_sent"]
        own = self.server_messages() - counted
        least = math.ceil(total / REQUEST_BYTES)
        self.check(
            "packing",
            messages == own and messages <= least + 6,
            f"{count} files, {total / MIB:.1f} MiB: {messages} messages by status, {own} by the "
            f"sandbox; bytes alone need {least}",
        )

    def server_messages(self) -> int:
        return int(self.volume.server_stats()["created"])

    # ------------------------------------------------------------ around it

    def secrecy(self) -> None:
        words = [SECRET.encode(), *self.samples]
        names = [Path(name).name for name in self.manifest if len(Path(name).name) >= 16]
        words += [name.encode() for name in names[:200]]
        found = []
        for path in self.volume.server_folder.rglob("*"):
            if not path.is_file() or not path.stat().st_size:
                continue
            found += [path.name for word in words if word.decode("latin-1") in path.name]
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
                found += [path.name for word in words if data.find(word) >= 0]
        self.check("secrecy", not found, f"{len(words)} names and runs sought; in {found[:5]}")
        token = self.volume.token.encode()
        places = [
            path
            for path in (*self.volume.state.rglob("log*"), self.volume.folder / "sandbox.log")
            if path.is_file() and token in path.read_bytes()
        ]
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if token in process.read_bytes():
                    places.append(process)
            except OSError:
                continue  # it has ended
        self.check("the token is nowhere", not places, f"logs and process list: {places}")

    def guest(self) -> None:
        told = self.volume.server_stats()
        mine = self.volume.status()["rate_limited"]
        counted = told["rate_limited"]["provoked"]
        self.check("a good guest", not counted and not mine, f"429s: {counted}, by status {mine}")

    def health(self) -> None:
        base = f"http://127.0.0.1:{self.port}"
        told = fetch_json(f"{base}/health")
        with urllib.request.urlopen(f"{base}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        ours = [line for line in lines if line.startswith("stashcordfs_")]
        self.check("/health and /metrics", bool(told and ours), f"{told}; {len(ours)} values")

    def service_stop(self) -> None:
        """SIGTERM, as systemd sends it, with something unsent."""
        (self.mnt / "late").write_bytes(random.Random(14).randbytes(3 * MIB))
        pid = self.volume.pid()
        process = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        signal_sent = time.monotonic()
        ended = bool(select.select([process], [], [], 120)[0])
        os.close(process)
        taken = time.monotonic() - signal_sent
        log = (self.volume.state / NAME / "log").read_text(encoding="utf-8")
        unmounted = not self.volume.is_mounted()
        said_left = "bytes unsent" in log
        self.volume.mount()
        left = self.volume.status()["dirty_bytes"]
        same = (self.mnt / "late").read_bytes() == random.Random(14).randbytes(3 * MIB)
        self.check(
            "the service's stop",
            ended and unmounted and same and (not left or said_left),
            f"ended in {taken:.1f} s, {left} bytes left, said so: {said_left}",
        )

    def all(self) -> None:
        for name, work in (
            ("small tree", self.small_tree),
            ("git", self.git),
            ("sqlite", self.sqlite),
            ("rewritten", self.rewritten),
            ("large", self.large),
            ("health", self.health),
            ("same after remount", self.same_after_remount),
            ("same without cache", self.same_without_cache),
            ("part", self.part),
            ("packing", self.packing),
            ("secrecy", self.secrecy),
            ("guest", self.guest),
            ("service stop", self.service_stop),
        ):
            self.step(name, work)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="0.05 tries the run itself")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    if reason := fuse_missing():
        print(f"acceptance: {reason}", file=sys.stderr)
        return 2
    port = free_port()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stashcordfs-acceptance-") as name:
        place = Path(name) / "local"
        place.mkdir()
        with DemoVolume.running(
            Path(name) / "volume", settings={"metrics_port": str(port)}, strong_keys=True
        ) as volume:
            run = Run(volume, folder=place, scale=options.scale, port=port)
            run.all()
    print(f"{len(run.failed)} failed: {', '.join(run.failed)}" if run.failed else "all passed")
    return int(bool(run.failed))


if __name__ == "__main__":
    sys.exit(main())
