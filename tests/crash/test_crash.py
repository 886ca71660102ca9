"""A thirtieth of the long runs, which `make soak-crash-kill` and `soak-crash-power` start.

Each runs as a process of its own, as a person would start it. What failed is in its lines.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "support"))
sys.path.append(str(HERE))
mounted = importlib.import_module("mounted")
power = importlib.import_module("power")

KINDS = ("ext4", "xfs")
NO_FUSE = mounted.fuse_missing()
NO_POWER = NO_FUSE or power.power_missing(KINDS)
pytestmark = pytest.mark.fuse


def crash(*args: str) -> tuple[int, list[dict], str]:
    """Exit code, the lines of the rounds, and everything to show when that is not as wanted."""
    done = subprocess.run(
        [sys.executable, HERE / "run.py", *args],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    wrong = [line for line in lines if line["wrong"]]
    return done.returncode, lines, json.dumps(wrong, indent=1)[:8000] + done.stderr[-4000:]


@pytest.mark.skipif(bool(NO_FUSE), reason=NO_FUSE or "fuse")
def test_a_killed_daemon_loses_nothing_acknowledged():
    code, lines, told = crash("kill", "--rounds", "10", "--seed", "11")
    assert code == 0, told
    assert len(lines) == 11


@pytest.mark.skipif(bool(NO_POWER), reason=NO_POWER or "power")
def test_a_power_cut_loses_nothing_acknowledged():
    code, lines, told = crash("power", "--rounds", "4", "--seed", "11")
    assert code == 0, told
    assert len(lines) == 6


@pytest.mark.skipif(bool(NO_POWER), reason=NO_POWER or "power")
def test_without_fsync_the_tester_tells_of_losses():
    code, lines, told = crash(
        "power", "--rounds", "2", "--seed", "11", "--kinds", "ext4", "--break-fsync"
    )
    assert code == 1, told
    assert any(line["wrong"] for line in lines), told
