"""Mount options and told state, on a real mount."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import struct
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
MIB = 1 << 20
STATE, PENDING = "user.stashcordfs.state", "user.stashcordfs.pending_bytes"
ACL = struct.pack("<IHHIHHIHHI", 2, 1, 6, 1 << 31, 4, 4, 1 << 31, 32, 0, 1 << 31)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    with mounted.DemoVolume.running(folder, settings={"upload_delay_s": "600"}) as running:
        yield running


@pytest.fixture
def remounted(volume):
    """Mount it with options; it stays so for the next test."""

    def remount(*options: str) -> Path:
        volume.command("umount", "--no-wait", str(volume.mountpoint))
        volume.mount(*options)
        return volume.mountpoint

    return remount


def test_state_is_told_to_any_script_and_never_copied(volume, tmp_path):
    file = volume.mountpoint / "told"
    file.write_bytes(bytes(5000))
    os.setxattr(file, "user.mine", b"kept")
    assert (os.getxattr(file, STATE), os.getxattr(file, PENDING)) == (b"local", b"8192")
    assert os.getxattr(volume.mountpoint, STATE) == b"local"
    assert os.listxattr(file) == ["user.mine"]
    subprocess.run(["cp", "-a", str(file), str(volume.mountpoint / "copy")], check=True)
    assert os.listxattr(volume.mountpoint / "copy") == ["user.mine"]
    if rsync := shutil.which("rsync"):
        target = volume.mountpoint / "synced"
        subprocess.run([rsync, "-aHAX", str(file), str(target)], check=True)
        assert os.listxattr(target) == ["user.mine"]
    volume.sync()
    assert (os.getxattr(file, STATE), os.getxattr(file, PENDING)) == (b"on-discord", b"0")
    assert os.getxattr(volume.mountpoint, STATE) == b"on-discord"
    file.chmod(0o600)  # another change that is only here
    assert os.getxattr(file, STATE) == b"uploading"


def test_the_source_is_a_network_place(volume):
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
    assert f"discord:demo {volume.mountpoint} fuse.stashcordfs " in mounts


def test_a_full_volume_says_so(volume, remounted):
    held = volume.mountpoint / "held"
    held.write_bytes(bytes(MIB))
    used = os.statvfs(volume.mountpoint)
    used_bytes = (used.f_blocks - used.f_bfree) * used.f_frsize
    place = remounted("-o", f"max_size={used_bytes + MIB}")
    told = os.statvfs(place)
    assert told.f_bavail * told.f_frsize == MIB
    more = os.open(place / "more", os.O_CREAT | os.O_WRONLY)
    os.write(more, bytes(2 * MIB))  # into the kernel's cache
    with pytest.raises(OSError, match="Errno") as refused:
        os.fsync(more)
    os.close(more)
    assert refused.value.errno == errno.ENOSPC
    assert held.read_bytes() == bytes(MIB)
    (place / "more").unlink()
    assert os.statvfs(place).f_bavail > 0


@as_root
def test_a_remount_for_reading_alone(volume, remounted):
    place = remounted()
    helper = [sys.executable, "-c", "from stashcordfs.cli.mount_helper import main; main()"]

    def remount(how: str) -> None:
        subprocess.run([*helper, "discord:demo", str(place), "-o", f"remount,{how}"], check=True)

    remount("ro")
    with pytest.raises(OSError, match="Read-only"):
        (place / "refused").touch()
    remount("rw")
    (place / "made").touch()


@as_root
def test_what_was_mounted_read_only_stays_so(volume, remounted):
    place = remounted("-o", "ro")
    subprocess.run(["mount", "-i", "-o", "remount,rw", str(place)], check=True)
    with pytest.raises(OSError, match="Read-only"):
        (place / "refused").touch()
    with pytest.raises(OSError, match="Read-only"):
        place.chmod(0o700)


def test_owner_and_rights_are_shown_as_asked_for(volume, remounted):
    place = remounted("-o", "uid=1234,gid=4321,umask=027,noexec,nofail,x-systemd.automount")
    found = (place / "told").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1234, 4321, 0o750)
    with pytest.raises(OSError, match="Errno") as refused:
        os.setxattr(place / "told", "system.posix_acl_access", ACL)
    assert refused.value.errno == errno.EOPNOTSUPP
    with pytest.raises(PermissionError):
        subprocess.run([str(place / "told")], check=False)
