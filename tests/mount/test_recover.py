"""A real mount, killed; its state removed; the volume back from the server alone."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from mounted import NAME, DemoVolume, fuse_missing

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(fuse_missing()), reason=fuse_missing() or "-"),
]


@pytest.fixture
def demo(tmp_path):
    with DemoVolume.running(tmp_path / "demo") as volume:
        yield volume


def kill(demo):
    pid = demo.pid()
    descriptor = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([descriptor], [], [])  # readable when it has ended
    os.close(descriptor)
    subprocess.run(["fusermount3", "-uz", str(demo.mountpoint)], check=False)


def channel(demo):
    return str(demo.server["channel_ids"][0])


def recover(demo, *args):
    return json.loads(demo.command("recover", NAME, "--channel", channel(demo), "--json", *args))


def same(left: Path, right: Path) -> bool:
    found = filecmp.dircmp(left, right)
    if found.left_only or found.right_only or found.funny_files:
        return False
    equal = filecmp.cmpfiles(left, right, found.common_files, shallow=False)[0]
    return len(equal) == len(found.common_files) and all(
        same(left / name, right / name) for name in found.common_dirs
    )


def test_what_discord_has_is_back_after_a_kill_and_the_rest_is_listed(demo) -> None:
    source = demo.folder / "source"
    for n in range(100):
        folder = source / f"folder-{n % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file-{n}").write_bytes(os.urandom(n * 100))
    (source / "large").write_bytes(os.urandom(5 << 20))
    shutil.copytree(source, demo.mountpoint / "tree")
    demo.sync()
    kill(demo)
    shutil.rmtree(demo.state)

    tried = recover(demo, "--dry-run")
    assert not (demo.state / NAME / "volume.json").exists()
    report = recover(demo)
    demo.mount()

    assert tried["inodes"] == report["inodes"] == 108
    assert report["segment"] >= 1
    assert report["missing"] == []
    assert same(source, demo.mountpoint / "tree")
    (demo.mountpoint / "new").write_text("goes on")
    demo.sync()
    assert demo.status()["segment"] > report["segment"]


def test_a_file_that_was_never_uploaded_is_named_and_gives_an_error(demo) -> None:
    (demo.mountpoint / "there").write_bytes(b"there")
    demo.sync()
    demo.umount()
    demo.environment["STASHCORDFS_UPLOAD_DELAY_S"] = "3600"
    demo.environment["STASHCORDFS_UPLOAD_DELAY_MAX_S"] = "3600"
    demo.mount()
    (demo.mountpoint / "alone").write_bytes(os.urandom(100_000))
    with (demo.mountpoint / "alone").open("rb") as file:
        os.fsync(file.fileno())
    told = demo.status()["segment"]
    while demo.status()["segment"] == told:  # within the bound: 30 s
        subprocess.run(["sleep", "1"], check=True)
    kill(demo)
    shutil.rmtree(demo.state)

    report = recover(demo)
    demo.mount()

    assert [(m["path"], m["bytes"]) for m in report["missing"]] == [("alone", 100_000)]
    kept = json.loads((demo.state / NAME / "recovered.json").read_text())
    assert kept["missing"] == report["missing"]
    assert (demo.mountpoint / "there").read_bytes() == b"there"
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (demo.mountpoint / "alone").read_bytes()


def test_the_old_machine_turns_read_only(demo, tmp_path) -> None:
    (demo.mountpoint / "a").write_text("a")
    demo.sync()
    other = dict(demo.environment, STASHCORDFS_STATE_DIR=str(tmp_path / "other"))
    mine, demo.environment = demo.environment, other
    report = recover(demo)
    demo.environment = mine
    (demo.mountpoint / "late").write_text("only here")
    with pytest.raises(RuntimeError, match="has taken the volume over"):
        demo.sync()
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        (demo.mountpoint / "b").write_text("b")
    assert (demo.mountpoint / "late").read_text() == "only here"
    state = demo.status()
    assert state["state"] == "read-only"
    assert "has taken the volume over" in state["last_error"]
    assert report["writer_epoch"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--expect", "99"], "99 was expected"),
        (["--at", "2020-01-01"], "no state of that time"),
        (["--at", "yesterday"], "write it as 2026"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(demo, arguments, says) -> None:
    (demo.mountpoint / "a").write_text("a")
    demo.umount()
    with pytest.raises(RuntimeError, match="exists on this machine"):
        recover(demo)
    shutil.rmtree(demo.state)
    with pytest.raises(RuntimeError, match=says):
        recover(demo, *arguments)
    demo.environment["STASHCORDFS_PASSPHRASE"] = "plain:wrong"
    with pytest.raises(RuntimeError, match="passphrase"):
        recover(demo)
