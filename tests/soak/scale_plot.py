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

_STEPS = {
    "recover": "recover",
    "recover_from_packs": "recover --from-packs",
    "checkpoint": "checkpoint, mounted",
    "fsck": "fsck",
    "verify": "verify",
    "mount": "mount",
}
_BOUNDS = {"s": 180, "mib": 500}  # of recovering a million files


def plot(evidence: Path, target: Path) -> None:
    """Draw what `make soak-scale` has found, the same bytes for the same findings."""
    sizes = json.loads(evidence.read_text())["sizes"]
    files = [int(size) for size in sizes]
    mpl.rcParams |= {"svg.hashsalt": "stashcordfs", "svg.fonttype": "none"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, key, label in zip(
        axes, ("s", "mib"), ("seconds", "MiB of memory at most"), strict=True
    ):
        for step, name in _STEPS.items():
            axis.plot(files, [sizes[str(n)]["steps"][step][key] for n in files], "o-", label=name)
        axis.axhline(_BOUNDS[key], color="grey", linestyle=":", label="bound of recover, 1,000,000")
        axis.set(xscale="log", yscale="log", xlabel="files", ylabel=label)
        axis.grid(visible=True, which="both", alpha=0.2)
    axes[0].legend(fontsize=8)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    plot(EVIDENCE / "scale.json", EVIDENCE.parent / "scale.svg")
