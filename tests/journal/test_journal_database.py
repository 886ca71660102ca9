from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import apsw
import pytest
import trio
import trio.testing

from stashcordfs.errors import FsError, JournalError, LocalDiskError
from stashcordfs.journal import Journal, outbox
from stashcordfs.journal import journal as facade
from stashcordfs.journal.sqlite import database as module
from stashcordfs.journal.sqlite import reserve, schema
from stashcordfs.types import ROOT_INO

FILE = stat.S_IFREG | 0o644
DATA = Path(__file__).parents[1] / "data"


async def make(journal, name, mode=FILE, parent=ROOT_INO):
    return await journal.create_node(parent, name, mode=mode, uid=0, gid=0, now_ns=1)


def reopen(path):
    return Journal.open(path, clock_ns=lambda: 0)


async def killed(journal, tmp_path):
    """The journal as a killed process leaves it."""
    copy = tmp_path / "killed"
    copy.mkdir(exist_ok=True)
    for file in tmp_path.glob("journal.sqlite*"):
        if not file.name.endswith("-shm"):
            shutil.copy(file, copy)
    return reopen(copy / "journal.sqlite")


async def test_a_killed_process_keeps_what_was_committed(journal, tmp_path):
    await make(journal, b"a")
    journal.commit()
    await make(journal, b"b")
    left = await killed(journal, tmp_path)
    assert [name for _, name, _ in await left.read_dir(ROOT_INO, 0, 9)] == [b"a"]
    left.close()


async def test_a_full_group_commits_by_itself(journal, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROUP_OPERATIONS", 64)
    for n in range(70):
        await make(journal, b"%02d" % n)
    left = await killed(journal, tmp_path)
    assert len(await left.read_dir(ROOT_INO, 0, 99)) == 64
    left.close()


async def test_a_failure_half_way_undoes_its_operation_alone(journal, monkeypatch):
    await make(journal, b"a")
    monkeypatch.setattr(journal._engine, "touch_folder", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await make(journal, b"b")
    monkeypatch.undo()
    assert [name for _, name, _ in await journal.read_dir(ROOT_INO, 0, 9)] == [b"a"]
    assert await journal.usage() == (2, 0)  # counted anew
    await make(journal, b"b")


async def test_a_reservation_that_was_rolled_back_gives_no_number_twice(journal, monkeypatch):
    monkeypatch.setattr(journal._engine, "touch_folder", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await make(journal, b"a")
    monkeypatch.undo()
    made = await make(journal, b"a")
    assert int(await journal.get_local("next_ino")) > made.ino


async def test_a_lost_group_stops_all_writing(journal, monkeypatch):
    await make(journal, b"a")

    def full(*_, **__):
        journal._db.run("ROLLBACK")  # as SQLite may, by itself
        raise LocalDiskError(errno.ENOSPC)

    with monkeypatch.context() as patch:
        patch.setattr(journal._engine, "touch_folder", full)
        with pytest.raises(LocalDiskError, check=lambda e: e.errno == errno.ENOSPC):
            await make(journal, b"b")
    for call in (make(journal, b"b"), journal.wal_sync()):
        with pytest.raises(LocalDiskError, match="lost"):
            await call
    assert await journal.lookup(ROOT_INO, b"a") is None


async def test_a_group_lost_outside_an_operation_is_seen_at_the_commit(journal):
    await make(journal, b"a")
    journal._db.run("ROLLBACK")
    with pytest.raises(LocalDiskError, match="lost"):
        journal.commit()


async def test_a_full_disk_at_the_commit_is_told_and_can_pass(journal, monkeypatch):
    await make(journal, b"a")
    real = journal._db._execute

    def full(sql, bindings=()):
        if sql == "COMMIT":
            raise apsw.FullError("full")
        return real(sql, bindings)

    monkeypatch.setattr(journal._db, "_execute", full)
    with pytest.raises(LocalDiskError, check=lambda e: e.errno == errno.ENOSPC):
        journal.commit()
    monkeypatch.undo()
    journal.commit()
    assert await journal.lookup(ROOT_INO, b"a") is not None


@pytest.mark.parametrize(
    ("raised", "told"),
    [(apsw.IOError, LocalDiskError), (apsw.CorruptError, JournalError)],
)
async def test_failures_of_sqlite_are_ours(journal, monkeypatch, raised, told):
    def fail(*_):
        raise raised("x")

    monkeypatch.setattr(journal._db, "_execute", fail)
    for call in (journal._db.run, journal._db.one, journal._db.all):
        with pytest.raises(told):
            call("SELECT 1")
    monkeypatch.undo()


# ---------------------------------------------------------------------- durable


class Syncs:
    """Counts fdatasyncs, and holds them while `gate` is shut."""

    def __init__(self, monkeypatch):
        self.count, self.gate, self.error = 0, threading.Event(), None
        self.gate.set()
        self.started = threading.Event()
        monkeypatch.setattr(module.os, "fdatasync", self)

    def __call__(self, fd):
        assert Path(f"/proc/self/fd/{fd}").readlink().name.endswith("-wal")
        self.count += 1
        self.started.set()
        assert self.gate.wait(30)
        if self.error:
            raise self.error


async def test_those_who_join_a_running_sync_share_the_next(journal, monkeypatch):
    syncs = Syncs(monkeypatch)
    syncs.gate.clear()
    await make(journal, b"a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(journal.wal_sync)
        await trio.to_thread.run_sync(syncs.started.wait)
        await make(journal, b"b")
        for _ in range(10):
            nursery.start_soon(journal.wal_sync)
        await trio.testing.wait_all_tasks_blocked()
        assert syncs.count == 1
        syncs.gate.set()
    assert syncs.count == 2
    await journal.wal_sync()  # nothing new
    assert syncs.count == 2


async def test_a_failed_sync_is_never_turned_into_a_success(journal, monkeypatch):
    syncs = Syncs(monkeypatch)
    syncs.error = OSError(errno.EIO, "gone")
    await make(journal, b"a")
    with pytest.raises(LocalDiskError):
        await journal.wal_sync()
    syncs.error = None
    for call in (journal.wal_sync(), make(journal, b"b")):
        with pytest.raises(LocalDiskError):
            await call
    assert syncs.count == 1


async def test_a_sync_that_is_cancelled_leaves_the_next_to_others(journal, monkeypatch):
    syncs = Syncs(monkeypatch)
    await make(journal, b"a")
    with trio.CancelScope() as scope:
        scope.cancel()
        await journal.wal_sync()
    await journal.wal_sync()
    assert syncs.count == 1


async def test_a_long_wal_is_copied_back(journal, tmp_path, monkeypatch):
    await make(journal, b"a")
    journal.commit()
    path = tmp_path / "journal.sqlite"
    before = path.stat().st_size
    await journal.checkpoint()  # a short one is left alone
    assert path.stat().st_size == before
    monkeypatch.setattr(module, "_CHECKPOINT_PAGES", 1)
    await journal.checkpoint()
    assert path.stat().st_size > before
    await make(journal, b"b")
    await journal.wal_sync()


async def test_a_wal_that_is_written_all_the_time_begins_anew(journal, tmp_path, monkeypatch):
    """A group that was open while the thread copied has written more by the time it ends."""
    monkeypatch.setattr(module, "_CHECKPOINT_PAGES", 1)
    monkeypatch.setattr(module, "_RESTART_PAGES", 50)
    names = itertools.count()

    async def meanwhile(work):
        await journal.lookup(ROOT_INO, b"0")  # opens a group, which reads
        done = work()
        await make(journal, b"%d" % next(names))
        return done

    monkeypatch.setattr(trio.to_thread, "run_sync", meanwhile)
    wal = tmp_path / "journal.sqlite-wal"
    sizes = []
    for _ in range(40):
        for _ in range(5):
            await make(journal, b"%d" % next(names))
            journal.commit()
        await journal.checkpoint()
        sizes.append(wal.stat().st_size)
    assert sizes[-1] == sizes[10] < 100 * 4096
    assert len(await journal.read_dir(ROOT_INO, 0, 1000)) == next(names)


async def test_a_wal_that_somebody_reads_is_not_copied_on_the_loop(journal, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHECKPOINT_PAGES", 1)
    monkeypatch.setattr(module, "_RESTART_PAGES", 10)
    monkeypatch.setattr(module, "_LAST_PAGES", 10)
    other = apsw.Connection(str(tmp_path / "journal.sqlite"))
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM inodes").fetchall()
    for n in range(20):
        await make(journal, b"%d" % n)
        journal.commit()
    copied_by = []
    real = journal._db._copy_back
    monkeypatch.setattr(
        journal._db, "_copy_back", lambda who: (copied_by.append(who), real(who))[1]
    )
    await journal.checkpoint()
    assert len(copied_by) == 2
    assert journal._db._connection not in copied_by
    other.close()


async def test_a_checkpoint_that_fails_is_logged(journal, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_CHECKPOINT_PAGES", 0)
    broken = tmp_path / "broken"
    broken.write_bytes(b"no database" * 1000)
    (tmp_path / "broken-wal").write_bytes(b"x" * 8)
    monkeypatch.setattr(journal._db, "path", broken)
    await journal.checkpoint()
    assert "checkpoint" in caplog.text


# ---------------------------------------------------------------------- opening


def test_what_cannot_be_opened_is_told(tmp_path):
    path = tmp_path / "j"
    with pytest.raises(JournalError, match="missing"):
        reopen(path)
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(JournalError, match="cannot be opened"):
        reopen(path)
    with pytest.raises(JournalError, match="there already"):
        Journal.create(path, clock_ns=lambda: 0, uid=0, gid=0)


def test_a_foreign_database_is_left_as_it_is(tmp_path):
    path = tmp_path / "j"
    other = apsw.Connection(str(path))
    other.execute("CREATE TABLE theirs (x)")
    other.close()
    with pytest.raises(JournalError, match="no journal"):
        reopen(path)
    other = apsw.Connection(str(path))
    assert other.execute("SELECT name FROM sqlite_schema").fetchall() == [("theirs",)]
    other.close()


def test_a_newer_journal_is_refused(journal, tmp_path):
    journal._db._connection.pragma("user_version", schema.VERSION + 1)
    with pytest.raises(JournalError, match="newer program"):
        reopen(tmp_path / "journal.sqlite")


async def test_a_migration_keeps_a_copy_that_holds_the_wal_too(journal, tmp_path, monkeypatch):
    await make(journal, b"a")
    journal.commit()  # in the WAL alone
    now = schema.VERSION
    monkeypatch.setattr(schema, "VERSION", now + 1)
    monkeypatch.setitem(schema.MIGRATIONS, now, "CREATE TABLE more (x)")
    migrated = reopen(tmp_path / "journal.sqlite")
    assert migrated._db.all("SELECT * FROM more") == []
    migrated.close()
    monkeypatch.undo()
    kept = tmp_path / f"journal.before-{now + 1}"
    assert kept.stat().st_mode & 0o777 == 0o600
    old = reopen(kept)
    assert await old.lookup(ROOT_INO, b"a") is not None
    old.close()


async def test_a_migration_that_fails_changes_nothing(journal, tmp_path, monkeypatch):
    now = schema.VERSION
    monkeypatch.setattr(schema, "VERSION", now + 1)
    broken = "CREATE TABLE more (x); CREATE TABLE more (x)"
    monkeypatch.setitem(schema.MIGRATIONS, now, broken)
    with pytest.raises(JournalError):
        reopen(tmp_path / "journal.sqlite")
    monkeypatch.undo()
    assert journal._db._connection.pragma("user_version") == now
    assert journal._db.all("SELECT name FROM sqlite_schema WHERE name = 'more'") == []


def _schema(path):
    database = apsw.Connection(str(path))
    found = database.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name").fetchall()
    columns = {
        name: database.execute("SELECT * FROM pragma_table_xinfo(?)", (name,)).fetchall()
        for _, name, _ in found
    }
    database.close()
    return {(kind, name) for kind, name, _ in found}, columns


def test_a_journal_of_version_1_becomes_what_a_new_one_is(tmp_path):
    old = tmp_path / "old.sqlite"
    database = apsw.Connection(str(old))
    database.execute((DATA / "journal-v1.sql").read_text())
    database.pragma("user_version", 1)
    database.pragma("application_id", schema.APPLICATION_ID)
    database.execute(
        "INSERT INTO inodes VALUES (1, 16877, 2, 0, 0, 0, 0, 5, 5, 5);"
        "INSERT INTO inodes VALUES (9, 33188, 1, 0, 0, 0, 30, 5, 5, 5);"
        "INSERT INTO dirents VALUES (1, 17, x'62', 9), (1, 16, x'63', 9);"
        "INSERT INTO chunk_list VALUES (9, 0, 4, 20), (9, 1, 5, 10); ANALYZE"
    )
    database.close()

    migrated = reopen(old)
    entries = migrated._engine.entries(ROOT_INO, 0, 9)
    migrated.close()
    Journal.create(tmp_path / "new.sqlite", clock_ns=lambda: 0, uid=0, gid=0).close()

    assert [(cookie, name, found.size, found.blocks) for cookie, name, found in entries] == [
        (16, b"c", 30, 1), (17, b"b", 30, 1),
    ]  # fmt: skip
    assert _schema(old) == _schema(tmp_path / "new.sqlite")


@pytest.mark.parametrize("version", [3, 4])  # of the same tables
async def test_a_journal_without_changes_becomes_a_new_one_that_wants_a_checkpoint(
    tmp_path, version
):
    old = tmp_path / "old.sqlite"
    database = apsw.Connection(str(old))
    database.execute((DATA / "journal-v3.sql").read_text())
    database.pragma("user_version", version)
    database.pragma("application_id", schema.APPLICATION_ID)
    database.execute("INSERT INTO inodes VALUES (1, 16877, 2, 0, 0, 0, 0, 5, 5, 5, 0)")
    database.close()

    migrated = reopen(old)
    assert await migrated.get_local("checkpoint_wanted") == "1"
    assert migrated.last_change == 0  # what was before is in no change
    await make(migrated, b"a")
    migrated.commit()
    assert migrated.last_change == 1
    migrated.close()
    Journal.create(tmp_path / "new.sqlite", clock_ns=lambda: 0, uid=0, gid=0).close()

    assert _schema(old) == _schema(tmp_path / "new.sqlite")


# ---------------------------------------------------------------------- plans


async def test_every_statement_of_a_running_journal_uses_an_index(journal, monkeypatch):
    seen = set()
    real = journal._db._execute
    monkeypatch.setattr(
        journal._db, "_execute", lambda sql, b=(): (seen.add((sql, tuple(b))), real(sql, b))[1]
    )
    made = await make(journal, b"a")
    await journal.getattr(made.ino)
    await journal.link(made.ino, ROOT_INO, b"b", now_ns=1)
    await journal.rename(ROOT_INO, b"a", ROOT_INO, b"c", noreplace=False, exchange=False, now_ns=1)
    await journal.read_dir(ROOT_INO, 0, 10)
    await journal.paths_of(made.ino)
    await journal.chunk_at(made.ino, 0)
    await journal.find_chunk(b"c" * 32)
    await journal.truncate(made.ino, 10, 100, 1)
    await journal.abandon_intent(1)
    await journal.cached_beyond(made.ino, 1)
    await journal.cached_page(-1, 10)
    await journal.drop_dirty(made.ino, [(1, 1)])
    await journal.nameless()
    for name in (b"b", b"c"):
        await journal.unlink(ROOT_INO, name, now_ns=1)
    await journal.purge(made)
    seen.add((outbox._REFER, (made.ino, 0, b"c" * 32, 1)))
    monkeypatch.undo()
    explained = 0
    for sql, bindings in seen:
        if sql.lstrip().startswith(("SELECT", "UPDATE", "DELETE", "INSERT")):
            plan = journal._db.all(f"EXPLAIN QUERY PLAN {sql}", bindings)
            text = " / ".join(str(row[3]) for row in plan)
            assert "TEMP B-TREE" not in text, (sql, text)
            scans = [row[3] for row in plan if str(row[3]).startswith("SCAN")]
            assert all("inodes_nameless" in scan for scan in scans), (sql, text)
            explained += 1
    assert explained > 20


async def test_a_refused_rule_leaves_the_groups_other_operations(journal):
    await make(journal, b"a")
    with pytest.raises(FsError):
        await make(journal, b"a")
    journal.commit()
    assert await journal.lookup(ROOT_INO, b"a") is not None
    assert facade.XATTR_VALUE_MAX == 65_536


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 80 MiB, and how to fill it up and to free it again."""
    if os.geteuid():
        pytest.skip("needs root, to mount")
    place = tmp_path / "disk"
    place.mkdir()
    size = ["-o", "size=80m"]
    if subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", place], check=False).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place):
    with (place / "hog").open("wb", buffering=0) as hog, contextlib.suppress(OSError):
        while hog.write(bytes(1 << 16)):
            pass


async def test_a_disk_filled_by_others_refuses_changes_before_it_loses_any(small_disk):
    path = small_disk / "journal.sqlite"
    journal = Journal.create(path, clock_ns=lambda: 7, uid=0, gid=0)
    try:
        await make(journal, b"a")
        journal.commit()
        fill(small_disk)
        values: list[bytes] = []
        for removing in (False, True):
            while journal.has_room(removing=removing):
                values.append(len(values).to_bytes(2, "big") * 30_000)
                made = await make(journal, b"%d" % len(values))
                await journal.set_xattr(made.ino, b"user.x", values[-1], now_ns=1)
                journal.commit()
        assert len(values) > 50
        await journal.unlink(ROOT_INO, b"a", now_ns=2)  # what must go on does
        await journal.wal_sync()

        (small_disk / "hog").unlink()
        assert journal.has_room(removing=False)
        await make(journal, b"b")
        journal.commit()
    finally:
        journal.close()
    again = reopen(path)
    for number, value in enumerate(values):
        made = await again.lookup(ROOT_INO, b"%d" % (number + 1))
        assert await again.get_xattr(made.ino, b"user.x") == value
    assert await again.lookup(ROOT_INO, b"a") is None
    assert await again.lookup(ROOT_INO, b"b") is not None
    again.close()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EIO])
async def test_where_space_cannot_be_reserved_nothing_is_refused(journal, monkeypatch, code):
    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(reserve, "fallocate", refused)
    journal._db.reserve.forget()
    await make(journal, b"a")
    assert journal.has_room(removing=False)
    journal.commit()


async def test_space_is_reserved_anew_after_the_wal_was_truncated(journal, tmp_path):
    wal = tmp_path / "journal.sqlite-wal"
    await make(journal, b"a")
    journal.commit()
    assert wal.stat().st_blocks * 512 >= reserve.WANTED_BYTES
    journal._db.scrub()
    assert wal.stat().st_blocks * 512 < reserve.WANTED_BYTES
    await make(journal, b"b")
    assert wal.stat().st_blocks * 512 >= reserve.WANTED_BYTES


async def test_where_little_is_reserved_a_group_takes_no_more_than_that(journal, tmp_path):
    """Names in random order dirty pages of their own each: 512 of them need more than 8 MiB."""
    folders = [await make(journal, b"d%d" % n, stat.S_IFDIR | 0o755) for n in range(60)]
    names = [(folders[n % 60].ino, b"f%d" % n) for n in range(12_000)]
    for folder, name in names:
        await make(journal, name, parent=folder)
    await journal.wal_sync()
    journal._db._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    db = journal._db
    db.reserve.ahead_bytes, db.reserve.refill = reserve.FOR_REMOVAL_BYTES, lambda: None
    before = db._commits
    for folder, name in random.Random(1).sample(names, 511):
        assert journal.has_room(removing=True)
        await journal.unlink(folder, name, now_ns=2, kept=lambda _: False)
    groups = db._commits - before
    assert groups >= 7
    assert (tmp_path / "journal.sqlite-wal").stat().st_size / groups < reserve.FOR_REMOVAL_BYTES


async def test_what_is_free_is_asked_again_where_space_cannot_be_reserved(journal, monkeypatch):
    def refused(*_):
        raise OSError(errno.EOPNOTSUPP, "")

    await make(journal, b"a")
    journal.commit()
    monkeypatch.setattr(reserve, "fallocate", refused)
    journal._db.reserve.forget()
    journal._db.reserve.refill()
    assert journal.has_room(removing=False)
    full = os.statvfs_result((4096, 4096, 1000, 0, 0, 10, 10, 10, 0, 255))
    monkeypatch.setattr(os, "fstatvfs", lambda _: full)
    await make(journal, b"b")
    assert not journal.has_room(removing=True)


async def test_a_failed_pass_over_a_long_wal_copies_nothing_on_the_loop(journal, monkeypatch):
    found = iter([(1 << 20, 0), (0, 0)])
    monkeypatch.setattr(journal._db, "_checkpoint", lambda: next(found))
    copied = []
    monkeypatch.setattr(journal._db, "_copy_back", copied.append)
    await journal.checkpoint()
    assert not copied
