"""Fuzz the readers with atheris for a while each; `make soak-fuzz` starts it.

    python tests/fuzz/run.py [--seconds N] [--seed N] [--corpus FOLDER] [--write] [TARGET...]

Seeded. What was found is kept in the corpus, from which the next run goes on; so does a run after
an interruption. Exit code 1 after a crash, a hang (10 s) or more than 2 GiB of memory: its input
stays beside the corpus. With --write the findings go to docs/evidence/fuzz.json.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import evidence
import targets

ONE = Path(__file__).with_name("one.py")
_STATS = re.compile(r"stat::(\w+): +(\d+)")


def fuzz(target: str, corpus: Path, *, seconds: int, seed: int) -> dict[str, Any]:
    """Run one target; what came of it."""
    folder, faults = corpus / target, corpus / f"{target}-faults"
    for each in (folder, faults):
        each.mkdir(parents=True, exist_ok=True)
    for data in targets.seeds(target):
        (folder / sha256(data).hexdigest()).write_bytes(data)
    before = len(list(faults.iterdir()))
    done = subprocess.run(
        [
            sys.executable, str(ONE), target,
            f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=10", "-rss_limit_mb=2048",
            "-max_len=16384", "-print_final_stats=1", f"-artifact_prefix={faults}/", str(folder),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    stats = {name: int(value) for name, value in _STATS.findall(done.stderr)}
    found = {
        "runs": stats.get("number_of_executed_units", 0),
        "corpus": len(list(folder.iterdir())),
        "peak_mib": stats.get("peak_rss_mb", 0),
        "exit_code": done.returncode,
        "faults": len(list(faults.iterdir())) - before,
    }
    if done.returncode or not found["runs"]:
        print(done.stderr[-4000:], file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("targets", nargs="*", default=list(targets.TARGETS))
    parser.add_argument("--seconds", type=int, default=300, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=evidence.ROOT / ".venv" / ".fuzz")
    parser.add_argument("--write", action="store_true", help="write the evidence")
    options = parser.parse_args()
    commit = evidence.commit_now()
    found: dict[str, Any] = {"seed": options.seed, "seconds_each": options.seconds}
    bad = False
    for target in options.targets:
        found[target] = fuzz(target, options.corpus, seconds=options.seconds, seed=options.seed)
        print(target, found[target], flush=True)
        bad = bad or found[target]["exit_code"] != 0 or not found[target]["runs"]
    if options.write:
        evidence.write("fuzz", made_by="make soak-fuzz", commit=commit, found=found)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
