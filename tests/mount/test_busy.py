"""A mount that is in use stays, and `umount` says by whom and what to do."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
mounted = importlib.import_module("mounted")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
]


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    with mounted.DemoVolume.running(tmp_path_factory.mktemp("busy")) as running:
        (running.mountpoint / "d").mkdir()
        (running.mountpoint / "d/file").write_text("x")
        yield running


@contextmanager
def sleeping(program="sleep", **how):
    """A process that uses the mount, by what it was started with."""
    with subprocess.Popen([program, "1000"], **how) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def refusal(volume) -> str:
    with pytest.raises(RuntimeError) as refused:
        volume.umount()
    assert volume.is_mounted()
    return str(refused.value)


def test_it_names_working_directory_open_file_and_program(volume):
    place = volume.mountpoint
    shutil.copy(shutil.which("sleep"), place / "d/nap")
    with (
        sleeping(cwd=place / "d") as walker,
        (place / "d/file").open() as file,
        sleeping(stdin=file) as holder,
        sleeping(str(place / "d/nap")) as napper,
    ):
        told = refusal(volume)
    assert f"{walker} (sleep: working directory {place}/d)" in told
    assert f"{holder} (sleep: open file {place}/d/file)" in told
    assert f"{napper} (nap: program {place}/d/nap)" in told
    assert told.endswith("leave it or end them, then unmount again")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may bind")
@pytest.mark.parametrize("inside", [True, False])
def test_it_names_a_bind_mount(volume, tmp_path, inside):
    other = volume.mountpoint / "d" if inside else tmp_path
    source = tmp_path if inside else volume.mountpoint / "d"
    subprocess.run(["mount", "--bind", source, other], check=True)
    try:
        assert f"a mount at {other} (umount {other})" in refusal(volume)
    finally:
        subprocess.run(["umount", other], check=True)


def test_it_unmounts_when_they_have_gone(volume):
    volume.umount()
    assert not volume.is_mounted()
    volume.mount()
    assert (volume.mountpoint / "d/file").read_text() == "x"
