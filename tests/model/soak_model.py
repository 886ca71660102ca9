"""The model test at length: `make soak-model` starts it.

    soak_model.py [--steps 100000] [--seed N] [--state FILE] [--at-once N] [--dir FOLDER] [--write]
    soak_model.py --replay FILE    one game again, from what a difference has left

Batches of games over a volume each; hypothesis's course follows from seed and batch. With --state a
run that was interrupted goes on with the next batch; with --at-once several volumes share the
steps, of the seeds from --seed on. Exit code 1 when the mount and the plain folder were not alike.
With --write the findings go to docs/evidence/model.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import evidence
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test
from machine import machine_for, playing
from mounted import fuse_missing
from twins import Rig

_GAMES, _STEPS = 60, 400  # of a batch; hypothesis's own rules leave some steps without effect


@dataclass
class Findings:
    seed: int
    at_once: int = 1  # volumes; their seeds follow one another
    batches: int = 0
    games: int = 0
    steps: int = 0
    remounts: int = 0
    seconds: int = 0
    by_operation: dict[str, int] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def play(folder: Path, findings: Findings, *, games: int, steps: int) -> None:
    """One batch: games, and at its end all of them by a mount without local data."""
    begun = time.monotonic()
    machine = seeded(findings.seed * 1_000_000 + findings.batches)
    with Rig.running(folder) as rig:
        try:
            run_state_machine_as_test(
                machine(machine_for(rig)), settings=playing(examples=games, steps=steps)
            )
            rig.all_again()
        except Exception:  # noqa: BLE001  hypothesis passes on whatever an operation raised
            traceback.print_exc()
            findings.problems.append(rig.difference or traceback.format_exc())
        findings.games += len(rig.games)
        findings.steps += rig.steps
        findings.remounts += rig.remounts + 1
        for game in rig.games:
            for name, *_ in game.done:
                findings.by_operation[name] = findings.by_operation.get(name, 0) + 1
    findings.batches += 1
    findings.seconds += round(time.monotonic() - begun)


def replay(folder: Path, steps: list[list[Any]]) -> None:
    """The steps that a difference has left in difference.json."""
    with Rig.running(folder) as rig:
        game = rig.game()
        for name, *args in steps:
            if name == "sync":
                game.sync()
            elif name == "press":
                game.press()
            elif name == "forget_pages":
                game.forget_pages(wait=args[0])
            elif name == "remount":
                game.remount(without_cache=args[0])
            else:
                game.do(name, *args)


def _bytes(told: dict[str, Any]) -> Any:
    return told["bytes"].encode("latin-1") if "bytes" in told else told


def soak(options: argparse.Namespace) -> Findings:
    state: Path | None = options.state
    findings = Findings(options.seed)
    if state is not None and state.exists():
        findings = Findings(**json.loads(state.read_text(encoding="utf-8")))
        if findings.seed != options.seed:
            raise SystemExit(f"{state} is of another run: seed {findings.seed}")
    while findings.steps < options.steps and len(findings.problems) < options.most_problems:
        commit = evidence.commit_now()
        if commit not in findings.commits:
            findings.commits.append(commit)
        with tempfile.TemporaryDirectory(dir=options.dir, prefix="stashcordfs-model-") as name:
            play(Path(name), findings, games=_GAMES, steps=_STEPS)
        print(json.dumps({**asdict(findings), "by_operation": None}), flush=True)
        if state is not None:
            new = state.with_suffix(".new")
            new.write_text(json.dumps(asdict(findings)), encoding="utf-8")
            new.replace(state)
    return findings


def soak_at_once(options: argparse.Namespace) -> Findings:
    """A process for each volume. What one has found is left in its state file."""
    states = [Path(f"{options.state}.{n}") for n in range(options.at_once)]
    share = -(-options.steps // options.at_once)
    parts = []
    for number, state in enumerate(states):
        command = [sys.executable, __file__, "--part", "--state", str(state)]
        command += ["--seed", str(options.seed + number), "--steps", str(share)]
        command += ["--most-problems", str(options.most_problems)]
        command += ["--dir", str(options.dir)] if options.dir else []
        parts.append(subprocess.Popen(command))
    ended = [part.wait() for part in parts]
    found = [Findings(**json.loads(s.read_text(encoding="utf-8"))) for s in states if s.exists()]
    whole = Findings(options.seed, options.at_once)
    for one in found:
        for name in ("batches", "games", "steps", "remounts", "seconds"):
            setattr(whole, name, getattr(whole, name) + getattr(one, name))
        for operation, count in one.by_operation.items():
            whole.by_operation[operation] = whole.by_operation.get(operation, 0) + count
        whole.commits += [commit for commit in one.commits if commit not in whole.commits]
        whole.problems += one.problems
    if any(ended) and not whole.problems:
        whole.problems.append(f"a part ended with {max(ended)}")
    if not whole.problems:
        for state in states:
            state.unlink(missing_ok=True)
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, help="volumes that share the steps")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help="where the batch's number is kept")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--most-problems", type=int, default=1, help="after so many it ends")
    parser.add_argument("--replay", type=Path, help="a difference.json")
    parser.add_argument("--write", action="store_true", help="write the evidence")
    options = parser.parse_args()
    if reason := fuse_missing():
        print(f"model: {reason}", file=sys.stderr)
        return 2
    if options.replay:
        steps = json.loads(options.replay.read_text(encoding="utf-8"), object_hook=_bytes)
        with tempfile.TemporaryDirectory(dir=options.dir, prefix="stashcordfs-model-") as name:
            replay(Path(name), steps)
        return 0
    if options.at_once > 1 and options.state is None:
        parser.error("--at-once needs --state")
    findings = soak_at_once(options) if options.at_once > 1 else soak(options)
    if options.write:
        evidence.write(
            "model", made_by="make soak-model", commit=findings.commits[-1], found=asdict(findings)
        )
    if options.state and not findings.problems and not options.part:
        options.state.unlink(missing_ok=True)
    return int(bool(findings.problems))


if __name__ == "__main__":
    sys.exit(main())
