"""Checkpoints over the folder store: when they come, what they hold, and what is dropped."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

import apsw
import pytest
import trio
import trio.testing

from stashcordfs.crypto.keys import (
    KIND_CHECKPOINT,
    KIND_CLAIM,
    KIND_MANIFEST,
    KIND_SEGMENT,
    object_id_of,
)
from stashcordfs.daemon.assembly import Telling
from stashcordfs.errors import DiscordUnavailable
from stashcordfs.journal.sqlite import schema
from stashcordfs.store.checkpoint import decode_manifest, expand_to
from stashcordfs.store.record import PostedRecord
from stashcordfs.store.sealed import open_object
from stashcordfs.store.segment import decode_segment
from stashcordfs.types import Limits
from stashcordfs.vfs.checkpointing import CheckpointSettings
from stashcordfs.vfs.publishing import PublishSettings

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, KEYS, FaultyStore, inline, until, volume

GENESIS = bytes(range(32))
RECORD = PostedRecord("stashcordfs-volume-x-1.json", b"{}")
OFTEN = CheckpointSettings(segments=4)


@pytest.fixture
def channel(tmp_path):
    return FaultyStore(tmp_path / "channel", limits=Limits(max_attachment_bytes=8 << 10))


def told(channel, checkpoints=OFTEN, **more) -> Telling:
    return Telling(store=channel, genesis=GENESIS, record=RECORD, checkpoints=checkpoints, **more)


async def named(channel):
    """Kind, number and location of every object in the channel."""
    found = []
    for at in await channel.listed(0):
        object_id = object_id_of(at.filename)
        if object_id is not None:
            found.append((*KEYS.read_object_id(object_id), at, object_id))
    return found


async def opened(channel, kind, at, object_id):
    data = await channel.fetch(at, 0, at.size_bytes)
    return open_object(KEYS, kind, object_id, data)


async def manifests(channel):
    return [
        decode_manifest(await opened(channel, kind, at, object_id))
        for kind, _, at, object_id in await named(channel)
        if kind == KIND_MANIFEST
    ]


def tables(path):
    database = apsw.Connection(str(path))
    found = {t: database.execute(f"SELECT * FROM {t}").fetchall() for t in schema.REPLICATED_TABLES}
    database.close()
    return found


async def make_some(v, count, *, every_s=60):
    for n in range(count):
        await v.make(b"%d-%f" % (n, trio.current_time()), os.urandom(100))
        await trio.sleep(every_s)


async def test_after_enough_segments_a_checkpoint_comes_in_parts_with_its_manifest_last(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        for _ in range(60):  # names that do not compress
            await v.make(os.urandom(120).hex().encode())
        await make_some(v, 5)
        found = await named(channel)
        (manifest,) = await manifests(channel)
        parts = [item for item in found if item[0] == KIND_CHECKPOINT]
        last = next(at for kind, _, at, _ in found if kind == KIND_MANIFEST)
        assert len(parts) > 1
        assert [item[3] for item in parts] == [part.object_id for part in manifest.parts]
        assert all(at.message < last.message for _, _, at, _ in parts)
        assert max(at.size_bytes for _, _, at, _ in parts) <= 8 << 10
        assert RECORD.filename in {at.filename for at in await channel.listed(last.message - 1)}
        assert not (tmp_path / "a" / "checkpoint.sqlite").exists()

        pieces = [await opened(channel, KIND_CHECKPOINT, at, oid) for _, _, at, oid in parts]
        expand_to(tmp_path / "copy", pieces, manifest.plain_bytes)
        journal = tables(tmp_path / "a" / "journal.sqlite")
        copied = tables(tmp_path / "copy")
        assert len(copied["inodes"]) > 60
        assert len(copied["dirents"]) > 60
        assert set(copied["dirents"]) <= set(journal["dirents"])


async def test_a_segment_that_holds_what_was_copied_precedes_the_manifest(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await make_some(v, 5)
        (manifest,) = await manifests(channel)
        found = await named(channel)
        last = next(at for kind, _, at, _ in found if kind == KIND_MANIFEST)
        before = [
            decode_segment(await opened(channel, KIND_SEGMENT, at, oid))
            for kind, _, at, oid in found
            if kind == KIND_SEGMENT and at.message < last.message
        ]
        covering = [s for s in before if s.complete and s.changes[-1].id >= manifest.last_change]
        assert covering
        head = next(s for s in before if s.number == manifest.head_number)
        assert head.changes[-1].id <= manifest.last_change


async def test_a_migrated_journal_gets_its_checkpoint_first_of_all(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        ino = await v.make(b"old", os.urandom(BLOCK))
        await v.fs.sync_remote()
        with v.journal._db.operation:  # as a migration leaves it: in no change, in no segment
            v.journal._db.run("DELETE FROM changes")
            v.journal._db.run("DELETE FROM objects")
            v.journal._db.run("INSERT OR REPLACE INTO local VALUES ('checkpoint_wanted', 1)")
    shutil_channel = FaultyStore(tmp_path / "fresh")
    async with volume(tmp_path / "a", telling=told(shutil_channel)) as v:
        await trio.sleep(60)
        (manifest,) = await manifests(shutil_channel)
        assert manifest.head_digest == GENESIS or manifest.head_number == 1
        assert await v.fs.getattr(ino)
        await trio.sleep(3600)
        assert len(await manifests(shutil_channel)) == 1


async def test_an_unmount_brings_a_checkpoint_forward(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await make_some(v, 2)
        assert await manifests(channel) == []
        await v.publisher.finish()
        assert len(await manifests(channel)) == 1
        puts = channel.puts
        await v.publisher.finish()
        assert channel.puts == puts


async def test_two_checkpoints_and_what_reaches_back_are_kept(clock, tmp_path, channel) -> None:
    week = CheckpointSettings(segments=4, keep_s=1000)
    async with volume(tmp_path / "a", telling=told(channel, week)) as v:
        await make_some(v, 60)
        now_ns = int((1 + trio.current_time()) * 1e9)
        kept = await manifests(channel)
        assert 3 <= len(kept) < 12
        assert kept[0].made_ns < now_ns - 1000 * 10**9 < kept[1].made_ns + 300 * 10**9
        found = await named(channel)
        numbers = sorted({number for kind, number, _, _ in found if kind == KIND_SEGMENT})
        assert numbers == list(range(numbers[0], v.publisher.segment + 1))
        assert numbers[0] <= kept[0].head_number + 1  # with the copy in the next one's message
        assert {n for kind, n, _, _ in found if kind == KIND_CHECKPOINT} == {m.number for m in kept}
        own = {o.object_id for k in (2, 3, 4, 5) for o in await v.journal.own_objects(k)}
        extra = {oid for kind, n, _, oid in found if oid not in own}
        assert len(extra) <= 1  # a copy that rides in the oldest segment's message


async def test_the_head_is_kept_though_all_checkpoints_are_newer(clock, tmp_path, channel) -> None:
    soon = CheckpointSettings(segments=2, keep_s=10)
    async with volume(tmp_path / "a", telling=told(channel, soon)) as v:
        await make_some(v, 3)
        for _ in range(4):  # as `fsck --repair` wants them
            await v.journal.set_local("checkpoint_wanted", "1")
            await v.publisher.finish()
            await trio.sleep(60)
        head = v.publisher.segment
        assert head in {n for kind, n, _, _ in await named(channel) if kind == KIND_SEGMENT}
        await v.make(b"next")
        await v.publisher.flush()
        assert v.publisher.segment == head + 1


async def test_of_the_claims_the_newest_is_kept(clock, tmp_path, channel) -> None:
    soon = CheckpointSettings(segments=2, keep_s=10)
    for _ in range(4):
        async with volume(tmp_path / "a", telling=told(channel, soon)) as v:
            await make_some(v, 3)
            assert v.fence.reason == ""
            await v.publisher.finish()
    claims = [item for item in await named(channel) if item[0] == KIND_CLAIM]
    assert 1 <= len(claims) <= 2


async def test_nothing_is_dropped_before_the_new_one_is_there(clock, tmp_path, channel) -> None:
    soon = CheckpointSettings(segments=4, keep_s=10)
    async with volume(tmp_path / "a", telling=told(channel, soon)) as v:
        await make_some(v, 14)
        before = {item[3] for item in await named(channel)}
        put = channel.put

        async def no_manifest(packs, *, nonce):
            if len(packs) > 1 and packs[1].filename == RECORD.filename:
                raise DiscordUnavailable("not now")
            return await put(packs, nonce=nonce)

        channel.put = no_manifest
        await make_some(v, 6)
        assert before <= {item[3] for item in await named(channel)}
        channel.put = put
        await until(lambda: not v.publisher.last_error)
        assert not before <= {item[3] for item in await named(channel)}


async def test_what_a_killed_process_had_posted_of_a_checkpoint_is_removed(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        put = channel.put

        async def no_manifest(packs, *, nonce):
            if len(packs) > 1 and packs[1].filename == RECORD.filename:
                raise DiscordUnavailable("not now")
            return await put(packs, nonce=nonce)

        channel.put = no_manifest
        await make_some(v, 6)
        left = {item[3] for item in await named(channel) if item[0] == KIND_CHECKPOINT}
        assert left
        channel.put = put
    async with volume(tmp_path / "a", telling=told(channel)) as v:
        await trio.sleep(400)
        (manifest,) = await manifests(channel)
        there = {item[3] for item in await named(channel) if item[0] == KIND_CHECKPOINT}
        assert there == {part.object_id for part in manifest.parts}
        assert not there & left


async def test_a_large_journal_needs_no_checkpoint_at_each_few_segments(
    clock, tmp_path, channel
) -> None:
    bytes_count = CheckpointSettings(segments=1000, least_bytes=20_000)
    settings = PublishSettings(bound_s=5)
    async with volume(
        tmp_path / "a", telling=told(channel, bytes_count, settings=settings), upload=False
    ) as v:
        for _ in range(40):
            for _ in range(20):
                await v.make(os.urandom(100).hex().encode())
            await trio.sleep(10)
        found = await named(channel)
        sizes = {
            kind: sum(at.size_bytes for k, _, at, _ in found if k == kind)
            for kind in (KIND_SEGMENT, KIND_CHECKPOINT)
        }
        assert len(await manifests(channel)) >= 2
        assert sizes[KIND_CHECKPOINT] <= sizes[KIND_SEGMENT]


def test_segments_are_superseded_while_they_can_be_deleted_together(tmp_path, channel) -> None:
    day_s = 86_400.0

    async def weeks() -> None:
        async with volume(tmp_path / "a", telling=told(channel, CheckpointSettings())) as v:
            await make_some(v, 5 * 24, every_s=day_s / 5)
            now_ns = int((1 + trio.current_time()) * 1e9)
            made_ns = [o.made_ns for o in await v.journal.own_objects(KIND_SEGMENT)]
            assert now_ns - 13 * day_s * 1e9 < min(made_ns) < now_ns - 7 * day_s * 1e9
            there = [n for kind, n, _, _ in await named(channel) if kind == KIND_SEGMENT]
            assert len(set(there)) <= len(made_ns) + 1  # a copy rides in the oldest one's message
            assert 2 <= len(await manifests(channel)) <= 4

    with patch("trio.to_thread.run_sync", inline):
        trio.run(weeks, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_for_a_few_segments_there_is_no_checkpoint(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "a", telling=told(channel, CheckpointSettings())) as v:
        await make_some(v, 8, every_s=86_400.0)
        assert await manifests(channel) == []
