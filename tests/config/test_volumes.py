from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stashcordfs.errors import StashcordError, UsageError
from stashcordfs.volumes import (
    Mount,
    VolumeBusy,
    VolumeDir,
    VolumeRecord,
    list_volumes,
    mount_holding,
    parse_mount,
    read_mounts,
)

RECORD = VolumeRecord("u", (1 << 60, 3), 4, "https://x/api/v10", 1 << 20)


@pytest.fixture
def volume(tmp_path):
    return VolumeDir(tmp_path / "state", "v")


def test_a_record_is_kept_as_it_was_and_privately(volume) -> None:
    assert list_volumes(volume.state_dir) == []
    volume.write_record(RECORD)
    assert volume.read_record() == RECORD
    assert volume.path.stat().st_mode & 0o777 == 0o700
    assert list_volumes(volume.state_dir) == [volume]
    assert volume.exists()
    for path in (volume.control_path, volume.log_path, volume.journal_path, volume.blocks_path):
        assert path.parent == volume.path
    volume.remove()
    assert not volume.exists()


def test_no_volume_and_a_broken_record_are_told_apart(volume) -> None:
    with pytest.raises(UsageError, match="no volume named v"):
        volume.read_record()
    volume.create()
    volume.record_path.write_text("{}")
    with pytest.raises(StashcordError, match="cannot be read"):
        volume.read_record()


@pytest.mark.parametrize("name", ["", ".", "a/b", "-x", "a,b", "x" * 65])
def test_a_name_must_be_fit_for_a_directory_and_a_unit(tmp_path, name) -> None:
    with pytest.raises(UsageError, match="no volume name"):
        VolumeDir(tmp_path, name)


def test_a_lock_keeps_a_second_holder_out_and_names_the_first(volume) -> None:
    assert volume.holder() is None
    pauses: list[float] = []
    with volume.lock():
        assert volume.holder() == os.getpid()
        with (
            pytest.raises(VolumeBusy, match=f"in use by process {os.getpid()}") as caught,
            volume.lock(pause=pauses.append),
        ):
            pass
        assert caught.value.pid == os.getpid()
    assert len(pauses) == 4
    assert volume.holder() is None
    with volume.lock():
        pass


def test_a_killed_process_frees_the_lock(volume) -> None:
    program = (
        "import sys; from pathlib import Path; from stashcordfs.volumes import VolumeDir\n"
        "with VolumeDir(Path(sys.argv[1]), 'v').lock(): print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(volume.state_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"held\n"
        assert volume.holder() == process.pid
        process.kill()
    assert volume.holder() is None


LINE = r"36 35 0:98 / /mnt/a\040b rw,nosuid shared:1 - fuse.stashcordfs discord:demo rw,x"


def test_our_mounts_are_found_among_others(tmp_path) -> None:
    others = [
        "",
        "36 35 0:98 / /mnt rw - ext4 /dev/sda1 rw",
        "36 35 0:98 / /mnt rw - fuse.stashcordfs somethingelse rw",
        "36 - fuse.stashcordfs discord:x rw",
    ]
    assert all(parse_mount(line) is None for line in others)
    path = tmp_path / "mountinfo"
    path.write_text("\n".join([*others, LINE]))
    assert read_mounts(path) == [Mount("demo", Path("/mnt/a b"), "0:98")]


def test_the_innermost_and_latest_mount_holds_a_path() -> None:
    outer, inner = Mount("o", Path("/a"), "1"), Mount("i", Path("/a/b"), "2")
    over = Mount("v", Path("/a/b"), "3")
    assert mount_holding(Path("/a/x"), [outer, inner]) == outer
    assert mount_holding(Path("/a/b/c"), [outer, inner, over]) == over
    assert mount_holding(Path("/ab"), [outer, inner]) is None
