"""The long runs of uploading and recovering; `make soak-uploads` and the like start them.

    python tests/soak/run.py uploads|offline|recover|directory [--seed N] [--dir FOLDER] [--write]
                             [--state FILE]

Seeded. With --state, `recover` goes on after an interruption with the next round. Exit code 1 when
something was not as it must be. With --write the findings go to docs/evidence/uploads.json,
offline.json, recover.json or directory.json.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import directory
import evidence
import offline
import recovering
import uploads
from mounted import fuse_missing

GIB = 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("which", choices=["uploads", "offline", "recover", "directory"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--state", type=Path, help="where finished rounds are kept")
    parser.add_argument("--write", action="store_true", help="write the evidence")
    options = parser.parse_args()
    if options.which != "uploads" and (reason := fuse_missing()):
        print(f"soak: {reason}", file=sys.stderr)
        return 2
    # in the background a shell ignores SIGINT for us, and our commands would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    commit, begun = evidence.commit_now(), time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stashcordfs-soak-") as name:
        folder = Path(name)
        result = (
            recovering.soak_recover(folder, rounds=20, seed=options.seed, state=options.state)
            if options.which == "recover"
            else uploads.soak_uploads(folder, uploads=1000, seed=options.seed)
            if options.which == "uploads"
            else directory.soak_directory(folder / "volume", entries=1_000_000, seed=options.seed)
            if options.which == "directory"
            else offline.soak_offline(
                folder / "volume",
                data_bytes=2 * GIB,
                file_bytes=64 << 20,
                cache_bytes=4 * GIB,
                seed=options.seed,
                away_s=300.0,
                unasked=True,
            )
        )
    found = {**result.as_json(), "seconds": round(time.monotonic() - begun)}
    print(json.dumps(found, indent=1))
    if options.write:
        made_by = f"make soak-{options.which}"
        evidence.write(options.which, made_by=made_by, commit=commit, found=found)
    return int(bool(result.problems))


if __name__ == "__main__":
    sys.exit(main())
