"""Garbage over the folder store: what is condemned, repacked and deleted, and what never is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from stashcordfs.crypto.keys import KIND_PACK, object_filename, object_id_of
from stashcordfs.daemon.assembly import Telling
from stashcordfs.errors import FsError, StashcordError
from stashcordfs.recovery.verify import Verifier
from stashcordfs.store.fetching import fetch_table
from stashcordfs.types import ROOT_INO
from stashcordfs.vfs.garbage_plan import CollectSettings
from stashcordfs.vfs.orphans import SPARED

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, KEYS, FaultyStore, inline, volume

GENESIS = bytes(range(32))
DAY_S = 86_400.0
EAGER = CollectSettings(history_s=7 * DAY_S, least_bytes=1, slack=0.1, patience_s=60.0)


@pytest.fixture
def clock(monkeypatch) -> trio.testing.MockClock:
    """No thread works while time stands still: days pass when nothing else can happen."""
    monkeypatch.setattr("trio.to_thread.run_sync", inline)
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
def channel(tmp_path):
    return FaultyStore(tmp_path / "channel")


def told(channel, garbage=EAGER, **more) -> Telling:
    return Telling(store=channel, genesis=GENESIS, garbage=garbage, **more)


async def packs(v) -> list:
    """What packs the store holds, by message."""
    return [
        at
        for at in await v.store.listed(0)
        if (oid := object_id_of(at.filename)) and KEYS.read_object_id(oid)[0] == KIND_PACK
    ]


async def make(v, *names) -> dict[bytes, bytes]:
    """Files of a block each, in one message."""
    made = {name: os.urandom(BLOCK) for name in names}
    for name, data in made.items():
        await v.make(name, data)
    await v.fs.sync_remote()
    return made


async def read(v, name) -> bytes:
    return await v.read((await v.fs.lookup(ROOT_INO, name)).ino)


async def forget_cache(v) -> None:
    while await v.blocks.evict(1 << 30):
        pass


async def days_later(v, days: float) -> None:
    await v.collector.collect(thorough=True)  # history's time begins
    await trio.sleep(days * DAY_S)


async def test_a_dead_message_is_condemned_told_and_after_a_grace_deleted(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await make(v, b"a", b"b")
        await v.fs.unlink(ROOT_INO, b"a")
        await v.fs.unlink(ROOT_INO, b"b")
        await days_later(v, 6)
        assert (await v.collector.collect(thorough=True)).newly_condemned == 0
        await trio.sleep(1.1 * DAY_S)
        found = await v.collector.collect(thorough=True)
        assert (found.newly_condemned, found.deleted_messages) == (1, 0)
        assert len(await packs(v)) == 1
        assert v.publisher.posted_change >= v.journal.last_change
        await trio.sleep(EAGER.grace_s)
        found = await v.collector.collect(thorough=True)
        assert (found.deleted_messages, found.condemned_messages) == (1, 0)
        assert await packs(v) == []
        assert v.reports == []


async def test_what_is_sparse_is_packed_anew_and_reads_back(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        made = await make(v, *(b"%d" % n for n in range(6)))
        for n in range(1, 5):
            await v.fs.unlink(ROOT_INO, b"%d" % n)
        await days_later(v, 7.1)
        found = await v.collector.collect(thorough=True)
        assert (found.repacked_messages, found.newly_condemned) == (1, 1)
        await trio.sleep(EAGER.grace_s)
        await v.collector.collect(thorough=True)
        (pack,) = await packs(v)
        assert pack.size_bytes < 3 * BLOCK
        await forget_cache(v)
        assert await read(v, b"0") == made[b"0"]
        assert await read(v, b"5") == made[b"5"]


async def test_a_repacked_table_keeps_the_sequences_and_the_names(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await make(v, *(b"%d" % n for n in range(4)))
        (old,) = await packs(v)
        before, _ = await fetch_table(v.store, KEYS, object_id_of(old.filename), old)
        for n in range(3):
            await v.fs.unlink(ROOT_INO, b"%d" % n)
        ino = (await v.fs.lookup(ROOT_INO, b"3")).ino
        await days_later(v, 7.1)
        await v.collector.collect(thorough=True)
        new = (await packs(v))[-1]
        after, _ = await fetch_table(v.store, KEYS, object_id_of(new.filename), new)
        assert list(after.references) == [r for r in before.references if r.ino == ino]
        assert [note.name for note in after.files if note.ino == ino] == [b"3"]


async def test_history_moves_along_and_keeps_its_time(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await make(v, *(b"%d" % n for n in range(8)))
        for n in range(6):
            await v.fs.unlink(ROOT_INO, b"%d" % n)
        await days_later(v, 4)
        await v.fs.unlink(ROOT_INO, b"6")
        await days_later(v, 3.1)
        assert (await v.collector.collect(thorough=True)).repacked_messages == 1
        found = await v.collector.collect(thorough=True)
        assert found.history_bytes == pytest.approx(BLOCK, rel=0.01)
        assert found.live_bytes == pytest.approx(BLOCK, rel=0.01)
        await trio.sleep(4 * DAY_S)
        assert (await v.collector.collect(thorough=True)).history_bytes == 0


async def test_a_chunk_chosen_by_deduplication_stays(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        made = await make(v, b"a")
        await v.fs.unlink(ROOT_INO, b"a")
        await days_later(v, 7.1)
        await v.make(b"again", made[b"a"])
        await v.fs.sync_remote()
        found = await v.collector.collect(thorough=True)
        assert found.newly_condemned == 0
        await forget_cache(v)
        assert await read(v, b"again") == made[b"a"]


async def test_a_condemned_chunk_is_sent_anew(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        made = await make(v, b"a")
        await v.fs.unlink(ROOT_INO, b"a")
        await days_later(v, 7.1)
        assert (await v.collector.collect(thorough=True)).newly_condemned == 1
        await v.make(b"again", made[b"a"])
        await v.fs.sync_remote()
        await trio.sleep(EAGER.grace_s)
        await v.collector.collect(thorough=True)
        await forget_cache(v)
        assert await read(v, b"again") == made[b"a"]
        assert len(await packs(v)) == 1


async def test_what_an_upload_has_just_chosen_is_not_condemned(
    clock, tmp_path, channel, monkeypatch
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        made = await make(v, b"a")
        await v.fs.unlink(ROOT_INO, b"a")
        await days_later(v, 7.1)
        stopped, go_on = trio.Event(), trio.Event()
        commit = v.uploader._commit

        async def late(*args):
            stopped.set()
            await go_on.wait()
            await commit(*args)

        monkeypatch.setattr(v.uploader, "_commit", late)
        await v.make(b"again", made[b"a"])
        v.uploader.wake()
        await stopped.wait()
        assert (await v.collector.collect(thorough=True)).newly_condemned == 0
        go_on.set()
        await v.fs.sync_remote()
        await forget_cache(v)
        assert await read(v, b"again") == made[b"a"]


async def test_a_block_that_refers_to_it_during_the_repacking_moves_too(
    clock, tmp_path, channel, monkeypatch
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        made = await make(v, *(b"%d" % n for n in range(4)))
        for n in range(1, 4):
            await v.fs.unlink(ROOT_INO, b"%d" % n)
        await days_later(v, 7.1)
        empty = v.collector._repacker.empty

        async def meanwhile(contents):
            done = await empty(contents)
            with v.journal._db.operation:  # as an upload that found the old row would
                ino = (await v.fs.lookup(ROOT_INO, b"twin")).ino
                old = next(iter(done.moved))
                v.journal._db.run("INSERT INTO chunk_list VALUES (?,0,?,?)", (ino, old, BLOCK))
                v.journal._note_reference(ino, 0)
            return done

        await v.make(b"twin")
        await v.fs.sync_remote()
        monkeypatch.setattr(v.collector._repacker, "empty", meanwhile)
        assert (await v.collector.collect(thorough=True)).newly_condemned == 1
        twin = (await v.fs.lookup(ROOT_INO, b"twin")).ino
        entry = await v.journal.chunk_at(twin, 0)
        assert not entry.damaged
        assert entry.location.message > 1
        assert await read(v, b"0") == made[b"0"]


async def test_nothing_is_deleted_before_a_segment_told_of_it(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await make(v, b"a")
        await v.fs.unlink(ROOT_INO, b"a")
        await days_later(v, 7.1)
        channel.offline = True
        with trio.move_on_after(2 * EAGER.grace_s):
            await v.collector.collect(thorough=True)
        assert len(await v.journal.condemned()) == 1
        assert len(await packs(v)) == 1
        channel.offline = False
        v.publisher.retry_now()
        await v.collector.collect(thorough=True)
        assert await packs(v) == []


async def test_a_killed_collector_goes_on(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await make(v, b"a")
        await v.fs.unlink(ROOT_INO, b"a")
        await days_later(v, 7.1)
        await v.collector.collect(thorough=True)
        await trio.sleep(EAGER.grace_s)
        for where in await v.journal.condemned():  # deleted, and then the process was killed
            await v.store.delete([where[:2]])
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        found = await v.collector.collect(thorough=True)
        assert (found.deleted_messages, found.condemned_messages) == (1, 0)


async def test_what_was_packed_anew_before_a_kill_is_not_sent_twice(
    clock, tmp_path, channel, monkeypatch
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        made = await make(v, *(b"%d" % n for n in range(4)))
        for n in range(1, 4):
            await v.fs.unlink(ROOT_INO, b"%d" % n)
        await days_later(v, 7.1)

        async def killed(*_):
            raise StashcordError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(v.collector._repacker, "_move", killed)
            with pytest.raises(StashcordError, match="killed"):
                await v.collector.collect(thorough=True)
        puts = v.store.puts
        found = await v.collector.collect(thorough=True)
        assert (found.newly_condemned, found.repacked_bytes) == (1, 0)
        assert v.store.puts == puts
        await forget_cache(v)
        assert await read(v, b"0") == made[b"0"]


async def test_a_taken_over_volume_is_left_alone(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await make(v, b"a")
        await v.fs.unlink(ROOT_INO, b"a")
        await days_later(v, 7.1)
        await v.collector.collect(thorough=True)
        await trio.sleep(EAGER.grace_s + 600)
        await v.fence._shut("another machine has it")
        with pytest.raises(FsError):
            await v.collector.collect(thorough=True)
        assert len(await packs(v)) == 1


async def test_the_background_collects_by_itself_and_then_rests(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        v.nursery.start_soon(v.collector.run)
        await make(v, b"a", b"kept")
        await v.fs.unlink(ROOT_INO, b"a")
        await trio.sleep(9 * DAY_S)
        assert v.collector.total.deleted_messages == 1
        (pack,) = await packs(v)
        assert pack.size_bytes < 2 * BLOCK
        puts, lists = channel.puts + v.store.puts, channel.lists
        await trio.sleep(5 * DAY_S)
        assert channel.puts + v.store.puts == puts
        assert channel.lists - lists <= 6  # the daily look


async def test_offline_nothing_is_tried(clock, tmp_path, channel, monkeypatch) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        monkeypatch.setattr(v.collector, "_offline", lambda: True)
        v.nursery.start_soon(v.collector.run)
        await make(v, b"a")
        await v.fs.unlink(ROOT_INO, b"a")
        await trio.sleep(DAY_S / 4)
        assert v.collector.total.messages == 0


async def _unlinked(v, name):
    await v.fs.unlink(ROOT_INO, name)


async def _renamed_over(v, name):
    await v.make(b"new")
    await v.fs.rename(ROOT_INO, b"new", ROOT_INO, name, noreplace=False, exchange=False)


async def _emptied(v, name):
    await v.fs.setattr((await v.fs.lookup(ROOT_INO, name)).ino, size=0)


async def _unlinked_twice(v, name):
    ino = (await v.fs.lookup(ROOT_INO, name)).ino
    await v.fs.link(ino, ROOT_INO, b"second")
    for each in (name, b"second"):
        await v.fs.unlink(ROOT_INO, each)


@pytest.mark.parametrize("removed", [_unlinked, _renamed_over, _emptied, _unlinked_twice])
async def test_what_was_out_of_the_trash_between_two_censuses_has_its_whole_time_again(
    clock, tmp_path, channel, removed
) -> None:
    async with volume(tmp_path / "a", telling=told(channel), history_s=9 * DAY_S) as v:
        await make(v, b"a")
        await v.fs.unlink(ROOT_INO, b"a")
        await days_later(v, 6)
        await v.trash.restore("/a")
        await removed(v, b"a")
        assert await v.trash.empty() == 1
        await days_later(v, 6.9)  # of the first time it would be the 13th day
        assert (await v.collector.collect(thorough=True)).newly_condemned == 0
        await trio.sleep(0.2 * DAY_S)
        assert (await v.collector.collect(thorough=True)).newly_condemned == 1


async def test_what_comes_out_of_the_trash_during_a_census_is_not_noted_as_unused(
    clock, tmp_path, channel, monkeypatch
) -> None:
    async with volume(tmp_path / "a", telling=told(channel), history_s=9 * DAY_S) as v:
        await make(v, b"a")
        await v.fs.unlink(ROOT_INO, b"a")

        async def then_restored(work, *args):
            found = await inline(work, *args)
            if v.trash.usage[0]:
                await v.trash.restore("/a")
            return found

        monkeypatch.setattr("trio.to_thread.run_sync", then_restored)
        async with v.collector.looking() as (census, _):
            assert len(census.fresh) == 1
        assert v.journal._db.all("SELECT * FROM unused") == []


async def test_what_cannot_be_read_is_left_alone_and_hinders_nothing_else(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await make(v, *(b"%d" % n for n in range(4)))
        await make(v, b"dead")
        for n in range(1, 4):
            await v.fs.unlink(ROOT_INO, b"%d" % n)
        await v.fs.unlink(ROOT_INO, b"dead")
        await days_later(v, 7.1)
        v.store.missing = True
        found = await v.collector.collect(thorough=True)
        assert (found.newly_condemned, found.repacked_messages) == (1, 0)
        fetched = v.store.fetched
        await v.collector.collect(thorough=True)  # not again and again
        assert v.store.fetched == fetched
        assert len(await packs(v)) == 2


async def test_a_verify_meanwhile_takes_nothing_collected_for_lost(
    clock, tmp_path, channel, monkeypatch
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await make(v, b"a")
        await v.fs.unlink(ROOT_INO, b"a")
        await days_later(v, 7.1)
        verifier = Verifier(
            journal=v.journal, blocks=v.blocks, store=v.store, keys=KEYS,
            state_path=tmp_path / "verify.json", report=v.reports.append,
        )  # fmt: skip
        held = verifier._held

        async def then_collected():
            packs_held = await held()
            await v.collector.collect(thorough=True)
            await trio.sleep(EAGER.grace_s)
            await v.collector.collect(thorough=True)
            return packs_held

        monkeypatch.setattr(verifier, "_held", then_collected)
        assert (await verifier.run()).clean
        assert v.reports == []


async def test_expelled_chunks_are_gone_at_once_and_the_rest_stays(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        made = await make(v, b"secret", b"kept")
        ino = (await v.fs.lookup(ROOT_INO, b"secret")).ino
        entry = await v.journal.chunk_at(ino, 0)
        rows = [row for row, _ in await v.journal.copies_of(entry.ref.chunk_id)]
        with pytest.raises(StashcordError, match="still refer"):
            await v.collector.expel(rows)
        await v.fs.unlink(ROOT_INO, b"secret")
        condemned = await v.collector.expel(rows)
        await v.collector.delete(condemned)
        (pack,) = await packs(v)
        assert pack.size_bytes < 2 * BLOCK
        assert await v.journal.copies_of(entry.ref.chunk_id) == []
        await forget_cache(v)
        assert await read(v, b"kept") == made[b"kept"]


async def test_orphans_go_after_a_grace_and_others_messages_never(clock, tmp_path, channel) -> None:
    soon = CollectSettings(history_s=0, least_bytes=1 << 40)
    async with volume(tmp_path / "a", telling=told(channel, soon)) as v:
        await make(v, b"a")
        v.journal._db.run("SAVEPOINT x")  # a pack that the journal does not know any more
        (known,) = await packs(v)
        v.journal._db.run("RELEASE x")
        orphan = await v.store._post([(object_filename(KEYS.new_object_id(1, 5)), [b"x"])], "n1")
        segment = await v.store._post([(object_filename(KEYS.new_object_id(2, 5)), [b"x"])], "n2")
        theirs = await v.store._post([("holiday.jpg", [b"x"])], "n3")
        mixed = await v.store._post(
            [(object_filename(KEYS.new_object_id(1, 6)), [b"x"]), ("note.txt", [b"x"])], "n4"
        )
        double = await v.store._post([(known.filename, [b"x"])], "n5")
        await v.journal.set_local(SPARED, "1")  # it has lost rows: who knows what these are
        found = await v.collector.collect(thorough=True)
        assert (found.orphans, found.orphans_deleted) == (2, 0)
        await v.journal.set_local(SPARED, "")
        found = await v.collector.collect(thorough=True)
        assert (found.orphans, found.orphans_deleted) == (2, 2)
        left = {at.message for at in await v.store.listed(0)}
        assert left == {known.message, segment[0].message, theirs[0].message, mixed[0].message}
        assert orphan[0].message not in left
        assert double[0].message not in left
