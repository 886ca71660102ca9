"""The long runs of uploading, recovering and collecting; `make soak-uploads` and so on start them.

    python tests/soak/run.py uploads|offline|recover|garbage|directory [--seed N] [--dir FOLDER]
                             [--write] [--state FILE]

Seeded. Exit code 1 when something was not as it must be. With --write the findings go to
docs/evidence/uploads.json, offline.json and so on. With --state FILE, `recover` goes on after an
interruption with the next round, and a part of `garbage` that was finished with the same code is
not run again.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import directory
import evidence
import garbage
import offline
import recovering
import uploads
from mounted import fuse_missing

GIB = 1 << 30


@dataclass
class Both:
    """What became of files that die in groups, and of those that die at random."""

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        return [f"{how}: {text}" for how, part in self.parts.items() for text in part["problems"]]

    def as_json(self) -> dict[str, Any]:
        return dict(self.parts)


def _garbage(folder: Path, seed: int, commit: str, state: Path | None) -> Both:
    both = Both()
    for how in ("groups", "random"):
        key = f"{how} {seed} {commit}"
        kept = json.loads(state.read_text()) if state and state.exists() else {}
        if key not in kept:
            kept[key] = garbage.soak_garbage(folder, how=how, seed=seed).as_json()
            if state:
                state.write_text(json.dumps(kept))
        both.parts[how] = kept[key]
    return both


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("which", choices=["uploads", "offline", "recover", "garbage", "directory"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--state", type=Path, help="where finished rounds or parts are kept")
    parser.add_argument("--write", action="store_true", help="write the evidence")
    options = parser.parse_args()
    if options.which in ("offline", "recover", "directory") and (reason := fuse_missing()):
        print(f"soak: {reason}", file=sys.stderr)
        return 2
    # in the background a shell ignores SIGINT for us, and our commands would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    commit, begun = evidence.commit_now(), time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stashcordfs-soak-") as name:
        folder = Path(name)
        result = (
            _garbage(folder, options.seed, commit, options.state)
            if options.which == "garbage"
            else recovering.soak_recover(
                folder, rounds=20, seed=options.seed, state=options.state, commit=commit
            )
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
