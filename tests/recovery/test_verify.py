"""verify over a folder as the store: what is missing, mended, told; subsets; requests counted."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "vfs"))
from damage import flip
from harness import BLOCK, KEYS, volume

from stashcordfs.errors import AccessDenied, FsError, StoreError, UsageError
from stashcordfs.journal.holdings import HeldPack
from stashcordfs.recovery.verify import State, Verifier, choose
from stashcordfs.types import Location, ObjectId


def verifier(v, folder: Path) -> Verifier:
    return Verifier(
        journal=v.journal,
        blocks=v.blocks,
        store=v.store,
        keys=KEYS,
        state_path=folder / "verify.json",
        report=v.reports.append,
        now_s=lambda: 1234.0,
    )


async def fill(v, count: int = 3) -> dict[bytes, bytes]:
    """Files that each are in a message of their own."""
    contents = {}
    for number in range(count):
        name = b"f%d" % number
        contents[name] = os.urandom(2 * BLOCK + 1 + number)
        await v.make(name, contents[name])
        await v.fs.sync_remote()
    return contents


async def ino_of(v, name: bytes) -> int:
    found = await v.fs.lookup(1, name)
    assert found is not None
    return found.ino


def message(folder: Path, number: int) -> Path:
    return folder / "store" / str(number)


def pack_of(folder: Path, number: int) -> Path:
    return next(p for p in message(folder, number).iterdir() if p.name != ".nonce")


async def test_a_whole_volume_is_clean(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        await fill(v)
        found = await verifier(v, tmp_path).run(data=True)
        assert found.clean
        assert (found.packs, found.checked_packs) == (3, 3)
        assert found.opened_bytes > 6 * BLOCK
        assert v.reports == []


async def test_every_single_loss_is_told_and_leaves_the_rest_intact(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        contents = await fill(v)
        for number in (1, 2, 3):
            kept = tmp_path / "kept"
            message(tmp_path, number).rename(kept)
            await v.blocks.evict(at_least=1 << 30)
            found = await verifier(v, tmp_path).run()

            lost = b"f%d" % (number - 1)
            assert not found.clean
            assert len(found.missing_packs) == 1
            assert found.damaged == {lost.decode(): 3}
            for name, data in contents.items():
                if name == lost:
                    with pytest.raises(FsError) as caught:
                        await v.read(await ino_of(v, name))
                    assert caught.value.errno == errno.EIO
                else:
                    assert await v.read(await ino_of(v, name)) == data

            kept.rename(message(tmp_path, number))
            again = await verifier(v, tmp_path).run()
            assert (again.found_again, again.clean) == (1, True)
            assert await v.read(await ino_of(v, lost)) == contents[lost]


async def test_what_is_cached_is_sent_anew_and_the_lost_pack_forgotten(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        contents = await fill(v, 1)
        shutil.rmtree(message(tmp_path, 1))
        found = await verifier(v, tmp_path).run()
        assert (found.resent_blocks, found.damaged_blocks, found.clean) == (3, 0, False)
        assert v.reports[-1].startswith("verify: 1 packs are missing")

        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        assert await v.read(await ino_of(v, b"f0")) == contents[b"f0"]
        assert (await verifier(v, tmp_path).run()).clean
        assert (await verifier(v, tmp_path).run()).packs == 1


async def test_the_next_mount_sends_what_this_one_could_not(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        contents = await fill(v, 1)
        shutil.rmtree(message(tmp_path, 1))
        v.store.offline = True
        assert (await verifier(v, tmp_path).run()).resent_blocks == 3
    async with volume(tmp_path) as v:
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        assert await v.read(await ino_of(v, b"f0")) == contents[b"f0"]


async def test_after_a_power_cut_a_synced_copy_is_still_sent(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        contents = await fill(v, 1)
        shutil.rmtree(message(tmp_path, 1))
        v.store.offline = True
        await verifier(v, tmp_path).run()
        await v.durability.sync()
    async with volume(tmp_path, power_lost=True) as v:
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        assert await v.read(await ino_of(v, b"f0")) == contents[b"f0"]


async def test_a_rotten_cached_copy_is_not_sent(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        await fill(v, 1)
        ino = await ino_of(v, b"f0")
        flip(Path(v.blocks.files.path((ino, 0))), 10)
        shutil.rmtree(message(tmp_path, 1))
        found = await verifier(v, tmp_path).run()
        assert (found.resent_blocks, found.damaged) == (2, {"f0": 1})


async def test_another_copy_of_the_content_is_used(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        contents = await fill(v, 1)
        v.uploader.settings = type(v.uploader.settings)(dedup=False)
        await v.make(b"same", contents[b"f0"])
        await v.fs.sync_remote()
        shutil.rmtree(message(tmp_path, 1))
        await v.blocks.evict(at_least=1 << 30)
        found = await verifier(v, tmp_path).run()
        assert (found.from_other_copy, found.damaged_blocks) == (6, 0)
        assert await v.read(await ino_of(v, b"f0")) == contents[b"f0"]


async def test_a_lost_chunk_is_not_chosen_by_deduplication(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        contents = await fill(v, 1)
        shutil.rmtree(message(tmp_path, 1))
        await v.blocks.evict(at_least=1 << 30)
        await verifier(v, tmp_path).run()
        await v.make(b"same", contents[b"f0"])
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        assert await v.read(await ino_of(v, b"same")) == contents[b"f0"]


async def test_an_attachment_of_another_size_is_missing(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        await fill(v, 1)
        with pack_of(tmp_path, 1).open("r+b") as file:
            file.truncate(100)
        assert len((await verifier(v, tmp_path).run()).missing_packs) == 1


async def test_a_changed_byte_is_found_by_data_alone(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        contents = await fill(v, 2)
        with pack_of(tmp_path, 1).open("r+b") as file:
            file.seek(100)  # in the first chunk
            file.write(b"\0\1\2\3")
        await v.blocks.evict(at_least=1 << 30)
        assert (await verifier(v, tmp_path).run()).clean
        found = await verifier(v, tmp_path).run(data=True)
        assert len(found.corrupt_packs) == 1
        assert found.damaged == {"f0": 1}
        with pytest.raises(FsError):
            await v.read(await ino_of(v, b"f0"))
        assert await v.read(await ino_of(v, b"f1")) == contents[b"f1"]


async def test_a_changed_table_is_told_and_no_block_is_lost(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        contents = await fill(v, 1)
        size = pack_of(tmp_path, 1).stat().st_size
        with pack_of(tmp_path, 1).open("r+b") as file:
            file.seek(size - 20)
            file.write(b"\0\1\2\3")
        await v.blocks.evict(at_least=1 << 30)
        found = await verifier(v, tmp_path).run(data=True)
        assert (len(found.corrupt_packs), found.damaged_blocks, found.clean) == (1, 0, False)
        assert await v.read(await ino_of(v, b"f0")) == contents[b"f0"]


@pytest.mark.parametrize(
    "change", ["offset = offset + 5", "length = length - 1", "number = number + 9",
               "codec = 1", "plain_length = 7", "chunk_id = zeroblob(32)"]
)  # fmt: skip
async def test_a_row_that_differs_from_the_packs_table_is_corrected(
    clock, tmp_path, change
) -> None:
    async with volume(tmp_path) as v:
        contents = await fill(v, 1)
        v.journal._db.begin()
        v.journal._db.run(f"UPDATE chunks SET {change} WHERE number = 1")
        await v.blocks.evict(at_least=1 << 30)
        found = await verifier(v, tmp_path).run(data=True)
        assert (found.corrected_chunks, found.damaged_blocks) == (1, 0)
        assert await v.read(await ino_of(v, b"f0")) == contents[b"f0"]


async def test_a_lost_pack_whose_bytes_are_still_gone_stays_lost(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        await fill(v, 1)
        await v.blocks.evict(at_least=1 << 30)
        v.store.missing = True  # the message is listed, the CDN has nothing
        assert (await verifier(v, tmp_path).run(data=True)).damaged_blocks == 3
        found = await verifier(v, tmp_path).run()
        assert (found.found_again, found.damaged_blocks) == (0, 3)
        v.store.missing = False
        found = await verifier(v, tmp_path).run()
        assert (found.found_again, found.clean) == (1, True)


async def test_a_listing_that_lags_condemns_nothing(clock, tmp_path, monkeypatch) -> None:
    async with volume(tmp_path) as v:
        await fill(v)

        async def nothing(channel, after):
            from stashcordfs.store.api import Page

            return Page([], None)

        monkeypatch.setattr(v.store, "page", nothing)
        found = await verifier(v, tmp_path).run()
        assert found.clean


async def test_without_the_right_to_read_the_history_nothing_is_condemned(
    clock, tmp_path, monkeypatch
) -> None:
    async with volume(tmp_path) as v:
        contents = await fill(v, 1)

        async def nothing(channel, after):
            from stashcordfs.store.api import Page

            return Page([], None)

        async def refused(channel, message):
            raise AccessDenied("missing permission", status=403, code=50013)

        monkeypatch.setattr(v.store, "page", nothing)
        monkeypatch.setattr(v.store, "attachments", refused)
        with pytest.raises(AccessDenied):
            await verifier(v, tmp_path).run()
        await v.blocks.evict(at_least=1 << 30)
        assert await v.read(await ino_of(v, b"f0")) == contents[b"f0"]


async def test_a_purged_channel_costs_few_requests(clock, tmp_path, monkeypatch) -> None:
    async with volume(tmp_path) as v:
        for number in range(70):
            await v.make(b"%d" % number, os.urandom(100))
            await v.fs.sync_remote()
        for number in range(1, 71):
            shutil.rmtree(message(tmp_path, number))
        await v.blocks.evict(at_least=1 << 30)
        asked = 0
        real = v.store.attachments

        async def count(channel, number):
            nonlocal asked
            asked += 1
            return await real(channel, number)

        monkeypatch.setattr(v.store, "attachments", count)
        found = await verifier(v, tmp_path).run()
        assert found.damaged_blocks == 70
        assert asked == 100


async def test_listings_that_contradict_many_messages_are_not_believed(
    clock, tmp_path, monkeypatch
) -> None:
    async with volume(tmp_path) as v:
        for number in range(60):
            await v.make(b"%d" % number, os.urandom(100))
            await v.fs.sync_remote()

        async def nothing(channel, after):
            from stashcordfs.store.api import Page

            return Page([], None)

        monkeypatch.setattr(v.store, "page", nothing)
        with pytest.raises(StoreError, match="leave out"):
            await verifier(v, tmp_path).run()
        assert (await v.journal.held_packs(0))[0].lost is False


async def test_a_hundred_messages_a_request(clock, tmp_path, monkeypatch) -> None:
    async with volume(tmp_path) as v:
        for number in range(205):
            await v.make(b"%d" % number, os.urandom(10))
            await v.fs.sync_remote()
        pages = 0
        real = v.store.page

        async def count(channel, after):
            nonlocal pages
            pages += 1
            return await real(channel, after)

        monkeypatch.setattr(v.store, "page", count)
        assert (await verifier(v, tmp_path).run()).clean
        assert pages == 3


async def test_subsets_go_on_where_the_last_one_ended(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        await fill(v, 4)
        seen = []
        for _ in range(4):
            found = await verifier(v, tmp_path).run(part=(1, 4))
            seen.append((found.checked_packs, State.load(tmp_path / "verify.json").cursor[1]))
        assert sum(count for count, _ in seen) >= 4
        assert {at for _, at in seen} >= {4}


async def test_two_runs_at_once_are_refused(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        await fill(v, 1)
        shutil.rmtree(message(tmp_path, 1))
        checker = verifier(v, tmp_path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(checker.run)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(UsageError, match="running"):
                await checker.run()


def test_a_state_that_cannot_be_read_begins_anew(tmp_path) -> None:
    path = tmp_path / "verify.json"
    for text in ("", "{}", '{"cursor": "x"}', "[1]"):
        path.write_text(text)
        assert State.load(path) == State()
    State([1, 2, 3], 4.0, 5).save(path)
    assert State.load(path) == State([1, 2, 3], 4.0, 5)


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 30), st.integers(0, 99)
)
def test_t_runs_see_every_pack(sizes, total, start) -> None:
    packs = [
        HeldPack(n, ObjectId(b""), 0, Location(1, n, 0, str(n), size), lost=False)
        for n, size in enumerate(sizes, 1)
    ]
    cursor = (1, min(start, len(packs)), 0)
    seen = set()
    for _ in range(total + 1):  # one more: the first may begin in the middle
        chosen = choose(packs, (1, total), cursor)
        seen |= {pack.row for pack in chosen}
        cursor = (1, chosen[-1].location.message, 0)
    assert seen == {pack.row for pack in packs}
