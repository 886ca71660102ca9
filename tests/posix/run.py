"""The POSIX cases against a folder, or against a volume of their own; `make posix` starts it.

    python tests/posix/run.py [FOLDER] [--write]

As root. Without FOLDER both a local disk and a mount are tried. Exit code 1 when something differs.
With --write the counts go to docs/evidence/posix.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import evidence
from mounted import DemoVolume, fuse_missing
from posix_cases import CASES
from posix_language import Outcome, run_all


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, nargs="?", help="an empty folder of a file system")
    parser.add_argument("--write", action="store_true", help="write the evidence")
    options = parser.parse_args()
    if os.geteuid() != 0 or fuse_missing():
        print(f"posix: {fuse_missing() or 'must run as root'}", file=sys.stderr)
        return 2
    commit = evidence.commit_now()
    if options.folder is not None:
        return int(not told("there", run_all(CASES, options.folder.resolve(), on_mount=True)))
    with tempfile.TemporaryDirectory(prefix="stashcordfs-posix-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "disk").mkdir()
        disk = run_all(CASES, folder / "disk", on_mount=False)
        with DemoVolume.running(folder / "volume") as volume:
            (folder / "volume").chmod(0o755)
            began = time.monotonic()
            mount = run_all(CASES, volume.mountpoint, on_mount=True)
            took_s = round(time.monotonic() - began, 1)
    good = all([told("on a local disk", disk), told("on a mount", mount)])
    if options.write:
        found = {"seconds_on_the_mount": took_s, "disk": counts(disk), "mount": counts(mount)}
        evidence.write("posix", made_by="make posix", commit=commit, found=found)
    return int(not good)


def counts(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    withheld = sum(step.mount != step.expected for case in CASES for step in case.steps)
    return {
        "cases": sum(outcome.cases for outcome in outcomes.values()),
        "checks": sum(outcome.steps for outcome in outcomes.values()),
        "withheld_by_kernel_or_binding": withheld,
        "failed": sum(len(outcome.differences) for outcome in outcomes.values()),
        "families": {family: outcome.steps for family, outcome in outcomes.items()},
    }


def told(where: str, outcomes: dict[str, Outcome]) -> bool:
    for outcome in outcomes.values():
        for difference in outcome.differences:
            print(f"differs {where}: {difference}")
    found = counts(outcomes)
    print(f"{where}: {found['checks']} checks in {found['cases']} cases, {found['failed']} failed")
    return not found["failed"]


if __name__ == "__main__":
    sys.exit(main())
