"""docs/scale.svg out of docs/evidence/scale.json: time and memory by the number of files.

python tests/soak/scale_plot.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

sys.path += [str(Path(__file__).resolve().parents[1] / "support")]
from evidence import EVIDENCE

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


if __name__ == "__main__":
    plot(EVIDENCE / "scale.json", EVIDENCE.parent / "scale.svg")
