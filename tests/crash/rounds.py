"""One round: load, a crash of some kind, a mount, and the check of everything acknowledged."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from checker import Checker, Verdict
from daemon import SITES
from invariants import check_journal, open_intents
from ledger import Trouble, attribute, read
from model import GRACE_S, Cut, State
from pages import PageMaker
from rig import HERE, Rig

_AT_ONCE_S = 15.0  # a mount that takes longer has looked through something
_HANGS_S = 90.0
_WRITER_ENDS_S = 20.0
_SYNC_SLACK_S = 1.5  # over the timer of the names' sync, for a busy machine
_FREQUENT = {"write", "claim", "commit", "release", "put-dirty", "drop-dirty", "resize"}
_RARE = {"drain", "snapshot", "manifest", "part", "superseded"}  # not by load alone
_SITE_S = 8.0  # until a site is passed under load
_ENDS_S = 30.0
_UPLOADING = (
    "intent.after", "post.before", "post.after", "confirm.before", "confirm.after",
    "chunks.before", "chunks.after", "close-intent.before", "close-intent.after",
)  # fmt: skip
_CHECKPOINTING = (
    "snapshot.before", "manifest.before", "part.before", "part.after", "manifest.after",
    "superseded.before", "superseded.after",
)  # fmt: skip
_AFTER_DEATH = {errno.ENOTCONN, errno.ECONNABORTED}

Result = dict[str, Any]


@dataclass(slots=True)
class Crash:
    """What a kind of round has done to the daemon."""

    cut: Cut
    note: str = ""
    during: str = ""  # what it certainly came into the middle of
    mounts: list[float] = field(default_factory=list)


class Round:
    """One round over a rig. `start` is replaced by what was found."""

    def __init__(self, rig: Rig, *, seed: int, number: int, writers: int, start: State) -> None:
        self.rig = rig
        self.seed = seed
        self.number = number
        self.chance = random.Random(f"{seed}/round/{number}")
        self.start = start
        self._count = writers
        self._writers: list[subprocess.Popen[bytes]] = []
        self._ledgers = [
            rig.folder / f"ledger-{number}-{writer}.jsonl" for writer in range(writers)
        ]

    # ------------------------------------------------------------ the parts

    def load(self, *more: str) -> None:
        """Start the writers, and let the server be unreliable. `more`: arguments of theirs."""
        self.rig.faults(self._faults())
        start = self.rig.folder / "start.json"
        start.write_text(json.dumps(self.start.to_json()), encoding="utf-8")
        for number, ledger in enumerate(self._ledgers):
            ledger.unlink(missing_ok=True)
            self._writers.append(
                subprocess.Popen(
                    [
                        sys.executable, str(HERE / "writer.py"), str(self.rig.mountpoint),
                        "--ledger", str(ledger), "--start", str(start), "--seed", str(self.seed),
                        "--number", str(number), "--round", str(self.number), *more,
                    ]
                )
            )  # fmt: skip
        ends = time.monotonic() + 10
        while not all(ledger.exists() for ledger in self._ledgers) and time.monotonic() < ends:
            time.sleep(0.01)

    def _faults(self) -> list[dict[str, Any]]:
        every = [
            {"kind": "status", "status": 503, "probability": 0.3},
            {"kind": "status", "route": "create_message", "probability": 0.5},
            {"kind": "lost_answer", "route": "create_message", "probability": 0.5},
            {"kind": "lost_answer", "route": "create_message", "status": 0, "probability": 0.5},
            {"kind": "reset", "probability": 0.3},
            {"kind": "rate_limit", "scope": "user", "retry_after": 0.2, "probability": 0.4},
            {"kind": "late", "route": "create_message", "seconds": 0.3, "probability": 0.5},
            {"kind": "cut", "route": "cdn", "probability": 0.3},
        ]
        chosen = self.chance.sample(every, self.chance.randrange(4))
        return [{"times": 6, "route": "*", **rule} for rule in chosen]

    def end_writers(self, *, gently: bool = False) -> None:
        for writer in self._writers:
            if gently:
                writer.terminate()
        for writer in self._writers:
            try:
                writer.wait(_WRITER_ENDS_S)
            except subprocess.TimeoutExpired:
                writer.kill()
                writer.wait()
        self._writers.clear()

    def pause(self, low: float, high: float) -> None:
        time.sleep(self.chance.uniform(low, high))

    # ------------------------------------------------------------ the whole

    def run(self, crash: Callable[[Round], Crash], *, kind: str, **mount: Any) -> Result:
        """Do it, check, and tell in one row. `mount`: options of the mount after."""
        begun = time.monotonic()
        try:
            done = crash(self)
        finally:
            self.end_writers()
        wrong = check_journal(self.rig.journal)
        mounted = self.rig.mount(**mount)
        done.mounts.append(mounted)
        if max(done.mounts) > _AT_ONCE_S:
            wrong.append(f"mounting took {max(done.mounts):.1f} s")
        self.rig.faults([])
        verdict, operations = self._check(done.cut)
        wrong += verdict.wrong
        self._tidy(verdict)
        return {
            "round": self.number,
            "kind": kind,
            "note": done.note,
            "during": done.during,
            "operations": operations,
            "pages": verdict.pages,
            "acknowledged": verdict.acknowledged_pages,
            "mount_s": round(mounted, 2),
            "seconds": round(time.monotonic() - begun, 2),
            "wrong": wrong,
        }

    def _check(self, cut: Cut) -> tuple[Verdict, int]:
        by_writer, count, wrong = {}, 0, []
        for number, ledger in enumerate(self._ledgers):
            operations, troubles = read(ledger)
            by_writer[f"w{number}"] = operations
            count += len(operations)
            wrong += [f"w{number}: {t.text}" for t in troubles if not _excused(t, cut)]
        with _no_hang(self.rig, wrong):
            verdict = Checker(self.rig.mountpoint, PageMaker(self.seed)).check(
                self.start, by_writer, cut
            )
        if not cut.power:  # a disk without power is an error, and is logged as one
            wrong += [f"log: {text}" for text in self.rig.new_errors()]
        verdict.wrong[:0] = wrong
        if not verdict.wrong:
            for ledger in self._ledgers:
                ledger.unlink(missing_ok=True)
        return verdict, count

    def _tidy(self, verdict: Verdict) -> None:
        """Remove what is damaged, so that one fault is told once."""
        state = verdict.state
        for path in verdict.damaged:
            with contextlib.suppress(OSError):
                (self.rig.mountpoint / path).unlink()
            file = state.names.pop(path, None)
            if file is not None and file not in state.names.values():
                state.files.pop(file, None)
                state.names.pop(attribute(path.partition("/")[0], file), None)
        if verdict.damaged:
            fd = os.open(self.rig.mountpoint, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        self.start = state


def _excused(trouble: Trouble, cut: Cut) -> bool:
    """An error that the crash explains. Nothing excuses a wrong read."""
    if not trouble.errno:
        return False
    return trouble.errno in _AFTER_DEATH or trouble.at >= cut.at - (0 if cut.power else GRACE_S)


@contextlib.contextmanager
def _no_hang(rig: Rig, wrong: list[str]) -> Iterator[None]:
    """Kill the daemon when a check does not end: the reads fail then, and that is told."""

    def give_up() -> None:
        wrong.append(f"the check hung for {_HANGS_S:.0f} s")
        rig.kill()

    timer = threading.Timer(_HANGS_S, give_up)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---------------------------------------------------------------------- killing


def kill_under_load(rnd: Round) -> Crash:
    rnd.load()
    rnd.pause(0.2, 2.2)
    return Crash(Cut(rnd.rig.kill(), power=False))


def kill_at_a_site(rnd: Round) -> Crash:
    name = rnd.chance.choice([*(site for site in SITES if site not in _RARE), "write.half"])
    site = name if "." in name else f"{name}.{rnd.chance.choice(['before', 'after'])}"
    count = rnd.chance.randrange(1, 120 if name in _FREQUENT or "." in name else 5)
    rnd.load()
    rnd.pause(0.1, 0.6)
    rnd.rig.arm(site, count)
    by_itself = rnd.rig.died_within(2.0)
    return Crash(Cut(rnd.rig.kill(), power=False), f"{site} {count if by_itself else '-'}")


def kill_while_mounting(rnd: Round) -> Crash:
    """Kill under load, then kill the next daemons before and just after they are ready."""
    crash = kill_under_load(rnd)
    rnd.end_writers()
    moments = []
    for _ in range(rnd.chance.randrange(1, 4)):
        told = rnd.rig.start()
        moments.append(round(rnd.chance.uniform(0.4, 1.2) * rnd.rig.mount_s, 2))
        ready = select.select([told], [], [], moments[-1])[0]
        if not ready:
            crash.during = "mount"
        rnd.rig.kill()
        os.close(told)
    crash.note = f"{moments} s after its start"
    return crash


def kill_while_uploading(rnd: Round) -> Crash:
    """Between an upload's intent and the last word of it in the journal."""
    rnd.load()
    rnd.pause(0.2, 1.0)
    site = rnd.chance.choice([*_UPLOADING, ""])
    if site:
        rnd.rig.arm(site, rnd.chance.randrange(1, 4))
    sync = rnd.rig.begin("sync", str(rnd.rig.mountpoint))
    by_itself = rnd.rig.died_within(_SITE_S if site else rnd.chance.uniform(0.4, 1.5))
    crash = Crash(Cut(rnd.rig.kill(), power=False), site if by_itself else "random moment")
    sync.wait(60)
    if by_itself or open_intents(rnd.rig.journal):
        crash.during = "upload"
    return crash


def kill_while_draining(rnd: Round) -> Crash:
    rnd.load()
    rnd.pause(0.3, 1.2)
    rnd.end_writers(gently=True)
    after_s = rnd.chance.choice([0.0, rnd.chance.uniform(0.0, 0.1), rnd.chance.uniform(0.0, 1.0)])
    rnd.rig.arm("drain.before", 1, after_s=after_s)
    umount = rnd.rig.begin("umount", str(rnd.rig.mountpoint))
    by_itself = rnd.rig.died_within(_ENDS_S)
    crash = Crash(Cut(rnd.rig.kill(), power=False), f"{after_s:.2f} s after its beginning")
    umount.wait(60)
    crash.during = "drain" if by_itself else ""
    return crash


def kill_while_checkpointing(rnd: Round) -> Crash:
    """While a copy of the journal goes to Discord: a sync posts the segment that makes it due."""
    rnd.load()
    rnd.pause(0.1, 0.6)
    site = rnd.chance.choice(_CHECKPOINTING)
    rnd.rig.arm(site, 1, after_s=rnd.chance.choice([0.0, 0.02, 0.1]))
    by_itself = False
    syncs = []
    while not by_itself and len(syncs) < 4:
        syncs.append(rnd.rig.begin("sync", str(rnd.rig.mountpoint)))
        while syncs[-1].poll() is None and not by_itself:
            by_itself = rnd.rig.died_within(0.02)
    crash = Crash(Cut(rnd.rig.kill(), power=False), site if by_itself else "random moment")
    for sync in syncs:
        sync.wait(60)
    crash.during = "checkpoint" if by_itself else ""
    return crash


def kill_while_copying_the_wal(rnd: Round) -> Crash:
    rnd.load()
    rnd.pause(0.1, 0.6)
    site = rnd.chance.choice(["wal-copy.before", "wal-copy.after"])
    rnd.rig.arm(site, rnd.chance.randrange(1, 3), after_s=rnd.chance.choice([0.0, 0.001, 0.004]))
    by_itself = rnd.rig.died_within(_SITE_S)
    crash = Crash(Cut(rnd.rig.kill(), power=False), site if by_itself else "random moment")
    crash.during = "wal" if by_itself else ""
    return crash


def kill_with_a_cold_cache(rnd: Round) -> Crash:
    """Overwrite blocks that only the server has, and die inside."""
    rnd.rig.umount()
    rnd.rig.forget_blocks()
    took = rnd.rig.mount()
    site = rnd.chance.choice(["write.half", "write.before", "merge.before", "merge.after", ""])
    if site:
        rnd.rig.arm(site, rnd.chance.randrange(1, 12))
    rnd.load("--overwriting")
    by_itself = rnd.rig.died_within(rnd.chance.uniform(0.3, 1.5))
    note = site if by_itself else "random moment"
    return Crash(Cut(rnd.rig.kill(), power=False), note, mounts=[took])


KILLS: dict[str, tuple[Callable[[Round], Crash], int]] = {
    "load": (kill_under_load, 4),
    "site": (kill_at_a_site, 7),
    "mount": (kill_while_mounting, 4),
    "upload": (kill_while_uploading, 4),
    "drain": (kill_while_draining, 4),
    "checkpoint": (kill_while_checkpointing, 4),
    "wal": (kill_while_copying_the_wal, 4),
    "cold": (kill_with_a_cold_cache, 4),
}
IN_THE_MIDDLE = ("mount", "upload", "drain", "checkpoint", "wal")  # a tenth of the rounds each


def lacking(rows: Sequence[Result], rounds: int) -> dict[str, int]:
    """Of each kind, how many kills in its middle are still missing."""
    hits = Counter(row.get("during", "") for row in rows)
    missing = {kind: -(-rounds // 10) - hits[kind] for kind in IN_THE_MIDDLE}
    return {kind: count for kind, count in missing.items() if count > 0}


# ---------------------------------------------------------------------- power


def cut_power(rnd: Round, *, load_s: tuple[float, float], names_s: float) -> Crash:
    """The disk below the state loses power; then the daemon is gone too."""
    assert rnd.rig.disk is not None
    if load_s[1]:
        rnd.load()
    ends = time.monotonic() + rnd.chance.uniform(*load_s)
    nudges = rnd.chance.choice([0, 0, 1, 3]) if load_s[1] > 1 else 0
    for _ in range(nudges):
        time.sleep(max(0.0, min(rnd.chance.uniform(0.1, 0.8), ends - time.monotonic())))
        _nudge(rnd)
    time.sleep(max(0.0, ends - time.monotonic()))
    at = rnd.rig.disk.cut()
    rnd.pause(0.0, 0.1)
    rnd.rig.kill()
    rnd.end_writers()
    rnd.rig.restore_power()
    return Crash(Cut(at, power=True, names_s=names_s), f"{nudges} nudges")


def _nudge(rnd: Round) -> None:
    """Write back some of the state's files, as the kernel may at any time and in any order."""
    files = [path for path in rnd.rig.volume.rglob("*") if path.is_file()]
    for path in rnd.chance.sample(files, min(3, len(files))):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)


def names_bound(sync_every_s: float) -> float:
    """How old the names may be after a cut."""
    return sync_every_s + _SYNC_SLACK_S
