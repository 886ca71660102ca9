"""A volume that is mounted with another bot than the one that made it."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
mounted = importlib.import_module("mounted")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
]


def test_attachments_that_come_back_empty_are_eio_with_what_to_do(tmp_path):
    with mounted.DemoVolume.running(tmp_path / "v") as volume:
        data = os.urandom(50_000)
        (volume.mountpoint / "theirs").write_bytes(data)
        other = volume.admin("bots", {})
        volume.environment["STASHCORDFS_TOKEN"] = f"plain:{other['token']}"
        volume.remount(without_cache=True)
        volume.admin("clock", {"advance_s": 3600})  # a young message would be waited for

        with pytest.raises(OSError, match="Errno") as refused:
            (volume.mountpoint / "theirs").read_bytes()
        assert refused.value.errno == errno.EIO
        assert "MESSAGE_CONTENT intent" in volume.status()["last_error"]

        (volume.mountpoint / "ours").write_bytes(b"the mount goes on")
        volume.sync()
        assert {path.name for path in volume.mountpoint.iterdir()} == {"theirs", "ours"}
