"""The adapter behind a real mount: what programs see through the kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(
        not os.access("/dev/fuse", os.R_OK | os.W_OK) or shutil.which("fusermount3") is None,
        reason="needs /dev/fuse and fusermount3",
    ),
]
PROGRAM = Path(__file__).parents[1] / "support" / "memory_fs.py"


@pytest.fixture(scope="module")
def mount(tmp_path_factory):
    place = tmp_path_factory.mktemp("mount point")
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), str(place)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield place
        subprocess.run(["fusermount3", "-u", str(place)], check=True)
        process.stdout.read()
    assert process.returncode == 0


def rename2(old: Path, new: Path, flags: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags)
    return ctypes.get_errno() if failed else 0


def test_mount_is_named_after_its_volume(mount):
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    ours = [line for line in lines if "fuse.stashcordfs discord:memory" in line]
    assert any(str(mount).replace(" ", "\\040") in line for line in ours)


def test_bytes_come_back(mount):
    file = mount / "file"
    data = os.urandom(3_000_000)
    file.write_bytes(data)
    assert file.read_bytes() == data
    with file.open("r+b") as handle:
        handle.seek(5)
        handle.write(b"middle")
        os.fsync(handle.fileno())
    os.truncate(file, 20)
    assert file.read_bytes() == data[:5] + b"middle" + data[11:20]


def test_append_and_truncating_open(mount):
    file = mount / "log"
    file.write_text("one")
    with file.open("a") as handle:
        handle.write(" two")
    assert file.read_text() == "one two"
    file.write_text("x")
    assert file.stat().st_size == 1


def test_attributes_are_kept(mount):
    file = mount / "attributes"
    file.touch(mode=0o640)
    file.chmod(0o604)
    os.utime(file, ns=(1_111_111_111_111_111_111, 1_222_222_222_222_222_222))
    found = file.stat()
    assert stat.S_IMODE(found.st_mode) == 0o604
    assert (found.st_atime_ns, found.st_mtime_ns) == (
        1_111_111_111_111_111_111,
        1_222_222_222_222_222_222,
    )


def test_folders_with_many_entries_list_each_once(mount):
    folder = mount / "many"
    folder.mkdir()
    names = {f"entry-{number:04}" for number in range(700)}
    for name in names:
        (folder / name).touch()
    listed = [entry.name for entry in folder.iterdir()]
    assert len(listed) == 700
    assert set(listed) == names


def test_links_and_special_files(mount):
    (mount / "target").write_text("t")
    (mount / "soft").symlink_to("target")
    (mount / "hard").hardlink_to(mount / "target")
    os.mkfifo(mount / "pipe")
    assert (mount / "soft").readlink() == Path("target")
    assert (mount / "hard").stat().st_nlink == 2
    assert stat.S_ISFIFO((mount / "pipe").stat().st_mode)


def test_rename_with_its_flags(mount):
    (mount / "r1").write_text("1")
    (mount / "r2").write_text("2")
    assert rename2(mount / "r1", mount / "r2", 1) == errno.EEXIST
    assert rename2(mount / "r1", mount / "r2", 2) == 0
    assert (mount / "r1").read_text() == "2"
    (mount / "r1").rename(mount / "r2")
    assert (mount / "r2").read_text() == "2"
    assert not (mount / "r1").exists()


def test_removal(mount):
    (mount / "full").mkdir()
    (mount / "full" / "child").touch()
    with pytest.raises(OSError, match="Errno") as refused:
        (mount / "full").rmdir()
    assert refused.value.errno == errno.ENOTEMPTY
    (mount / "full" / "child").unlink()
    (mount / "full").rmdir()
    assert not (mount / "full").exists()


def test_extended_attributes_with_create_and_replace(mount):
    file = mount / "xattrs"
    file.touch()
    os.setxattr(file, "user.a", b"1", os.XATTR_CREATE)
    with pytest.raises(FileExistsError):
        os.setxattr(file, "user.a", b"2", os.XATTR_CREATE)
    os.setxattr(file, "user.a", b"2", os.XATTR_REPLACE)
    assert (os.getxattr(file, "user.a"), os.listxattr(file)) == (b"2", ["user.a"])
    os.removexattr(file, "user.a")
    with pytest.raises(OSError, match="Errno") as refused:
        os.setxattr(file, "user.a", b"3", os.XATTR_REPLACE)
    assert refused.value.errno == errno.ENODATA


def test_statvfs_and_fsync_of_a_folder(mount):
    assert os.statvfs(mount).f_blocks == 1000
    descriptor = os.open(mount, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fault-bug", errno.EIO),
        ("fault-disk", errno.ENOSPC),
        ("fault-store", errno.EIO),
        ("fault-posix", errno.EPERM),
    ],
)
def test_a_fault_is_an_errno_and_the_mount_lives(mount, name, expected):
    with pytest.raises(OSError, match="Errno") as refused:
        (mount / name).stat()
    assert refused.value.errno == expected
    (mount / "alive").write_text("still")
    assert (mount / "alive").read_text() == "still"
