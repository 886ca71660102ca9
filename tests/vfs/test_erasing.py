"""Purging: nothing of a file is left, on Discord, in history, or here; shown by a search."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from stashcordfs.daemon.assembly import Telling
from stashcordfs.errors import DiscordUnavailable, StashcordError
from stashcordfs.recovery import fsck
from stashcordfs.recovery.rebuild import rebuild_from_packs
from stashcordfs.recovery.recover import Recovery
from stashcordfs.store.record import PostedRecord
from stashcordfs.types import ROOT_INO
from stashcordfs.vfs.checkpointing import CheckpointSettings

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import harness
from harness import BLOCK, KEYS
from opened_up import holding, open_up

volume = partial(harness.volume, history_s=7 * 86_400.0)

GENESIS = bytes(range(32))
RECORD = PostedRecord("stashcordfs-volume-x-1.json", b"{}")
FOLDER = b"Hidden-Folder"
SECRET = b"Secret-Name-of-a-file"
CONTENT = b"what nobody shall read again, "


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0.02)


def told() -> Telling:
    checkpoints = CheckpointSettings(segments=3)
    return Telling(store=None, genesis=GENESIS, record=RECORD, checkpoints=checkpoints)


def secret(blocks: int, version: int = 0) -> bytes:
    """Compressible, so that it is found in clear where it is kept in clear."""
    return (CONTENT + b"%d " % version) * (blocks * BLOCK // len(CONTENT))


async def hits(store, *needles: bytes) -> list[str]:
    """What the store has, opened with the keys, that holds one of the needles."""
    attachments = [
        (at.filename, await store.fetch(at, 0, at.size_bytes)) for at in await store.listed(0)
    ]
    return holding(open_up(attachments, KEYS), *needles)


def local_hits(folder, *needles: bytes) -> list[str]:
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "store" not in path.relative_to(folder).parts
        if any(needle in path.read_bytes() for needle in needles)
    ]


async def fill(v) -> dict[bytes, bytes]:
    """A folder with the secret in several versions, and others that share packs with it."""
    kept = {b"kept-%d" % n: os.urandom(3000 + n) for n in range(4)}
    folder = await v.fs.mkdir(ROOT_INO, FOLDER, 0o755, 0, 0)
    for name, data in kept.items():
        await v.make(name, data, parent=folder.ino)
    ino = await v.make(SECRET, secret(2), parent=folder.ino)
    await v.fs.sync_remote()
    fh = await v.fs.open(ino, os.O_RDWR)
    await v.write(fh, 0, secret(1, 1))  # in place: the old content is history
    await v.fs.release(fh)
    kept[b"later"] = os.urandom(2000)
    await v.make(b"later", kept[b"later"], parent=folder.ino)
    await v.fs.sync_remote()
    fh = await v.fs.open(ino, os.O_RDWR | os.O_TRUNC)  # the old content is in the trash
    await v.write(fh, 0, secret(1, 2))
    await v.fs.release(fh)
    await v.fs.sync_remote()
    await v.make(b"new", secret(1, 3), parent=folder.ino)
    await v.fs.sync_remote()
    await v.fs.rename(folder.ino, b"new", folder.ino, SECRET, noreplace=False, exchange=False)
    await v.fs.sync_remote()
    return kept


async def check_kept(v, kept) -> None:
    folder = await v.fs.lookup(ROOT_INO, FOLDER)
    for name, data in kept.items():
        assert await v.read((await v.fs.lookup(folder.ino, name)).ino) == data


def recovery_of(store, work) -> Recovery:
    work.mkdir()
    return Recovery(store=store, keys=KEYS, genesis=GENESIS, folder=work, progress=lambda *_: None)


async def test_a_purged_file_is_found_nowhere_and_the_others_are_whole(clock, tmp_path) -> None:
    state = tmp_path / "state"
    async with volume(state, telling=told()) as v:
        kept = await fill(v)
        assert len(await hits(v.store, SECRET)) > 5
        assert len(await hits(v.store, CONTENT)) > 3
        assert local_hits(state, SECRET)
        assert local_hits(state, CONTENT)

        plan = await v.eraser.plan(FOLDER.decode() + "/" + SECRET.decode(), recursive=False)
        assert (plan.files, plan.trashed, plan.shared_bytes) == (1, 2, 0)
        done = await v.eraser.purge(plan)

        assert await hits(v.store, SECRET, CONTENT) == []
        assert local_hits(state, SECRET, CONTENT) == []
        assert done.rewritten_messages
        assert done.history_messages
        assert done.still_served == 0
        await v.blocks.evict(at_least=1 << 30)
        await check_kept(v, kept)
        await recovery_of(v.store, tmp_path / "at once").find()
        await v.make(b"after", b"goes on")
        await v.fs.sync_remote()
        recovery = recovery_of(v.store, tmp_path / "work")
        new = tmp_path / "new"
        new.mkdir()
        await recovery.build(await recovery.find(), new / "journal.sqlite")
    (line,) = (state / "audit.log").read_text().splitlines()
    assert json.loads(line)["action"] == "purge"
    place = fsck.Place(state, BLOCK, 0)
    assert fsck.check(place, mounted=False, progress=lambda *_: None).clean
    (new / "store").symlink_to(state / "store")
    async with volume(new, telling=told()) as v:  # as another machine has it
        await check_kept(v, kept)
        assert await v.fs.lookup(ROOT_INO, b"after") is not None


async def test_packs_alone_bring_nothing_of_it_back(clock, tmp_path) -> None:
    async with volume(tmp_path / "state", telling=told()) as v:
        await fill(v)
        where = "/" + FOLDER.decode() + "/" + SECRET.decode()
        await v.eraser.purge(await v.eraser.plan(where, recursive=False))
        path = tmp_path / "packs.sqlite"
        await rebuild_from_packs(
            v.store, KEYS, path, channels=[1], block_bytes=BLOCK, progress=lambda *_: None
        )
    assert SECRET not in path.read_bytes()
    assert b"kept-1" in path.read_bytes()


async def test_what_another_file_holds_stays_and_is_told(clock, tmp_path) -> None:
    async with volume(tmp_path / "state", telling=told()) as v:
        ino = await v.make(SECRET, secret(1))
        await v.make(b"twin", secret(1))
        await v.fs.link(ino, ROOT_INO, b"second-name")
        await v.fs.sync_remote()
        plan = await v.eraser.plan(SECRET.decode(), recursive=False)
        assert plan.shared_with == ["/twin"]
        assert plan.shared_bytes == len(secret(1))
        assert plan.other_names == ["/second-name"]
        await v.eraser.purge(plan)
        assert await hits(v.store, SECRET, b"second-name") == []
        assert await v.fs.lookup(ROOT_INO, b"second-name") is None
        await v.blocks.evict(at_least=1 << 30)
        assert await v.read((await v.fs.lookup(ROOT_INO, b"twin")).ino) == secret(1)


async def test_a_folder_goes_with_all_in_it_and_only_when_that_is_said(clock, tmp_path) -> None:
    state = tmp_path / "state"
    async with volume(state, telling=told()) as v:
        await fill(v)
        await v.make(b"outside", b"x" * 100)
        sub = await v.fs.mkdir((await v.fs.resolve(FOLDER)), b"sub-folder", 0o755, 0, 0)
        await v.make(b"deeper", b"deep" * 1000, parent=sub.ino)
        await v.fs.sync_remote()
        for name in (b"sub-folder/deeper",):
            await v.fs.unlink(await v.fs.resolve(FOLDER + b"/sub-folder"), name.split(b"/")[1])
        await v.fs.rmdir(await v.fs.resolve(FOLDER), b"sub-folder")
        with pytest.raises(StashcordError, match="--recursive"):
            await v.eraser.plan(FOLDER.decode(), recursive=False)
        await v.eraser.purge(await v.eraser.plan(FOLDER.decode(), recursive=True))
        needles = (SECRET, CONTENT, FOLDER, b"kept-", b"deeper", b"deepdeep")
        assert await hits(v.store, *needles) == []
        assert local_hits(state, *needles) == []
        assert await v.read((await v.fs.lookup(ROOT_INO, b"outside")).ino) == b"x" * 100


async def test_an_open_file_is_refused_and_nothing_is_changed(clock, tmp_path) -> None:
    async with volume(tmp_path / "state", telling=told()) as v:
        ino = await v.make(SECRET, secret(1))
        fh = await v.fs.open(ino, 0)
        with pytest.raises(StashcordError, match="is open"):
            await v.eraser.plan(SECRET.decode(), recursive=False)
        await v.fs.release(fh)
        assert await v.read(ino) == secret(1)
        with pytest.raises(StashcordError, match="no such file"):
            await v.eraser.plan("nothing", recursive=False)


@pytest.mark.parametrize(
    ("call", "times"),
    [
        ("put", 0), ("put", 2), ("put", 4), ("delete", 0), ("delete", 1), ("page", 0), ("page", 3),
        ("fetch", 2), ("fetch", 9), ("attachments", 0), ("attachments", 4), ("link", 0),
        ("link", 9),
    ],
)  # fmt: skip
async def test_cut_short_anywhere_the_next_mount_goes_on(
    clock, tmp_path, monkeypatch, call, times
) -> None:
    state = tmp_path / "state"
    async with volume(state, telling=told()) as v:
        kept = await fill(v)
        plan = await v.eraser.plan(FOLDER.decode() + "/" + SECRET.decode(), recursive=False)
        left = times
        real = getattr(v.store, call)

        async def failing(*args, **more):
            nonlocal left
            left -= 1
            if left < 0:
                raise DiscordUnavailable("cut short")
            return await real(*args, **more)

        monkeypatch.setattr(v.store, call, failing)
        with pytest.raises((DiscordUnavailable, trio.TooSlowError)), trio.fail_after(3600):
            await v.eraser.purge(plan)
    async with volume(state, telling=told()) as v:
        v.nursery.start_soon(v.eraser.run)
        with trio.fail_after(7200):
            while await v.journal.get_local("purge") or v.journal.erasing_count:  # noqa: ASYNC110
                await trio.sleep(10)
        assert await hits(v.store, SECRET, CONTENT) == []
        assert local_hits(state, SECRET, CONTENT) == []
        await check_kept(v, kept)


async def test_the_cdn_is_asked_until_it_serves_nothing_of_it(clock, tmp_path, monkeypatch) -> None:
    async with volume(tmp_path / "state", telling=told()) as v:
        await v.make(SECRET, secret(1))
        await v.fs.sync_remote()
        until_s = trio.current_time() + 5 * 3600
        asked = 0

        async def lingers(link):
            nonlocal asked
            asked += 1
            return trio.current_time() < until_s

        monkeypatch.setattr(v.store, "serves", lingers)
        done = await v.eraser.purge(await v.eraser.plan(SECRET.decode(), recursive=False))
        count = done.still_served
        assert count == v.journal.erasing_count > 3
        v.nursery.start_soon(v.eraser.run)
        await trio.sleep(7 * 3600)
        assert v.journal.erasing_count == 0
        assert asked < 20 * count  # with growing pauses
