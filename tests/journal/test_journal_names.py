from __future__ import annotations

import errno
import stat

import pytest

from stashcordfs.errors import FsError
from stashcordfs.journal import Journal, rules
from stashcordfs.types import ROOT_INO, Ino

FILE, DIR = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755


async def make(journal, name, mode=FILE, parent=ROOT_INO, **more):
    more = {"uid": 1, "gid": 2, "now_ns": 10} | more
    return await journal.create_node(parent, name, mode=mode, **more)


async def move(journal, old, new, *, to=ROOT_INO, at=ROOT_INO, noreplace=False, exchange=False):
    return await journal.rename(at, old, to, new, noreplace=noreplace, exchange=exchange, now_ns=50)


def refused(code):
    return pytest.raises(FsError, check=lambda error: error.errno == code)


async def test_a_made_inode_is_found_by_name_and_number(journal):
    made = await make(journal, b"a", mode=stat.S_IFCHR | 0o600, rdev=0x103)
    assert await journal.lookup(ROOT_INO, b"a") == made == await journal.getattr(made.ino)
    assert (made.uid, made.gid, made.rdev, made.nlink, made.ctime_ns) == (1, 2, 0x103, 1, 10)
    assert await journal.lookup(ROOT_INO, b"b") is None
    assert (await journal.getattr(ROOT_INO)).mtime_ns == 10


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (b"x" * 256, errno.ENAMETOOLONG),
        (b"", errno.EINVAL),
        (b"..", errno.EINVAL),
        (b"a/b", errno.EINVAL),
        (b"there", errno.EEXIST),
    ],
)
async def test_names_that_are_refused(journal, name, code):
    await make(journal, b"there")
    with refused(code):
        await make(journal, name)


async def test_parents_that_are_refused(journal):
    file = await make(journal, b"file")
    gone = await make(journal, b"gone", DIR)
    await journal.rmdir(ROOT_INO, b"gone", now_ns=11)
    for parent, code in ((file.ino, errno.ENOTDIR), (gone.ino, errno.ENOENT)):
        with refused(code):
            await make(journal, b"n", parent=parent)
    with refused(errno.ENOENT):
        await journal.getattr(Ino(12345))


async def test_setgid_is_handed_down(journal):
    top = await make(journal, b"top", DIR | stat.S_ISGID, gid=77)
    below = await make(journal, b"below", DIR, parent=top.ino, gid=5)
    file = await make(journal, b"file", parent=top.ino, gid=5)
    assert below.gid == file.gid == 77
    assert below.mode & stat.S_ISGID
    assert not file.mode & stat.S_ISGID


async def test_links_count_and_the_last_name_leaves_a_nameless_inode(journal):
    made = await make(journal, b"a")
    assert (await journal.link(made.ino, ROOT_INO, b"b", now_ns=20)).nlink == 2
    assert sorted(await journal.paths_of(made.ino)) == [b"a", b"b"]
    assert (await journal.unlink(ROOT_INO, b"a", now_ns=21)).nlink == 1
    assert await journal.nameless() == []
    assert (await journal.unlink(ROOT_INO, b"b", now_ns=22)).nlink == 0
    assert [left.ino for left in await journal.nameless()] == [made.ino]
    with refused(errno.ENOENT):
        await journal.link(made.ino, ROOT_INO, b"c", now_ns=23)
    await journal.purge(made)
    assert await journal.nameless() == []
    assert await journal.usage() == (1, 0)


async def test_what_link_unlink_and_rmdir_refuse(journal):
    folder = await make(journal, b"d", DIR)
    await make(journal, b"f", parent=folder.ino)
    file = await make(journal, b"g")
    for code, call in (
        (errno.EPERM, journal.link(folder.ino, ROOT_INO, b"e", now_ns=1)),
        (errno.EEXIST, journal.link(file.ino, ROOT_INO, b"d", now_ns=1)),
        (errno.EISDIR, journal.unlink(ROOT_INO, b"d", now_ns=1)),
        (errno.ENOENT, journal.unlink(ROOT_INO, b"z", now_ns=1)),
        (errno.ENAMETOOLONG, journal.unlink(ROOT_INO, b"z" * 256, now_ns=1)),
        (errno.ENOTDIR, journal.rmdir(ROOT_INO, b"g", now_ns=1)),
        (errno.ENOTEMPTY, journal.rmdir(ROOT_INO, b"d", now_ns=1)),
    ):
        with refused(code):
            await call
    assert (await journal.getattr(file.ino)).nlink == 1


async def test_the_link_bound_holds_for_files_and_not_for_folders(journal, monkeypatch):
    monkeypatch.setattr(rules, "LINK_MAX", 3)
    file = await make(journal, b"f")
    await journal.link(file.ino, ROOT_INO, b"f2", now_ns=1)
    await journal.link(file.ino, ROOT_INO, b"f3", now_ns=1)
    with refused(errno.EMLINK):
        await journal.link(file.ino, ROOT_INO, b"f4", now_ns=1)
    for name in (b"a", b"b", b"c", b"d"):
        await make(journal, name, DIR)
    assert (await journal.getattr(ROOT_INO)).nlink == 6
    removed = await journal.rmdir(ROOT_INO, b"a", now_ns=1)
    with journal._db.operation:
        rules.revive(journal._engine, removed, ROOT_INO, b"a", now_ns=1)
    assert (await journal.getattr(ROOT_INO)).nlink == 6


async def test_a_whiteout_takes_the_old_place(journal):
    moved = await make(journal, b"f")
    await journal.rename(
        ROOT_INO, b"f", ROOT_INO, b"g", noreplace=False, exchange=False, whiteout=(7, 8), now_ns=5
    )
    left = await journal.lookup(ROOT_INO, b"f")
    assert left is not None
    assert (left.mode, left.rdev, left.nlink) == (stat.S_IFCHR, 0, 1)
    assert (left.uid, left.gid) == (7, 8)  # whoever has renamed, not the file's owner
    assert (await journal.lookup(ROOT_INO, b"g")).ino == moved.ino


async def test_rename_keeps_the_folders_link_counts(journal):
    one, two = await make(journal, b"1", DIR), await make(journal, b"2", DIR)
    child = await make(journal, b"c", DIR, parent=one.ino)
    assert await move(journal, b"c", b"k", at=one.ino, to=two.ino) is None
    assert (await journal.getattr(one.ino)).nlink == 2
    assert (await journal.getattr(two.ino)).nlink == 3
    assert await journal.parent_of(child.ino) == two.ino
    assert await journal.paths_of(child.ino) == [b"2/k"]
    replaced = await move(journal, b"1", b"k", to=two.ino)
    assert replaced is not None
    assert (replaced.ino, replaced.nlink) == (child.ino, 0)
    assert (await journal.getattr(two.ino)).nlink == 3
    assert (await journal.getattr(ROOT_INO)).nlink == 3
    assert await journal.paths_of(child.ino) == []
    with refused(errno.ENOENT):
        await journal.parent_of(child.ino)


async def test_what_rename_refuses(journal):
    top = await make(journal, b"top", DIR)
    mid = await make(journal, b"mid", DIR, parent=top.ino)
    await make(journal, b"file")
    await make(journal, b"empty", DIR)
    for code, call in (
        (errno.ENOENT, move(journal, b"no", b"x")),
        (errno.EEXIST, move(journal, b"file", b"top", noreplace=True)),
        (errno.EINVAL, move(journal, b"file", b"x", noreplace=True, exchange=True)),
        (errno.ENOENT, move(journal, b"file", b"x", exchange=True)),
        (errno.EINVAL, move(journal, b"top", b"x", to=mid.ino)),
        (errno.EINVAL, move(journal, b"top", b"x", to=top.ino)),
        (errno.EINVAL, move(journal, b"mid", b"top", at=top.ino, exchange=True)),
        (errno.ENOTDIR, move(journal, b"empty", b"file")),
        (errno.EISDIR, move(journal, b"file", b"empty")),
        (errno.ENOTEMPTY, move(journal, b"empty", b"top")),
    ):
        with refused(code):
            await call


async def test_rename_between_two_names_of_one_file_does_nothing(journal):
    made = await make(journal, b"a")
    await journal.link(made.ino, ROOT_INO, b"b", now_ns=2)
    assert await move(journal, b"a", b"b") is None
    assert await move(journal, b"a", b"b", exchange=True) is None
    assert sorted(await journal.paths_of(made.ino)) == [b"a", b"b"]


async def test_exchange_swaps_a_folder_with_a_file(journal):
    one = await make(journal, b"1", DIR)
    sub = await make(journal, b"sub", DIR, parent=one.ino)
    file = await make(journal, b"file")
    await move(journal, b"sub", b"file", at=one.ino, exchange=True)
    assert (await journal.lookup(ROOT_INO, b"file")).ino == sub.ino
    assert (await journal.lookup(one.ino, b"sub")).ino == file.ino
    assert (await journal.getattr(one.ino)).nlink == 2
    assert (await journal.getattr(ROOT_INO)).nlink == 4


async def test_a_listing_goes_on_rightly_while_names_come_and_go(journal):
    for n in range(6):
        await make(journal, b"%d" % n)
    first = await journal.read_dir(ROOT_INO, 0, 3)
    assert [name for _, name, _ in first] == [b"0", b"1", b"2"]
    assert first[0][0] >= 16
    await journal.unlink(ROOT_INO, b"1", now_ns=2)
    await journal.unlink(ROOT_INO, b"4", now_ns=2)
    await make(journal, b"1")
    rest = await journal.read_dir(ROOT_INO, first[-1][0], 100)
    assert [name for _, name, _ in rest] == [b"3", b"5", b"1"]


async def test_a_very_deep_folder_has_its_path(journal):
    at, top = ROOT_INO, None
    for _ in range(1500):  # deeper than Python's recursion
        at = (await make(journal, b"d", DIR, parent=at)).ino
        top = top or at
    file = await make(journal, b"f", parent=at)
    assert await journal.paths_of(file.ino) == [b"d/" * 1500 + b"f"]
    assert await journal.is_below(file.ino, top)
    assert not await journal.is_below(top, file.ino)
    assert await journal.is_below(top, top)
    assert await journal.paths_of(ROOT_INO) == [b""]
    assert await journal.parent_of(ROOT_INO) == ROOT_INO


async def test_a_name_below_a_folder_without_a_name_has_no_path(journal):
    folder = await make(journal, b"d", DIR)
    file = await make(journal, b"f", parent=folder.ino)
    with journal._db.operation:
        journal._engine.delete_entry(ROOT_INO, b"d")
    assert await journal.paths_of(file.ino) == []
    assert not await journal.is_below(file.ino, ROOT_INO)


async def test_symlinks_keep_their_target(journal):
    made = await make(journal, b"l", stat.S_IFLNK | 0o777, target=b"there")
    assert made.size == 5
    assert await journal.readlink(made.ino) == b"there"
    with refused(errno.EINVAL):
        await journal.readlink(ROOT_INO)
    await journal.unlink(ROOT_INO, b"l", now_ns=1)
    await journal.purge(made)
    await journal.purge(made)  # safe to retry
    with refused(errno.EINVAL):
        await journal.readlink(made.ino)


async def test_extended_attributes(journal):
    made = await make(journal, b"f")
    await journal.set_xattr(made.ino, b"user.a", b"1", now_ns=30)
    await journal.set_xattr(made.ino, b"user.a", b"2", now_ns=31)
    assert await journal.get_xattr(made.ino, b"user.a") == b"2"
    assert await journal.list_xattrs(made.ino) == [b"user.a"]
    await journal.remove_xattr(made.ino, b"user.a", now_ns=32)
    assert (await journal.getattr(made.ino)).ctime_ns == 32
    for code, call in (
        (errno.ENODATA, journal.get_xattr(made.ino, b"user.a")),
        (errno.ENODATA, journal.remove_xattr(made.ino, b"user.a", now_ns=1)),
        (errno.ERANGE, journal.set_xattr(made.ino, b"n" * 256, b"", now_ns=1)),
        (errno.E2BIG, journal.set_xattr(made.ino, b"n", b"v" * 65_537, now_ns=1)),
        (errno.ENOENT, journal.set_xattr(Ino(999), b"n", b"v", now_ns=1)),
    ):
        with refused(code):
            await call


async def test_attributes_change_one_by_one_and_the_kind_stays(journal):
    made = await make(journal, b"f")
    after = await journal.set_attributes(made.ino, mode=stat.S_IFDIR | 0o4711, uid=9, size=100)
    assert after == await journal.getattr(made.ino)
    assert (after.mode, after.uid, after.gid) == (stat.S_IFREG | 0o4711, 9, 2)
    assert await journal.usage() == (2, 100)


async def test_a_reopened_journal_holds_all_and_gives_new_numbers(tmp_path):
    path = tmp_path / "j.sqlite"
    journal = Journal.create(path, clock_ns=lambda: 0, uid=0, gid=0, writer_epoch=3)
    made = await make(journal, b"f")
    await journal.set_attributes(made.ino, size=11)
    journal.close()
    journal = Journal.open(path, clock_ns=lambda: 0)
    assert made.ino >> 40 == 3
    assert await journal.usage() == (2, 11)
    assert (await make(journal, b"g")).ino > made.ino
    assert [name for _, name, _ in await journal.read_dir(ROOT_INO, 0, 9)] == [b"f", b"g"]
    journal.close()


async def test_a_refusal_leaves_what_is_in_memory_and_is_no_rollback(journal):
    """The kernel sends the last times of removed files: each would empty the memory of inodes."""
    made = await make(journal, b"a")
    for call in (
        make(journal, b"a"),
        journal.set_attributes(Ino(12345), mtime_ns=5, ctime_ns=5),
        journal.rmdir(ROOT_INO, b"a", now_ns=11),
    ):
        with pytest.raises(FsError):
            await call
    assert journal._db.rollbacks == 0
    assert journal._engine._known[made.ino] == made


async def test_attributes_and_a_synced_size_go_with_their_inode_also_after_a_new_start(tmp_path):
    path = tmp_path / "journal.sqlite"
    first = Journal.create(path, clock_ns=lambda: 7, uid=0, gid=0)
    for name in (b"a", b"b"):
        made = await make(first, name)
        await first.set_xattr(made.ino, b"user.x", b"v", now_ns=11)
        await first.set_attributes(made.ino, size=10, synced=0)
    await first.unlink(ROOT_INO, b"a", now_ns=12, kept=lambda _: False)
    first.close()
    again = Journal.open(path, clock_ns=lambda: 8)
    assert await again.synced_sizes() == [(made.ino, 0)]
    await again.unlink(ROOT_INO, b"b", now_ns=13, kept=lambda _: False)
    for table in ("xattrs", "synced_sizes"):
        assert again._db.all(f"SELECT * FROM {table}") == []
    again.close()


async def test_what_an_undone_operation_forgot_is_known_again(journal):
    made = await make(journal, b"a")
    await journal.set_attributes(made.ino, size=10, synced=0)

    def half_way():
        with journal._db.operation:
            journal._engine.drop_synced_size(made.ino)
            journal._engine.put_xattr(made.ino, b"user.x", b"v")
            raise FsError(errno.EIO)

    with refused(errno.EIO):
        half_way()
    assert journal._engine.grown == {made.ino}
    assert not journal._engine.has_xattrs
    await journal.size_synced(made.ino, 10, whole=True)
    assert await journal.synced_sizes() == []
