"""Load on the mount, checked: `make soak-fsx`, `soak-fsstress`, `soak-fio` and `soak-stress`.

    python tests/soak/load.py fsx|fsstress|fio|stress [--minutes 60] [--seed N] [--write]

Exit code 1 when something was not as it must be. With --write the findings go to
docs/evidence/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import evidence
from fio import soak_fio
from fsstress import soak_fsstress
from fsx import soak_fsx
from mounted import fuse_missing
from stressors import STRESSORS, soak_stress

Soak = Callable[[Path, argparse.Namespace], Any]
SOAKS: dict[str, Soak] = {
    "fsx": lambda folder, o: soak_fsx(folder, minutes=o.minutes, seed=o.seed),
    "fsstress": lambda folder, o: soak_fsstress(folder, minutes=o.minutes, seed=o.seed),
    "fio": lambda folder, o: soak_fio(folder, minutes=o.minutes, seed=o.seed),
    "stress": lambda folder, o: soak_stress(
        folder, minutes=o.minutes, seconds_each=round(min(30, o.minutes * 60 / len(STRESSORS)))
    ),
}
_PACKAGES = {"fio": "fio", "stress": "stress-ng"}


def install(package: str) -> None:
    query = subprocess.run(["dpkg-query", "-W", package], capture_output=True, check=False)
    if query.returncode:
        print(f"==> Installing {package}", flush=True)
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        options = ["-y", "-qq", "--no-install-recommends"]
        subprocess.run(["apt-get", "install", *options, package], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("which", choices=SOAKS)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--write", action="store_true", help="write the evidence")
    options = parser.parse_args()
    if reason := fuse_missing():
        print(f"soak: {reason}", file=sys.stderr)
        return 2
    if package := _PACKAGES.get(options.which):
        install(package)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    commit, begun = evidence.commit_now(), time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stashcordfs-load-") as name:
        result = SOAKS[options.which](Path(name) / "volume", options)
    found = {**result.as_json(), "seconds": round(time.monotonic() - begun)}
    print(json.dumps(found, indent=1))
    if options.write:
        made_by = f"make soak-{options.which}"
        evidence.write(options.which, made_by=made_by, commit=commit, found=found)
    return int(bool(result.problems))


if __name__ == "__main__":
    sys.exit(main())
