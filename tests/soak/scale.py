"""A volume of very many files: made through `vfs`, then each part's time and memory measured.

    python tests/soak/scale.py [--files 1000000] [--seed N] [--dir FOLDER] [--keep] [--write]

Every step is a process of its own, most of them a command as a user types it, so that its memory
is its own. In FOLDER an interrupted run is taken up by the same command; what was made goes when
all is done, or with --keep serves to measure once more. With --write the findings become this
size's entry in docs/evidence/scale.json. Exit code 1 when something was not as it must be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import evidence
from mounted import COMMAND, NAME, DemoVolume, fuse_missing
from scale_making import Tree

from stashcordfs.journal.sqlite.schema import REPLICATED_TABLES

_MAKING = [sys.executable, str(Path(__file__).with_name("scale_making.py"))]
_BATCH = 250_000  # files made by one process
_COMPARED = 2000  # of the recovered files, read and compared
_PROBE_EVERY_S = 0.02
MIB = 1 << 20
# The bounds of recovering, from a million files down.
MOST_RECOVER_S, MOST_RECOVER_MIB, MOST_REQUESTS = 180.0, 500, 100


@dataclass
class Result:
    """Seconds (`s`: by the clock, `cpu_s`: of a processor) and MiB (the most), step by step."""

    files: int
    seed: int
    changes_after_checkpoint: int = 0
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Soak:
    def __init__(self, folder: Path, files: int, seed: int, *, hurried: bool) -> None:
        """`folder` may be what an interrupted run has left."""
        self._idle_s = 0.2 if hurried else 5.0  # before an idle mount's memory is read
        self.tree = Tree(files, seed)
        self.result = Result(files, seed, self.tree.changes)
        self._kept = folder / "made.json"  # what is made, and what making was like
        self._made: dict[str, Any] = {"first": 0, "second": 0, "make": {}}
        again = self._kept.exists()
        if again:
            self._made = json.loads(self._kept.read_text())
        settings = {"passphrase": "plain:of a volume of very many files", "log_level": "info"}
        server = ["--no-rate-limits"] if hurried else []
        self._volume = DemoVolume(
            folder, settings=settings, server=server, strong_keys=not hurried, again=again
        )
        self._volume.mount_within_s = 1800.0  # on a busy machine
        commits = self._made.setdefault("commits", [])
        if (now := evidence.commit_now()) not in commits:
            commits.append(now)
        self._keep()

    def _keep(self) -> None:
        self._kept.write_text(json.dumps(self._made))

    def run(self) -> Result:
        try:
            self._make()
            self._recover()
            self._recover_from_packs()
        finally:
            self._volume.end()
        return self.result

    # ------------------------------------------------------------------ steps

    def _make(self) -> None:
        tree, made = self.tree, self._made
        self._make_part("first", tree.first)
        if "checkpoint" not in made:
            self._measured("want", "WANT", program=_MAKING)
            made["checkpoint"] = self._checkpoint()
            self._keep()
        self._make_part("second", tree.changes)
        self.result.steps["make"] = made["make"] | {"files": tree.last, "commits": made["commits"]}
        for step in ("checkpoint", "mount_cached"):
            self.result.steps[step] = made[step]

    def _make_part(self, part: str, until: int) -> None:
        made = self._made
        while made[part] < until:
            end = min(until, made[part] + _BATCH)
            step = self._measured(f"{part} {end}", part.upper(), made[part], end, program=_MAKING)
            made[part] = end
            before = made["make"]
            made["make"] = {
                "s": round(before.get("s", 0) + step["s"], 1),
                "cpu_s": round(before.get("cpu_s", 0) + step["cpu_s"], 1),
                "mib": max(before.get("mib", 0), step["mib"]),
            }
            self._keep()

    def _checkpoint(self) -> dict[str, Any]:
        """The next mount takes one: how long, how large, and does the mount answer meanwhile."""
        volume = self._volume
        watch = Watch(volume.state / NAME / "checkpoint.sqlite")
        probe = Probe(volume.mountpoint, self.tree)
        before = volume.server_stats()["messages"]
        with watch.watching():
            begun = time.monotonic()
            volume.mount()
            mounted_s = time.monotonic() - begun
            probe.daemon = daemon = Daemon(volume)
            with probe.asking():
                watch.ended.wait()
                time.sleep(self._idle_s)
        messages = volume.server_stats()["messages"] - before
        self._made["mount_cached"] = {"s": round(mounted_s, 1), "idle_mib": daemon.mib()}
        volume.umount()
        parts = self._parts()
        return {
            "s": round(watch.ended_s - watch.begun_s, 2),
            "bytes": sum(parts),
            "parts": len(parts),
            "messages": messages,  # a claim and a segment among them
            **probe.told(watch),
        }

    def _recover(self) -> None:
        """On a bare machine, as after the loss of the laptop; then what is done with it."""
        step, report = self._recovered("recover")
        self.result.steps["recover"] = step
        self._bounds(step)
        self._alike()
        recovered = self.result.steps
        size = (self._volume.state / NAME / "journal.sqlite").stat().st_size
        recovered["journal"] = {
            "bytes": size, "bytes_a_file": round(size / self.tree.files),
            "inodes": report["inodes"],
        }  # fmt: skip
        for name in ("fsck", "verify"):
            recovered[name] = self._measured(name, name, NAME, "--json")
            if not json.loads(recovered[name].pop("out"))["clean"]:
                self.result.problems.append(f"{name} finds something")
        recovered["mount"] = self._mount()
        step = self._measured("read", "READ", _COMPARED, program=_MAKING)
        self.result.problems += json.loads(step["out"])

    def _mount(self) -> dict[str, Any]:
        volume = self._volume
        begun = time.monotonic()
        volume.mount()
        mounted = time.monotonic()
        names = len(list(volume.mountpoint.iterdir()))
        listed = time.monotonic()
        daemon = Daemon(volume)
        time.sleep(self._idle_s)
        found = {
            "s": round(mounted - begun, 2), "first_listing_s": round(listed - mounted, 3),
            "idle_mib": daemon.mib(), "mib": daemon.mib("VmHWM"),
        }  # fmt: skip
        volume.umount()
        if not names:
            self.result.problems.append("the recovered volume is empty")
        return found

    def _recover_from_packs(self) -> None:
        """Once more, as if no checkpoint and no segment were left."""
        step, report = self._recovered("recover from packs", "--from-packs")
        lost = [note for note in report["notes"] if "lost" in note or "missing" in note]
        self.result.steps["recover_from_packs"] = step | {"inodes": report["inodes"]}
        self.result.problems += [f"from packs: {note}" for note in lost]
        fsck = self._measured("fsck of that", "fsck", NAME, "--json")
        if not json.loads(fsck["out"])["clean"]:
            self.result.problems.append("fsck finds something after a recovery from packs")

    # ------------------------------------------------------------------ means

    def _recovered(self, what: str, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """`recover` into an empty state directory; the volume's is kept beside it."""
        volume = self._volume
        kept = volume.folder / "state-made"
        if not kept.exists():
            volume.state.rename(kept)
        shutil.rmtree(volume.state, ignore_errors=True)
        channel = str(volume.server["channel_ids"][0])
        step = self._measured(what, "recover", NAME, "--channel", channel, "--json", *options)
        report = json.loads(step.pop("out"))
        step |= {"requests": report["requests"], "changes": report["changes"]}
        if report["missing_files"] or report["older_files"]:
            self.result.problems.append(f"{what}: something is lost")
        return step, report

    def _bounds(self, step: dict[str, Any]) -> None:
        for key, most in (
            ("s", MOST_RECOVER_S), ("mib", MOST_RECOVER_MIB), ("requests", MOST_REQUESTS)
        ):  # fmt: skip
            if step[key] > most:
                self.result.problems.append(f"recover: {step[key]} {key}, {most} are allowed")

    def _alike(self) -> None:
        """Every row of the replicated tables is as the lost machine had it."""
        path = self._volume.state / NAME / "journal.sqlite"
        other = self._volume.folder / "state-made" / NAME / "journal.sqlite"
        db = sqlite3.connect(path)
        try:
            db.execute("ATTACH ? AS made", (str(other),))
            for table in REPLICATED_TABLES:
                columns = [r[1] for r in db.execute(f"PRAGMA table_info({table})")]
                names = ", ".join(c for c in columns if c != "atime_ns")
                for one, two in itertools.permutations(("main", "made")):
                    rows = db.execute(
                        f"SELECT count(*) FROM (SELECT {names} FROM {one}.{table} "
                        f"EXCEPT SELECT {names} FROM {two}.{table})"
                    ).fetchone()
                    if rows[0]:
                        self.result.problems.append(f"{rows[0]} rows of {table} in {one} alone")
        finally:
            db.close()

    def _parts(self) -> list[int]:
        """The sizes of the newest checkpoint's parts."""
        path = self._volume.state / NAME / "journal.sqlite"
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            rows = db.execute(
                "SELECT size FROM objects WHERE kind = 3 AND number ="
                " (SELECT max(number) FROM objects WHERE kind = 4)"
            )
            return [size for (size,) in rows]
        finally:
            db.close()

    def _measured(self, what: str, *args: object, program: list[str] = COMMAND) -> dict[str, Any]:
        """Run a process to its end: seconds, its most memory, what it printed."""
        if program is _MAKING:
            part, *rest = args
            args = (NAME, part, self.tree.files, self.tree.seed, *rest)
        command = [*program, *map(str, args)]
        log = self._volume.folder / "commands.log"
        with tempfile.TemporaryFile("w+") as out, log.open("a") as errors:
            actions = [
                (os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, errors.fileno(), 2)
            ]  # fmt: skip
            begun = time.monotonic()
            pid = os.posix_spawn(
                command[0], command, self._volume.environment, file_actions=actions
            )
            _, status, used = os.wait4(pid, 0)
            seconds = time.monotonic() - begun
            if os.waitstatus_to_exitcode(status):
                raise RuntimeError(f"{what} ended with {status}: {log.read_text()[-2000:]}")
            out.seek(0)
            text = out.read()
        cpu_s = used.ru_utime + used.ru_stime
        found = {"s": round(seconds, 1), "cpu_s": round(cpu_s, 1), "mib": used.ru_maxrss >> 10}
        print(f"{what}: {found}", flush=True)
        return found | {"out": text}


class Daemon:
    """Reads the memory of the process that serves a volume."""

    def __init__(self, volume: DemoVolume) -> None:
        pid = int((volume.state / NAME / "lock").read_text())
        self._status = Path(f"/proc/{pid}/status")

    def mib(self, which: str = "VmRSS") -> int:
        """VmRSS, or VmHWM: the most so far."""
        line = next(x for x in self._status.read_text().splitlines() if x.startswith(which))
        return int(line.split()[1]) >> 10


class Watch:
    """When a file comes and goes: the copy is there from a checkpoint's first step to its last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.ended = threading.Event()
        self.begun_s = self.ended_s = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        yield
        thread.join()

    def _watch(self) -> None:
        while not self._path.exists():
            time.sleep(0.002)
        self.begun_s = time.monotonic()
        while self._path.exists():
            time.sleep(0.002)
        self.ended_s = time.monotonic()
        self.ended.set()


class Probe:
    """Asks the mount every few ms for a file nobody has asked for; how long the answers take."""

    daemon: Daemon

    def __init__(self, mountpoint: Path, tree: Tree) -> None:
        self._mountpoint = mountpoint
        self._tree = tree
        self._random = random.Random(tree.seed)
        self._ended = threading.Event()
        self._looks: list[tuple[float, float, int]] = []  # when, how long, the daemon's memory

    @contextmanager
    def asking(self) -> Iterator[None]:
        thread = threading.Thread(target=self._ask)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _ask(self) -> None:
        folder = self._mountpoint / "probe"
        for number in itertools.count():
            file = self._random.randrange(self._tree.first)
            upper, lower = (name.decode() for name in self._tree.folder(file))
            path = self._mountpoint / upper / lower / self._tree.name(file).decode()
            begun = time.monotonic()
            path.stat()
            if number % 5 == 0:
                folder.mkdir()
                folder.rmdir()
            self._looks.append((begun, time.monotonic() - begun, self.daemon.mib()))
            if self._ended.wait(_PROBE_EVERY_S):
                return

    def told(self, watch: Watch) -> dict[str, Any]:
        """The daemon's memory, and answers in ms, while it was there and afterwards."""
        during = [look for look in self._looks if watch.begun_s <= look[0] <= watch.ended_s]
        after = [look for look in self._looks if look[0] > watch.ended_s]
        return {
            "mib": max((mib for _, _, mib in during), default=0),
            "mib_after": after[-1][2],
            "answers_during_ms": _spread([took for _, took, _ in during]),
            "answers_after_ms": _spread([took for _, took, _ in after]),
        }


def _spread(took: list[float]) -> dict[str, Any]:
    if not took:
        return {"answers": 0}
    in_order = sorted(1000 * s for s in took)
    return {
        "answers": len(took),
        "median": round(statistics.median(in_order), 2),
        "p99": round(in_order[len(took) * 99 // 100], 2),
        "most": round(in_order[-1], 1),
    }


def soak_scale(folder: Path, *, files: int, seed: int, hurried: bool = False) -> Result:
    """Run it in `folder`, which may be what an interrupted run has left. 16 KiB a file of disk.

    `hurried`: with key slots that cost nothing and without rate limits, for a test.
    """
    return Soak(folder, files, seed, hurried=hurried).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep what was made in --dir")
    parser.add_argument("--write", action="store_true", help="write the evidence")
    options = parser.parse_args()
    if reason := fuse_missing():
        print(f"soak: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.default_int_handler)
    commit = evidence.commit_now()
    with tempfile.TemporaryDirectory(prefix="stashcordfs-soak-") as name:
        place = options.dir or Path(name)
        place = place / f"{options.files}-{options.seed}"
        result = soak_scale(place, files=options.files, seed=options.seed)
        if not options.keep:
            shutil.rmtree(place)
    found = {"commit": commit, **result.as_json()}
    print(json.dumps(found, indent=1))
    if options.write:
        path = evidence.EVIDENCE / "scale.json"
        sizes = json.loads(path.read_text())["sizes"] if path.exists() else {}
        sizes[str(options.files)] = found
        in_order = {size: sizes[size] for size in sorted(sizes, key=int)}
        evidence.write("scale", made_by="make soak-scale", commit=commit, found={"sizes": in_order})
    return int(bool(result.problems))


if __name__ == "__main__":
    sys.exit(main())
