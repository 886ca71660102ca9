"""Trees compared by what a copy must keep, and by what a remount must."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "model"))
import visible
from sides import Side


def looked(root: Path) -> visible.Tree:
    return visible.look(Side(root))


def compared(source: Path, copy: Path) -> None:
    """AssertionError unless the copy has everything of the source, and its mtimes."""
    one, other = looked(source), looked(copy)
    wrong = visible.differences(other, one)
    wrong += [
        f"{path!r}: mtime {other[path].mtime_ns} instead of {facts.mtime_ns}"
        for path, facts in one.items()
        if path and path in other and other[path].mtime_ns != facts.mtime_ns
    ]
    assert not wrong, "\n".join(wrong[:20])


def kept(before: visible.Tree, after: visible.Tree) -> list[str]:
    """What a remount has changed."""
    return visible.changed(before, after)
