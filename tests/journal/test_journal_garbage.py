"""What nothing refers to, and what is condemned: counted in a snapshot, told in segments."""

from __future__ import annotations

import apsw
import pytest

from stashcordfs.errors import JournalError
from stashcordfs.journal import Journal, trash
from stashcordfs.journal.census import take_census, take_contents
from stashcordfs.journal.garbage import Condemned, Move
from stashcordfs.journal.snapshot import Rebuild, take_snapshot
from stashcordfs.types import ROOT_INO, ChunkId, ChunkRef, Location, ObjectId

FILE = 0o100644


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.sqlite"


def chunk_id(name):
    return ChunkId(name.ljust(32, b"."))


async def made(journal, name, size=10):
    found = await journal.create_node(ROOT_INO, name, mode=FILE, uid=0, gid=0, now_ns=1)
    await journal.set_attributes(found.ino, size=size)
    return found.ino


async def packed(journal, message, *names, close=True):
    """A pack in a message of its own, with a chunk of 10 bytes for each name."""
    object_id = ObjectId(b"%016d" % message)
    refs = [
        ChunkRef(chunk_id(name), object_id, 0, at, 24 + 26 * at, 26, 10, 0)
        for at, name in enumerate(names)
    ]
    intent = await journal.add_intent(
        nonce="n", channel=0, after_message=0, packs=[(object_id, 0, 200, f"p{message}", refs)]
    )
    where = Location(7, message, message + 1, f"p{message}", 200)
    await journal.confirm_intent_packs(intent, {object_id: where})
    if close:
        await journal.close_intent(intent)


async def refer(journal, ino, name, index=0):
    await journal.commit_chunks([(ino, index, chunk_id(name), 10)])


def census(journal, path, kept_since_ns=0):
    journal.commit()
    return take_census(path, kept_since_ns=kept_since_ns)


async def rows(journal):
    return {bytes(name).rstrip(b"."): row for name, row in journal._db.all(
        "SELECT chunk_id, id FROM chunks")}  # fmt: skip


async def test_what_a_file_refers_to_is_live_and_the_rest_is_unused(journal, path):
    ino = await made(journal, b"f")
    await packed(journal, 5, b"a", b"b")
    await refer(journal, ino, b"a")
    found = census(journal, path)
    row = await rows(journal)
    assert list(found.fresh) == [row[b"b"]]
    (message,) = found.messages
    assert (message.address, message.size_bytes, message.live_bytes) == ((7, 5), 200, 26)
    assert message.history_bytes == 26  # it was not known before: its time begins now


async def test_history_keeps_a_chunk_for_its_time(journal, path):
    await packed(journal, 5, b"a")
    row = await rows(journal)
    await journal.note_unused([row[b"a"]], 100)
    assert census(journal, path, 100).messages[0].history_bytes == 26
    assert census(journal, path, 100).next_expiry_ns == 100
    assert census(journal, path, 101).messages[0].needed_bytes == 0


async def test_a_chunk_that_is_known_as_unused_keeps_its_time(journal, path):
    await packed(journal, 5, b"a")
    row = await rows(journal)
    await journal.note_unused([row[b"a"]], 100)
    await journal.note_unused([row[b"a"]], 200)
    assert census(journal, path).fresh == []
    assert census(journal, path, 101).messages[0].needed_bytes == 0


async def test_a_reference_ends_the_time_in_its_own_transaction(journal, path):
    ino = await made(journal, b"f")
    await packed(journal, 5, b"a")
    row = await rows(journal)
    await journal.note_unused([row[b"a"]], 100)
    with journal.noting() as noted:
        await refer(journal, ino, b"a")
    assert journal._db.all("SELECT * FROM unused") == []
    assert noted == {(ino, 0)}
    assert (await journal.referred_chunks(noted))[ino, 0][0] == row[b"a"]


async def test_an_upload_that_is_not_closed_is_not_counted_as_unused(journal, path):
    await packed(journal, 5, b"a", close=False)
    found = census(journal, path)
    assert found.fresh == []
    assert found.messages[0].pinned


async def test_what_is_revived_or_gone_is_told(journal, path):
    ino = await made(journal, b"f")
    await packed(journal, 5, b"a")
    row = await rows(journal)
    await refer(journal, ino, b"a")
    await journal.note_unused([row[b"a"], 999], 100)  # as an older program left it
    assert set(census(journal, path).revived) == {row[b"a"], 999}


async def test_the_trash_holds_bytes_but_does_not_stop_the_clock(journal, path):
    ino = await made(journal, b"f")
    await packed(journal, 5, b"a")
    await refer(journal, ino, b"a")
    journal.commit()
    journal._db.run("CREATE TABLE IF NOT EXISTS trash (ino INTEGER PRIMARY KEY, a, b, c, d)")
    journal._db.run("INSERT INTO trash VALUES (?, 1, x'61', 1, 0)", (ino,))
    found = census(journal, path)
    assert list(found.fresh) == [(await rows(journal))[b"a"]]
    await journal.note_unused(found.fresh, 100)
    assert census(journal, path, 200).messages[0].live_bytes == 26


async def test_a_long_list_that_comes_out_of_the_trash_is_used_again_to_its_last_block(
    journal, monkeypatch
):
    monkeypatch.setattr(trash, "_BATCH", 2)
    journal.keep_trash = True
    names = [b"%d" % n for n in range(7)]
    ino = await made(journal, b"f", 70)
    await packed(journal, 5, b"other", *names)
    for index, name in enumerate(names):
        await refer(journal, ino, name, index)
    await journal.unlink(ROOT_INO, b"f", now_ns=1)
    row = await rows(journal)
    await journal.note_unused([row[name] for name in (b"other", *names)], 100)
    with journal.noting() as noted:
        await journal.revive(await journal.trashed(ino), ROOT_INO, b"f", now_ns=1)
    assert journal._db.all("SELECT chunk FROM unused") == [(row[b"other"],)]
    assert noted == {(ino, index) for index in range(7)}


async def test_contents_are_what_must_be_kept_and_who_refers_to_it(journal, path):
    ino = await made(journal, b"f", 30)
    await packed(journal, 5, b"live", b"history", b"dead", b"doomed")
    await refer(journal, ino, b"live")
    await refer(journal, ino, b"doomed", 1)
    row = await rows(journal)
    await journal.note_unused([row[b"dead"]], 100)
    await journal.note_unused([row[b"history"]], 300)
    journal.commit()
    (pack,) = census(journal, path).messages[0].packs
    found = take_contents(path, [pack], kept_since_ns=200, without={row[b"doomed"]})
    assert [(n.row, n.unused) for n in found.needed] == [
        (row[b"live"], False), (row[b"history"], True),
    ]  # fmt: skip
    assert list(found.blocks) == [Move(ino, 0, row[b"live"], 0)]
    assert list(found.excepted) == [Move(ino, 1, row[b"doomed"], 0)]
    assert found.packs[pack][2].message == 5


async def test_a_block_moves_to_another_copy_unless_it_has_changed_since(journal, path):
    ino = await made(journal, b"f", 30)
    await packed(journal, 5, b"a", b"b")
    await packed(journal, 6, b"a", b"c")
    old, new = (row for row, _ in await journal.copies_of(chunk_id(b"a")))
    await refer(journal, ino, b"b")
    await journal.move_blocks([Move(ino, 0, old, new)])
    assert (await journal.chunk_at(ino, 0)).ref.chunk_id == chunk_id(b"b")
    await refer(journal, ino, b"a")
    now = (await journal.referred_chunks([(ino, 0)]))[ino, 0][0]
    await journal.move_blocks([Move(ino, 0, now, old + new - now)])
    assert (await journal.referred_chunks([(ino, 0)]))[ino, 0][0] == old + new - now


async def test_what_history_needs_is_kept_by_another_copy_as_long(journal, path):
    await journal.note_unused([5, 6], 100)
    await journal.note_unused([7], 300)
    await journal.prolong_unused(7, 5)
    await journal.prolong_unused(6, 7)
    await journal.prolong_unused(7, 99)  # in use: it has no row, and gets none
    await journal.prolong_unused(98, 6)
    rows = journal._db.all("SELECT chunk, since_ns FROM unused ORDER BY chunk")
    assert rows == [(5, 300), (6, 100), (7, 300)]


async def test_what_is_condemned_is_chosen_no_more_and_its_rows_go(journal, path):
    ino = await made(journal, b"f")
    await packed(journal, 5, b"a")
    (message,) = census(journal, path).messages
    await journal.condemn(7, 5, message.packs, 200)
    assert await journal.find_chunk(chunk_id(b"a")) is None
    with pytest.raises(JournalError):
        await refer(journal, ino, b"a")
    assert await journal.condemned() == [Condemned(7, 5, journal._clock_ns(), 200)]
    assert await journal.held_packs(0) == []  # not `verify`'s to find again
    while await journal.clear_condemned():
        pass
    assert journal._db.all("SELECT id FROM chunks UNION ALL SELECT id FROM packs") == []
    assert len(await journal.condemned()) == 1


async def test_condemning_is_told_and_forgetting_is_not(journal, path):
    await packed(journal, 5, b"a")
    await journal.condemn(7, 5, census(journal, path).messages[0].packs, 200)
    journal.commit()
    told = journal.last_change
    told_rows = await journal.changes_until(told, 1 << 30)
    tables = {c.name for c in apsw.Changeset.iter(told_rows[-1][2])}
    assert tables >= {"condemned", "packs"}
    await journal.forget_condemned([(7, 5)])
    journal.commit()
    assert journal.last_change == told
    assert await journal.condemned() == []


async def of_the_past(journal, tmp_path):
    """A copy of the journal as it is now, for a rebuild."""
    journal.commit()
    take_snapshot(tmp_path / "journal.sqlite", tmp_path / "past")


async def located(journal, tmp_path):
    """The journal of the past, told where everything is now."""
    journal.commit()
    take_snapshot(tmp_path / "journal.sqlite", tmp_path / "now")
    with Rebuild.from_snapshot(tmp_path / "old", tmp_path / "past") as rebuild:
        rebuild.locate(tmp_path / "now")
    return Journal.open(tmp_path / "old", clock_ns=lambda: 8)


async def test_a_state_of_the_past_finds_its_chunks_where_they_are_now(journal, path, tmp_path):
    ino = await made(journal, b"f", 30)
    await packed(journal, 5, b"a", b"b", b"lost")
    for index, name in enumerate([b"a", b"b", b"lost"]):
        await refer(journal, ino, name, index)
    await of_the_past(journal, tmp_path)
    await packed(journal, 6, b"a", b"c")  # repacked, twice
    await packed(journal, 7, b"b")
    await journal.condemn(7, 5, [pack for _, pack in await journal.copies_of(chunk_id(b"lost"))], 9)
    while await journal.clear_condemned():
        pass
    old = await located(journal, tmp_path)
    assert [(await old.chunk_at(ino, n)).location.message for n in range(2)] == [6, 7]
    assert (await old.chunk_at(ino, 2)).damaged
    assert await old.find_chunk(chunk_id(b"c")) is not None  # known, so collected one day
    assert [each.message for each in await old.condemned()] == [5]
    assert await old.get_local("checkpoint_wanted") == "1"
    old.close()


async def test_a_state_of_the_past_keeps_what_has_not_moved(journal, path, tmp_path):
    ino = await made(journal, b"f")
    await packed(journal, 5, b"a")
    await refer(journal, ino, b"a")
    await of_the_past(journal, tmp_path)
    before = await journal.chunk_at(ino, 0)
    await packed(journal, 6, b"b")
    old = await located(journal, tmp_path)
    assert await old.chunk_at(ino, 0) == before
    old.close()
