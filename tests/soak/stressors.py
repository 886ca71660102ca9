"""stress-ng's file-system stressors on the mount, one after another, each checked.

A stressor that fails, a mount that does not answer afterwards, and an internal error in the
daemon's log are problems. Run as root, as some of them want to be.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[1] / "support")]
from mounted import NAME, DemoVolume

STRESSORS = (
    "access", "chdir", "chmod", "chown", "copy-file", "dentry", "dir", "dirdeep", "dirmany",
    "dnotify", "dup", "fanotify", "fcntl", "filename", "flock", "fsize", "fstat", "getdent",
    "handle", "hdd", "inotify", "iomix", "lease", "link", "locka", "lockf", "lockofd",
    "mknod", "open", "rename", "symlink", "sync-file", "touch", "utime", "xattr",
)  # fmt: skip
# of the class "filesystem" of stress-ng 0.15
LEFT_OUT = {
    "bind-mount": "mounts, in a namespace of its own, and does not use the folder",
    "binderfs": "another file system",
    "chattr": "an ioctl, which the binding does not carry",
    "eventfd": "no file system",
    "fallocate": "not carried by the binding: EOPNOTSUPP",
    "fiemap": "an ioctl, which the binding does not carry",
    "file-ioctl": "ioctls, which the binding does not carry",
    "fpunch": "fallocate, not carried by the binding",
    "inode-flags": "ioctls, which the binding does not carry",
    "io": "syncs whatever else is mounted on the machine, and so tells of others' errors",
    "ioprio": "no file system",
    "procfs": "another file system",
    "verity": "an ioctl, which the binding does not carry",
}
_MOST = {
    "copy-file": ("--copy-file-bytes", "128m"),
    "dirdeep": ("--dirdeep-inodes", "2000"),
    "hdd": ("--hdd-bytes", "64m"),
    "iomix": ("--iomix-bytes", "32m"),
    "sync-file": ("--sync-file-bytes", "16m"),
}
_PATIENCE_S = 300


@dataclass
class Result:
    seconds_each: int
    processes: int
    left_out: dict[str, str] = field(default_factory=lambda: dict(LEFT_OUT))
    version: str = ""
    operations: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    load_s: int = 0
    messages_sent: int = 0
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Stress:
    def __init__(self, volume: DemoVolume, folder: Path, result: Result) -> None:
        self._volume = volume
        self._folder = folder
        self.result = result
        self._log = volume.state / NAME / "log"
        self._log_seen = 0

    def one(self, stressor: str) -> None:
        place = self._volume.mountpoint / stressor
        place.mkdir(exist_ok=True)
        metrics = self._folder / "metrics.yaml"
        command = [
            "stress-ng", f"--{stressor}", str(self.result.processes),
            "--timeout", f"{self.result.seconds_each}s", "--temp-path", str(place),
            "--verify", "--metrics", "--yaml", str(metrics), *_MOST.get(stressor, ()),
        ]  # fmt: skip
        begun = time.monotonic()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
            )
        except subprocess.TimeoutExpired:
            self._wrong(stressor, f"not over after {_PATIENCE_S} s")
            return
        self.result.load_s += round(time.monotonic() - begun)
        told = done.stdout + done.stderr
        if done.returncode or re.search(r"\bfail:|skipped|not supported", told):
            self._wrong(stressor, f"ended with {done.returncode}: {told[-1500:]}")
        found = re.search(r"bogo-ops: (\d+)", metrics.read_text()) if metrics.exists() else None
        count = int(found[1]) if found else 0
        self.result.operations[stressor] = self.result.operations.get(stressor, 0) + count
        # iomix and xattr count long rounds: none may end in a short run
        self._alive(stressor, place)

    def _alive(self, stressor: str, place: Path) -> None:
        data = os.urandom(100_000)
        probe = place / "probe"
        probe.write_bytes(data)
        if probe.read_bytes() != data:
            self._wrong(stressor, "the mount reads back wrong afterwards")
        shutil.rmtree(place)
        log = self._log.read_text(errors="replace")
        for line in log[self._log_seen :].splitlines():
            if "handler failed" in line or "Traceback" in line:
                self._wrong(stressor, f"in the daemon's log: {line[:500]}")
        self._log_seen = len(log)

    def _wrong(self, stressor: str, what: str) -> None:
        self.result.problems.append(f"{stressor}: {what}")
        print(f"{stressor}: {what}", flush=True)


def soak_stress(
    folder: Path, *, minutes: float, seconds_each: int = 30, stressors: tuple[str, ...] = STRESSORS
) -> Result:
    """Rounds of all stressors until so many minutes have passed, one round at least."""
    result = Result(seconds_each, processes=2)
    version = ["stress-ng", "--version"]
    result.version = subprocess.run(version, capture_output=True, text=True, check=True).stdout
    end = time.monotonic() + minutes * 60
    with DemoVolume.running(folder / "volume", server=("--no-rate-limits",)) as volume:
        stress = Stress(volume, folder, result)
        while not result.rounds or time.monotonic() < end:
            for stressor in stressors:
                stress.one(stressor)
                print(json.dumps({stressor: result.operations.get(stressor)}), flush=True)
                if result.rounds and time.monotonic() > end:
                    break
            result.rounds += 1
        status = volume.status()
        result.messages_sent = status["messages_sent"]
        volume.umount()
        if status["last_error"]:
            result.problems.append(f"the daemon's last error: {status['last_error']}")
    return result
