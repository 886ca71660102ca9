"""The quick ones of `make soak-programs`, on one mount, and again with nothing kept locally."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
from mounted import DemoVolume, fuse_missing
from running import PROGRAMS, run_all
from trees import compared

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(fuse_missing()), reason=fuse_missing() or "fuse"),
]
QUICK = [program for program in PROGRAMS.values() if program.quick]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    with DemoVolume.running(folder / "volume", server=("--no-rate-limits",)) as volume:
        yield run_all(volume, folder, QUICK, scale=0.1)


@pytest.mark.parametrize("name", [program.name for program in QUICK])
def test_it_works_on_the_mount(found, name):
    assert found[name]["wrong"] == ""
    assert len(found[name]["checks"]) >= 2


def test_a_copy_that_lost_something_is_seen(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    with pytest.raises(AssertionError, match="mtime"):
        compared(tmp_path / "one", tmp_path / "other")
