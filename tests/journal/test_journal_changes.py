"""What is recorded, applied to what was before, is what there is now: for names and contents."""

from __future__ import annotations

import contextlib
import errno
import stat
import tempfile
from pathlib import Path

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stashcordfs.errors import FsError, JournalError, LocalDiskError
from stashcordfs.journal import Journal
from stashcordfs.journal.changes import OwnObject
from stashcordfs.journal.snapshot import Rebuild, take_snapshot
from stashcordfs.journal.sqlite import checksums, schema
from stashcordfs.journal.sqlite import database as module
from stashcordfs.types import ROOT_INO, ChunkId, ChunkRef, Location, ObjectId

FILE, DIR = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755
BLOCK = 1000


def ask(call):
    """Run what never suspends."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("suspended")


def tables(path, *, atime=False):
    """Every row of the replicated tables; the access times only if wanted."""
    database = apsw.Connection(str(path))
    found = {}
    for table in schema.REPLICATED_TABLES:
        rows = database.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
        if table == "inodes" and not atime:
            rows = [row[:7] + row[8:] for row in rows]
        found[table] = rows
    database.close()
    return found


def recorded(journal):
    journal.commit()
    return ask(journal.changes_until(journal.last_change, 1 << 40))


def made_again(path, rows):
    with Rebuild.from_nothing(path) as rebuild:
        rebuild.apply(changeset for _, _, changeset in rows)
    return tables(path)


NAMES = st.sampled_from([b"a", b"b", b"c"])
OPERATION = st.one_of(
    st.tuples(st.just("create"), NAMES, st.sampled_from([FILE, DIR, stat.S_IFLNK | 0o777])),
    st.tuples(st.just("link"), NAMES, NAMES),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("rename"), NAMES, NAMES, st.booleans()),
    st.tuples(st.just("xattr"), NAMES, st.binary(max_size=5)),
    st.tuples(st.just("mode"), NAMES, st.integers(0, 0o777)),
    st.tuples(st.just("atime"), NAMES, st.integers(1, 1 << 60)),
    st.tuples(st.just("grow"), NAMES, st.integers(0, 5 * BLOCK)),
    st.tuples(st.just("truncate"), NAMES, st.integers(0, 5 * BLOCK)),
    st.tuples(st.just("upload"), NAMES, st.integers(0, 4), st.booleans()),
    st.tuples(st.just("fail")),
    st.tuples(st.just("commit")),
)


class Driver:
    """Plays operations on a journal, as the vfs would."""

    def __init__(self, journal):
        self.journal, self.uploads = journal, 0

    def found(self, name):
        found = ask(self.journal.lookup(ROOT_INO, name))
        if found is None:
            raise FsError(2)
        return found

    def play(self, what, *args):
        with contextlib.suppress(FsError):
            getattr(self, what)(*args)

    def create(self, name, mode):
        target = b"there" if stat.S_ISLNK(mode) else None
        ask(
            self.journal.create_node(
                ROOT_INO, name, mode=mode, uid=1, gid=2, now_ns=3, target=target
            )
        )

    def link(self, name, new):
        ask(self.journal.link(self.found(name).ino, ROOT_INO, new, now_ns=4))

    def remove(self, name):
        folder = stat.S_ISDIR(self.found(name).mode)
        call = self.journal.rmdir if folder else self.journal.unlink
        left = ask(call(ROOT_INO, name, now_ns=5))
        if not left.nlink:
            ask(self.journal.purge(left))

    def rename(self, old, new, exchange):
        left = ask(
            self.journal.rename(
                ROOT_INO, old, ROOT_INO, new, noreplace=False, exchange=exchange, now_ns=6
            )
        )
        if left is not None and not left.nlink:
            ask(self.journal.purge(left))

    def xattr(self, name, value):
        ask(self.journal.set_xattr(self.found(name).ino, b"user.x", value, now_ns=7))

    def mode(self, name, mode):
        ask(self.journal.set_attributes(self.found(name).ino, mode=mode, atime_ns=mode))

    def atime(self, name, when):
        ask(self.journal.set_attributes(self.found(name).ino, atime_ns=when))

    def grow(self, name, size):
        ask(self.journal.set_attributes(self.found(name).ino, size=size, synced=0))

    def truncate(self, name, size):
        ask(self.journal.truncate(self.found(name).ino, size, BLOCK, 8))

    def upload(self, name, index, confirmed):
        ino = self.found(name).ino
        self.uploads += 1
        pack = ObjectId(self.uploads.to_bytes(16, "big"))
        chunk = ChunkId(self.uploads.to_bytes(32, "big"))
        ref = ChunkRef(chunk, pack, 0, 0, 24, 100, BLOCK, 0)
        intent = ask(
            self.journal.add_intent(
                nonce="n", channel=0, after_message=0, packs=[(pack, 0, 200, "p", [ref])]
            )
        )
        if not confirmed:
            ask(self.journal.abandon_intent(intent))
            return
        at = Location(5, self.uploads, 1, "p", 200)
        ask(self.journal.confirm_intent_packs(intent, {pack: at}))
        ask(self.journal.commit_chunks([(ino, index, chunk, BLOCK)]))
        ask(self.journal.close_intent(intent))

    def fail(self):
        with contextlib.suppress(ZeroDivisionError), self.journal._db.operation:
            self.journal._db.run("DELETE FROM dirents")
            self.journal._db.run("UPDATE inodes SET size = 4711")
            raise ZeroDivisionError

    def commit(self):
        self.journal.commit()


@settings(max_examples=50, deadline=None)
@given(before=st.lists(OPERATION, max_size=15), after=st.lists(OPERATION, max_size=30))
def test_changes_applied_to_a_copy_of_before_give_what_is_now(before, after):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = folder / "journal.sqlite"
        journal = Journal.create(path, clock_ns=lambda: 9, uid=0, gid=0)
        driver = Driver(journal)
        for operation in before:
            driver.play(*operation)
        journal.commit()
        snapshot = take_snapshot(path, folder / "copy")
        for operation in after:
            driver.play(*operation)
        rows = recorded(journal)

        with Rebuild.from_snapshot(folder / "rebuilt", folder / "copy") as rebuild:
            rebuild.apply(c for number, _, c in rows if number > snapshot.last_change)

        assert [number for number, _, _ in rows] == list(range(1, len(rows) + 1))
        assert tables(folder / "rebuilt") == tables(path)
        assert made_again(folder / "again", rows) == tables(path)
        journal.close()


def make(journal, name=b"f"):
    return ask(journal.create_node(ROOT_INO, name, mode=FILE, uid=0, gid=0, now_ns=1))


def test_the_access_time_alone_makes_no_change(journal):
    made = make(journal)
    before = len(recorded(journal))
    ask(journal.set_attributes(made.ino, atime_ns=4711))
    assert ask(journal.getattr(made.ino)).atime_ns == 4711
    assert len(recorded(journal)) == before


def test_what_is_only_here_makes_no_change(journal):
    before = len(recorded(journal))
    ask(journal.cached_add(5 << 32))
    ask(journal.set_local("x", "y"))
    ask(journal.watch(["name"], 7))
    assert len(recorded(journal)) == before


def test_a_journal_made_of_a_copy_has_checksums_where_they_are_available(journal, tmp_path):
    for n in range(300):
        made = make(journal, b"%d" % n)
        ask(journal.set_xattr(made.ino, b"user.x", bytes(30_000), now_ns=1))
    journal.commit()
    take_snapshot(tmp_path / "journal.sqlite", tmp_path / "copy")  # larger than SQLite's cache
    with Rebuild.from_snapshot(tmp_path / "again", tmp_path / "copy") as rebuild:
        rebuild.finish({})
    again = Journal.open(tmp_path / "again", clock_ns=lambda: 0)
    assert checksums.has_checksums(again._db._connection) == checksums.available()
    assert ask(again.usage()) == ask(journal.usage())
    again.close()


def test_a_row_that_was_seen_elsewhere_does_not_fit(journal, tmp_path):
    made = make(journal)
    first = recorded(journal)
    ask(journal.set_attributes(made.ino, mode=0o600))
    second = recorded(journal)[len(first) :]
    with Rebuild.from_nothing(tmp_path / "again") as rebuild:
        rebuild.apply(c for _, _, c in first)
        rebuild.execute("UPDATE inodes SET mode = 1 WHERE ino = ?", (made.ino,))
        with pytest.raises(JournalError, match="UPDATE in inodes: DATA"):
            rebuild.apply(c for _, _, c in second)
        with pytest.raises(JournalError, match="CONFLICT"):
            rebuild.apply(c for _, _, c in first)


def test_a_group_is_told_after_its_commit_with_what_it_is_about(journal):
    told = []
    journal.on_recorded(told.append)
    made = make(journal)
    assert told == []
    journal.commit()
    ask(journal.set_attributes(made.ino, size=10, synced=10))
    journal.commit()
    assert [(r.id, r.names, r.touched) for r in told] == [
        (2, True, frozenset()), (3, False, frozenset({(made.ino, -1)})),
    ]  # fmt: skip


def test_a_group_ends_before_it_outgrows_a_segment(journal, monkeypatch):
    monkeypatch.setattr(module, "_CHANGESET_BYTES", 5000)
    made = make(journal)
    for n in range(20):
        ask(journal.set_xattr(made.ino, b"user.%d" % n, bytes(1000), now_ns=1))
    ask(journal.unlink(ROOT_INO, b"f", now_ns=2))
    rows = recorded(journal)
    assert max(len(changeset) for _, _, changeset in rows) < 7000
    assert len(rows) > 4


def test_an_inodes_extended_attributes_have_a_bound_together(journal):
    made = make(journal)
    for n in range(16):
        ask(journal.set_xattr(made.ino, b"user.%d" % n, bytes(65_000), now_ns=1))
    with pytest.raises(FsError, check=lambda error: error.errno == errno.ENOSPC):
        ask(journal.set_xattr(made.ino, b"user.x", bytes(65_000), now_ns=1))
    ask(journal.set_xattr(made.ino, b"user.1", bytes(65_536), now_ns=1))
    ask(journal.purge(ask(journal.unlink(ROOT_INO, b"f", now_ns=2))))
    assert journal._db.all("SELECT * FROM xattrs") == []


def test_a_long_chunk_list_is_cut_in_steps_that_are_truncations(journal, monkeypatch):
    from stashcordfs.journal import journal as facade

    monkeypatch.setattr(facade, "_BATCH", 10)
    made = make(journal)
    driver = Driver(journal)
    ask(journal.set_attributes(made.ino, size=35 * BLOCK, synced=0))
    for n in range(35):
        driver.upload(b"f", n, True)
    ask(journal.truncate(made.ino, 4 * BLOCK + 1, BLOCK, 9))
    assert len(journal._db.all("SELECT * FROM chunk_list")) == 5
    assert ask(journal.getattr(made.ino)).size == 4 * BLOCK + 1
    assert ask(journal.getattr(made.ino)).blocks == -(-(4 * BLOCK + 1) // 512)


def test_a_refused_row_of_changes_is_stored_by_the_next_commit(journal, monkeypatch, tmp_path):
    make(journal, b"a")
    run = journal._db.run

    def full(sql, bindings=()):
        if sql.startswith("INSERT INTO changes"):
            raise LocalDiskError(28)
        run(sql, bindings)

    with monkeypatch.context() as patch:
        patch.setattr(journal._db, "run", full)
        with pytest.raises(LocalDiskError):
            journal.commit()
    make(journal, b"b")
    rows = recorded(journal)
    assert made_again(tmp_path / "again", rows) == tables(tmp_path / "journal.sqlite")


def own(number, *, last_change=0, kind=2, location=None):
    return OwnObject(
        ObjectId(bytes([kind]) * 8 + number.to_bytes(8, "big")),
        kind, number, 0, last_change, 5, b"d" * 32, 100, location,
    )  # fmt: skip


def test_a_segment_takes_the_place_of_its_changes_and_ids_go_on(journal, tmp_path):
    make(journal)
    last = recorded(journal)[-1][0]
    ask(journal.add_object(own(1, last_change=last), b"sealed"))
    journal.commit()
    assert recorded(journal) == []
    assert ask(journal.sealed_bytes(own(1).object_id)) == b"sealed"
    assert ask(journal.oldest_change_ns()) == 5
    journal.close()
    again = Journal.open(tmp_path / "journal.sqlite", clock_ns=lambda: 8)
    make(again, b"g")
    assert [number for number, _, _ in recorded(again)] == [last + 1]
    assert ask(again.newest_object(2)) == own(1, last_change=last)
    again.close()


def test_own_objects_are_confirmed_and_forgotten(journal):
    at = Location(5, 6, 7, "name", 100)
    for number in (1, 2):
        ask(journal.add_object(own(number), b"s%d" % number))
    ask(journal.confirm_object(own(1).object_id, at))
    found = ask(journal.own_objects(2))
    assert [o.location and o.location.message for o in found] == [6, None]
    ask(journal.drop_sealed(2, 3))
    assert ask(journal.sealed_bytes(own(1).object_id)) is None
    assert ask(journal.sealed_bytes(own(2).object_id)) == b"s2"
    assert ask(journal.own_objects(2, after=1)) == [own(2)]
    ask(journal.drop_objects([own(1).object_id]))
    assert ask(journal.own_objects(2)) == [own(2)]
    assert ask(journal.is_own(own(1).object_id))  # a list may still show it
    journal._clock_ns = lambda: 31 * 86_400 * 10**9
    ask(journal.drop_objects([]))
    assert not ask(journal.is_own(own(1).object_id))
    assert ask(journal.is_own(own(2).object_id))


def test_the_name_of_a_copy_that_rides_in_a_standing_message_is_never_forgotten(journal):
    """Segment 2's message carries a copy of 1, and a look at the whole channel comes upon it."""
    for number in (0, 1, 2):
        ask(journal.add_object(own(number), b"s"))
        ask(journal.confirm_object(own(number).object_id, Location(5, 6 + number, 7, "name", 100)))
    ask(journal.drop_objects([own(0).object_id, own(1).object_id]))
    journal._clock_ns = lambda: 31 * 86_400 * 10**9
    ask(journal.drop_objects([]))
    known = [ask(journal.is_own(own(number).object_id)) for number in (0, 1, 2)]
    assert known == [False, True, True]


def test_rows_are_handed_out_by_size(journal):
    for n in range(6):
        make(journal, b"%d" % n)
        journal.commit()
    sizes = [len(c) for _, _, c in recorded(journal)]
    assert len(ask(journal.changes_until(99, sum(sizes[:3])))) == 3
    assert len(ask(journal.changes_until(99, 1))) == 1
    assert len(ask(journal.changes_until(2, 1 << 30))) == 2
