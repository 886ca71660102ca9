"""Mounting on an automount point, as systemd does for x-systemd.automount in /etc/fstab."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
mounted = importlib.import_module("mounted")

_FILE_SYSTEMS = Path("/proc/filesystems")
pytestmark = [
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts autofs"),
    pytest.mark.skipif("autofs" not in _FILE_SYSTEMS.read_text(), reason="needs autofs"),
]
_HUNG_S = 60


@contextlib.contextmanager
def automount_point(path: Path):
    """An automount point that we are the manager of, and that nobody answers for.

    Who is not of our process group waits at it for ever (autofs_oz_mode in fs/autofs/autofs_i.h);
    when the pipe closes, with ENOENT.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    read_end, write_end = os.pipe()
    options = f"fd={write_end},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
    try:
        made = libc.mount(b"test", os.fsencode(path), b"autofs", 0, options.encode())
    finally:
        os.close(write_end)
    try:
        assert made == 0, os.strerror(ctypes.get_errno())
        yield
    finally:
        os.close(read_end)
        libc.umount2(os.fsencode(path), 2)  # MNT_DETACH


def test_an_automount_point_does_not_wait_for_the_mount_that_it_waits_for(tmp_path):
    volume = mounted.DemoVolume(tmp_path, server=[])
    try:
        with automount_point(volume.mountpoint):
            volume.command("mount", mounted.NAME, str(volume.mountpoint), timeout_s=_HUNG_S)
            daemon = int((volume.state / mounted.NAME / "lock").read_text())
            assert os.getsid(daemon) == daemon, "a terminal's signals would reach it"
            subprocess.run(["fusermount3", "-u", volume.mountpoint], check=True)
    finally:
        volume.end()
