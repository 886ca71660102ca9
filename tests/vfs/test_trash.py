"""The trash: what goes in, what comes back, what ends it."""

from __future__ import annotations

import errno
import os
import random
import sys
from functools import partial
from pathlib import Path

import pytest

from stashcordfs.cache import Marks
from stashcordfs.errors import FsError, UsageError
from stashcordfs.journal import Journal
from stashcordfs.recovery import fsck
from stashcordfs.types import ROOT_INO

sys.path.insert(0, str(Path(__file__).parent))
import harness
from cuts import Disk
from harness import BLOCK

WEEK_S = 7 * 86_400.0
volume = partial(harness.volume, history_s=WEEK_S)


@pytest.fixture
def mounted(tmp_path):
    return volume(tmp_path / "state")


async def paths(v, below=b""):
    return sorted([item.path async for item in v.trash.items(below)])


def check(folder):
    return fsck.check(fsck.Place(folder, BLOCK, 0), mounted=False, progress=lambda *_: None)


async def test_an_uploaded_file_comes_back_whole_with_its_attributes(mounted) -> None:
    async with mounted as v:
        data = os.urandom(3 * BLOCK + 7)
        ino = await v.make(b"file", data)
        await v.fs.setattr(ino, mode=0o640, uid=3, gid=4, mtime_ns=77)
        await v.fs.setxattr(ino, b"user.note", b"kept")
        await v.fs.sync_remote()
        before = await v.fs.getattr(ino)

        await v.fs.unlink(ROOT_INO, b"file")
        assert await v.fs.lookup(ROOT_INO, b"file") is None
        assert await paths(v) == [b"file"]
        assert v.trash.usage == (1, len(data))
        done = await v.trash.restore("/file")

        assert done.paths == ["/file"]
        after = await v.fs.lookup(ROOT_INO, b"file")
        assert after == before._replace(ctime_ns=after.ctime_ns)
        assert await v.fs.getxattr(ino, b"user.note") == b"kept"
        assert await v.read(ino) == data
        assert await paths(v) == []
        assert v.trash.usage == (0, 0)


async def test_what_discord_never_had_is_not_in_the_trash(mounted) -> None:
    async with mounted as v:
        ino = await v.make(b"young", b"x" * 100)
        await v.make(b"empty")
        for name in (b"young", b"empty"):
            await v.fs.unlink(ROOT_INO, name)
        assert await paths(v) == []
        with pytest.raises(FsError):
            await v.journal.getattr(ino)


async def test_a_replaced_and_an_emptied_file_keep_their_old_content(mounted) -> None:
    async with mounted as v:
        first, second = os.urandom(BLOCK + 1), os.urandom(2 * BLOCK)
        ino = await v.make(b"doc", first)
        await v.fs.setxattr(ino, b"user.note", b"1")
        await v.fs.sync_remote()
        await v.make(b"doc.new", second)
        await v.fs.sync_remote()
        await v.fs.rename(ROOT_INO, b"doc.new", ROOT_INO, b"doc", noreplace=False, exchange=False)
        fh = await v.fs.open((await v.fs.lookup(ROOT_INO, b"doc")).ino, os.O_WRONLY | os.O_TRUNC)
        await v.write(fh, 0, b"third")
        await v.fs.release(fh)

        items = sorted([i async for i in v.trash.items()], key=lambda i: i.entry.deleted_ns)
        assert [item.path for item in items] == [b"doc", b"doc"]
        for item, to in zip(items, ("/one", "/two"), strict=True):
            await v.trash.restore(str(item.entry.found.ino), to=to)
        found = [await v.fs.lookup(ROOT_INO, name) for name in (b"one", b"two", b"doc")]
        assert [await v.read(one.ino) for one in found] == [first, second, b"third"]
        assert await v.fs.getxattr(found[0].ino, b"user.note") == b"1"


async def test_a_removed_tree_comes_back_in_one_go(mounted) -> None:
    async with mounted as v:
        top = await v.fs.mkdir(ROOT_INO, b"top", 0o750, 5, 6)
        sub = await v.fs.mkdir(top.ino, b"sub", 0o700, 5, 6)
        bare = await v.fs.mkdir(top.ino, b"bare", 0o700, 5, 6)
        contents = {}
        for folder, name in ((top, b"a"), (sub, b"b"), (sub, b"c")):
            contents[name] = os.urandom(500)
            await v.make(name, contents[name], parent=folder.ino)
        await v.fs.sync_remote()
        for folder, name in ((top, b"a"), (sub, b"b"), (sub, b"c")):
            await v.fs.unlink(folder.ino, name)
        await v.fs.rmdir(top.ino, b"sub")
        await v.fs.rmdir(top.ino, b"bare")
        await v.fs.rmdir(ROOT_INO, b"top")
        with pytest.raises(FsError):  # nothing of it is in the trash
            await v.journal.getattr(bare.ino)
        assert await paths(v, b"top/sub") == [b"top/sub/b", b"top/sub/c"]

        done = await v.trash.restore("top")

        assert done.paths == ["/top/a", "/top/sub/b", "/top/sub/c"]
        assert (await v.fs.lookup(ROOT_INO, b"top")).mode & 0o777 == 0o750
        back = await v.fs.lookup(top.ino, b"sub")
        assert (back.ino, back.uid, back.nlink) == (sub.ino, 5, 2)
        assert (await v.fs.getattr(top.ino)).nlink == 3
        assert await v.read((await v.fs.lookup(sub.ino, b"c")).ino) == contents[b"c"]
        assert v.trash.usage == (0, 0)


async def test_nothing_is_overwritten_and_the_newest_version_comes_back(mounted) -> None:
    async with mounted as v:
        for n in range(2):
            await v.make(b"file", b"%d" % n)
            await v.fs.sync_remote()
            await v.fs.unlink(ROOT_INO, b"file")
        await v.make(b"file", b"new")
        with pytest.raises(FsError) as raised:
            await v.trash.restore("file")
        assert raised.value.errno == errno.EEXIST
        await v.trash.restore("file", to="/a/b/older")
        folder = await v.fs.resolve(b"a/b")
        assert await v.read((await v.fs.lookup(folder, b"older")).ino) == b"1"
        assert await paths(v) == [b"file"]
        with pytest.raises(UsageError, match="nothing in the trash"):
            await v.trash.restore("elsewhere")


async def test_a_restored_file_can_be_written_and_is_kept(mounted) -> None:
    """Its local file was about to be reaped when it came back."""
    async with mounted as v:
        ino = await v.make(b"file", b"a" * BLOCK)
        await v.fs.sync_remote()
        await v.fs.unlink(ROOT_INO, b"file")
        await v.trash.restore("file")
        fh = await v.fs.open(ino, os.O_RDWR)
        await v.write(fh, 5, b"new")
        await v.fs.fsync(fh, False)  # reaps
        await v.fs.release(fh)
        await v.fs.sync_remote()
        assert await v.read(ino) == b"aaaaanew".ljust(BLOCK, b"a")


async def test_of_a_block_that_was_only_here_the_trash_has_an_error_and_never_zeros(
    tmp_path,
) -> None:
    folder = tmp_path / "state"
    async with volume(folder) as v:
        ino = await v.make(b"file", b"a" * 3 * BLOCK)
        await v.fs.sync_remote()
    async with volume(folder, upload=False) as v:
        fh = await v.fs.open(ino, os.O_RDWR)
        await v.write(fh, 2 * BLOCK, b"b" * 3 * BLOCK)  # one overwritten, two more at the end
        await v.fs.release(fh)
        await v.durability.sync()
        await v.fs.unlink(ROOT_INO, b"file")
        (item,) = [item async for item in v.trash.items()]
        assert item.entry.lost_blocks
    assert check(folder).clean  # it is no alarm
    async with volume(folder, upload=False) as v:
        await v.trash.restore("file")
        fh = await v.fs.open(ino, 0)
        assert await v.fs.read(fh, 0, 3 * BLOCK) == b"a" * 3 * BLOCK
        for index in (3, 4):
            with pytest.raises(FsError) as raised:
                await v.fs.read(fh, index * BLOCK, BLOCK)
            assert raised.value.errno == errno.EIO
        await v.fs.release(fh)
    assert set(check(folder).errors) == {"damaged"}


@pytest.mark.parametrize("power_lost", [False, True])
async def test_a_file_that_was_open_when_the_process_died_is_whole_in_the_trash(
    tmp_path, power_lost
) -> None:
    folder = tmp_path / "state"
    async with volume(folder) as v:
        ino = await v.make(b"file", b"a" * 2 * BLOCK)
        await v.fs.sync_remote()
    async with volume(folder, upload=False) as v:
        fh = await v.fs.open(ino, os.O_RDWR)
        await v.fs.unlink(ROOT_INO, b"file")
        await v.write(fh, 3 * BLOCK, b"b" * BLOCK)  # a hole, then what only this machine has
        await v.fs.fsync(fh, False)
    async with volume(folder, power_lost=power_lost) as v:
        await v.trash.restore("file")
        fh = await v.fs.open(ino, 0)
        assert await v.fs.read(fh, 0, 3 * BLOCK) == (b"a" * 2 * BLOCK).ljust(3 * BLOCK, b"\0")
        with pytest.raises(FsError) as raised:
            await v.fs.read(fh, 3 * BLOCK, BLOCK)
        assert raised.value.errno == errno.EIO
        await v.fs.release(fh)
    assert set(check(folder).errors) == {"damaged"}


@pytest.mark.parametrize("power_lost", [False, True])
async def test_a_second_kill_within_the_start_leaves_no_zeros_in_the_trash(
    tmp_path, power_lost, monkeypatch
) -> None:
    folder = tmp_path / "state"
    async with volume(folder) as v:
        ino = await v.make(b"file", b"a" * BLOCK)
        await v.fs.sync_remote()
    async with volume(folder, upload=False) as v:
        fh = await v.fs.open(ino, os.O_RDWR)
        await v.fs.unlink(ROOT_INO, b"file")
        await v.write(fh, BLOCK, b"b" * BLOCK)
        await v.fs.fsync(fh, False)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "lose_trashed", killed)
        with pytest.raises(RuntimeError):
            async with volume(folder, upload=False, power_lost=power_lost):
                pass
    for _ in range(2):
        async with volume(folder, upload=False, power_lost=power_lost) as v:
            (item,) = [item async for item in v.trash.items()]
            assert item.entry.lost_blocks == 1
    async with volume(folder, upload=False) as v:
        await v.trash.restore("file")
        fh = await v.fs.open(ino, 0)
        assert await v.fs.read(fh, 0, BLOCK) == b"a" * BLOCK
        with pytest.raises(FsError) as raised:
            await v.fs.read(fh, BLOCK, BLOCK)
        assert raised.value.errno == errno.EIO
        await v.fs.release(fh)


@pytest.mark.parametrize("told_by", ["mark", "row", "mark and row"])
async def test_a_kill_once_a_mark_is_released_leaves_no_zeros_in_the_trash(
    tmp_path, told_by, monkeypatch
) -> None:
    """What says that a block is only here must outlive the start that finds it lost."""
    folder, killed_once, killed_twice = (tmp_path / name for name in ("state", "once", "twice"))
    async with volume(folder) as v:
        ino = await v.make(b"file", b"a" * 100)
        await v.fs.setattr(ino, size=2 * BLOCK)
        await v.fs.sync_remote()
    async with volume(folder, upload=False) as v:
        fh = await v.fs.open(ino, os.O_RDWR)
        await v.fs.unlink(ROOT_INO, b"file")
        await v.write(fh, BLOCK, b"b" * 100)  # into a hole
        await (v.durability.commit() if told_by == "mark" else v.fs.fsync(fh, False))
        Disk(folder).cut(killed_once, random.Random(1), power=False)
    if told_by == "row":
        (killed_once / "marks.map").unlink()
    release = Marks.release

    def killed_here(marks: Marks, slot: int) -> None:
        release(marks, slot)
        if not killed_twice.exists():
            Disk(killed_once).cut(killed_twice, random.Random(1), power=False)

    with monkeypatch.context() as patch:
        patch.setattr(Marks, "release", killed_here)
        async with volume(killed_once, upload=False):
            pass
    for found in [killed_once] if told_by == "row" else [killed_once, killed_twice]:
        async with volume(found, upload=False) as v:
            await v.trash.restore("file")
            fh = await v.fs.open(ino, 0)
            assert await v.fs.read(fh, 0, 100) == b"a" * 100
            with pytest.raises(FsError) as raised:
                await v.fs.read(fh, BLOCK, 100)
            assert raised.value.errno == errno.EIO
            await v.fs.release(fh)


async def killed(*_) -> None:
    msg = "the process is killed here"
    raise RuntimeError(msg)


async def test_a_file_that_is_still_open_goes_on_when_it_is_restored(mounted) -> None:
    async with mounted as v:
        ino = await v.make(b"file", b"a" * 100)
        await v.fs.sync_remote()
        fh = await v.fs.open(ino, os.O_RDWR)
        await v.fs.unlink(ROOT_INO, b"file")
        await v.write(fh, 0, b"b")
        await v.trash.restore("file")
        await v.fs.release(fh)
        assert (await v.read(ino))[:2] == b"ba"


async def test_what_is_old_enough_is_forgotten(tmp_path) -> None:
    folder = tmp_path / "state"
    async with volume(folder) as v:
        v.trash.keep_s = 3600.0
        sub = await v.fs.mkdir(ROOT_INO, b"sub", 0o755, 0, 0)
        inos = [await v.make(b"%d" % n, b"%d" % n * 9, parent=sub.ino) for n in range(3)]
        await v.fs.sync_remote()
        for n in range(3):
            await v.fs.unlink(sub.ino, b"%d" % n)
        await v.fs.rmdir(ROOT_INO, b"sub")
        assert await v.trash.empty(older_than_s=3600) == 0
        assert await v.trash.empty() == 3
        assert v.trash.usage == (0, 0)
        for ino in (sub.ino, *inos):
            with pytest.raises(FsError):
                await v.journal.getattr(ino)
        assert v.journal._db.all("SELECT * FROM chunk_list") == []
    assert check(folder).clean


async def test_a_trash_that_is_off_keeps_nothing(mounted) -> None:
    async with mounted as v:
        v.trash.keep_s = 0
        ino = await v.make(b"file", b"a" * 100)
        await v.fs.sync_remote()
        await v.fs.unlink(ROOT_INO, b"file")
        assert await paths(v) == []
        with pytest.raises(FsError):
            await v.journal.getattr(ino)


async def test_a_remount_keeps_the_trash_which_counts_by_itself(tmp_path) -> None:
    folder = tmp_path / "state"
    async with volume(folder) as v:
        ino = await v.make(b"file", b"a" * 10_000)
        await v.fs.sync_remote()
        await v.fs.unlink(ROOT_INO, b"file")
        used = await v.fs.statfs()
        assert used.blocks == used.free
    assert check(folder).clean
    async with volume(folder) as v:
        assert v.trash.usage == (1, 10_000)
        await v.trash.restore(str(ino))
        assert await v.read(ino) == b"a" * 10_000


async def test_fsck_mends_a_trash_that_cannot_be(tmp_path) -> None:
    folder = tmp_path / "state"
    async with volume(folder) as v:
        ino = await v.make(b"file", b"a" * 100)
        await v.fs.sync_remote()
        v.journal._db.begin()
        for row in (ino, 99):
            v.journal._db.run("INSERT INTO trash VALUES (?, 1, 'x', 1, 0)", (row,))
        v.journal.commit()
    report = check(folder)
    assert report.errors["trash"] == 2
    fsck.repair(fsck.Place(folder, BLOCK, 0), progress=lambda *_: None)
    assert check(folder).clean
    async with volume(folder) as v:
        assert await v.read(ino) == b"a" * 100
