from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from stashcordfs.cache import LocalFiles
from stashcordfs.errors import LocalDiskError
from stashcordfs.types import Ino

KEY = (Ino(0x1_0000_0000_05), 0)


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    return LocalFiles(tmp_path / "blocks", max_open=2)


def test_bytes_come_back(files: LocalFiles) -> None:
    files.write(KEY, 10_000, b"abc")

    assert files.read(KEY, 9_999, 4) == b"\0abc"


def test_a_short_file_is_a_fault_not_short_data(files: LocalFiles) -> None:
    files.write(KEY, 0, b"abc")

    with pytest.raises(LocalDiskError) as caught:
        files.read(KEY, 0, 4)
    assert caught.value.errno == errno.EIO


def test_punching_frees_space_and_keeps_the_length(files: LocalFiles) -> None:
    files.write(KEY, 0, os.urandom(1 << 20))
    before = Path(files.path(KEY)).stat().st_blocks

    files.punch(KEY, 0, 1 << 19)

    after = Path(files.path(KEY)).stat()
    assert after.st_size == 1 << 20
    assert after.st_blocks <= before // 2 + 16
    assert files.read(KEY, 0, 8) == bytes(8)


def test_grow_never_shrinks(files: LocalFiles) -> None:
    files.write(KEY, 0, b"abcdef")
    files.grow(KEY, 3)
    assert files.size(KEY) == 6

    files.grow(KEY, 9)
    assert files.read(KEY, 0, 9) == b"abcdef\0\0\0"

    files.resize(KEY, 2)
    assert files.size(KEY) == 2


def test_descriptors_are_bounded(files: LocalFiles) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for n in range(20):
        files.write((Ino(n), 1), 0, b"x")

    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    assert all(files.read((Ino(n), 1), 0, 1) == b"x" for n in range(20))


def test_generations_are_files_of_their_own(files: LocalFiles) -> None:
    files.write((Ino(1), 0), 0, b"old")
    files.write((Ino(1), 5), 0, b"new")

    files.remove((Ino(1), 0))

    assert not files.exists((Ino(1), 0))
    assert files.exists((Ino(1), 5))
    assert [key for key, _ in files.scan()] == [(Ino(1), 5)]


def test_removing_what_is_not_there_is_no_error(files: LocalFiles) -> None:
    files.remove((Ino(9), 9))


def test_few_files_are_synced_one_by_one_and_many_at_once(files: LocalFiles) -> None:
    keys = [(Ino(n), 0) for n in range(1, 12)]
    for key in keys:
        files.write(key, 0, b"x")

    files.sync(keys[:2])
    files.sync(keys)
    files.sync([])


def test_a_refusing_disk_is_told_by_errno(files: LocalFiles, tmp_path: Path) -> None:
    files.write((Ino(77), 0), 0, b"x")
    Path(files.path((Ino(77), 0))).unlink()  # not by us
    with pytest.raises(LocalDiskError) as caught:
        files.sync([(Ino(77), 0)])
    assert caught.value.errno == errno.ENOENT

    with pytest.raises(LocalDiskError):
        files.resize(KEY, -1)
    with pytest.raises(LocalDiskError):
        files.punch(KEY, -1, 1)
    with pytest.raises(LocalDiskError):
        files.write(KEY, -1, b"x")
    with pytest.raises(LocalDiskError):
        files.read(KEY, -1, 1)
    (tmp_path / "plain").write_bytes(b"")
    with pytest.raises(LocalDiskError):
        LocalFiles(tmp_path / "plain")


def test_a_full_disk_gives_enospc(tmp_path: Path) -> None:
    full = LocalFiles(tmp_path / "blocks")
    Path(full.path(KEY)).symlink_to("/dev/full")

    with pytest.raises(LocalDiskError) as caught:
        full.write(KEY, 0, b"x")
    assert caught.value.errno == errno.ENOSPC


def test_free_space_is_the_disks(files: LocalFiles) -> None:
    assert files.free_bytes() > 0
    files.close()


def test_removed_files_and_files_made_ahead_serve_the_next_ones(files: LocalFiles) -> None:
    files.write(KEY, 0, b"old")
    number = Path(files.path(KEY)).stat().st_ino
    files.remove(KEY)
    assert not files.exists(KEY)
    assert not Path(files.path(KEY)).exists()
    other = (Ino(9), 0)
    files.write(other, 2, b"new")
    assert Path(files.path(other)).stat().st_ino == number
    assert files.read(other, 0, 5) == b"\0\0new"

    wanted = files.spares_wanted()
    files.make_spares(wanted)
    files.add_spares(wanted)
    assert files.spares_wanted() == []
    low: list[bool] = []
    files.on_low_spares = lambda: low.append(True)
    for ino in range(100, 100 + len(wanted)):
        files.write((Ino(ino), 0), 0, b"x")
    assert low == [True]
    assert [key for key, _ in files.scan()].count((Ino(100), 0)) == 1
