from __future__ import annotations

import os

import pytest

from stashcordfs.volumes import VolumeDir, VolumeRecord


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """What this machine keeps of a volume, and no setting of the user's."""
    for name in list(os.environ):
        if name.startswith("STASHCORDFS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STASHCORDFS_STATE_DIR", str(tmp_path / "state"))
    volume = VolumeDir(tmp_path / "state", "v")
    volume.write_record(VolumeRecord("uuid-1", (11,), 11, "https://x/api/v10", 1 << 20))
    return volume
