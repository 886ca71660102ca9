from __future__ import annotations

import stat

import pytest

from stashcordfs.errors import JournalError
from stashcordfs.types import ROOT_INO, ChunkId, ChunkRef, Ino, Location, ObjectId

BLOCK = 1000
P1, P2 = ObjectId(b"p" * 16), ObjectId(b"q" * 16)
C1, C2 = ChunkId(b"c" * 32), ChunkId(b"d" * 32)


def ref(chunk, pack, number=0):
    return ChunkRef(chunk, pack, 1, number, 64 + number * 500, 500, BLOCK, 1)


def at(message):
    return Location(5, message, message + 1, "name", 2000)


async def intend(journal, pack, *chunks):
    refs = [ref(chunk, pack, n) for n, chunk in enumerate(chunks)]
    return await journal.add_intent(
        nonce="n", channel=5, after_message=9, packs=[(pack, 1, 2000, "name", refs)]
    )


async def upload(journal, pack, *chunks):
    intent = await intend(journal, pack, *chunks)
    await journal.confirm_intent_packs(intent, {pack: at(100)})
    await journal.close_intent(intent)


async def stored(journal, ino):
    """The kept sum, and what the chunk list says: they must never differ."""
    kept = journal._db.one("SELECT stored FROM inodes WHERE ino = ?", (ino,))
    rows = journal._db.one("SELECT total(valid_length) FROM chunk_list WHERE ino = ?", (ino,))
    assert kept is None or kept[0] == rows[0]
    return rows[0]


@pytest.fixture
async def ino(journal):
    made = await journal.create_node(
        ROOT_INO, b"f", mode=stat.S_IFREG | 0o644, uid=0, gid=0, now_ns=1
    )
    await journal.set_attributes(made.ino, size=10 * BLOCK)
    return made.ino


async def test_a_chunk_counts_when_its_pack_is_confirmed(journal, ino):
    intent = await intend(journal, P1, C1, C2)
    (left,) = await journal.open_intents()
    assert left.packs == {P1: ("name", 2000)}
    assert left.chunk_ids == {C1, C2}
    assert left.since_ns > 0
    assert await journal.find_chunk(C1) is None
    with pytest.raises(JournalError, match="unknown"):
        await journal.commit_chunks([(ino, 0, C1, BLOCK)])
    await journal.confirm_intent_packs(intent, {P1: at(100)})
    assert await journal.find_chunk(C1) is not None
    await journal.commit_chunks([(ino, 0, C1, BLOCK), (ino, 3, C2, 10)])
    await journal.close_intent(intent)
    assert await journal.open_intents() == []
    entry = await journal.chunk_at(ino, 3)
    assert entry is not None
    assert (entry.ref, entry.location, entry.valid_length) == (ref(C2, P1, 1), at(100), 10)
    assert await journal.chunk_at(ino, 1) is None
    assert await stored(journal, ino) == BLOCK + 10


async def test_commit_chunks_is_all_or_nothing(journal, ino):
    await upload(journal, P1, C1)
    with pytest.raises(JournalError):
        await journal.commit_chunks([(ino, 0, C1, BLOCK), (ino, 1, C2, BLOCK)])
    assert await journal.chunk_at(ino, 0) is None


async def test_an_inode_that_is_gone_is_passed_over(journal, ino):
    await upload(journal, P1, C1)
    await journal.commit_chunks([(Ino(4711), 0, C1, BLOCK), (ino, 0, C1, BLOCK)])
    assert await journal.chunk_at(Ino(4711), 0) is None
    assert await journal.chunk_at(ino, 0) is not None


@pytest.mark.parametrize("confirm_first", [True, False])
async def test_two_uploads_of_one_chunk_do_not_hang_on_each_other(journal, ino, confirm_first):
    one = await intend(journal, P1, C1)
    two = await intend(journal, P2, C1)
    kept, lost, pack = (one, two, P1) if confirm_first else (two, one, P2)
    await journal.abandon_intent(lost)
    await journal.confirm_intent_packs(kept, {pack: at(100)})
    await journal.commit_chunks([(ino, 0, C1, BLOCK)])
    entry = await journal.chunk_at(ino, 0)
    assert entry is not None
    assert entry.ref.pack == pack


async def test_a_chunk_of_an_open_upload_is_answered_by_the_confirmed_one(journal, ino):
    await upload(journal, P1, C1)
    await intend(journal, P2, C1)
    await journal.commit_chunks([(ino, 0, C1, BLOCK)])
    entry = await journal.chunk_at(ino, 0)
    assert entry is not None
    assert entry.ref.pack == P1


async def test_abandoning_keeps_what_was_confirmed(journal):
    intent = await intend(journal, P1, C1)
    await journal.confirm_intent_packs(intent, {P1: at(100)})
    await journal.abandon_intent(intent)
    assert await journal.find_chunk(C1) is not None
    other = await intend(journal, P2, C2)
    await journal.abandon_intent(other)
    assert await journal.open_intents() == []
    assert await journal.find_chunk(C2) is None
    assert journal._db.all("SELECT count(*) FROM packs") == [(1,)]


async def test_truncating_cuts_the_edge_and_drops_what_is_beyond(journal, ino):
    await upload(journal, P1, C1)
    await journal.commit_chunks([(ino, n, C1, BLOCK) for n in range(4)])
    await journal.put_dirty(ino, [(n, n + 1, 0b101) for n in range(4)])
    await journal.truncate(ino, BLOCK + 1, BLOCK, 70)
    after = await journal.getattr(ino)
    assert (after.size, after.mtime_ns, after.ctime_ns) == (BLOCK + 1, 70, 70)
    await journal.truncate(ino, 9 * BLOCK, BLOCK, 71)  # the old bytes don't come back
    assert await stored(journal, ino) == BLOCK + 1
    assert [index for _, index, _, _ in await journal.all_dirty()] == [0, 1]
    await journal.truncate(ino, 0, BLOCK, 72)
    assert await stored(journal, ino) == 0
    assert await journal.all_dirty() == []
    assert await journal.usage() == (2, 0)


async def test_truncation_is_one_operation_at_the_groups_edge(journal, ino, monkeypatch):
    monkeypatch.setattr("stashcordfs.journal.sqlite.database.GROUP_OPERATIONS", 64)
    await upload(journal, P1, C1)
    await journal.commit_chunks([(ino, n, C1, BLOCK) for n in range(4)])
    commits = set()
    for _ in range(130):
        await journal.truncate(ino, 0, BLOCK, 70)
        commits.add(journal._db._operations)
    assert commits == set(range(64))  # each counts once, and none is split by a commit


async def test_a_long_chunk_list_is_purged_in_batches(journal, ino, monkeypatch):
    monkeypatch.setattr("stashcordfs.journal.journal._BATCH", 3)
    await upload(journal, P1, C1)
    await journal.commit_chunks([(ino, n, C1, 1) for n in range(10)])
    await journal.set_local_generation(ino, 2)
    assert await journal.local_generations() == [(ino, 2)]
    await journal.unlink(ROOT_INO, b"f", now_ns=1)
    await journal.purge(await journal.getattr(ino))
    assert await stored(journal, ino) == 0
    assert await journal.local_generations() == []
    assert await journal.usage() == (1, 0)


async def test_dirty_rows_go_only_at_their_version(journal, ino):
    await journal.put_dirty(ino, [(0, 5, 1 << 200), (1, 6, 3)])
    await journal.drop_dirty(ino, [(0, 4), (1, 6)])
    assert await journal.all_dirty() == [(ino, 0, 5, 1 << 200)]


async def test_cached_blocks(journal):
    keys = [7 << 32 | n for n in range(4)]
    for key in (*keys, keys[0]):
        await journal.cached_add(key, 5, b"sums")
    assert await journal.cached_sums(keys[0]) == (5, b"sums")
    await journal.cached_remove([keys[1]])
    assert await journal.cached_sums(keys[1]) is None
    left = [(key, 5) for key in (keys[0], keys[2], keys[3])]
    assert await journal.cached_page(-1, 10) == left
    assert await journal.cached_page(keys[0], 1) == left[1:2]
    assert await journal.cached_page(keys[3], 10) == []
    assert await journal.cached_beyond(Ino(7), 1) == [keys[2], keys[3]]


async def test_versions_are_never_given_twice(journal):
    first = await journal.reserve_versions(10)
    second = await journal.reserve_versions(10)
    assert first >= 1
    assert second >= first + 10


async def test_local_facts(journal):
    assert await journal.get_local("boot") is None
    await journal.set_local("boot", "x")
    assert await journal.get_local("boot") == "x"
