"""docs/scale.svg, and the table in docs/scale.md, out of docs/evidence/scale.json.

python tests/soak/scale_plot.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

sys.path += [str(Path(__file__).resolve().parents[1] / "support")]
from evidence import EVIDENCE

_BEGIN, _END = "<!-- written by tests/soak/scale_plot.py -->", "<!-- until here -->"
# Step: name, what its memory is called in the findings, how the line looks where lines coincide.
_STEPS = {
    "recover": ("recover", "mib", "-"),
    "recover_from_packs": ("recover --from-packs", "mib", "--"),
    "checkpoint": ("checkpoint (the daemon, all cached)", "mib", "-"),
    "fsck": ("fsck", "mib", "-"),
    "verify": ("verify", "mib", ":"),
    "mount": ("mount after recover; then idle", "idle_mib", "-"),
    "mount_cached": ("mount with all cached; then idle", "idle_mib", "-"),
}
_BOUNDS = {"s": 180, "mib": 500}  # of recovering a million files


def plot(evidence: Path, target: Path) -> None:
    """Draw what `make soak-scale` has found, the same bytes for the same findings."""
    sizes = json.loads(evidence.read_text())["sizes"]
    files = [int(size) for size in sizes]
    mpl.rcParams |= {"svg.hashsalt": "stashcordfs"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    for axis, label, key in zip(axes, ("seconds", "MiB of memory"), ("s", "mib"), strict=True):
        for step, (name, memory, line) in _STEPS.items():
            found = [sizes[str(n)]["steps"][step] for n in files]
            wanted = [one["s" if key == "s" else memory] for one in found]
            axis.plot(files, wanted, "o" + line, label=name, markersize=4)
        axis.axhline(_BOUNDS[key], color="grey", linestyle="-.", label="bound of recover")
        axis.set(xscale="log", yscale="log", xlabel="files", ylabel=label)
        axis.grid(visible=True, which="both", alpha=0.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(target, metadata={"Date": None})


_ROWS = {
    "making it, a process at a time": ("make", "mib"),
    "checkpoint, by the daemon that has all cached": ("checkpoint", "mib"),
    "**recover**": ("recover", "mib"),
    "recover from packs alone": ("recover_from_packs", "mib"),
    "fsck": ("fsck", "mib"),
    "verify, by listing": ("verify", "mib"),
    "mount after recover; then idle": ("mount", "idle_mib"),
    "mount, all cached; then idle": ("mount_cached", "idle_mib"),
}


def table(sizes: dict[str, Any]) -> str:
    """What was found, for the document."""
    heads = [f"{int(size):,} files" for size in sizes]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    steps = [found["steps"] for found in sizes.values()]
    for name, (step, memory) in _ROWS.items():
        cells = [_cell(one[step], memory) for one in steps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, tell in {
        "requests of recover; from packs": lambda s: (
            f"{s['recover']['requests']}; {s['recover_from_packs']['requests']}"
        ),
        "checkpoint: bytes, messages": lambda s: (
            f"{s['checkpoint']['bytes'] / (1 << 20):.1f} MiB, {s['checkpoint']['parts'] + 1}"
        ),
        "answers meanwhile: median, 99 %, slowest": lambda s: _answers(s["checkpoint"]),
        "journal": lambda s: _journal(s["journal"]),
    }.items():
        lines.append(f"| {name} | " + " | ".join(map(tell, steps)) + " |")
    return "\n".join(lines)


def _cell(step: dict[str, Any], memory: str) -> str:
    cpu = f" ({step['cpu_s']} of a processor)" if "cpu_s" in step else ""
    return f"{step['s']} s{cpu}, {step[memory]} MiB"


def _journal(found: dict[str, Any]) -> str:
    return f"{found['bytes'] / (1 << 20):.0f} MiB, {found['bytes_a_file']} bytes a file"


def _answers(checkpoint: dict[str, Any]) -> str:
    took = checkpoint["answers_during_ms"]
    if not took["answers"]:
        return "-"
    return f"{took['median']}, {took['p99']}, {took['most']} ms"


def write_table(sizes: dict[str, Any], document: Path) -> None:
    """Put the table between its marks."""
    text = document.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    document.write_text(f"{before}{_BEGIN}\n\n{table(sizes)}\n\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    FOUND = EVIDENCE / "scale.json"
    plot(FOUND, EVIDENCE.parent / "scale.svg")
    write_table(json.loads(FOUND.read_text())["sizes"], EVIDENCE.parent / "scale.md")
