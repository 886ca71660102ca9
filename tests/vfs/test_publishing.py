"""Segments over the folder store: when they come, what is in them; none is lost, none twice."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from stashcordfs.crypto.keys import KIND_CLAIM, KIND_SEGMENT, object_id_of
from stashcordfs.daemon.assembly import Telling
from stashcordfs.errors import DiscordUnavailable, OutcomeUnknown
from stashcordfs.store.sealed import open_object
from stashcordfs.store.segment import decode_claim, decode_segment
from stashcordfs.types import ROOT_INO
from stashcordfs.vfs.publishing import PublishSettings
from stashcordfs.vfs.uploading import UploadSettings

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, KEYS, volume

GENESIS = bytes(range(32))


def told(**changes) -> Telling:
    return Telling(store=None, genesis=GENESIS, **changes)  # type: ignore[arg-type]


async def objects(store, kind=KIND_SEGMENT):
    """The sealed objects of a kind with the message that has them, in the channel's order."""
    found = []
    for at in await type(store).__mro__[1].listed(store, 0):
        object_id = object_id_of(at.filename)
        if object_id is not None and KEYS.read_object_id(object_id)[0] == kind:
            data = await type(store).__mro__[1].fetch(store, at, 0, at.size_bytes)
            found.append((at.message, object_id, data))
    return found


async def segments(store):
    """The segments as each message carries them: the first attachment is its own."""
    found = await objects(store)
    bodies = [(m, decode_segment(open_object(KEYS, KIND_SEGMENT, o, d))) for m, o, d in found]
    return [next(group)[1] for _, group in itertools.groupby(bodies, key=lambda item: item[0])]


async def test_a_change_is_told_after_the_bound_and_only_once(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        await trio.sleep(100)
        before = v.publisher.segment
        await v.make(b"a")
        await trio.sleep(29)
        assert v.publisher.segment == before
        assert 28 < v.publisher.behind_s < 30
        await trio.sleep(2)
        assert v.publisher.segment == before + 1
        assert v.publisher.behind_s == 0
        await trio.sleep(1000)
        assert v.publisher.segment == before + 1


async def test_segments_are_numbered_chained_and_carry_the_one_before(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        for name in (b"a", b"b", b"c"):
            await v.make(name)
            await trio.sleep(60)
        own = await segments(v.store)
        found = await objects(v.store)
        digests = [o.digest for o in await v.journal.own_objects(KIND_SEGMENT)]
        assert [s.number for s in own] == [1, 2, 3]
        assert [s.previous for s in own] == [GENESIS, *digests[:2]]
        messages = sorted({message for message, _, _ in found})
        carried = [[d for m, _, d in found if m == message] for message in messages]
        assert [len(c) for c in carried] == [1, 2, 2]
        assert carried[2][1] == carried[1][0]
        ids = [c.id for s in own for c in s.changes]
        assert ids == list(range(1, len(ids) + 1))


async def test_what_is_only_here_at_the_cut_is_named(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told(), upload=False) as v:
        ino = await v.make(b"a", os.urandom(3 * BLOCK))
        await trio.sleep(60)
        own = await segments(v.store)
        assert own[-1].dirty == [(ino, 0), (ino, 1), (ino, 2)]
        assert own[-1].complete
    async with volume(tmp_path, telling=told()) as v:
        await v.fs.sync_remote()
        assert (await segments(v.store))[-1].dirty == []


async def test_sync_returns_when_a_segment_tells_of_it(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        await v.make(b"a", os.urandom(BLOCK))
        await v.fs.sync_remote()
        assert v.publisher.posted_change == v.journal.last_change
        assert v.publisher.behind_s == 0
        lists, puts = v.store.lists, v.store.puts
        await v.fs.sync_remote()
        assert (v.store.lists, v.store.puts) == (lists, puts)


async def test_an_idle_volume_looks_once_a_day_and_sends_nothing(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        await v.make(b"a")
        await trio.sleep(100)
        lists, puts = v.store.lists, v.store.puts
        await trio.sleep(10 * 86_400)
        assert v.store.puts == puts
        assert v.store.lists - lists in (9, 10)


async def test_a_log_that_grows_for_ever_is_told_every_five_minutes(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        fh, made = await v.fs.create(ROOT_INO, b"log", 0o644, 2, 0, 0)
        await trio.sleep(100)
        begun = v.publisher.segment
        for n in range(80):
            await v.fs.write(fh, n * 10, b"0123456789")
            await v.fs.setattr(made.ino, mtime_ns=n)
            await trio.sleep(15)
        await v.fs.release(fh)
        assert 3 <= v.publisher.segment - begun <= 5


async def test_new_blocks_of_a_growing_file_are_told_within_the_bound(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        fh, _ = await v.fs.create(ROOT_INO, b"film", 0o644, 2, 0, 0)
        worst = 0.0
        for n in range(70):
            await v.fs.write(fh, n * BLOCK, os.urandom(BLOCK))
            await trio.sleep(9)
            worst = max(worst, v.publisher.behind_s)
        await v.fs.release(fh)
        assert worst < 40


async def test_contents_age_counts_from_when_they_were_written(clock, tmp_path) -> None:
    slow = UploadSettings(delay_s=20)
    async with volume(tmp_path, telling=told(), settings=slow) as v:
        await trio.sleep(100)
        await v.make(b"name")  # due first, and the content below misses its segment
        await trio.sleep(25)
        begun = trio.current_time()
        await v.make(b"late", b"content")
        worst = 0.0
        for _ in range(50):
            await trio.sleep(1)
            told_s = v.publisher.behind_s
            unsent_s = v.uploader.oldest_dirty_s()
            if v.journal.last_change > v.publisher.posted_change:
                assert max(told_s, unsent_s) >= trio.current_time() - begun - 1
            worst = max(worst, told_s)
        assert worst < 33
        assert v.publisher.behind_s == 0


async def test_while_data_crowds_the_segments_keep_to_their_share(clock, tmp_path) -> None:
    made = [0]

    async with volume(tmp_path, telling=told(requests=lambda: made[0]), upload=False) as v:
        v.publisher._backlog = lambda: 100.0
        lists, puts = v.store.lists, v.store.puts
        for n in range(200):
            await v.make(b"%d" % n)
            made[0] += 5
            await trio.sleep(5)
        spent = v.store.lists - lists + v.store.puts - puts
        assert spent <= 0.05 * (1000 + spent) + 2
        assert v.publisher.segment >= 20


async def test_the_last_message_of_many_is_told_along_with_the_others(clock, tmp_path) -> None:
    """Else the segment that waited for the crowd goes just before it, and another one after it."""
    made = [0]
    async with volume(tmp_path, telling=told(requests=lambda: made[0])) as v:
        await trio.sleep(100)
        before = v.publisher.segment
        put = v.store.put

        async def slow(packs, *, nonce):
            made[0] += 1
            await trio.sleep(20)
            return await put(packs, nonce=nonce)

        v.store.put = slow
        await v.make(b"large", os.urandom(60 << 20))
        await v.fs.sync_remote()
        assert v.publisher.segment == before + 1


@pytest.mark.parametrize(("left", "posted"), [(0, True), (4, False), (40, True)])
async def test_when_all_is_soon_sent_one_segment_tells_all(clock, tmp_path, left, posted) -> None:
    made = [0]
    async with volume(tmp_path, telling=told(requests=lambda: made[0]), upload=False) as v:
        await trio.sleep(100)
        v.publisher._backlog = lambda: float(left)
        await v.make(b"a")
        made[0] += 45
        await trio.sleep(35)
        assert (v.publisher.behind_s == 0) is posted
        await trio.sleep(70)
        assert v.publisher.behind_s == 0


async def test_a_crowd_that_moves_slowly_does_not_hold_segments_back_for_ever(
    clock, tmp_path
) -> None:
    async with volume(tmp_path, telling=told(), upload=False) as v:
        await trio.sleep(100)
        v.publisher._backlog = lambda: 100.0
        await v.make(b"a")
        await trio.sleep(90)
        assert v.publisher.behind_s > 80
        await trio.sleep(12)
        assert v.publisher.behind_s == 0


async def test_many_changes_become_several_segments_of_one_cut(clock, tmp_path) -> None:
    small = PublishSettings(segment_bytes=2000)
    async with volume(tmp_path, telling=told(settings=small), upload=False) as v:
        await trio.sleep(60)
        v.store.offline = True
        inos = []
        for n in range(60):
            inos.append(await v.make(b"%d" % n, b"x"))
            await trio.sleep(0.1)
        await trio.sleep(300)
        v.store.offline = False
        await trio.sleep(400)
        own = await segments(v.store)
        assert len(own) > 4
        flags = [s.complete for s in own]
        assert flags[-1]
        assert not all(flags)
        assert not any(s.dirty for s in own if not s.complete)
        assert own[-1].dirty == [(ino, 0) for ino in inos]


# ---------------------------------------------------------------------- trouble


class Lossy:
    """A store whose next puts lose their answer, before or after the message is made."""

    def __init__(self, store, *, times, stores):
        self.put, self.times, self.stores = store.put, times, stores
        self.nonces = []
        store.put = self

    async def __call__(self, packs, *, nonce):
        self.nonces.append(nonce)
        if self.times:
            self.times -= 1
            if self.stores:
                await self.put(packs, nonce=nonce)
            raise OutcomeUnknown("the answer was lost")
        return await self.put(packs, nonce=nonce)


@pytest.mark.parametrize("stores", [True, False])
async def test_a_lost_answer_makes_no_segment_twice(clock, tmp_path, stores) -> None:
    async with volume(tmp_path, telling=told()) as v:
        await trio.sleep(60)
        lossy = Lossy(v.store, times=1, stores=stores)
        before = v.publisher.segment
        await v.make(b"a")
        await trio.sleep(60)
        assert v.publisher.segment == before + 1
        assert len(lossy.nonces) == (1 if stores else 2)
        assert len(set(lossy.nonces)) == 1
        assert [s.number for s in await segments(v.store)] == list(range(1, before + 2))


async def test_without_a_network_changes_gather_and_go_when_it_is_back(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        await trio.sleep(60)
        v.store.offline = True
        await v.make(b"a")
        await trio.sleep(3600)
        assert v.publisher.behind_s > 3500
        assert "no network" in v.publisher.last_error
        v.store.offline = False
        v.publisher.retry_now()
        await trio.sleep(1)
        assert v.publisher.behind_s == 0
        assert v.publisher.last_error == ""


async def test_an_unmount_without_news_ends_without_a_network(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        await v.make(b"a")
        await v.fs.sync_remote()
    async with volume(tmp_path, telling=told()) as v:
        v.store.offline = True
        with trio.fail_after(600):
            await v.fs.sync_remote()
            await v.publisher.finish()


async def test_what_an_earlier_run_left_is_told_by_the_next(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        await trio.sleep(60)
        v.store.offline = True
        await v.make(b"a")
        await trio.sleep(200)  # cut, and not posted
        await v.make(b"b")  # not cut
    async with volume(tmp_path, telling=told()) as v:
        assert v.publisher.behind_s > 190
        await trio.sleep(60)
        assert v.publisher.behind_s == 0
        own = await segments(v.store)
        ids = [c.id for s in own for c in s.changes]
        assert ids == list(range(1, len(ids) + 1))


async def test_a_segment_that_arrived_before_the_process_died_is_not_sent_again(
    clock, tmp_path
) -> None:
    async with volume(tmp_path, telling=told()) as v:
        await trio.sleep(60)
        lossy = Lossy(v.store, times=1000, stores=True)
        await v.make(b"a")
        await trio.sleep(30.5)
        assert lossy.nonces
    async with volume(tmp_path, telling=told()) as v:
        await trio.sleep(60)
        assert v.publisher.behind_s == 0
        found = [s.number for s in await segments(v.store)]
        assert found == sorted(set(found))


async def test_an_fsyncs_wait_for_its_change_ends_with_its_segment(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        await trio.sleep(60)
        await v.make(b"a")
        v.journal.commit()
        begun = trio.current_time()
        await v.publisher.posted(v.journal.last_change)
        assert trio.current_time() - begun < 5
        assert v.publisher.posted_change == v.journal.last_change


# ---------------------------------------------------------------------- one writer


async def claims(store):
    found = await objects(store, KIND_CLAIM)
    return [decode_claim(open_object(KEYS, KIND_CLAIM, o, d)) for _, o, d in found]


async def test_a_mount_claims_the_volume_once(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told(host="laptop")) as v:
        await v.make(b"a")
        await trio.sleep(100)
        found = await claims(v.store)
        assert [(c.writer_epoch, c.head_number, c.host) for c in found] == [(1, 0, "laptop")]
        assert found[0].head_digest == GENESIS
        assert v.fence.claimed
    async with volume(tmp_path, telling=told()) as v:
        await trio.sleep(100)
        again = await claims(v.store)
        assert again[-1].head_number == v.publisher.segment
        assert again[-1].writer != again[0].writer
        assert v.fence.reason == ""


async def test_a_start_without_a_network_claims_when_it_is_there(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        v.store.offline = True
        await v.make(b"a")
        await trio.sleep(1000)
        assert not v.fence.claimed
        v.store.offline = False
        await trio.sleep(400)
        assert v.fence.claimed
        assert v.publisher.behind_s == 0


async def test_no_network_is_no_reason_to_refuse_writing(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        v.store.offline = True
        with pytest.raises(DiscordUnavailable):
            await v.fence.check()
        await v.make(b"a", b"data")


async def test_two_who_end_a_mount_at_once_both_get_their_answer(clock, tmp_path) -> None:
    async with volume(tmp_path, telling=told()) as v:
        await v.make(b"a")
        with trio.fail_after(600):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(v.publisher.finish)
                nursery.start_soon(v.publisher.finish)
