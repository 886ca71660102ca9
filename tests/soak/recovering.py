"""Machines that are lost at a random moment, with faults on: what `status` called told is back.

Each round: a new volume on a faulty server; a tree of files is written in bursts, over many rounds
of upload; at a random moment, during that or soon after, the daemon is killed and its state
removed; `recover` on a new machine. Every file that was complete before what `status` had last
called unknown to Discord must be there, byte for byte. Of the others nothing may be wrong: absent,
whole, listed as lost, or ending early.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mounted import NAME, DemoVolume

TREE_FILES = 24_000
_MARGIN_S = 1.0  # a group commit, and the answer of `status`
_SIZES = {0: 2, 10: 3, 400: 6, 4_000: 6, 30_000: 3, 300_000: 0.2}  # bytes: how often
_BURST, _PAUSE_S = (50, 600), (0.0, 1.0)
FAULTS = [
    {"kind": "status", "status": [500, 502, 503], "route": "create_message", "probability": 0.1},
    {"kind": "lost_answer", "status": 504, "route": "create_message", "probability": 0.1},
    {"kind": "delay", "seconds": 1.5, "route": "*", "probability": 0.1},
    {"kind": "cut", "route": "cdn", "probability": 0.05},
    {"kind": "hide", "newest": 1, "route": "list_messages", "probability": 0.1},
    {"kind": "interleave", "route": "create_message", "probability": 0.1},
]
READING_FAULTS = [rule for rule in FAULTS if rule["route"] == "cdn"]  # slowness shows no more here


@dataclass
class Result:
    rounds: int = 0
    files: int = 0  # in all rounds
    files_most: int = 0  # in one
    uploads_most: int = 0  # messages that a round had posted before it was killed
    told: int = 0  # of the files complete before what status called unknown
    back: int = 0
    listed: int = 0
    absent: int = 0
    oldest_unknown_s: float = 0.0
    recover_s: float = 0.0
    requests: int = 0  # of the dearest recovery
    problems: list[str] = field(default_factory=list)

    def as_json(self):
        return asdict(self)


def soak_recover(
    folder: Path,
    *,
    rounds: int,
    seed: int,
    files: int = TREE_FILES,
    shortest_s: float = 5.0,
    longest_s: float = 160.0,
    state: Path | None = None,
    commit: str = "",
) -> Result:
    """`state` keeps what was found so far: after an interruption it goes on with the next round.

    If seed and commit are the same, that is.
    """
    result = Result()
    if state is not None and state.exists():
        kept = json.loads(state.read_text())
        if (kept.pop("seed"), kept.pop("commit", "")) == (seed, commit):
            result = Result(**kept)
    for number in range(result.rounds, rounds):
        chance = random.Random(seed * 1000 + number)
        for_s = chance.uniform(shortest_s, longest_s)
        _round(folder / f"round-{number}", chance, for_s, files, result)
        result.rounds += 1
        if state is not None:
            state.write_text(json.dumps({**result.as_json(), "seed": seed, "commit": commit}))
    if state is not None:
        state.unlink(missing_ok=True)
    return result


def _round(folder: Path, chance: random.Random, for_s: float, files: int, result: Result) -> None:
    with DemoVolume.running(folder) as demo:
        _faults(demo, chance, FAULTS)
        written = _write(demo, chance, for_s, files)
        known = demo.status()
        at = time.monotonic() - float(known["discord_age_s"]) - _MARGIN_S
        _lose(demo)
        begun = time.monotonic()
        channel = str(demo.server["channel_ids"][0])
        report = json.loads(demo.command("recover", NAME, "--channel", channel, "--json"))
        result.recover_s = max(result.recover_s, round(time.monotonic() - begun, 1))
        result.requests = max(result.requests, report["requests"])
        result.oldest_unknown_s = max(result.oldest_unknown_s, known["discord_age_s"])
        result.files_most = max(result.files_most, len(written))
        result.uploads_most = max(result.uploads_most, known["messages_sent"])
        _faults(demo, chance, READING_FAULTS)
        demo.mount()
        listed = {item["path"] for item in report["missing"]} | set(report["older"])
        for name, (seed, size, ended) in written.items():
            _check(demo, name, random.Random(seed).randbytes(size), ended < at, listed, result)
    shutil.rmtree(folder)


def _faults(demo: DemoVolume, chance: random.Random, faults: list[dict[str, Any]]) -> None:
    rules = [{**rule, "for_s": 86_400} for rule in faults]
    demo.admin("faults", {"rules": rules, "seed": chance.randrange(1 << 30)})


def _write(
    demo: DemoVolume, chance: random.Random, for_s: float, files: int
) -> dict[str, tuple[int, int, float]]:
    """Files until the moment comes: seed, size, and when each was complete, by name."""
    written: dict[str, tuple[int, int, float]] = {}
    folders = [demo.mountpoint / f"d{d}" / f"e{e}" for d in range(9) for e in range(20)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        for _ in range(min(chance.randint(*_BURST), files - len(written))):
            path = chance.choice(folders) / f"f{len(written)}"
            seed = chance.randrange(1 << 40)
            (size,) = chance.choices(list(_SIZES), list(_SIZES.values()))
            path.write_bytes(random.Random(seed).randbytes(size))
            name = str(path.relative_to(demo.mountpoint))
            written[name] = (seed, size, time.monotonic())
            if time.monotonic() > end:
                break
        time.sleep(min(chance.uniform(*_PAUSE_S), max(0.0, end - time.monotonic())))
    return written


def _lose(demo: DemoVolume) -> None:
    """Kill the daemon, and the machine with it."""
    descriptor = os.pidfd_open(demo.pid())
    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    select.select([descriptor], [], [])
    os.close(descriptor)
    subprocess.run(["fusermount3", "-uz", str(demo.mountpoint)], check=True)
    shutil.rmtree(demo.state)


def _check(
    demo: DemoVolume, name: str, expected: bytes, told: bool, listed: set[str], result: Result
) -> None:
    result.files += 1
    result.told += told
    try:
        got = (demo.mountpoint / name).read_bytes()
    except FileNotFoundError:
        got = None
        result.absent += 1
    except OSError:
        got = None
        result.listed += name in listed
        if name not in listed:
            result.problems.append(f"{name}: an error, and not listed")
    if got == expected:
        result.back += 1
    elif told:
        result.problems.append(f"{name}: was told to be on Discord, and is not back")
    elif got is not None and not expected.startswith(got):
        result.problems.append(f"{name}: other bytes than were written")
