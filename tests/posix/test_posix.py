"""Every case on a local disk, which shows that it is right, and on a mount."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
from mounted import DemoVolume, fuse_missing
from posix_cases import CASES
from posix_language import run_all

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or bool(fuse_missing()),
    reason=fuse_missing() or "needs root, to act as other users",
)
FAMILIES = sorted({case.family for case in CASES})


@pytest.fixture(scope="module")
def mount(tmp_path_factory):
    folder = tmp_path_factory.mktemp("posix")
    for part in (folder, *folder.parents):
        if part.is_relative_to(tmp_path_factory.getbasetemp().parent):
            part.chmod(part.stat().st_mode | 0o011)  # other users must be able to get there
    with DemoVolume.running(folder) as volume:
        yield volume.mountpoint


@pytest.fixture(scope="module")
def disk(tmp_path_factory, mount):
    folder = tmp_path_factory.mktemp("disk")
    folder.chmod(0o755)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mount_does_as_posix_says(family, mount):
    mine = [case for case in CASES if case.family == family]
    assert [str(d) for d in run_all(mine, mount, on_mount=True)[family].differences] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_disk_does_so_too(family, disk):
    if _type_of(disk) != "ext4":
        pytest.skip("the temporary folder is not on an ext4")
    mine = [case for case in CASES if case.family == family]
    assert [str(d) for d in run_all(mine, disk, on_mount=False)[family].differences] == []


def _type_of(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    at = max((m for m in mounts if folder.is_relative_to(m[0])), key=lambda m: len(m[0]))
    return at[1]
