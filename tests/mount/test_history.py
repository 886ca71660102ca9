"""What was deleted and what was before, as a user gets them: commands over one real mount."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stashcordfs.daemon.provision import unlock
from stashcordfs.store import record as records

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
mounted = importlib.import_module("mounted")
opened_up = importlib.import_module("opened_up")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
]
NAME = mounted.NAME


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    with mounted.DemoVolume.running(tmp_path_factory.mktemp("history")) as running:
        yield running


def trash(volume) -> list[dict]:
    return json.loads(volume.command("trash", "list", NAME, "--json"))


def test_a_removed_tree_is_back_for_programs_at_once(volume) -> None:
    tree = volume.mountpoint / "tree"
    (tree / "sub").mkdir(parents=True)
    data = os.urandom(70_000)
    (tree / "a").write_bytes(data)
    (tree / "sub" / "b").write_bytes(data[:500])
    volume.sync()
    shutil.rmtree(tree)
    assert not tree.exists()  # the kernel remembers that
    assert [item["path"] for item in trash(volume)] == ["/tree/a", "/tree/sub/b"]
    assert volume.status()["trash_bytes"] == 70_500

    told = volume.command("trash", "restore", NAME, "/tree")

    assert "2 files are back" in told
    assert (tree / "a").read_bytes() == data
    assert sorted(path.name for path in tree.iterdir()) == ["a", "sub"]
    assert (tree / "sub" / "b").read_bytes() == data[:500]
    assert trash(volume) == []


def test_the_trash_of_an_unmounted_volume_can_be_used_as_well(volume) -> None:
    path = volume.mountpoint / "doc"
    path.write_bytes(b"first")
    volume.sync()
    path.write_bytes(b"second")  # O_TRUNC
    volume.umount()
    (item,) = trash(volume)
    volume.command("trash", "restore", NAME, str(item["id"]), "--to", "old/doc")
    with pytest.raises(RuntimeError, match="nothing in the trash"):
        volume.command("trash", "restore", NAME, "/doc")
    volume.mount()
    assert (volume.mountpoint / "old" / "doc").read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    path.unlink()
    assert "1 files are forgotten" in volume.command("trash", "empty", NAME, "--yes")
    assert "Nothing is in the trash" in volume.command("trash", "list", NAME)
    done = subprocess.run(
        [*mounted.COMMAND, "fsck", NAME], env=volume.environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_mount_of_the_past_shows_it_beside_the_volume_and_leaves_nothing(volume) -> None:
    path = volume.mountpoint / "page"
    path.write_bytes(b"old" * 50_000)
    volume.sync()
    before = datetime.now(UTC).isoformat()
    path.write_bytes(b"new")
    (volume.mountpoint / "later").touch()
    volume.sync()
    past = volume.folder / "past"
    past.mkdir()
    posted = volume.server_stats()["messages"]

    told = volume.command("mount", NAME, str(past), "--at", before)

    try:
        assert "As of segment" in told
        assert (past / "page").read_bytes() == b"old" * 50_000
        assert not (past / "later").exists()
        with pytest.raises(OSError, match="Read-only"):
            (past / "page").write_bytes(b"x")
        assert path.read_bytes() == b"new"
        states = json.loads(volume.command("status", str(past), "--json"))
        assert states["name"].startswith(f"{NAME}@")
        (volume.folder / "again").mkdir()
        with pytest.raises(RuntimeError, match="in use by process"):
            volume.command("mount", NAME, str(volume.folder / "again"), "--at", before)
    finally:
        volume.command("umount", str(past))
    assert volume.server_stats()["messages"] == posted
    assert list((volume.state / NAME).glob("at-*")) == []
    assert volume.status()["state"] == "mounted"


def test_a_time_before_everything_is_refused(volume) -> None:
    (volume.folder / "never").mkdir()
    with pytest.raises(RuntimeError, match="no state of that time"):
        volume.command("mount", NAME, str(volume.folder / "never"), "--at", "2020-01-01")
    assert list((volume.state / NAME).glob("at-*")) == []


def on_server(volume, *needles: bytes) -> list[str]:
    """What the channel shows, opened with the volume's keys, that holds one of the needles."""
    record = records.decode((volume.state / NAME / "record").read_bytes())
    secret = volume.environment["STASHCORDFS_PASSPHRASE"].removeprefix("plain:")
    _, keys = unlock(record, passphrase=secret)
    attachments, before = [], ""
    while True:
        channel = volume.server["channel_ids"][0]
        messages = volume.api("GET", f"/channels/{channel}/messages?limit=100{before}")
        for each in (a for message in messages for a in message["attachments"]):
            with urllib.request.urlopen(each["url"], timeout=30) as answer:
                attachments.append((each["filename"], answer.read()))
        if len(messages) < 100:
            return opened_up.holding(opened_up.open_up(attachments, keys), *needles)
        before = f"&before={messages[-1]['id']}"


def test_a_purged_file_is_gone_for_programs_and_from_the_state_folder(volume) -> None:
    folder = volume.mountpoint / "papers"
    folder.mkdir()
    (folder / "very-secret-name").write_bytes(b"very secret content " * 5000)
    (folder / "kept").write_bytes(b"kept" * 1000)
    volume.sync()
    (folder / "very-secret-name").write_bytes(b"very secret content, again " * 5000)
    volume.sync()
    assert (folder / "very-secret-name").stat().st_size  # the kernel knows it
    with pytest.raises(RuntimeError, match="--recursive"):
        volume.command("purge", str(folder), "--yes")
    plan = json.loads(
        volume.command("purge", str(folder / "very-secret-name"), "--dry-run", "--json")
    )
    assert (plan["files"], plan["trashed"]) == (1, 1)
    assert (folder / "very-secret-name").exists()
    rule = {"kind": "linger", "route": "*", "seconds": 3600, "for_s": 600}
    volume.admin("faults", {"seed": 1, "rules": [rule]})  # the CDN goes on to serve it

    assert on_server(volume, b"very-secret-name")
    assert on_server(volume, b"very secret content")

    told = volume.command("purge", str(folder / "very-secret-name"), "--yes")

    assert on_server(volume, b"very-secret-name", b"very secret content") == []
    assert on_server(volume, b"kept")

    assert "This cannot be undone" in told
    assert "The CDN still serves" in told
    assert volume.status()["erasing"] > 0
    assert [path.name for path in folder.iterdir()] == ["kept"]
    assert not (folder / "very-secret-name").exists()
    assert (folder / "kept").read_bytes() == b"kept" * 1000
    for path in volume.state.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"very-secret-name" not in data, path
            assert b"very secret content" not in data, path
    line = json.loads((volume.state / NAME / "audit.log").read_text().splitlines()[-1])
    assert (line["action"], line["files"]) == ("purge", 1)


def test_an_unmounted_volume_can_be_purged_as_well(volume) -> None:
    (volume.mountpoint / "another").write_bytes(b"x" * 100_000)
    volume.umount()
    volume.admin("clock", {"advance_s": 7200})  # the CDN has let go
    volume.command("purge", "/another", "--volume", NAME, "--yes")
    volume.mount()
    assert not (volume.mountpoint / "another").exists()
    assert (volume.mountpoint / "papers" / "kept").read_bytes() == b"kept" * 1000
    assert volume.status()["erasing"] == 0
    shutil.rmtree(volume.mountpoint / "papers")
