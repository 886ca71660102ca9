"""The crash tester: writers under load, a crash, a mount, and the check of what was acknowledged.

    python tests/crash/run.py kill  [--rounds 300] [--seed N] [--state FILE] [--evidence FILE]
    python tests/crash/run.py power [--rounds 100] [--kinds ext4,xfs] [--break-fsync] ...

Each round prints one JSON line. With --state, a run that was interrupted goes on with the next
round over a new volume, if the commit is the same; a round's course follows from seed and number.
Ends with 1 when anything acknowledged was lost, with 2 when it cannot run here.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
import evidence
from checker import Checker
from invariants import check_journal, check_server, open_intents
from model import State
from pages import PageMaker
from power import LoopDisk, go_alone, power_missing
from rig import Rig, RigError, fuse_missing
from rounds import KILLS, Result, Round, cut_power, lacking, names_bound

_OPTIONS = {
    "cache_bytes": 24 << 20, "checkpoint_pages": 64, "settle_s": 2.0, "checkpoint_segments": 3,
}  # fmt: skip
_MISSES = 5  # rounds left over for kills that come too early or too late
_RECORD_PREFIX = "stashcordfs-volume-"
_SETTLES_S = 120.0
_TELLING = 100  # rounds; fewer need not have met everything


class Run:
    """Rounds of one mode, over one volume or, for power, one volume a kind of disk."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.rows: list[Result] = []
        self.begin_at = 0
        self.ends: dict[str, dict[str, Any]] = {}
        self._rigs: dict[str, tuple[Rig, State]] = {}
        self._folder = folder
        self._commit = evidence.commit_now()

    # ------------------------------------------------------------ resuming

    def resume(self) -> None:
        path: Path | None = self.options.state
        if path is None or not path.exists():
            return
        told = json.loads(path.read_text(encoding="utf-8"))
        if (told["mode"], told["seed"]) != (self.options.mode, self.options.seed):
            raise SystemExit(f"{path} is of another run: {told['mode']}, seed {told['seed']}")
        if told.get("commit") != self._commit:
            print(f"crash: {path} is of another commit; from the beginning", file=sys.stderr)
            return
        self.rows, self.begin_at = told["rows"], told["next"]

    def _keep(self, following: int) -> None:
        path: Path | None = self.options.state
        if path is None:
            return
        told = {
            "mode": self.options.mode,
            "seed": self.options.seed,
            "commit": self._commit,
            "next": following,
            "rows": self.rows,
        }
        new = path.with_suffix(".new")
        new.write_text(json.dumps(told), encoding="utf-8")
        new.replace(path)

    # ------------------------------------------------------------ rounds

    def all(self) -> None:
        names = self.options.kinds if self.options.mode == "power" else ["kill"]
        try:
            for name in names:
                self._rigs[name] = (self._rig(name), State())
            for number in range(self.begin_at, self.options.rounds):
                self._one(number, names[number % len(names)])
                self._keep(number + 1)
            for name, (rig, state) in self._rigs.items():
                self._end(name, rig, state)
            if self.options.state:
                self.options.state.unlink(missing_ok=True)
        finally:
            for rig, _ in self._rigs.values():
                rig.close()

    def _rig(self, name: str) -> Rig:
        folder = self._folder / name
        disk = LoopDisk(folder, name) if self.options.mode == "power" else None
        options = {**_OPTIONS, "break_fsync": self.options.break_fsync}
        rig = Rig(folder, disk=disk, options=options)
        try:
            rig.mount(sync_every_s=5.0)
        except BaseException:
            rig.close()
            raise
        return rig

    def _one(self, number: int, name: str) -> None:
        rig, state = self._rigs[name]
        rnd = Round(
            rig,
            seed=self.options.seed,
            number=number,
            writers=self.options.writers,
            start=state,
        )
        try:
            row = self._kill(rnd) if self.options.mode == "kill" else self._power(rnd, name)
            self._rigs[name] = (rig, rnd.start)
        except (RigError, subprocess.SubprocessError, OSError) as error:
            row = {"round": number, "kind": name, "wrong": [f"{type(error).__name__}: {error}"]}
            self._rigs.pop(name)
            rig.close()
            self._replace(name, number)
        print(json.dumps(row), flush=True)
        self.rows.append(row)

    def _replace(self, name: str, number: int) -> None:
        """Go on with a new volume; the old one is kept for whoever looks into it."""
        old = self._folder / name
        old.rename(self._folder / f"{name}-broken-{number}")
        self._rigs[name] = (self._rig(name), State())

    def _kill(self, rnd: Round) -> Result:
        kinds = list(KILLS)
        missing = lacking(self.rows, self.options.rounds)
        if rnd.number < len(kinds):  # a short run has each of them, a cold one with something in it
            kind = kinds[rnd.number]
        elif missing and sum(missing.values()) >= self.options.rounds - rnd.number - _MISSES:
            kind = rnd.chance.choices(list(missing), list(missing.values()))[0]
        else:
            kind = rnd.chance.choices(kinds, [weight for _, weight in KILLS.values()])[0]
        return rnd.run(KILLS[kind][0], kind=kind, sync_every_s=rnd.chance.choice([0.3, 5.0]))

    def _power(self, rnd: Round, name: str) -> Result:
        # The timer of this round was set when the last one ended.
        every = self._sync_every(rnd.number - len(self.options.kinds))
        fresh = rnd.number < len(self.options.kinds)  # a volume on its first day
        idle = not fresh and rnd.chance.random() < 0.1
        long = rnd.chance.random() < 0.3
        load = (0.4, 2.2)
        if fresh:
            load = (0.05, 0.3)
        elif idle:
            load = (0.0, 0.0)
        elif long:
            load = (3.0, 4.0)
        crash = partial(cut_power, load_s=load, names_s=names_bound(every))
        kind = f"{name} fresh" if fresh else f"{name} idle" if idle else name
        return rnd.run(crash, kind=kind, sync_every_s=self._sync_every(rnd.number))

    def _sync_every(self, number: int) -> float:
        if number < self.begin_at:
            return 5.0
        return random.Random(f"{self.options.seed}/every/{number}").choice([0.5, 1.0, 5.0])

    # ------------------------------------------------------------ the end

    def _end(self, name: str, rig: Rig, state: State) -> None:
        """Everything to the server; then the server alone must have all of it, once."""
        wrong: list[str] = []
        begun = time.monotonic()
        rig.faults([])
        rig.sync()
        while open_intents(rig.journal) and time.monotonic() - begun < _SETTLES_S:
            time.sleep(0.5)
        rig.umount()
        wrong += check_journal(rig.journal)
        left = open_intents(rig.journal)
        rig.forget_blocks()
        rig.mount()
        maker = PageMaker(self.options.seed)
        cold = Checker(rig.mountpoint, maker).exactly(state)
        wrong += [f"with an empty cache: {text}" for text in cold.wrong]
        rig.umount()
        rig.end_server()
        server = check_server(rig.journal, rig.server_folder, record_prefix=_RECORD_PREFIX)
        if server.missing:
            wrong.append(f"{len(server.missing)} packs are not on the server")
        if server.twice:
            wrong.append(f"{len(server.twice)} packs are there more than once")
        self.ends[name] = {
            "packs": server.packs,
            "missing": len(server.missing),
            "twice": len(server.twice),
            "unsettled": len(server.unsettled),
            "orphans": len(server.orphans),
            "open_intents": left,
            "cold_pages": cold.pages,
            "seconds": round(time.monotonic() - begun, 1),
            "wrong": wrong,
        }
        print(json.dumps({"end": name, **self.ends[name]}), flush=True)

    def summary(self) -> dict[str, Any]:
        failed = [row for row in self.rows if row["wrong"]]
        mounts = [row["mount_s"] for row in self.rows if "mount_s" in row]
        return {
            "mode": self.options.mode,
            "commit": self._commit,
            "seed": self.options.seed,
            "break_fsync": self.options.break_fsync,
            "rounds": len(self.rows),
            "failed_rounds": len(failed),
            "by_kind": dict(Counter(row["kind"] for row in self.rows)),
            "killed_in_the_middle_of": dict(
                Counter(d for row in self.rows if (d := row.get("during")))
            ),
            "operations": sum(row.get("operations", 0) for row in self.rows),
            "pages_checked": sum(row.get("pages", 0) for row in self.rows),
            "acknowledged_pages": sum(row.get("acknowledged", 0) for row in self.rows),
            "slowest_mount_s": max(mounts, default=0),
            "seconds": round(sum(row.get("seconds", 0) for row in self.rows)),
            "ends": self.ends,
            "failures": failed[:20],
        }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=["kill", "power"])
    parser.add_argument("--rounds", type=int, help="default: 300 kills, or 100 power cuts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--kinds", default="ext4,xfs", help="local disks of the power cuts")
    parser.add_argument("--state", type=Path, help="where the round's number is kept")
    parser.add_argument("--evidence", type=Path, help="where the summary is written")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep the folder when something failed")
    parser.add_argument("--break-fsync", action="store_true", help="nothing is synced: must fail")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or {"kill": 300, "power": 100}[options.mode]
    options.kinds = options.kinds.split(",")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    reason = fuse_missing()
    if not reason and options.mode == "power":
        reason = power_missing(tuple(options.kinds))
    if reason:
        print(f"crash: {reason}", file=sys.stderr)
        return 2
    if options.mode == "power":
        go_alone()
    folder = Path(tempfile.mkdtemp(dir=options.dir, prefix="stashcordfs-crash-"))
    run = Run(options, folder)
    run.resume()
    try:
        run.all()
    finally:
        summary = run.summary()
        failed = summary["failed_rounds"] or any(end["wrong"] for end in run.ends.values())
        if not (failed and options.keep):
            subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=False)
    short = {key: value for key, value in summary.items() if key != "failures"}
    print(json.dumps(short, indent=1), flush=True)
    if options.evidence:
        options.evidence.parent.mkdir(parents=True, exist_ok=True)
        options.evidence.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if options.mode == "kill" and len(run.rows) >= _TELLING and lacking(run.rows, len(run.rows)):
        print("crash: too few kills in the middle of something", file=sys.stderr)
        return 1
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
