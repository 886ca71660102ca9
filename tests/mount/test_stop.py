"""How a mount ends: what is drained, what is said to be left, and that the next mount goes on."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stashcordfs.cli.mountpoint import wait_for_exit

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
mounted = importlib.import_module("mounted")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
]
SIZE = 3_000_000


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop")
    settings = {"upload_delay_s": "600", "settle_delay_s": "0.2"}
    with mounted.DemoVolume.running(folder, settings=settings) as volume:
        yield volume


@pytest.fixture
def volume(running, request):
    """Mounted, with one file that Discord does not have."""
    if not running.is_mounted():
        running.mount()
    data = os.urandom(SIZE)  # nothing that Discord has already
    file = running.mountpoint / request.node.name
    file.write_bytes(data)
    yield running
    # The next mount sends what was left; then Discord alone has it.
    if not running.is_mounted():
        running.mount()
    running.remount(without_cache=True)
    assert file.read_bytes() == data


def pid_of(volume) -> int:
    return int((volume.state / mounted.NAME / "lock").read_text())


def last_words(volume) -> str:
    lines = (volume.state / mounted.NAME / "log").read_text().splitlines()
    return next(line for line in reversed(lines) if "unmounted volume=" in line)


def ended(volume, pid: int) -> bool:
    return wait_for_exit(pid, timeout_s=60) and not volume.is_mounted()


def await_state(volume, state: str) -> None:
    while (now := volume.status()["state"]) != state:
        assert now != "unmounted"


def test_sigterm_drains(volume):
    pid = pid_of(volume)
    os.kill(pid, signal.SIGTERM)
    assert ended(volume, pid)
    assert "left_bytes=0 left_blocks=0" in last_words(volume)


def test_a_second_sigterm_ends_at_once_and_says_what_is_left(volume):
    pid = pid_of(volume)
    with volume.server_halted():
        os.kill(pid, signal.SIGTERM)
        await_state(volume, "draining")
        assert volume.is_mounted()
        os.kill(pid, signal.SIGTERM)
        assert ended(volume, pid)
    assert "left_bytes=3002368 left_blocks=3" in last_words(volume)


def test_sigterm_during_a_draining_umount_does_not_count_as_the_second(volume):
    pid = pid_of(volume)
    with volume.server_halted():
        umount = subprocess.Popen(
            [*mounted.COMMAND, "umount", volume.mountpoint], env=volume.environment
        )
        await_state(volume, "draining")
        os.kill(pid, signal.SIGTERM)
        await_state(volume, "draining")
        assert not wait_for_exit(pid, timeout_s=1)
        assert volume.is_mounted()
    assert umount.wait(60) in {0, 1}  # whoever unmounts first
    assert ended(volume, pid)
    assert "left_bytes=0" in last_words(volume)


def test_a_plain_unmount_leaves_the_rest_to_the_next_mount(volume):
    pid = pid_of(volume)
    subprocess.run(["fusermount3", "-u", volume.mountpoint], check=True)
    assert ended(volume, pid)
    assert "left_bytes=3002368 left_blocks=3" in last_words(volume)


def test_umount_without_waiting_says_what_is_left(volume):
    done = subprocess.run(
        [*mounted.COMMAND, "umount", "--no-wait", volume.mountpoint],
        env=volume.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ("2.863 MiB in 3 blocks not on Discord yet; the next mount goes on\n")


def test_a_detached_mount_serves_its_users_to_their_end(volume):
    pid = pid_of(volume)
    place = volume.mountpoint
    data = os.urandom(SIZE)
    with (place / "late").open("wb") as file:
        subprocess.run(["fusermount3", "-uz", place], check=True)
        assert not volume.is_mounted()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        assert volume.status()["dirty_blocks"] == 6
    assert ended(volume, pid)
    assert "left_blocks=6" in last_words(volume)
    volume.mount()
    assert (place / "late").read_bytes() == data


def test_sigterm_with_a_file_open_keeps_what_was_written(volume):
    pid = pid_of(volume)
    place = volume.mountpoint
    data = os.urandom(SIZE)
    file = (place / "open").open("wb", buffering=0)
    file.write(data)
    os.kill(pid, signal.SIGTERM)
    assert ended(volume, pid)
    with pytest.raises(OSError, match="Errno"):
        os.fsync(file.fileno())
    file.close()
    volume.mount()
    assert (place / "open").read_bytes() == data
