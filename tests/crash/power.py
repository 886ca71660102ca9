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
import sys
import time
from collections.abc import Callable
from pathlib import Path

_GOINGDOWN = 2 << 30 | 4 << 16 | ord("X") << 8 | 125  # _IOR('X', 125, uint32), xfs_fs.h, ext4.h
_NO_LOG_FLUSH = struct.pack("=I", 2)
_IMAGE_BYTES = 768 << 20
_MAKERS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
_BUSY_S = 10.0
_ALONE = "STASHCORDFS_CRASH_ALONE"
_Done = subprocess.CompletedProcess[str]


def power_missing(kinds: tuple[str, ...]) -> str:
    """Why no power can be cut here; empty when it can."""
    if os.geteuid():
        return "needs root, to mount loop devices"
    for kind in kinds:
        if not shutil.which(_MAKERS[kind][0]):
            return f"needs {_MAKERS[kind][0]}"
    done = subprocess.run(["losetup", "-f"], capture_output=True, text=True, check=False)
    return f"needs a loop device: {done.stderr.strip()}" if done.returncode else ""


def go_alone() -> None:
    """Go on in a mount namespace of our own, of which nobody else makes a copy.

    A process that makes itself one while a disk is mounted would keep it mounted there.
    """
    if os.environ.get(_ALONE):
        return
    os.environ[_ALONE] = "yes"
    program = ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv]
    os.execvp(program[0], program)


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
        self._until(["umount", self.path], lambda done: done.returncode == 0)
        # Mounted in another namespace as well, it would stay as it is: without power.
        self._until(["losetup", "-j", self._image], lambda done: not done.stdout)

    def _until(self, command: list[str | Path], done: Callable[[_Done], bool]) -> None:
        def run() -> _Done:
            return subprocess.run(command, capture_output=True, text=True, check=False)

        ends = time.monotonic() + _BUSY_S
        while not done(ended := run()):
            if time.monotonic() > ends:
                raise RuntimeError(f"{command}: {ended.stdout}{ended.stderr.strip()}")
            time.sleep(0.05)
