"""The fault matrix: each of the service's bad days against each operation, on a real mount.

    python tests/faults/run.py [--only WORD] [--write] [--jobs 3] [--state FILE]

With --state, a run that was interrupted goes on with the rows that are left, if the commit is the
same; a row that had a problem is not tried again. With --write the findings go to
docs/evidence/fault-matrix.json and .md. Exit code 1 when an operation hung, gave wrong data, failed
where it must not, or did not recover.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import evidence
from matrix import OPERATIONS, RECOVER_S, SETTINGS, WAIT_S, Matrix, Result
from mounted import fuse_missing
from rows import ROWS, WITHOUT_ROW, Row

EVIDENCE = evidence.EVIDENCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--write", action="store_true", help="write the evidence")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--state", type=Path, help="where finished rows are kept")
    parser.add_argument("--jobs", type=int, default=3, help="volumes at once")
    options = parser.parse_args()
    if reason := fuse_missing():
        print(f"faults: {reason}", file=sys.stderr)
        return 2
    # in the background a shell ignores SIGINT for us, and our commands would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows = [row for row in ROWS if options.only in row.name]
    commit = evidence.commit_now()
    kept = Kept(options.state, commit)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stashcordfs-faults-") as name:
        results = run(rows, Path(name), jobs=options.jobs, kept=kept)
    show(results)
    if options.write:
        write(results, commit)
    kept.end()
    return int(any(result.problems for result in results))


class Kept:
    """The rows that are done, in a file, for as long as the commit is the same."""

    def __init__(self, path: Path | None, commit: str) -> None:
        """`commit` as `commit_now` says it; of changed code nothing is kept."""
        self._path = None if "changes" in commit else path
        self._commit = commit
        self._turn = threading.Lock()
        self.results: dict[str, Result] = {}
        if self._path and self._path.exists():
            told = json.loads(self._path.read_text(encoding="utf-8"))
            if told["commit"] == commit:
                self.results = {row["row"]: Result.from_json(row) for row in told["rows"]}

    def add(self, result: Result) -> None:
        with self._turn:
            self.results[result.row] = result
            if self._path:
                rows = [each.as_json() for each in self.results.values()]
                new = self._path.with_suffix(".new")
                new.write_text(json.dumps({"commit": self._commit, "rows": rows}), encoding="utf-8")
                new.replace(self._path)

    def end(self) -> None:
        if self._path:
            self._path.unlink(missing_ok=True)


def run(rows: list[Row], folder: Path, *, jobs: int, kept: Kept) -> list[Result]:
    """All rows, spread over as many volumes, each with a server of its own: most is waiting."""
    left = deque(row for row in rows if row.name not in kept.results)
    begun = time.monotonic()

    def work(number: int) -> None:
        with Matrix.on(folder / f"volume-{number}") as matrix:
            while left:
                row = left.popleft()
                result = matrix.run(row)
                kept.add(result)
                said = "; ".join(result.problems) or "as it should be"
                print(f"{time.monotonic() - begun:6.0f} s  {row.name}: {said}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, range(min(jobs, len(left)))))  # raises what a worker raised
    return [kept.results[row.name] for row in rows]


def show(results: list[Result]) -> None:
    table = Table(title="outcome and seconds of each operation while the fault is there")
    for heading in ("fault", *OPERATIONS, "recovered"):
        table.add_column(heading, overflow="fold")
    for result in results:
        style = "red" if result.problems else ""
        table.add_row(*cells_of(result), style=style)
    Console(width=200).print(table)


def cells_of(result: Result) -> list[str]:
    cells = [result.cells.get(name) for name in OPERATIONS]
    texts = ["-" if cell is None else f"{cell.outcome} {cell.seconds:.1f}" for cell in cells]
    back = "no" if result.recovered_s is None else f"{result.recovered_s:.0f} s"
    return [result.row, *texts, f"{back}, {result.after}" if result.after else back]


def write(results: list[Result], commit: str) -> None:
    EVIDENCE.mkdir(exist_ok=True)
    about = {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "settings": SETTINGS,
        "wait_s": WAIT_S,
        "recover_s": RECOVER_S,
        "rows": [result.as_json() for result in results],
    }
    text = json.dumps(about, indent=1) + "\n"
    (EVIDENCE / "fault-matrix.json").write_text(text, encoding="utf-8")
    (EVIDENCE / "fault-matrix.md").write_text(markdown(results, commit), encoding="utf-8")


def markdown(results: list[Result], commit: str) -> str:
    wrong = [result for result in results if result.problems]
    lines = [
        "# Fault matrix",
        "",
        f"Commit {commit}, {time.strftime('%Y-%m-%d')}, made by `make soak-faults`. Settings:",
        f"{', '.join(f'{k} = {v}' for k, v in SETTINGS.items())}.",
        "",
        "Each cell is an operation's outcome while the fault is there, and its seconds.",
        f"`waits`: the command waited for Discord for {WAIT_S:.0f} s and heeded an interrupt",
        "(`umount` was then given `--no-wait`). `recovered`: seconds from the fault's end until",
        f"all was on Discord and an evicted file could be read; `no`: not in {RECOVER_S:.0f} s.",
        "After each row a mount without local data has read back what was written meanwhile.",
        "",
        f"{len(results)} rows, {len(wrong)} with a problem.",
        "",
        *[f"* {result.row}: {'; '.join(result.problems)}" for result in wrong],
        *([""] if wrong else []),
        "| no. | fault | " + " | ".join(OPERATIONS) + " | recovered | refusals |",
        "|" + " --- |" * (len(OPERATIONS) + 4),
    ]
    for result in results:
        name, *rest = cells_of(result)
        number = "-" if result.number is None else str(result.number)
        lines.append(f"| {number} | {name} | {' | '.join(rest)} | {result.refusals} |")
    lines += [
        "",
        "The numbers are those of the behaviours in `sandbox.md`. Refusals: answers of 401,",
        "403 and 429 (not of a shared limit) while the row ran. `purge` is tried where the fault",
        "is about deletion. Without a row:",
        "",
        *[f"* {number}: {why}." for number, why in WITHOUT_ROW.items()],
        "* 10 as the service has it, for edits of old messages: the same. Other calls get it here.",
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
