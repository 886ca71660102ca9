"""Programs that people use, on a mount: `make soak-programs` starts it, as root.

    python tests/programs/run.py [NAME ...] [--regime usual|narrow] [--scale 1.0] [--write]

Two regimes: as a user has it, and with the block cache capped at 64 MiB and 50 ms of latency; the
service's limits are on in both. Installs the Debian packages that it needs. Exit code 1 when a
check failed. With --write the findings go to docs/evidence/programs.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import evidence
from mounted import DemoVolume, fuse_missing
from programs import missing
from running import PROGRAMS, run_all

_MIB = 1 << 20
# settings of the mount, options of the sandbox; its limits are on
REGIMES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "usual": ({}, ()),
    "narrow": ({"cache_bytes": str(64 * _MIB)}, ("--latency-s", "0.05")),
}


def install(packages: list[str]) -> None:
    if not packages:
        return
    print(f"==> Installing {' '.join(packages)}", flush=True)
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
    subprocess.run([*environment, *install, *packages], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help=", ".join(PROGRAMS))
    parser.add_argument("--regime", choices=REGIMES, action="append")
    parser.add_argument("--scale", type=float, default=1.0, help="of sizes and numbers")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--write", action="store_true", help="write the evidence")
    options = parser.parse_args()
    if reason := fuse_missing():
        print(f"programs: {reason}", file=sys.stderr)
        return 2
    chosen = [PROGRAMS[name] for name in options.names or PROGRAMS]
    install(missing(tuple(name for program in chosen for name in program.packages)))
    commit = evidence.commit_now()
    found: dict[str, Any] = {"scale": options.scale, "regimes": {}}
    for regime in options.regime or REGIMES:
        print(f"-- {regime}", flush=True)
        found["regimes"][regime] = in_regime(regime, chosen, options)
    print(json.dumps(found, indent=1))
    if options.write:
        evidence.write("programs", made_by="make soak-programs", commit=commit, found=found)
    results = [r for told in found["regimes"].values() for r in told["programs"].values()]
    return int(any(result["wrong"] for result in results))


def in_regime(regime: str, chosen: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    settings, server = REGIMES[regime]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stashcordfs-programs-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as a user of its own
        with DemoVolume.running(
            folder / "volume", settings=settings, server=server, options=("-o", "allow_other")
        ) as volume:
            found = run_all(volume, folder, chosen, scale=options.scale)
            status = volume.status()
    return {
        "settings": settings,
        "server": list(server),
        "programs": found,
        "passed": sum(not result["wrong"] for result in found.values()),
        "of": len(found),
        "messages_sent": status["messages_sent"],
        "rate_limited": status["rate_limited"],
        "last_error": status["last_error"],
        "seconds": round(time.monotonic() - begun),
    }


if __name__ == "__main__":
    sys.exit(main())
