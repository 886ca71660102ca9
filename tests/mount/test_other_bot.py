"""A volume that is mounted with another bot than the one that made it."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import urllib.request
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
mounted = importlib.import_module("mounted")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
]


def admin(volume, route: str, body: dict[str, object]) -> dict[str, object]:
    base = volume.server["api_url"].partition("/api/")[0]
    request = urllib.request.Request(
        f"{base}/_sandbox/{route}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_attachments_that_come_back_empty_are_eio_with_what_to_do(tmp_path):
    with mounted.DemoVolume.running(tmp_path / "v") as volume:
        data = os.urandom(50_000)
        (volume.mountpoint / "theirs").write_bytes(data)
        other = admin(volume, "bots", {})
        volume.environment["STASHCORDFS_TOKEN"] = f"plain:{other['token']}"
        volume.remount(without_cache=True)
        admin(volume, "clock", {"advance_s": 3600})  # a young message would be waited for

        with pytest.raises(OSError, match="Errno") as refused:
            (volume.mountpoint / "theirs").read_bytes()
        assert refused.value.errno == errno.EIO
        assert "MESSAGE_CONTENT intent" in volume.status()["last_error"]

        (volume.mountpoint / "ours").write_bytes(b"the mount goes on")
        volume.sync()
        assert {path.name for path in volume.mountpoint.iterdir()} == {"theirs", "ours"}
