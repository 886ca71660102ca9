"""What a long run leaves behind: its findings as JSON under docs/evidence, with the commit."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence"


def commit_now() -> str:
    """The commit that is checked out; says so when the program was changed since."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "stashcordfs")
    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")


def write(name: str, *, made_by: str, commit: str, found: dict[str, Any]) -> None:
    """Write `name`.json. `commit` is the one that the run began with."""
    about = {"made_by": made_by, "commit": commit, "date": time.strftime("%Y-%m-%d")}
    EVIDENCE.mkdir(exist_ok=True)
    text = json.dumps({**about, **found}, indent=1) + "\n"
    (EVIDENCE / f"{name}.json").write_text(text, encoding="utf-8")
