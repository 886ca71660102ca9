"""fsck and verify as a user runs them: a real mount, a real server's double, real losses."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
mounted = importlib.import_module("mounted")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
]
NAME = mounted.NAME
MIB = 1 << 20


@pytest.fixture
def volume(tmp_path):
    with mounted.DemoVolume.running(tmp_path) as running:
        yield running


def run(volume, *args: str) -> tuple[int, str]:
    done = subprocess.run(
        [*mounted.COMMAND, *args],
        env=volume.environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def report(volume, *args: str) -> dict:
    return json.loads(run(volume, *args, "--json")[1])


def packs(volume) -> list[dict]:
    """Messages with packs, oldest first: not the volume's record, claims or segments."""
    channel = volume.server["channel_ids"][0]
    found = volume.api("GET", f"/channels/{channel}/messages?limit=100")
    assert isinstance(found, list)
    ours = [m for m in found if m["attachments"][0]["size"] >= MIB]
    return sorted(ours, key=lambda message: int(message["id"]))


def fill(volume, count: int) -> dict[str, bytes]:
    """Files, each uploaded in a message of its own."""
    contents = {}
    for number in range(count):
        contents[f"f{number}"] = random.Random(number).randbytes(2 * MIB + 1 + number)
        (volume.mountpoint / f"f{number}").write_bytes(contents[f"f{number}"])
        volume.sync()
    return contents


def delete(volume, message: dict) -> None:
    channel = volume.server["channel_ids"][0]
    volume.api("DELETE", f"/channels/{channel}/messages/{message['id']}")


def test_a_used_volume_is_clean_mounted_killed_and_unmounted(volume):
    fill(volume, 2)
    (volume.mountpoint / "unsent").write_bytes(b"x" * 1000)
    assert run(volume, "fsck", NAME)[0] == 0
    assert run(volume, "verify", NAME, "--data")[0] == 0
    os.kill(volume.pid(), signal.SIGKILL)
    subprocess.run(["fusermount3", "-uz", str(volume.mountpoint)], check=True)
    found = report(volume, "fsck", NAME)
    assert (found["clean"], found["state"], found["findings"]) == (True, "unmounted", [])
    volume.mount()
    assert (volume.mountpoint / "unsent").read_bytes() == b"x" * 1000
    volume.umount()
    assert run(volume, "fsck", NAME)[0] == 0


def test_listing_costs_one_request_and_no_download(volume):
    fill(volume, 3)
    before = volume.server_stats()
    assert report(volume, "verify", NAME)["checked_packs"] == 3
    after = volume.server_stats()
    assert after["requests"] - before["requests"] == 1
    assert after["cdn_bytes"] == before["cdn_bytes"]


def test_a_deleted_message_is_sent_anew_from_the_cache(volume):
    contents = fill(volume, 3)
    delete(volume, packs(volume)[1])
    code, text = run(volume, "verify", NAME)
    assert code == 1
    assert "3 blocks are sent anew" in text
    assert "1 packs are missing or damaged on Discord" in volume.status()["last_error"]
    volume.sync()
    volume.remount(without_cache=True)
    for name, data in contents.items():
        assert (volume.mountpoint / name).read_bytes() == data
    assert run(volume, "verify", NAME, "--data")[0] == 0
    assert volume.status()["damaged_blocks"] == 0


def test_a_deleted_message_is_sent_anew_without_a_mount(volume):
    contents = fill(volume, 2)
    volume.umount()
    delete(volume, packs(volume)[0])
    found = report(volume, "verify", NAME)
    assert (found["resent_blocks"], found["damaged_blocks"]) == (3, 0)
    assert len(packs(volume)) == 2
    volume.mount()
    volume.remount(without_cache=True)
    for name, data in contents.items():
        assert (volume.mountpoint / name).read_bytes() == data


def test_what_is_lost_for_good_is_told_by_path_and_gives_an_error(volume):
    contents = fill(volume, 2)
    volume.remount(without_cache=True)
    delete(volume, packs(volume)[0])
    found = report(volume, "verify", NAME)
    assert found["damaged"] == {"f0": 3}
    assert volume.status()["damaged_blocks"] == 3
    with pytest.raises(OSError, match="Input/output error"):
        (volume.mountpoint / "f0").read_bytes()
    assert (volume.mountpoint / "f1").read_bytes() == contents["f1"]
    checked = report(volume, "fsck", NAME)
    assert checked["errors_by_check"] == {"damaged": 3}
    assert "/f0: block 0" in checked["findings"][0]["text"]
    (volume.mountpoint / "f0").unlink()
    assert report(volume, "verify", NAME)["damaged_blocks"] == 3  # the trash keeps it
    assert run(volume, "trash", "empty", NAME, "--yes")[0] == 0
    assert run(volume, "verify", NAME)[0] == 0
    assert run(volume, "fsck", NAME)[0] == 0


def test_a_corrupt_attachment_is_found_by_opening_it(volume):
    contents = fill(volume, 2)
    volume.remount(without_cache=True)
    attachment = packs(volume)[0]["attachments"][0]["id"]
    volume.admin(f"attachments/{attachment}", {"action": "corrupt", "offset": 1000})
    assert run(volume, "verify", NAME)[0] == 0
    found = report(volume, "verify", NAME, "--data")
    assert len(found["corrupt_packs"]) == 1
    assert found["damaged"] == {"f0": 1}
    assert (volume.mountpoint / "f1").read_bytes() == contents["f1"]


def test_without_the_right_to_read_the_history_nothing_is_condemned(volume):
    contents = fill(volume, 1)
    volume.admin("settings", {"read_history": False})
    code, text = run(volume, "verify", NAME)
    assert code == 1
    assert "error:" in text
    volume.admin("settings", {"read_history": True})
    volume.remount(without_cache=True)
    assert (volume.mountpoint / "f0").read_bytes() == contents["f0"]
    assert run(volume, "verify", NAME)[0] == 0


def test_a_month_of_subsets_sees_everything(volume):
    fill(volume, 3)
    checked = [report(volume, "verify", NAME, "--subset", "1/3")["checked_packs"] for _ in range(3)]
    assert sum(checked) >= 3


def test_an_unmount_ends_by_saying_what_cannot_be_sent_and_the_next_mount_has_it(volume):
    fill(volume, 1)
    volume.remount(without_cache=True)
    delete(volume, packs(volume)[0])
    volume.admin("clock", {"advance_s": 120})  # a new message might only be late in coming
    with (volume.mountpoint / "f0").open("r+b", buffering=0) as file:
        file.write(b"n" * 4096)  # the rest of the block is on Discord alone
    (volume.mountpoint / "other").write_bytes(b"o" * 1000)
    for command in ("sync", "umount"):
        code, text = run(volume, command, str(volume.mountpoint))
        assert code == 1
        assert "kept here: block 0 of /f0: " in text
    assert "1 blocks not on Discord yet; the next mount goes on" in text
    assert not volume.is_mounted()
    volume.mount()
    with (volume.mountpoint / "f0").open("rb", buffering=0) as file:
        assert file.read(4096) == b"n" * 4096
    assert (volume.mountpoint / "other").read_bytes() == b"o" * 1000


def test_garbage_is_condemned_on_a_mount_and_without_one(tmp_path) -> None:
    with mounted.DemoVolume.running(tmp_path, settings={"history_days": "0"}) as volume:
        for number in range(2):
            (volume.mountpoint / f"file-{number}").write_bytes(os.urandom(3 * MIB))
            volume.sync()
        assert len(packs(volume)) == 2
        (volume.mountpoint / "file-0").unlink()
        found = report(volume, "gc", NAME)
        assert found["newly_condemned"] == 0  # history's time begins with the first census
        found = report(volume, "gc", NAME)
        assert (found["newly_condemned"], found["condemned_messages"]) == (1, 1)
        assert found["deleted_messages"] == 0
        assert volume.status()["garbage_bytes"] > 3 * MIB
        (volume.mountpoint / "file-1").unlink()
        volume.umount()
        run(volume, "gc", NAME)
        found = report(volume, "gc", NAME)
        assert found["condemned_messages"] == 2
        assert len(packs(volume)) == 2
        volume.mount()


def test_what_a_recovery_would_miss_is_replaced_mounted_or_not(volume):
    channel = volume.server["channel_ids"][0]

    def delete_newest() -> None:
        found = volume.api("GET", f"/channels/{channel}/messages?limit=1")
        assert isinstance(found, list)
        delete(volume, found[0])

    fill(volume, 1)
    delete_newest()  # the segment that tells of the file
    found = report(volume, "verify", NAME)
    assert (len(found["missing_objects"]), found["checkpoint_wanted"]) == (1, True)
    assert volume.status()["missing_objects"] == 1
    assert "a new checkpoint takes its place" in volume.status()["last_error"]
    volume.sync()
    volume.umount()  # waits for the checkpoint
    assert report(volume, "verify", NAME)["clean"]
    delete_newest()
    assert report(volume, "verify", NAME)["checkpoint_wanted"]
    assert report(volume, "verify", NAME, "--data")["clean"]
    tried = report(volume, "recover", "other", "--channel", channel, "--dry-run")
    assert (tried["inodes"], tried["missing_packs"], tried["damaged"]) == (2, [], {})
    volume.mount()
    assert volume.status()["missing_objects"] == 0
