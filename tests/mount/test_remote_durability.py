"""durability = remote on a real mount: what an fsync, an O_SYNC write and a killed program see."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
mounted = importlib.import_module("mounted")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
]
NAME = "user.stashcordfs.durability"
_MESSAGES = 2  # the data, and the segment that says whose it is
SETTINGS = {"upload_delay_s": "600", "network_deadline_s": "6"}


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    with mounted.DemoVolume.running(folder, settings=SETTINGS) as running:
        yield running


@pytest.fixture
def remote(volume, request):
    folder = volume.mountpoint / request.node.name
    (folder / "below").mkdir(parents=True)
    os.setxattr(folder, NAME, b"remote")
    volume.sync()  # the mount's claim, and these names: nothing else is sent meanwhile
    return folder / "below"


def written(path: Path, data: bytes, flags: int = 0) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags)
    os.write(descriptor, data)
    return descriptor


def test_the_attribute_is_refused_read_listed_removed_and_kept(volume, remote):
    folder = remote.parent
    for place, value, wanted in [
        (folder, b"yes", errno.EINVAL),
        (remote, b"", errno.EINVAL),
    ]:
        with pytest.raises(OSError, match="Errno") as refused:
            os.setxattr(place, NAME, value)
        assert refused.value.errno == wanted
    (remote / "f").touch()
    with pytest.raises(NotADirectoryError):
        os.setxattr(remote / "f", NAME, b"remote")
    os.setxattr(remote, NAME, b"local")
    volume.remount()
    assert os.getxattr(folder, NAME) == b"remote"
    assert os.listxattr(remote) == [NAME]
    os.removexattr(remote, NAME)
    assert os.listxattr(remote) == []


@pytest.mark.parametrize("flags", [os.O_SYNC, os.O_DSYNC, os.O_SYNC | os.O_DIRECT])
def test_a_synchronous_write_returns_when_discord_has_it(volume, remote, flags):
    import mmap

    before = volume.server_stats()["created"]
    descriptor = os.open(remote / "f", os.O_WRONLY | os.O_CREAT | flags)
    with mmap.mmap(-1, 4096) as page:  # O_DIRECT wants it aligned
        page[:] = os.urandom(4096)
        os.write(descriptor, page)
    # The data, the segment that tells of it, and perhaps one that was due anyway.
    assert _MESSAGES <= volume.server_stats()["created"] - before <= _MESSAGES + 1
    os.close(descriptor)


def test_fsyncs_at_once_share_messages_and_local_ones_send_none(volume, remote):
    before = volume.server_stats()["created"]
    local = written(volume.mountpoint / "elsewhere", b"x")
    os.fsync(local)
    os.close(local)
    assert volume.server_stats()["created"] == before
    descriptors = [written(remote / str(n), os.urandom(5000)) for n in range(60)]
    with ThreadPoolExecutor(60) as pool:
        list(pool.map(os.fsync, descriptors))
    for descriptor in descriptors:
        os.close(descriptor)
    assert _MESSAGES <= volume.server_stats()["created"] - before <= 6 * _MESSAGES


def test_fsync_of_a_folder_waits_for_what_is_in_it(volume, remote):
    before = volume.server_stats()["created"]
    (remote / "f").write_bytes(os.urandom(100))
    descriptor = os.open(remote, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    # The data, the segment that tells of it, and perhaps one that was due anyway.
    assert _MESSAGES <= volume.server_stats()["created"] - before <= _MESSAGES + 1


def test_without_discord_it_is_eio_and_later_it_works_again(volume, remote):
    far, near = written(remote / "far", b"1" * 9000), written(volume.mountpoint / "near", b"2")
    with volume.server_halted():
        with pytest.raises(OSError, match="Errno") as refused:
            os.fsync(far)
        assert refused.value.errno == errno.EIO
        os.fsync(near)
        assert (remote / "far").read_bytes() == b"1" * 9000
    assert "acknowledged" in volume.status()["last_error"]
    volume.sync()
    os.fsync(far)
    os.close(far)
    os.close(near)


_WAITS = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(fd, b"nothing else holds this")  # or it would be known, and no message needed
print("asks", flush=True)
os.fsync(fd)
"""


def test_a_program_that_waits_can_be_killed(volume, remote):
    volume.environment["STASHCORDFS_NETWORK_DEADLINE_S"] = "600"
    volume.remount()
    with volume.server_halted():
        program = subprocess.Popen(
            [sys.executable, "-c", _WAITS, remote / "f"], stdout=subprocess.PIPE
        )
        with program:
            assert program.stdout.readline() == b"asks\n"
            while not volume.status()["pending_packs"]:
                assert program.poll() is None  # its request may not have reached the daemon
            program.kill()
            assert program.wait(60) < 0  # the deadline is ten times as long
        assert (remote / "f").read_bytes() == b"nothing else holds this"
