"""Taking a volume over while the channel's list lags, or its old writer goes on."""

from __future__ import annotations

import os
import sys
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from stashcordfs.crypto.keys import object_id_of
from stashcordfs.crypto.slots import SlotSet
from stashcordfs.daemon.assembly import Telling
from stashcordfs.daemon.recovering import Rebuilding, Wanted
from stashcordfs.errors import StashcordError
from stashcordfs.store.record import PostedRecord, VolumeRecord
from stashcordfs.store.segment import genesis
from stashcordfs.types import Limits
from stashcordfs.vfs.checkpointing import CheckpointSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "vfs"))
from harness import BLOCK, KEYS, FaultyStore, clock, until, volume

__all__ = ["clock"]

RECORD = VolumeRecord(bytes(16), BLOCK, SlotSet(bytes(16), 0, ()), 0)
NEVER = CheckpointSettings(segments=10**9, least_bytes=10**12)


class LaggingStore(FaultyStore):
    """A channel whose lists lack what is above an id, until a time."""

    shown_to = 1 << 62
    lags_until_s = 0.0
    damaged_after, damaged_at = 1 << 62, 0

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.fetches: Counter = Counter()

    def lag(self, until_s: float) -> None:
        self.shown_to, self.lags_until_s = max(self._ids()), until_s

    def damage_on_its_way(self, after: int, at_fetch: int) -> None:
        """What stands above an id arrives changed, once each, at so many fetches."""
        self.damaged_after, self.damaged_at = after, at_fetch

    async def fetch(self, location, start, length):
        data = await super().fetch(location, start, length)
        self.fetches[location] += 1
        if location.message > self.damaged_after and self.fetches[location] == self.damaged_at:
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    def _hidden(self, message: int) -> bool:
        return message > self.shown_to and trio.current_time() < self.lags_until_s

    async def listed(self, after):
        return [at for at in await super().listed(after) if not self._hidden(at.message)]

    async def page_back(self, before):
        page = await super().page_back(before)
        return page._replace(
            attachments=[at for at in page.attachments if not self._hidden(at.message)]
        )


@pytest.fixture
def channel(tmp_path):
    return LaggingStore(tmp_path / "channel", limits=Limits(max_attachment_bytes=8 << 20))


def told(channel) -> Telling:
    posted = PostedRecord("stashcordfs-volume-x-1.json", b"{}")
    return Telling(store=channel, genesis=genesis(RECORD), record=posted, checkpoints=NEVER)


def taking_over(channel, tmp_path, **wanted) -> Rebuilding:
    (tmp_path / "new").mkdir(exist_ok=True)
    return Rebuilding(
        Wanted((1,), 1, **wanted),
        channel,
        FaultyStore(tmp_path / "old" / "store"),
        KEYS,
        RECORD,
        tmp_path / "new",
        lambda *_: None,
    )


@asynccontextmanager
async def taken_over(tmp_path, channel):
    (tmp_path / "new" / "store").symlink_to(tmp_path / "old" / "store")
    async with volume(tmp_path / "new", telling=told(channel)) as v:
        yield v


async def lagging(channel, tmp_path, content: bytes = b"b") -> int:
    """A volume that is gone, and whose newest file the channel's list hides for 30 s; its inode."""
    async with volume(tmp_path / "old", telling=told(channel)) as v:
        await v.make(b"a", b"a")
        await v.fs.sync_remote()
        channel.lag(trio.current_time() + 30)
        ino = await v.make(b"b", content)
        await v.fs.sync_remote()
    return ino


async def test_segments_that_a_lagging_list_hides_come_back(clock, tmp_path, channel) -> None:
    content = os.urandom(BLOCK)
    ino = await lagging(channel, tmp_path, content)

    report = await taking_over(channel, tmp_path).take_over()

    async with taken_over(tmp_path, channel) as v:
        assert await v.read(ino) == content
        assert v.journal.writer_epoch == report["writer_epoch"]
        await v.make(b"c", content)
        await v.fs.sync_remote()
        assert v.fence.reason == ""


@pytest.mark.parametrize("at_fetch", [1, 2])
async def test_one_damaged_download_hides_no_segment(clock, tmp_path, channel, at_fetch) -> None:
    """The first fetch is of the look after the claim, the second of the next pass."""
    ino = await lagging(channel, tmp_path, b"b" * BLOCK)
    channel.damage_on_its_way(channel.shown_to, at_fetch)

    report = await taking_over(channel, tmp_path).take_over()

    assert report["notes"] == []
    async with taken_over(tmp_path, channel) as v:
        assert await v.read(ino) == b"b" * BLOCK


async def test_a_file_that_a_power_cut_left_empty_is_fetched_again(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "old", telling=told(channel)) as v:
        ino = await v.make(b"a", b"a")
        await v.fs.sync_remote()
    await taking_over(channel, tmp_path).run()
    kept = [path for path in (tmp_path / "new").iterdir() if object_id_of(path.name)]
    for path in kept:
        path.write_bytes(b"")
    assert kept

    await taking_over(channel, tmp_path).take_over()

    async with taken_over(tmp_path, channel) as v:
        assert await v.read(ino) == b"a"


async def test_what_turns_up_is_found_behind_a_page_of_other_messages(
    clock, tmp_path, channel
) -> None:
    ino = await lagging(channel, tmp_path)
    for number in range(120):
        await channel.post_record(b"x", f"of-somebody-else-{number}")
    channel.lags_until_s = trio.current_time() + 30

    await taking_over(channel, tmp_path).take_over()

    async with taken_over(tmp_path, channel) as v:
        assert await v.read(ino) == b"b"


async def test_a_recovery_that_came_between_is_not_taken_over(clock, tmp_path, channel) -> None:
    await lagging(channel, tmp_path)
    task, run, passes = taking_over(channel, tmp_path), Rebuilding.run, []

    async def between():
        passes.append(1)
        if len(passes) == 2:
            (tmp_path / "other").mkdir()
            await taking_over(channel, tmp_path / "other").take_over()
        return await run(task)

    task.run = between  # type: ignore[method-assign]
    with pytest.raises(StashcordError, match="another recovery"):
        await task.take_over()


async def test_after_a_recovery_cut_short_the_same_command_goes_on(
    clock, tmp_path, channel
) -> None:
    """Its claim is not listed yet, and must not pass for another machine's."""
    async with volume(tmp_path / "old", telling=told(channel)) as v:
        ino = await v.make(b"a", b"a")
        await v.fs.sync_remote()
    channel.lag(trio.current_time() + 30)
    with trio.move_on_after(5) as scope:
        await taking_over(channel, tmp_path).take_over()
    assert scope.cancelled_caught

    report = await taking_over(channel, tmp_path).take_over()

    assert report["writer_epoch"] == 3
    async with taken_over(tmp_path, channel) as v:
        assert await v.read(ino) == b"a"
        assert v.fence.reason == ""


async def test_what_the_old_machine_posts_before_the_claim_comes_back(
    clock, tmp_path, channel
) -> None:
    """It was told to be on Discord while the journal was made, a moment before the claim."""
    content = os.urandom(BLOCK)
    inos = []
    async with volume(tmp_path / "old", telling=told(channel)) as old:
        await old.make(b"a", content)
        await old.fs.sync_remote()
        task = taking_over(channel, tmp_path)
        run = task.run

        async def made_slowly():
            report = await run()
            if not inos:
                inos.append(await old.make(b"b", content))
                await old.fs.sync_remote()
            return report

        task.run = made_slowly  # type: ignore[method-assign]
        await task.take_over()
        await old.make(b"c", content)
        await until(lambda: old.fence.reason)

    async with taken_over(tmp_path, channel) as v:
        assert await v.read(inos[0]) == content
        assert v.fence.reason == ""


async def test_a_list_that_never_shows_the_claim_is_not_believed(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "old", telling=told(channel)) as v:
        await v.make(b"a", b"a")
        await v.fs.sync_remote()
        channel.lag(trio.current_time() + 86_400)

    with pytest.raises(StashcordError, match="newer changes may be missing"):
        await taking_over(channel, tmp_path).take_over()


async def test_a_state_of_before_is_taken_over_as_it_was(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "old", telling=told(channel)) as v:
        await v.make(b"a", b"a")
        await v.fs.sync_remote()
        then_ns = int((1 + trio.current_time()) * 1e9)
        await trio.sleep(60)
        await v.make(b"b", b"b")
        await v.fs.sync_remote()

    await taking_over(channel, tmp_path, at_ns=then_ns).take_over()

    async with taken_over(tmp_path, channel) as v:
        fh = await v.fs.opendir(1)
        assert [name for _, name, _ in await v.fs.readdir(fh, 0, 9)][2:] == [b"a"]
        await v.fs.releasedir(fh)
