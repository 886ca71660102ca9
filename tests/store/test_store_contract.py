"""One suite for every form of the store: the folder, and Discord by way of the sandbox."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import httpx
import pytest

from stashcordfs.crypto.keys import VolumeKeys
from stashcordfs.discord.client import DiscordClient
from stashcordfs.errors import (
    LocalDiskError,
    ObjectCorrupt,
    ObjectMissing,
    StashcordError,
    StoreError,
    TooLarge,
)
from stashcordfs.store.api import RECORD_PREFIX, match_attachments
from stashcordfs.store.discord_store import DiscordStore
from stashcordfs.store.folder_store import FolderStore
from stashcordfs.store.pack import open_chunk
from stashcordfs.store.packer import RequestBuilder
from stashcordfs.types import Limits, Location

KEYS = VolumeKeys(bytes(16), {0: bytes(32)})
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sandbox")
    command = [sys.executable, "-m", "stashcordfs.sandbox", "--dir", str(folder)]
    command += ["--no-rate-limits", "--attachment-bytes", str(10 * MIB)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()
            process.wait(20)


def grow_old(server) -> None:
    """What is missing now is gone, not late."""
    url = str(server["api_url"]).partition("/api/")[0] + "/_sandbox/clock"
    httpx.post(url, json={"advance_s": 61}).raise_for_status()


@asynccontextmanager
async def on_discord(server):
    url, token = server["api_url"], server["token"]
    channels = [int(number) for number in server["channel_ids"]]
    async with DiscordClient(api_url=url, token=lambda: token) as client:
        yield DiscordStore(client, channels=channels, journal_channel=channels[0])


@pytest.fixture(params=["folder", "discord"])
def opened(request, tmp_path):
    """Opens the store as often as the test wants: each time as after a restart."""
    if request.param == "discord":
        return lambda: on_discord(request.getfixturevalue("server"))

    @asynccontextmanager
    async def in_folder():
        yield FolderStore(tmp_path / "store", accepts=Limits(10 * MIB, 10, 25 * MIB))

    return in_folder


async def packs_of(total: int, limits: Limits | None = None):
    builder = RequestBuilder(KEYS, limits or Limits(MIB, 10, 25 * MIB))
    for n in range(max(1, total // 500_000)):
        data = os.urandom(min(total, 500_000))
        assert await builder.add(n, data, KEYS.chunk_id(data))
    return await builder.finish([], [])


async def test_what_is_put_is_fetched_by_ranges_also_after_a_restart(opened) -> None:
    packs = await packs_of(2_000_000)
    assert len(packs) == 2
    async with opened() as store:
        places = await store.put(packs, nonce=os.urandom(8).hex())
    async with opened() as store:
        for pack, place in zip(packs, places, strict=True):
            assert (place.filename, place.size_bytes) == (pack.filename, pack.size)
            whole = b"".join(pack.parts)
            assert await store.fetch(place, 0, pack.size) == whole
            ref = pack.chunks[0]
            sealed = await store.fetch(place, ref.offset, ref.length)
            assert len(open_chunk(KEYS, ref, sealed)) == ref.plain_length


async def test_the_same_nonce_makes_one_message(opened) -> None:
    packs = await packs_of(100)
    async with opened() as store:
        nonce = os.urandom(8).hex()
        first = await store.put(packs, nonce=nonce)
        assert await store.put(packs, nonce=nonce) == first


async def test_a_page_shows_what_stands_after_an_id_and_where_to_go_on(opened) -> None:
    async with opened() as store:
        first = (await store.put(await packs_of(100), nonce=os.urandom(8).hex()))[0]
        places = []
        while len(places) < 101:  # the store may spread messages over channels
            place = (await store.put(await packs_of(100), nonce=os.urandom(8).hex()))[0]
            places += [place] if place.channel == first.channel else []

        page = await store.page(first.channel, first.message)
        assert page.attachments == places[:100]
        assert page.last == places[99].message
        rest = await store.page(first.channel, page.last)
        assert rest.attachments == places[100:]
        assert rest.last is None


async def test_one_message_is_looked_at_by_itself(opened) -> None:
    async with opened() as store:
        places = await store.put(await packs_of(2_000_000), nonce=os.urandom(8).hex())
        where = places[0].channel, places[0].message
        assert await store.attachments(*where) == places
        await store.delete([where])
        assert await store.attachments(*where) is None


async def test_what_may_have_arrived_is_found_by_name_after_an_id(opened) -> None:
    async with opened() as store:
        before = await store.newest_id()
        packs = await packs_of(100)
        (place,) = await store.put(packs, nonce=os.urandom(8).hex())
        assert await store.newest_id() >= place.message
    async with opened() as store:
        assert await store.find(before, {place.filename, "other"}) == {place.filename: place}
        assert await store.find(place.message, {place.filename}) == {}


async def test_what_was_made_twice_is_found_twice(opened) -> None:
    async with opened() as store:
        before = await store.newest_id()
        packs = await packs_of(100)
        first, second = [await store.put(packs, nonce=os.urandom(8).hex()) for _ in range(2)]
        assert await store.find_all(before, {packs[0].filename}) == first + second
        assert not store.doubtful("any")


async def test_a_ping_is_answered(opened) -> None:
    async with opened() as store:
        await store.ping()


async def test_records_are_found_and_read(opened) -> None:
    async with opened() as store:
        name = f"{RECORD_PREFIX}x.json"
        made = await store.post_record(b'{"a":1}', name)
        assert isinstance(made, Location)
        assert (await store.find_records())[-1] == b'{"a":1}'


async def test_what_is_deleted_is_missing_and_beyond_the_end_is_corrupt(opened, server) -> None:
    async with opened() as store:
        places = [
            (await store.put(await packs_of(100), nonce=os.urandom(8).hex()))[0] for _ in range(3)
        ]
        with pytest.raises(ObjectCorrupt):
            await store.fetch(places[0], 0, places[0].size_bytes + 1)
        await store.delete([(p.channel, p.message) for p in places])
        await store.delete([(places[0].channel, places[0].message)])
    grow_old(server)
    async with opened() as store:
        for place in places:
            with pytest.raises(ObjectMissing):
                await store.fetch(place, 0, 1)


async def test_a_refused_size_lowers_the_limits_until_it_passes(opened) -> None:
    async with opened() as store:
        packs = await packs_of(11 * MIB, Limits())
        with pytest.raises(TooLarge):
            await store.put(packs, nonce=os.urandom(8).hex())
        assert store.limits.max_attachment_bytes == 10 * MIB
        packs = await packs_of(11 * MIB, store.limits)
        assert len(await store.put(packs, nonce=os.urandom(8).hex())) == 2


async def put_until_told(store) -> None:
    for _ in range(20):
        with suppress(TooLarge):
            await store.put(await packs_of(100), nonce="n")


async def test_a_folder_that_refuses_everything_says_so(tmp_path) -> None:
    store = FolderStore(tmp_path / "s", accepts=Limits(10, 1, 10))
    with pytest.raises(StashcordError, match="smallest"):
        await put_until_told(store)


async def test_a_disk_fault_of_the_folder_is_told(tmp_path) -> None:
    store = FolderStore(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    (tmp_path / "s").write_text("not a folder")
    with pytest.raises(LocalDiskError):
        await store.newest_id()


class Refusing:
    """A client whose server takes nothing."""

    async def create_message(self, *args, **kwargs):
        raise TooLarge("no", status=413)


async def test_a_server_that_refuses_the_smallest_is_not_tried_for_ever() -> None:
    store = DiscordStore(Refusing(), channels=[1], journal_channel=1)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="smallest"):
        await put_until_told(store)


def test_attachments_are_matched_by_name_then_by_a_size_of_their_own() -> None:
    def match(wanted, got):
        return [w.attachment for w in match_attachments(wanted, got, channel=1, message=2)]

    a, b = ("a", 10), ("b", 20)
    assert match([a, b], [(5, "b", 20), (4, "a", 10)]) == [4, 5]
    assert match([a, b], [(4, "a_1", 10), (5, "b", 20)]) == [4, 5]
    same = replace(Location(1, 2, 4, "a_1", 10), channel=1)
    assert match_attachments([a], [(4, "a_1", 10)], channel=1, message=2) == [same]
    for got in (
        [],
        [(4, "a", 10)],
        [(4, "a", 11), (5, "b", 20)],
        [(4, "a", 10), (5, "b", 20), (6, "c", 1)],
        [(4, "a", 10), (5, "x", 20), (6, "y", 20)],
    ):
        with pytest.raises(ObjectCorrupt):
            match([a, b], got)
    with pytest.raises(ObjectCorrupt):
        match([("a", 10), ("b", 10)], [(4, "x", 10), (5, "y", 10)])
