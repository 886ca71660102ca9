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
    files.close()
    assert LocalFiles(files.root).at_start == {(Ino(1), 5): 3}


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
    path = Path(full.path(KEY))
    full.close()
    path.unlink()
    path.symlink_to("/dev/full")
    full = LocalFiles(tmp_path / "blocks")

    with pytest.raises(LocalDiskError) as caught:
        full.write(KEY, 0, b"x")
    assert caught.value.errno == errno.ENOSPC


def test_free_space_is_the_disks(files: LocalFiles) -> None:
    assert files.free_bytes() > 0
    files.close()


def test_removed_files_and_files_made_ahead_serve_the_next_ones(files: LocalFiles) -> None:
    files.write(KEY, 0, b"old")
    path = files.path(KEY)
    files.remove(KEY)
    assert not files.exists(KEY)
    assert Path(path).stat().st_size == 0
    other = (Ino(9), 0)
    files.write(other, 2, b"new")
    assert files.path(other) == path
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


def test_a_start_finds_whose_the_files_are_and_empties_the_rest(tmp_path: Path) -> None:
    # no close(): a killed process calls none
    files = LocalFiles(tmp_path)
    files.write((Ino(7), 3), 0, b"mine")
    files.write((Ino(8), 0), 0, b"gone by hand")
    files.write((Ino(9), 0), 0, b"whose?")
    Path(files.path((Ino(8), 0))).unlink()
    stray = Path(files.path((Ino(9), 0)))
    (stray.parent / "README").write_text("somebody else's")
    files._set_owner(int(stray.name, 16), (Ino(0), 0))  # killed while it was given up

    again = LocalFiles(tmp_path)

    assert again.at_start == {(Ino(7), 3): 4}
    assert again.read((Ino(7), 3), 0, 4) == b"mine"
    assert stray.stat().st_size == 0
    for ino in (20, 21):
        again.write((Ino(ino), 0), 0, b"next")
    assert (
        len(list(tmp_path.glob("n*/[0-9a-f]*"))) == 3
    )  # none is made while one is vacant or spare
    assert (stray.parent / "README").read_text() == "somebody else's"
    assert again.read((Ino(20), 0), 0, 4) == again.read((Ino(21), 0), 0, 4) == b"next"


def test_a_file_that_a_power_cut_gives_two_of_is_taken_once(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write(KEY, 0, b"one")
    files.write((Ino(4), 0), 0, b"other")
    files._set_owner(int(Path(files.path((Ino(4), 0))).name, 16), KEY)

    again = LocalFiles(tmp_path)

    assert list(again.at_start) == [KEY]
    assert again.read(KEY, 0, 3) == b"one"


def test_files_of_the_earlier_layout_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / "05").mkdir()
    (tmp_path / "spare").mkdir()
    (tmp_path / "spare" / "1").touch()
    (tmp_path / "05" / f"{KEY[0]:x}.2").write_bytes(b"kept")

    files = LocalFiles(tmp_path)

    assert files.at_start == {(KEY[0], 2): 4}
    assert files.read((KEY[0], 2), 0, 4) == b"kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n0000", "owners"]


def test_more_spares_than_anybody_needs_are_removed(
    files: LocalFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stashcordfs.cache.files._SPARES_MOST", 1)
    for ino in range(1, 5):
        files.write((Ino(ino), 0), 0, b"x")
    for ino in range(1, 5):
        files.remove((Ino(ino), 0))

    assert len(list(files.root.glob("n*/*"))) == 1
    files.write((Ino(9), 0), 0, b"x")
    files.write((Ino(10), 0), 0, b"y")
    assert files.read((Ino(9), 0), 0, 1) + files.read((Ino(10), 0), 0, 1) == b"xy"


def test_numbers_of_spares_that_could_not_be_made_are_used_again(files: LocalFiles) -> None:
    wanted = files.spares_wanted()
    files.give_back(wanted)

    assert sorted(files.spares_wanted()) == sorted(wanted)


def test_a_failed_sync_of_the_owners_stays_one(
    files: LocalFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> None:
        raise OSError(errno.EIO, "Input/output error")

    files.write(KEY, 0, b"x")
    monkeypatch.setattr(files._owners, "sync", failing)
    with pytest.raises(LocalDiskError):
        files.sync([KEY])
    monkeypatch.undo()

    with pytest.raises(LocalDiskError):
        files.sync([KEY])


def test_a_table_of_owners_that_cannot_grow_refuses_the_write_and_keeps_the_file(
    files: LocalFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise LocalDiskError(errno.ENOSPC, "owners: No space left on device")

    monkeypatch.setattr(files._owners, "grow", full)
    monkeypatch.setattr(type(files._owners), "__len__", lambda self: 0)
    with pytest.raises(LocalDiskError) as caught:
        files.write(KEY, 0, b"x")

    assert caught.value.errno == errno.ENOSPC
    assert not files.exists(KEY)
    monkeypatch.undo()
    files.write(KEY, 0, b"x")
    assert files.path(KEY).endswith("/0")
