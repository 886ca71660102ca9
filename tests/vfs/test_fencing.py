"""One writer: two machines over one channel, of which one must notice and keep what it has."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from stashcordfs.crypto.keys import KIND_CLAIM, KIND_SEGMENT, object_id_of
from stashcordfs.daemon.assembly import Telling
from stashcordfs.errors import FsError
from stashcordfs.store.sealed import seal_object
from stashcordfs.store.segment import Claim, encode_claim
from stashcordfs.types import ROOT_INO
from stashcordfs.vfs.journal_channel import FETCH_TRIES

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, KEYS, FaultyStore, until, volume

GENESIS = bytes(range(32))


@pytest.fixture
def channel(tmp_path):
    """The journal channel that all machines share."""
    return FaultyStore(tmp_path / "channel")


def told(channel, host="") -> Telling:
    return Telling(store=channel, genesis=GENESIS, host=host)


def refuses(call):
    return pytest.raises(FsError, check=lambda error: error.errno == errno.EROFS)


async def post_claim(channel, epoch, host="other", head=0):
    claim = Claim(os.urandom(16), epoch, head, GENESIS, 10**18, host)
    made = seal_object(KEYS, KIND_CLAIM, head, encode_claim(claim))
    await channel.put([made], nonce=os.urandom(8).hex())


async def test_a_writer_that_was_taken_over_turns_read_only_and_keeps_what_it_has(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        data = os.urandom(BLOCK)
        ino = await v.make(b"old", data)
        await trio.sleep(100)
        fh = await v.fs.open(ino, 2)
        await post_claim(channel, 2, "desk")
        await v.make(b"late", b"only here")
        await trio.sleep(100)

        assert "(desk) has taken the volume over on 2001-09-09" in v.fence.reason
        assert v.reports[-1] == v.fence.reason
        for call in (
            v.fs.create(ROOT_INO, b"x", 0o644, 2, 0, 0),
            v.fs.mkdir(ROOT_INO, b"x", 0o755, 0, 0),
            v.fs.symlink(ROOT_INO, b"x", b"t", 0, 0),
            v.fs.link(ino, ROOT_INO, b"x"),
            v.fs.unlink(ROOT_INO, b"old"),
            v.fs.rmdir(ROOT_INO, b"old"),
            v.fs.rename(ROOT_INO, b"old", ROOT_INO, b"x", noreplace=False, exchange=False),
            v.fs.setattr(ino, mode=0o600),
            v.fs.open(ino, os.O_WRONLY),
            v.fs.open(ino, os.O_TRUNC),
            v.fs.write(fh, 0, b"x"),
            v.fs.setxattr(ino, b"user.x", b""),
            v.fs.removexattr(ino, b"user.x"),
            v.fs.sync_remote(),
            v.publisher.posted(v.journal.last_change),
        ):
            with refuses(call):
                await call
        assert await v.read(ino) == data
        late = await v.fs.lookup(ROOT_INO, b"late")
        assert await v.read(late.ino) == b"only here"
        puts = channel.puts + v.store.puts
        await trio.sleep(3 * 86_400)
        assert channel.puts + v.store.puts == puts


async def test_the_next_start_is_read_only_too_without_a_network(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await trio.sleep(100)
        await post_claim(channel, 2)
        await v.publisher.resumed()  # the machine has slept
        await until(lambda: v.fence.reason)
    channel.offline = True
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        with refuses(v):
            await v.fs.mkdir(ROOT_INO, b"x", 0o755, 0, 0)


async def test_a_flush_under_way_ends_when_the_volume_is_taken_over(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await trio.sleep(100)
        v.store.offline = True
        await v.make(b"a", os.urandom(BLOCK))
        ended = trio.Event()

        async def flush() -> None:
            with refuses(v):
                await v.fs.sync_remote()
            ended.set()

        v.nursery.start_soon(flush)
        await trio.sleep(10)
        await post_claim(channel, 2)
        await v.publisher.resumed()
        with trio.fail_after(60):
            await ended.wait()


async def test_a_copy_of_the_state_is_no_second_writer(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel, "first")) as v:
        await v.make(b"a")
        await trio.sleep(100)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    async with volume(tmp_path / "a", telling=told(channel, "first")) as first:
        await until(lambda: first.fence.claimed)
        async with volume(tmp_path / "b", telling=told(channel, "copy")) as second:
            await until(lambda: second.fence.reason)
            assert "(first)" in second.fence.reason
            await first.make(b"b")
            first.journal.commit()
            await first.publisher.posted(first.journal.last_change)
            assert first.fence.reason == ""


async def test_of_two_claims_at_once_the_lower_message_wins(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel, "first")):
        await trio.sleep(100)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    listed = channel.listed

    async def blind(after):
        return []

    channel.listed = blind  # neither sees the other's
    async with volume(tmp_path / "a", telling=told(channel, "first")) as first:
        await until(lambda: first.fence.claimed)
        async with volume(tmp_path / "b", telling=told(channel, "second")) as second:
            await until(lambda: second.fence.claimed)
            channel.listed = listed
            await second.make(b"b")
            await first.make(b"a")
            await trio.sleep(100)
            assert first.fence.reason == ""
            assert "(first)" in second.fence.reason
            assert second.publisher.segment < first.publisher.segment


async def test_an_older_writers_late_words_do_not_disturb_the_new_one(
    clock, tmp_path, channel
) -> None:
    from stashcordfs.journal import Journal

    (tmp_path / "a").mkdir()
    Journal.create(
        tmp_path / "a" / "journal.sqlite", clock_ns=lambda: 0, uid=0, gid=0, writer_epoch=5
    ).close()
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await trio.sleep(100)
        await post_claim(channel, 4)
        await v.make(b"a")
        await trio.sleep(100)
        assert v.fence.reason == ""
        assert v.publisher.behind_s == 0


async def test_what_is_not_authentic_fences_nobody(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await v.make(b"a")
        await trio.sleep(100)
        made = seal_object(KEYS, KIND_CLAIM, 9, b"no claim")
        forged = seal_object(KEYS, KIND_SEGMENT, 9, b"x" * 100)
        damaged = type(forged)(forged.object_id, forged.kind, 9, forged.data[:-1] + b"?")
        await channel.put([made, damaged], nonce="1")
        theirs = await channel.listed(0)
        again = next(at for at in theirs if object_id_of(at.filename))
        data = await channel.fetch(again, 0, again.size_bytes)
        copied = type(forged)(object_id_of(again.filename), forged.kind, 9, data)
        await channel.put([copied], nonce="2")  # somebody posts again what he saw
        fetched = channel.fetched
        await v.make(b"b")
        await trio.sleep(100)
        await v.make(b"c")
        await trio.sleep(100)
        assert v.fence.reason == ""
        assert v.publisher.behind_s == 0
        # Tried again in the first look, as it may be damaged on its way, and never in the second
        assert channel.fetched - fetched == FETCH_TRIES * (made.size + damaged.size)
