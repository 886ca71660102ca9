"""Runs programs on one mount, then looks at all they left with nothing kept locally."""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import heavy as heavy  # noqa: PLC0414  each registers its programs
import sharing as sharing  # noqa: PLC0414
import small as small  # noqa: PLC0414
import trees
from mounted import DemoVolume
from programs import PROGRAMS, Checks, Place, Program

Found = dict[str, dict[str, Any]]


def run_all(
    volume: DemoVolume, folder: Path, programs: Sequence[Program], *, scale: float
) -> Found:
    """Each program's checks, by name. `wrong` is what failed; one ends no other."""
    found: Found = {}
    places: dict[str, Place] = {}
    for program in programs:
        places[program.name] = _place(volume, folder, program.name, scale)
        begun = time.monotonic()
        found[program.name] = {"version": _version(program), "checks": [], "wrong": ""}
        _check(found[program.name], program.run(places[program.name]))
        found[program.name]["seconds"] = round(time.monotonic() - begun, 1)
        told = found[program.name]
        print(f"{program.name}: {told['wrong'] or 'ok'} ({told['seconds']} s)", flush=True)
    before = {name: trees.looked(place.at) for name, place in places.items()}
    volume.remount(without_cache=True)
    for program in programs:
        told, place = found[program.name], places[program.name]
        _check(told, _kept(before[program.name], place.at))
        _check(told, program.again(place), suffix=" (nothing kept locally)")
    return found


def _place(volume: DemoVolume, folder: Path, name: str, scale: float) -> Place:
    plain = name.replace(" ", "-").replace("'", "")
    place = Place(volume.mountpoint / plain, folder / "work" / plain, scale)
    for made in (place.at, place.work):
        made.mkdir(parents=True)
    return place


def _check(told: dict[str, Any], checks: Checks, *, suffix: str = "") -> None:
    try:
        for passed in checks:
            told["checks"].append(passed + suffix)
    except (AssertionError, OSError, subprocess.SubprocessError):
        told["wrong"] += traceback.format_exc()[-3000:]


def _kept(before: Any, at: Path) -> Checks:
    wrong = trees.kept(before, trees.looked(at))
    assert not wrong, "\n".join(wrong[:20])
    yield f"all {len(before)} names, contents and attributes after a remount without local data"


def _version(program: Program) -> str:
    done = subprocess.run(program.version, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip().partition("\n")[0]


__all__ = ["PROGRAMS", "run_all"]
