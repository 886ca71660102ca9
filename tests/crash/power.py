"""A file system that loses power: on a loop device, shut down without flushing its log.

`XFS_IOC_GOINGDOWN` with NOLOGFLUSH, which ext4 answers too: from then on nothing reaches the
device, and what was not synced, names included, is gone after the next mount.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

_GOINGDOWN = 2 << 30 | 4 << 16 | ord("X") << 8 | 125  # _IOR('X', 125, uint32), xfs_fs.h, ext4.h
_NO_LOG_FLUSH = struct.pack("=I", 2)
_IMAGE_BYTES = 768 << 20
_MAKERS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
_BUSY_S = 10.0


def power_missing(kinds: tuple[str, ...]) -> str:
    """Why no power can be cut here; empty when it can."""
    if os.geteuid():
        return "needs root, to mount loop devices"
    for kind in kinds:
        if not shutil.which(_MAKERS[kind][0]):
            return f"needs {_MAKERS[kind][0]}"
    done = subprocess.run(["losetup", "-f"], capture_output=True, text=True, check=False)
    return f"needs a loop device: {done.stderr.strip()}" if done.returncode else ""


class LoopDisk:
    """A sparse image with a file system, mounted at `path`."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        self.path = folder / "disk"
        self._image = folder / f"{kind}.img"
        self.path.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        subprocess.run([*_MAKERS[kind], self._image], check=True, capture_output=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self._image, self.path], check=True)

    def cut(self) -> float:
        """The power goes now. Returns when."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            at = time.monotonic()
            fcntl.ioctl(fd, _GOINGDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(fd)
        return at

    def restore(self) -> None:
        """The power is back: the file system recovers by its log. Nobody may use it meanwhile."""
        self.unmount()
        self.mount()

    def unmount(self) -> None:
        """Unmount, waiting for a process that has just been killed to be gone."""
        ends = time.monotonic() + _BUSY_S
        while True:
            done = subprocess.run(
                ["umount", self.path], capture_output=True, text=True, check=False
            )
            if not done.returncode:
                return
            if time.monotonic() > ends:
                raise RuntimeError(f"umount: {done.stderr.strip()}")
            time.sleep(0.05)
