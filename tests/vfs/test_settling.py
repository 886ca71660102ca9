"""Uploads whose answer is lost: each message once, no orphan, nothing forgotten."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from stashcordfs.errors import DiscordUnavailable, ObjectCorrupt, OutcomeUnknown
from stashcordfs.vfs import settling

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, volume


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0.02)


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
        assert await v.journal.watched() == []


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
