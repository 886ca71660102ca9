"""Recovering over the folder store: the state of the last segment, and what is refused."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path

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
from stashcordfs.errors import DiscordUnavailable, FsError, JournalError, StashcordError, StoreError
from stashcordfs.journal import Journal
from stashcordfs.recovery.chain import Fork
from stashcordfs.recovery.rebuild import rebuild_from_packs
from stashcordfs.recovery.recover import NothingFound, Recovery
from stashcordfs.store.record import PostedRecord
from stashcordfs.store.sealed import seal_object
from stashcordfs.store.segment import Claim, Segment, encode_claim, encode_segment
from stashcordfs.types import ROOT_INO, Attributes, Ino, Limits
from stashcordfs.vfs.checkpointing import CheckpointSettings
from stashcordfs.vfs.orphans import SPARED

sys.path.insert(0, str(Path(__file__).parents[1] / "vfs"))
from harness import BLOCK, KEYS, FaultyStore, until, volume

GENESIS = bytes(range(32))
RECORD = PostedRecord("stashcordfs-volume-x-1.json", b"{}")
NEVER = CheckpointSettings(segments=10**9, least_bytes=10**12)
OFTEN = CheckpointSettings(segments=4)


@pytest.fixture
def channel(tmp_path):
    return FaultyStore(tmp_path / "channel", limits=Limits(max_attachment_bytes=8 << 20))


def told(channel, checkpoints=NEVER) -> Telling:
    return Telling(store=channel, genesis=GENESIS, record=RECORD, checkpoints=checkpoints)


def recovery(channel, folder, genesis=GENESIS):
    folder.mkdir(exist_ok=True)
    return Recovery(
        store=channel, keys=KEYS, genesis=genesis, folder=folder, progress=lambda *_: None
    )


@asynccontextmanager
async def recovered(channel, tmp_path, *, store, **wanted):
    """The volume as a new machine has it; with what did not come back."""
    work = tmp_path / "work"
    task = recovery(channel, work)
    found = await task.find(**wanted)
    new = tmp_path / "new"
    new.mkdir()
    built = await task.build(found, new / "journal.sqlite")
    journal = Journal.open(new / "journal.sqlite", clock_ns=lambda: 1)
    lost, older = await journal.note_losses(built.dirty, BLOCK)
    journal.close()
    (new / "store").symlink_to(store)
    async with volume(new, telling=told(channel)) as v:
        v.lost, v.older, v.found = lost, older, found  # type: ignore[attr-defined]
        yield v


async def tree(v, at=ROOT_INO, path=b""):
    """Every path with what it is: attributes that are to come back, and content or its error."""
    fh = await v.fs.opendir(at)
    found = {}
    for _, name, a in (await v.fs.readdir(fh, 0, 10_000))[2:]:
        here = path + b"/" + name
        facts = (a.mode, a.nlink, a.uid, a.gid, a.size, a.mtime_ns, a.ino)
        if a.mode & 0o170000 == 0o040000:
            found[here] = facts
            found |= await tree(v, a.ino, here)
        elif a.mode & 0o170000 == 0o120000:
            found[here] = (facts, await v.fs.readlink(a.ino))
        else:
            try:
                found[here] = (facts, await v.read(a.ino))
            except FsError as error:
                found[here] = (facts, error.errno)
    await v.fs.releasedir(fh)
    return found


async def fill(v):
    folder = await v.fs.mkdir(ROOT_INO, b"folder", 0o750, 3, 4)
    for n in range(20):
        await v.make(b"file-%d" % n, os.urandom(n * 300), parent=folder.ino)
    big = await v.make(b"big", os.urandom(3 * BLOCK + 5))
    await v.fs.link(big, folder.ino, b"other name")
    await v.fs.symlink(ROOT_INO, b"link", b"folder/file-1", 0, 0)
    await v.fs.setxattr(big, b"user.note", b"kept")
    await v.fs.rename(folder.ino, b"file-3", ROOT_INO, b"moved", noreplace=False, exchange=False)
    await v.fs.unlink(folder.ino, b"file-4")
    return big


@pytest.mark.parametrize("checkpoints", [NEVER, OFTEN])
async def test_what_was_synced_comes_back_whole_and_can_be_written_to(
    clock, tmp_path, channel, checkpoints
) -> None:
    async with volume(tmp_path / "old", telling=told(channel, checkpoints)) as v:
        for n in range(6):
            await v.make(b"round-%d" % n, os.urandom(BLOCK))
            await v.fs.sync_remote()
        big = await fill(v)
        await v.fs.sync_remote()
        before = await tree(v)
        old_head = v.publisher.segment
    async with recovered(channel, tmp_path, store=tmp_path / "old" / "store") as v:
        assert await tree(v) == before
        assert await v.fs.getxattr(big, b"user.note") == b"kept"
        assert (v.lost, v.older, v.found.notes) == ([], [], [])
        assert (v.found.chain.base is not None) == (checkpoints is OFTEN)
        made = await v.make(b"new", b"new content")
        assert made >> 40 == 2
        await v.fs.sync_remote()
        assert v.publisher.segment > old_head
        assert v.fence.reason == ""


async def test_the_old_machine_notices_and_its_words_after_that_are_left_out(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "old", telling=told(channel)) as old:
        await old.make(b"a", b"a")
        await old.fs.sync_remote()
        async with recovered(channel, tmp_path, store=tmp_path / "old" / "store") as new:
            await until(lambda: new.fence.claimed)
            await old.make(b"b", b"b")
            await until(lambda: old.fence.reason)
            await new.make(b"c", b"c")
            await new.fs.sync_remote()
            assert new.fence.reason == ""


async def test_what_never_reached_discord_is_an_error_and_is_listed(
    clock, tmp_path, channel
) -> None:
    async with volume(tmp_path / "old", telling=told(channel)) as v:
        grown = await v.make(b"grown", b"x" * (BLOCK + 100))
        changed = await v.make(b"changed", b"1" * 2 * BLOCK)
        await v.fs.sync_remote()
        v.store.offline = True
        alone = await v.make(b"alone", os.urandom(2 * BLOCK))
        fh = await v.fs.open(grown, 1)
        await v.write(fh, BLOCK + 100, b"y" * (3 * BLOCK))
        await v.fs.release(fh)
        fh = await v.fs.open(changed, 1)
        await v.write(fh, 0, b"2" * BLOCK)
        await v.fs.release(fh)
        hole = await v.make(b"hole")
        await v.fs.setattr(hole, size=10 * BLOCK)
        v.journal.commit()
        await v.publisher.flush()
    async with recovered(channel, tmp_path, store=tmp_path / "old" / "store") as v:
        assert {(at.ino, at.index, at.size_bytes, at.cut) for at in v.lost} == {
            (grown, 1, 3 * BLOCK, True), (alone, 0, BLOCK, False), (alone, 1, BLOCK, False),
        }  # fmt: skip
        assert set(v.older) == {(grown, 1), (changed, 0)}
        assert await v.read(grown) == b"x" * (BLOCK + 100)
        assert await v.read(changed) == b"1" * 2 * BLOCK
        assert await v.read(hole) == bytes(10 * BLOCK)
        with pytest.raises(FsError, check=lambda error: error.errno == errno.EIO):
            await v.read(alone)
        fh = await v.fs.open(alone, 1 | os.O_TRUNC)
        await v.write(fh, 0, b"written anew")
        await v.fs.release(fh)
        await v.fs.sync_remote()
        assert await v.read(alone) == b"written anew"


# ---------------------------------------------------------------------- losses on Discord


async def rounds(tmp_path, channel, count, checkpoints=NEVER):
    async with volume(tmp_path / "old", telling=told(channel, checkpoints)) as v:
        for n in range(count):
            await v.make(b"round-%d" % n, b"%d" % n)
            await v.fs.sync_remote()
        return await tree(v)


async def messages_of(channel, kind):
    found = {}
    for at in await channel.listed(0):
        object_id = object_id_of(at.filename)
        if object_id is not None:
            its, number = KEYS.read_object_id(object_id)
            if its == kind:
                found.setdefault(number, []).append((at.channel, at.message))
    return found


async def test_each_single_message_of_the_journal_can_be_lost(clock, tmp_path, channel) -> None:
    before = await rounds(tmp_path, channel, 6)
    segments = await messages_of(channel, KIND_SEGMENT)
    newest = max(segments)
    for message in sorted({where[0] for where in segments.values()}):
        if message == segments[newest][0]:
            continue
        kept = tmp_path / "channel" / str(message[1])
        away = tmp_path / "away"
        kept.rename(away)
        task = recovery(channel, tmp_path / f"work-{message[1]}")
        found = await task.find()
        await task.build(found, tmp_path / f"j-{message[1]}")
        away.rename(kept)
        assert found.head.number == newest
    assert before


async def test_a_gap_is_refused_and_an_earlier_state_offered(clock, tmp_path, channel) -> None:
    await rounds(tmp_path, channel, 6)
    segments = await messages_of(channel, KIND_SEGMENT)
    await channel.delete(segments[3])  # its own message, and the one with the copy
    with pytest.raises(StashcordError, match=r"segment [34] is missing.*--at"):
        await recovery(channel, tmp_path / "work").find()


async def test_a_damaged_checkpoint_is_done_without(clock, tmp_path, channel) -> None:
    before = await rounds(tmp_path, channel, 6, OFTEN)
    parts = await messages_of(channel, KIND_CHECKPOINT)
    for where in parts.values():
        for path in (tmp_path / "channel" / str(where[0][1])).glob("0.*"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
    task = recovery(channel, tmp_path / "work")
    found = await task.find()
    assert found.chain.base is not None
    with pytest.raises(StoreError):
        await task.build(found, tmp_path / "j")
    task.exclude(found, "damaged")
    again = await task.find()
    assert again.chain.base is None
    await task.build(again, tmp_path / "j")
    assert "damaged" in again.notes[-1]
    assert before


async def test_with_a_checkpoint_the_segments_before_it_are_not_needed(
    clock, tmp_path, channel
) -> None:
    await rounds(tmp_path, channel, 6, OFTEN)
    segments = await messages_of(channel, KIND_SEGMENT)
    await channel.delete(segments[1])
    await channel.delete(segments[2])
    found = await recovery(channel, tmp_path / "work").find()
    assert found.chain.base is not None


async def test_an_unfinished_checkpoint_is_not_used(clock, tmp_path, channel) -> None:
    await rounds(tmp_path, channel, 6, OFTEN)
    manifests = await messages_of(channel, KIND_MANIFEST)
    for where in manifests.values():
        await channel.delete(where)
    found = await recovery(channel, tmp_path / "work").find()
    assert found.chain.base is None


# ---------------------------------------------------------------------- what is refused


async def test_a_channel_older_than_expected_is_refused(clock, tmp_path, channel) -> None:
    await rounds(tmp_path, channel, 3)
    newest = max(await messages_of(channel, KIND_SEGMENT))
    assert (await recovery(channel, tmp_path / "w").find(expect=newest)).head.number == newest
    with pytest.raises(StashcordError, match=f"number {newest}, {newest + 1} was expected"):
        await recovery(channel, tmp_path / "w").find(expect=newest + 1)


async def test_an_empty_channel_and_another_volumes_are_refused(clock, tmp_path, channel) -> None:
    with pytest.raises(NothingFound):
        await recovery(channel, tmp_path / "w").find()
    await rounds(tmp_path, channel, 2)
    with pytest.raises(StashcordError, match="segment 0 is missing"):
        await recovery(channel, tmp_path / "w", genesis=b"another").find()


async def test_a_fork_is_refused(clock, tmp_path, channel) -> None:
    await rounds(tmp_path, channel, 3)
    found = await recovery(channel, tmp_path / "w").find()
    head = found.head
    rival = Segment(head.number, head.writer_epoch, 5, 1, head.previous, [])
    made = seal_object(KEYS, KIND_SEGMENT, head.number, encode_segment(rival))
    await channel.put([made], nonce="rival")
    with pytest.raises(Fork, match="two different segments"):
        await recovery(channel, tmp_path / "w").find()


async def test_changes_of_another_format_are_refused(clock, tmp_path, channel) -> None:
    await rounds(tmp_path, channel, 2)
    task = recovery(channel, tmp_path / "w")
    found = await task.find()
    head = found.head
    from stashcordfs.store.segment import Change

    newer = Segment(head.number + 1, 1, 99, 10**18, head.digest, [Change(head.last + 1, 1, b"")])
    made = seal_object(KEYS, KIND_SEGMENT, head.number + 1, encode_segment(newer))
    await channel.put([made], nonce="newer")
    found = await task.find()
    with pytest.raises(StashcordError, match="format 99"):
        await task.build(found, tmp_path / "j")


async def test_a_state_of_before_comes_back(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "old", telling=told(channel, OFTEN)) as v:
        kept = await v.make(b"kept", b"first")
        await v.fs.sync_remote()
        then = int((1 + trio.current_time()) * 1e9)
        await trio.sleep(100)
        before = await tree(v)
        await v.fs.unlink(ROOT_INO, b"kept")
        for n in range(8):
            await v.make(b"later-%d" % n)
            await v.fs.sync_remote()
    async with recovered(channel, tmp_path, store=tmp_path / "old" / "store", at_ns=then) as v:
        assert await tree(v) == before
        assert await v.read(kept) == b"first"
        await v.make(b"goes on", b"from there")
        await v.fs.sync_remote()
        after = await tree(v)
    task = recovery(channel, tmp_path / "work-2")
    found = await task.find()
    assert found.head.writer_epoch == 2
    await task.build(found, tmp_path / "j")
    assert "replaced" in found.notes[0]
    assert after


async def test_what_was_fetched_once_is_not_fetched_again(clock, tmp_path, channel) -> None:
    await rounds(tmp_path, channel, 6, OFTEN)
    task = recovery(channel, tmp_path / "w")
    await task.build(await task.find(), tmp_path / "j")
    fetched = channel.fetched
    task = recovery(channel, tmp_path / "w")
    await task.build(await task.find(), tmp_path / "j2")
    assert channel.fetched == fetched


# ---------------------------------------------------------------------- from packs alone


async def test_packs_alone_bring_names_and_contents_back(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "old", telling=told(channel)) as v:
        await fill(v)
        folder = (await v.fs.lookup(ROOT_INO, b"folder")).ino
        await v.fs.mkdir(folder, b"deep", 0o700, 0, 0)
        deep = (await v.fs.lookup(folder, b"deep")).ino
        await v.make(b"far below", os.urandom(5000), parent=deep)
        await v.fs.sync_remote()
        data = {
            path: (value[0][0], value[1])
            for path, value in (await tree(v)).items()
            if isinstance(value[0], tuple) and isinstance(value[1], bytes) and value[1]
            and value[0][0] & 0o170000 == 0o100000
        }  # fmt: skip
    new = tmp_path / "new"
    new.mkdir()
    store = FaultyStore(tmp_path / "old" / "store")
    outcome = await rebuild_from_packs(
        store, KEYS, new / "journal.sqlite", channels=[1], block_bytes=BLOCK,
        progress=lambda *_: None,
    )  # fmt: skip
    (new / "store").symlink_to(tmp_path / "old" / "store")
    async with volume(new) as v:
        found = await tree(v)
        for path, (mode, content) in data.items():
            assert found[path][0][0] == mode
            assert found[path][1] == content
        assert found[b"/big"][0][1] == 2
        made = await v.make(b"new", b"x")
        assert made >> 40 == outcome.writer_epoch == 2


async def test_who_rebuilds_from_packs_comes_after_every_writer_before(clock, tmp_path) -> None:
    """Whatever inode numbers tell: a writer may have made no file."""
    store = FaultyStore(tmp_path / "store")
    async with volume(tmp_path / "old", other_store=store) as v:
        await v.make(b"file", b"content")
        await v.fs.sync_remote()
    for epoch in (4, 5):
        claim = Claim(bytes(16), epoch, 0, GENESIS, 10**18, "elsewhere")
        made = seal_object(KEYS, KIND_CLAIM, 0, encode_claim(claim))
        await store.put([made], nonce=f"claim-{epoch}")
    outcome = await rebuild_from_packs(
        store, KEYS, tmp_path / "journal.sqlite", channels=[1], block_bytes=BLOCK,
        progress=lambda *_: None,
    )  # fmt: skip
    assert outcome.writer_epoch == 6


async def test_a_journal_rebuilt_from_packs_has_its_changes_in_pieces(clock, tmp_path) -> None:
    """One change of everything would be more than a segment, and than memory, can hold."""
    journal = Journal.create(tmp_path / "journal.sqlite", clock_ns=lambda: 1, uid=0, gid=0)
    before = journal.last_change
    await journal.adopt_nodes(
        (Attributes(Ino(n), 0o100644, 0, 0, 0, 0, 0, 1, 1, 1), [(ROOT_INO, b"%d" % n)])
        for n in range(100, 2000)
    )
    journal.commit()
    assert journal.last_change - before > 3
    assert (await journal.lookup(ROOT_INO, b"1999")).nlink == 1
    journal.close()


async def test_content_without_a_name_is_whole_under_lost_and_found(
    clock, tmp_path, monkeypatch
) -> None:
    async def none(*_):
        return []

    content = {}
    async with volume(tmp_path / "old") as v:
        before = await v.fs.mkdir(ROOT_INO, b"lost+found", 0o700, 0, 0)  # of an earlier recovery
        await v.make(b"found", b"named", parent=before.ino)
        await v.fs.sync_remote()
        content[b"/lost+found~%d/found" % before.ino] = b"named"
        monkeypatch.setattr("stashcordfs.vfs.uploading.file_notes", none)
        for n in range(3):
            data = os.urandom(n * BLOCK + 100)
            content[b"/lost+found/inode-%d" % await v.make(b"file-%d" % n, data)] = data
        await v.fs.sync_remote()
    new = tmp_path / "new"
    new.mkdir()
    (new / "store").symlink_to(tmp_path / "old" / "store")
    outcome = await rebuild_from_packs(
        FaultyStore(new / "store"), KEYS, new / "journal.sqlite", channels=[1],
        block_bytes=BLOCK, progress=lambda *_: None,
    )  # fmt: skip
    assert "3 names are lost: see lost+found" in outcome.notes
    async with volume(new) as v:
        found = await tree(v)
        assert {path: found[path][1] for path in content} == content


async def test_a_network_that_goes_ends_a_recovery_with_its_words(
    clock, tmp_path, channel, monkeypatch
) -> None:
    async def gone(*_):
        raise DiscordUnavailable("no network", offline=True)

    async with volume(tmp_path / "old", telling=told(channel)) as v:
        for n in range(3):
            await v.make(b"file-%d" % n, os.urandom(1000 + n))
            await v.fs.sync_remote()
    store = FaultyStore(tmp_path / "old" / "store")
    for one in (channel, store):
        monkeypatch.setattr(one, "fetch", gone)
    with pytest.raises(DiscordUnavailable, match="no network"):
        await recovery(channel, tmp_path / "work").find()
    with pytest.raises(DiscordUnavailable, match="no network"):
        await rebuild_from_packs(
            store, KEYS, tmp_path / "journal.sqlite", channels=[1], block_bytes=BLOCK,
            progress=lambda *_: None,
        )  # fmt: skip


async def test_a_full_disk_ends_a_rebuild_from_packs_with_its_words(
    clock, tmp_path, monkeypatch
) -> None:
    def full(*_):
        raise JournalError("journal: the disk is full")

    async with volume(tmp_path / "old") as v:
        for n in range(3):
            await v.make(b"file-%d" % n, os.urandom(1000 + n))
            await v.fs.sync_remote()
    monkeypatch.setattr("stashcordfs.journal.gathered.Gathered.add", full)
    with pytest.raises(JournalError, match="full"):
        await rebuild_from_packs(
            FaultyStore(tmp_path / "old" / "store"), KEYS, tmp_path / "journal.sqlite",
            channels=[1], block_bytes=BLOCK, progress=lambda *_: None,
        )  # fmt: skip
    assert not list(tmp_path.glob("journal.sqlite*"))


async def test_a_pack_that_is_lost_costs_its_blocks_alone(clock, tmp_path, channel) -> None:
    async with volume(tmp_path / "old") as v:
        for n in range(3):
            await v.make(b"file-%d" % n, os.urandom(1000 + n))
            await v.fs.sync_remote()
    store = FaultyStore(tmp_path / "old" / "store")
    message = (await store.listed(0))[1].message
    for path in (tmp_path / "old" / "store" / str(message)).glob("0.*"):
        path.write_bytes(path.read_bytes()[:-3])
    (tmp_path / "new").mkdir()
    outcome = await rebuild_from_packs(
        store, KEYS, tmp_path / "new" / "journal.sqlite", channels=[1], block_bytes=BLOCK,
        progress=lambda *_: None,
    )  # fmt: skip
    assert "1 packs could not be read" in outcome.notes
    journal = Journal.open(tmp_path / "new" / "journal.sqlite", clock_ns=lambda: 1)
    assert await journal.get_local(SPARED)  # it is no orphan
    journal.close()
    (tmp_path / "new" / "store").symlink_to(tmp_path / "old" / "store")
    async with volume(tmp_path / "new") as v:
        assert sorted(await tree(v)) == [b"/file-0", b"/file-2"]


@pytest.mark.parametrize("how", ["renamed over", "truncated"])
async def test_what_was_replaced_by_content_that_never_got_there_is_in_the_trash(
    clock, tmp_path, channel, how
) -> None:
    old = os.urandom(BLOCK + 9)
    async with volume(tmp_path / "old", telling=told(channel), history_s=1e6) as v:
        ino = await v.make(b"doc", old)
        await v.fs.sync_remote()
        v.uploader.halted = lambda: True
        if how == "truncated":
            fh = await v.fs.open(ino, os.O_WRONLY | os.O_TRUNC)
            await v.write(fh, 0, b"new" * 1000)
            await v.fs.release(fh)
        else:
            await v.make(b"doc.new", b"new" * 1000)
            await v.fs.rename(
                ROOT_INO, b"doc.new", ROOT_INO, b"doc", noreplace=False, exchange=False
            )
        await v.publisher.flush()
        store = tmp_path / "old" / "store"
    async with recovered(channel, tmp_path, store=store) as v:
        doc = await v.fs.lookup(ROOT_INO, b"doc")
        assert [one.ino for one in v.lost] == [doc.ino]
        with pytest.raises(FsError):
            await v.read(doc.ino)
        (item,) = [item async for item in v.trash.items()]
        assert (item.path, item.entry.lost_blocks) == (b"doc", 0)
        await v.trash.restore("doc", to="old")
        assert await v.read((await v.fs.lookup(ROOT_INO, b"old")).ino) == old
