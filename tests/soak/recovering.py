"""Machines that are lost at a random moment, with faults on: what `status` called told is back.

Each round: a new volume on a faulty server; files are written, in bursts; at a random moment the
daemon is killed and its state removed; `recover` on a new machine. Every file that was complete
before what `status` had last called unknown to Discord must be there, byte for byte. Of the others
nothing may be wrong: absent, whole, listed as lost, or ending early.
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
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mounted import NAME, DemoVolume

_MARGIN_S = 1.0  # a group commit, and the answer of `status`
FAULTS = [
    {"kind": "status", "status": [500, 502, 503], "route": "create_message", "probability": 0.1},
    {"kind": "lost_answer", "status": 504, "route": "create_message", "probability": 0.1},
    {"kind": "delay", "seconds": 1.5, "route": "*", "probability": 0.1},
    {"kind": "cut", "route": "cdn", "probability": 0.05},
    {"kind": "hide", "newest": 1, "route": "list_messages", "probability": 0.1},
    {"kind": "interleave", "route": "create_message", "probability": 0.1},
]


@dataclass
class Result:
    rounds: int = 0
    files: int = 0
    told: int = 0  # of them complete before what status called unknown
    back: int = 0
    listed: int = 0
    absent: int = 0
    oldest_unknown_s: float = 0.0
    recover_s: float = 0.0
    requests: int = 0  # of the dearest recovery
    problems: list[str] = field(default_factory=list)

    def as_json(self):
        return asdict(self)


def soak_recover(folder: Path, *, rounds: int, seed: int, longest_s: float = 90.0) -> Result:
    result = Result()
    for number in range(rounds):
        _round(folder / f"round-{number}", random.Random(seed * 1000 + number), longest_s, result)
        result.rounds += 1
    return result


def _round(folder: Path, chance: random.Random, longest_s: float, result: Result) -> None:
    with DemoVolume.running(folder) as demo:
        _faults(demo, chance)
        written = _write(demo, chance, chance.uniform(5, longest_s))
        known = demo.status()
        at = time.monotonic() - float(known["discord_age_s"]) - _MARGIN_S
        _lose(demo)
        begun = time.monotonic()
        channel = str(demo.server["channel_ids"][0])
        report = json.loads(demo.command("recover", NAME, "--channel", channel, "--json"))
        result.recover_s = max(result.recover_s, round(time.monotonic() - begun, 1))
        result.requests = max(result.requests, report["requests"])
        result.oldest_unknown_s = max(result.oldest_unknown_s, known["discord_age_s"])
        demo.mount()
        listed = {item["path"] for item in report["missing"]} | set(report["older"])
        for name, (seed, size, ended) in written.items():
            _check(demo, name, random.Random(seed).randbytes(size), ended < at, listed, result)
    shutil.rmtree(folder)


def _faults(demo: DemoVolume, chance: random.Random) -> None:
    base = str(demo.server["api_url"]).partition("/api/")[0]
    rules = [{**rule, "for_s": 86_400} for rule in FAULTS]
    body = json.dumps({"rules": rules, "seed": chance.randrange(1 << 30)}).encode()
    urllib.request.urlopen(f"{base}/_sandbox/faults", body, timeout=30).close()


def _write(demo: DemoVolume, chance: random.Random, for_s: float) -> dict:
    written: dict[str, tuple[int, int, float]] = {}
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        for _ in range(chance.randrange(1, 60)):
            name = f"d{chance.randrange(9)}/f{len(written)}"
            seed, size = chance.randrange(1 << 40), chance.choice([0, 10, 4000, 30_000, 300_000])
            path = demo.mountpoint / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(random.Random(seed).randbytes(size))
            written[name] = (seed, size, time.monotonic())
        time.sleep(chance.uniform(0, 3))
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
