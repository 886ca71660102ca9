"""Uploads whose answer is lost: each message once, no orphan, nothing forgotten."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from stashcordfs.daemon.control import Control
from stashcordfs.daemon.mounted import Parts, Report
from stashcordfs.discord.client import ClientStats
from stashcordfs.errors import DiscordUnavailable, ObjectCorrupt, OutcomeUnknown, TokenRejected
from stashcordfs.recovery.verify import State
from stashcordfs.types import ROOT_INO
from stashcordfs.vfs import settling
from stashcordfs.vfs.uploading import UploadSettings

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, volume


def messages(store) -> list[str]:
    return sorted(p.name for p in store._folder.iterdir() if p.name.isdigit())


class Unclear:
    """Lets a store's puts fail as told: `stores` before the error, or not at all."""

    def __init__(self, store, *, times: int, stores: bool) -> None:
        self.store, self.times, self.stores = store, times, stores
        self.put = store.put
        self.nonces: list[str] = []
        self.packs: list = []
        self.tried = trio.Event()
        store.put = self

    async def __call__(self, packs, *, nonce):
        self.nonces.append(nonce)
        self.packs.append(packs)
        if self.times:
            self.times -= 1
            if self.stores:
                await self.put(packs, nonce=nonce)
            self.tried.set()
            raise OutcomeUnknown("the answer was lost")
        return await self.put(packs, nonce=nonce)


async def test_a_stored_message_is_found_by_listing_and_not_sent_again(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        lost = Unclear(v.store, times=1, stores=True)
        await v.make(b"a", os.urandom(BLOCK))
        await v.fs.sync_remote()

        assert len(lost.nonces) == 1
        assert len(messages(v.store)) == 1
        assert await v.journal.open_intents() == []


async def test_what_is_not_listed_is_sent_again_under_the_same_nonce(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        lost = Unclear(v.store, times=3, stores=False)
        await v.make(b"a", os.urandom(BLOCK))
        await v.fs.sync_remote()

        assert len(lost.nonces) == 4
        assert len(set(lost.nonces)) == 1
        assert len(messages(v.store)) == 1


async def test_a_message_that_listings_do_not_show_yet_is_not_doubled(
    clock, tmp_path, monkeypatch
) -> None:
    async with volume(tmp_path) as v:
        Unclear(v.store, times=1, stores=True)
        find = v.store.find
        monkeypatch.setattr(v.store, "find", lambda after, names: _nothing())  # a lag
        await v.make(b"a", os.urandom(BLOCK))
        await v.fs.sync_remote()

        assert len(messages(v.store)) == 1
        assert find is not v.store.find


async def _nothing():
    await trio.lowlevel.checkpoint()
    return {}


async def test_a_given_up_upload_that_appears_later_is_deleted(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        v.nursery.start_soon(v.settler.run_watch)
        lost = Unclear(v.store, times=1000, stores=False)
        data = os.urandom(BLOCK)
        ino = await v.make(b"a", data)
        await trio.sleep(400)
        assert await v.journal.watched()

        lost.times = 0
        await v.fs.sync_remote()
        assert lost.nonces[-1] != lost.nonces[0]
        await lost.put(lost.packs[0], nonce="late")  # the first message appears after all
        assert len(messages(v.store)) == 2
        await trio.sleep(7 * 3600)

        assert len(messages(v.store)) == 1
        assert await v.read(ino) == data
        await trio.sleep(2 * 86_400)
        assert await v.journal.watched() == []


async def test_a_message_that_is_made_twice_is_kept_once(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        v.nursery.start_soon(v.settler.run_watch)
        lost = Unclear(v.store, times=1, stores=False)
        data = os.urandom(BLOCK)
        ino = await v.make(b"a", data)
        await v.fs.sync_remote()
        kept = await message_of(v, b"a")
        await trio.sleep(500)
        await lost.put(lost.packs[0], nonce="as if forgotten")  # the first request, stuck so long
        assert len(messages(v.store)) == 2
        await trio.sleep(7 * 3600)

        assert messages(v.store) == [str(kept)]
        await v.blocks.evict(BLOCK)
        assert await v.read(ino) == data


async def test_the_store_may_know_that_a_success_is_doubtful(clock, tmp_path, monkeypatch) -> None:
    async with volume(tmp_path) as v:
        v.nursery.start_soon(v.settler.run_watch)
        monkeypatch.setattr(v.store, "doubtful", lambda nonce: True)
        await v.make(b"a", os.urandom(BLOCK))
        await v.fs.sync_remote()
        assert len(await v.journal.watched()) == 1
        await trio.sleep(2 * 86_400)

        assert len(messages(v.store)) == 1
        assert await v.journal.watched() == []


async def test_nothing_is_deleted_while_its_upload_is_being_settled(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        lost = Unclear(v.store, times=1, stores=True)
        find, v.store.find = v.store.find, unanswered
        await v.make(b"a", os.urandom(BLOCK))
        await lost.tried.wait()
        await trio.testing.wait_all_tasks_blocked()
        (pack,) = lost.packs[0]
        await v.journal.watch([pack.filename], 0)  # the narrowest moment: watched, not confirmed
        await v.settler._look_for_watched()
        assert len(messages(v.store)) == 1

        v.store.find = find
        await v.fs.sync_remote()
        await v.settler._look_for_watched()
        assert len(messages(v.store)) == len(lost.nonces) == 1


async def test_watching_looks_through_old_messages_once(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        v.nursery.start_soon(v.settler.run_watch)
        asked: list[tuple[float, int]] = []
        find_all = v.store.find_all

        async def counted(after, names):
            asked.append((trio.current_time(), after))
            return await find_all(after, names)

        v.store.find_all = counted
        Unclear(v.store, times=1, stores=True)
        for number in range(50):
            await v.make(b"%d" % number, os.urandom(BLOCK))
            await v.fs.sync_remote()
            await trio.sleep(60)
        await trio.sleep(86_400)

        assert len(asked) < 20
        assert asked[-1][1] == 50


async def test_no_network_is_not_taken_for_absence(clock, tmp_path, monkeypatch) -> None:
    async with volume(tmp_path) as v:
        lost = Unclear(v.store, times=1, stores=True)
        find, offline = v.store.find, True

        async def unanswered(after, names):
            if offline:
                raise DiscordUnavailable("no network")
            return await find(after, names)

        monkeypatch.setattr(v.store, "find", unanswered)
        await v.make(b"a", os.urandom(BLOCK))
        await trio.sleep(120)
        assert await v.journal.open_intents()

        offline = False
        await v.fs.sync_remote()
        assert len(messages(v.store)) == len(lost.nonces) == 1


async def test_the_next_start_adopts_what_an_earlier_run_had_sent(clock, tmp_path) -> None:
    data = os.urandom(BLOCK)
    async with volume(tmp_path) as v:
        lost = Unclear(v.store, times=1, stores=True)
        ino = await v.make(b"a", data)
        await lost.tried.wait()
    async with volume(tmp_path) as v:
        await v.fs.sync_remote()

        assert len(messages(v.store)) == 1
        assert await v.journal.open_intents() == []
        assert await v.read(ino) == data


async def left_by_an_earlier_run(tmp_path, *, arrived: str, lost: str) -> None:
    """One upload a name, its outcome not known: `arrived` is on the server, `lost` is not."""
    async with volume(tmp_path) as v:
        v.store.find = unanswered
        for name in arrived + lost:
            unclear = Unclear(v.store, times=1, stores=name in arrived)
            await v.make(name.encode(), os.urandom(BLOCK))
            await unclear.tried.wait()
            v.store.put = unclear.put
            v.uploader._end_pause()
        assert len(await v.journal.open_intents()) >= len(arrived + lost)


async def message_of(v, name: bytes) -> int:
    entry = await v.journal.chunk_at((await v.fs.lookup(ROOT_INO, name)).ino, 0)
    assert entry is not None
    return entry.location.message


async def unanswered(after, names):
    await trio.lowlevel.checkpoint()
    raise DiscordUnavailable("a bad day")


class Listings:
    """Counts a store's listings, and when they were asked for."""

    def __init__(self, store) -> None:
        self.find = store.find
        self.at: list[float] = []
        store.find = self

    async def __call__(self, after, names):
        self.at.append(trio.current_time())
        return await self.find(after, names)


async def test_what_is_left_is_settled_together_by_shared_listings(clock, tmp_path) -> None:
    await left_by_an_earlier_run(tmp_path, arrived="ab", lost="cd")
    async with volume(tmp_path) as v:
        listings, begun = Listings(v.store), trio.current_time()
        await v.fs.sync_remote()

        assert len(listings.at) == 4  # soon, then three that are 20 s apart; one set for all
        assert trio.current_time() - begun < 70
        assert [await message_of(v, name) for name in (b"a", b"b")] == [1, 2]  # adopted
        assert {await message_of(v, name) for name in (b"c", b"d")} == set(
            range(3, 1 + len(messages(v.store)))
        )
        assert await v.journal.open_intents() == []
        assert len(await v.journal.watched()) == 4  # any may still be carried out again


async def test_others_do_not_wait_for_what_is_unsettled(clock, tmp_path) -> None:
    await left_by_an_earlier_run(tmp_path, arrived="", lost="cd")
    await left_by_an_earlier_run(tmp_path, arrived="", lost="efg")
    async with volume(tmp_path) as v:
        begun = trio.current_time()
        ino = await v.make(b"new", os.urandom(BLOCK))
        await v.fs.sync_remote(ino)

        assert trio.current_time() - begun < 2
        assert v.settler.unsettled == 5
        assert len(messages(v.store)) == 1  # what is unsettled was not sent again


async def test_what_was_changed_since_does_not_wait_either(clock, tmp_path) -> None:
    await left_by_an_earlier_run(tmp_path, arrived="a", lost="")
    async with volume(tmp_path) as v:
        v.store.find = unanswered
        ino = (await v.fs.lookup(ROOT_INO, b"a")).ino
        fh = await v.fs.open(ino, os.O_RDWR)
        await v.write(fh, 0, b"changed")
        await v.fs.release(fh)
        await v.fs.sync_remote(ino)

        assert v.settler.unsettled == 1
        assert len(messages(v.store)) == 2


async def test_an_upload_goes_on_while_another_is_settled(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        lost = Unclear(v.store, times=1, stores=False)
        v.store.find = unanswered
        await v.make(b"a", os.urandom(BLOCK))
        await lost.tried.wait()
        for name in (b"b", b"c", b"d"):  # more than are sent at once
            await v.fs.sync_remote(await v.make(name, os.urandom(BLOCK)))

        assert v.settler.unsettled == 1
        assert v.settler.unsettled_since_ns == 1e9 * (1 + 5)  # due after 5 s; the harness adds 1
        assert v.settler.oldest_unsettled_s() == pytest.approx(trio.current_time() - 5)
        assert len(messages(v.store)) == 3


async def test_status_and_metrics_tell_what_is_unsettled_and_since_when(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        parts = Parts(
            name="v", mountpoint=tmp_path, settings=None, blocks=v.blocks, uploader=v.uploader,
            settler=v.settler, durability=v.durability, levels=None, filesystem=v.fs, trash=v.trash,
            stats=ClientStats(), client=SimpleNamespace(gate=SimpleNamespace(rejected=False)),
            token=None, token_watch=SimpleNamespace(status=dict),
            sleep=SimpleNamespace(suspends=0), report=Report(), nursery=v.nursery,
            verifier=SimpleNamespace(state=State()),
        )  # fmt: skip
        assert parts.status()["unsettled"] == 0
        assert parts.status()["unsettled_since"] == ""

        lost = Unclear(v.store, times=1, stores=False)
        v.store.find = unanswered
        await v.make(b"a", os.urandom(BLOCK))
        await lost.tried.wait()
        await trio.sleep(90)

        assert parts.status()["unsettled"] == 1
        assert parts.status()["unsettled_since"] == "1970-01-01T00:00:06+00:00"
        told = Control(parts, None, None, parts.metrics)._render()
        assert b"stashcordfs_unsettled_uploads 1.0" in told
        assert b"stashcordfs_oldest_unsettled_seconds 90.0" in told


async def test_not_everything_is_let_become_unclear(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        lost = Unclear(v.store, times=1000, stores=False)
        v.store.find = unanswered
        for number in range(12):
            await v.make(b"%d" % number, os.urandom(BLOCK))
            await trio.sleep(60)

        assert v.settler.unsettled == len(set(lost.nonces)) == 4


async def test_the_uploader_sleeps_while_everything_waits(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        Unclear(v.store, times=1, stores=False)
        v.store.find = unanswered
        await v.make(b"a", os.urandom(BLOCK))
        await trio.sleep(60)
        looks = 0
        due_in = v.uploader._due_in

        def counted():
            nonlocal looks
            looks += 1
            return due_in()

        v.uploader._due_in = counted
        await trio.sleep(600)
        assert looks == 0

        await v.fs.sync_remote(await v.make(b"b", os.urandom(BLOCK)))
        assert len(messages(v.store)) == 1


async def test_what_is_adopted_is_not_sent_again_without_deduplication(clock, tmp_path) -> None:
    await left_by_an_earlier_run(tmp_path, arrived="a", lost="")
    async with volume(tmp_path, settings=UploadSettings(dedup=False)) as v:
        await v.fs.sync_remote()

        assert len(messages(v.store)) == 1


async def test_without_a_network_nothing_is_asked_but_one_ping_a_minute(clock, tmp_path) -> None:
    await left_by_an_earlier_run(tmp_path, arrived="a", lost="")
    async with volume(tmp_path) as v:
        find = v.store.find

        async def offline(after, names):
            await trio.lowlevel.checkpoint()
            raise DiscordUnavailable("no network", offline=True)

        v.store.offline, v.store.find = True, offline
        listings = Listings(v.store)
        await trio.sleep(3600)
        assert len(listings.at) == 1
        assert 55 <= v.store.pings <= 60

        v.store.offline, v.store.find = False, find
        await trio.sleep(61)
        assert await v.journal.open_intents() == []


async def test_an_intent_of_which_nothing_arrived_is_given_up_and_sent_anew(
    clock, tmp_path
) -> None:
    async with volume(tmp_path) as v:
        lost = Unclear(v.store, times=1000, stores=False)
        await v.make(b"a", os.urandom(BLOCK))
        await lost.tried.wait()
    async with volume(tmp_path) as v:
        await v.fs.sync_remote()

        assert len(messages(v.store)) == 1
        assert await v.journal.open_intents() == []
        assert len(await v.journal.watched()) > 0


async def test_a_message_that_was_not_kept_as_sent_is_watched_for(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        put = v.store.put

        async def cut(packs, *, nonce):
            v.store.put = put
            raise ObjectCorrupt("not as it was sent")

        v.store.put = cut
        await v.make(b"a", os.urandom(BLOCK))
        await v.fs.sync_remote()

        assert len(await v.journal.watched()) == 1
        assert len(messages(v.store)) == 1


def test_the_resends_stay_within_what_the_server_remembers() -> None:
    assert settling._RESEND_FOR_S <= 180


async def test_a_refused_token_is_told_once_while_looking(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        Unclear(v.store, times=1, stores=True)
        looks = []

        async def refused(after, names):
            await trio.lowlevel.checkpoint()
            looks.append(after)
            raise TokenRejected("rejected", status=401)

        v.store.find = refused
        await v.make(b"a", os.urandom(BLOCK))
        await trio.sleep(3600)
        assert len(looks) > 10
        assert len([text for text in v.reports if "looking for" in text]) == 1
