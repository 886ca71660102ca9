"""From mount(8)'s arguments to ours."""

from __future__ import annotations

import pytest

from stashcordfs.cli.mount_helper import is_helpers_call, mount_arguments, run


def test_what_mount_passes_becomes_our_command():
    assert mount_arguments(["photos", "/mnt/p", "-n", "-o", "rw,_netdev,nodev", "-t", "x"]) == [
        "mount", "-o", "rw,_netdev,nodev,suid", "--", "photos", "/mnt/p",
    ]  # fmt: skip
    assert mount_arguments(["discord:photos", "/mnt", "-r"]) == [
        "mount", "-o", "ro,dev,suid", "--", "discord:photos", "/mnt",
    ]  # fmt: skip


def test_a_fake_mount_does_nothing():
    assert mount_arguments(["photos", "/mnt", "-f"]) is None
    assert run(["photos", "/mnt", "-f"]) == 0


def test_a_remount_is_mounts_own():
    assert mount_arguments(["photos", "/mnt", "-o", "ro,remount"]) == [
        "--", "mount", "-i", "-o", "ro,remount", "/mnt",
    ]  # fmt: skip


@pytest.mark.parametrize("args", [["photos"], ["photos", "/mnt", "-q"], []])
def test_wrong_use_ends_as_mount_wants_it(args, capsys):
    with pytest.raises(SystemExit) as ended:
        mount_arguments(args)
    assert ended.value.code == 1
    assert "mount.fuse.stashcordfs" in capsys.readouterr().err


def test_a_failure_ends_as_mount_wants_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("STASHCORDFS_STATE_DIR", str(tmp_path))
    assert run(["missing", str(tmp_path), "-o", "rw"]) in {1, 32}
    assert "missing" in capsys.readouterr().err


def test_fuses_own_helper_is_told_from_our_commands():
    assert is_helpers_call(["demo", "/mnt", "-o", "rw"])
    assert not is_helpers_call(["mount", "demo", "/mnt", "-o", "rw"])
    assert not is_helpers_call(["demo", "/mnt"])
    assert not is_helpers_call(["status", "/mnt", "--json"])
