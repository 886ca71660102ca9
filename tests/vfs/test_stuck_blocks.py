"""Dirty blocks that cannot be sent, as their base is lost: told, kept, and no storm of tries."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import trio

from stashcordfs.errors import ContentLost, LocalDiskError
from stashcordfs.types import PAGE_BYTES, ROOT_INO

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, volume


async def half_written(v, name: bytes = b"torn"):
    """A file of which a page was written anew; the rest is on Discord alone, and missing."""
    folder = await v.fs.mkdir(ROOT_INO, b"dir", 0o755, 0, 0)
    ino = await v.make(name, os.urandom(BLOCK), parent=folder.ino)
    await v.fs.sync_remote()
    await v.blocks.evict(at_least=1 << 30)
    v.store.missing = True
    fh = await v.fs.open(ino, 2)
    await v.write(fh, 0, b"n" * PAGE_BYTES)
    await v.fs.release(fh)
    return ino


async def test_a_sync_sends_the_rest_and_then_names_what_cannot_be_sent(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        torn = await half_written(v)
        whole = await v.make(b"whole", os.urandom(BLOCK))
        with pytest.raises(ContentLost, match="kept here: block 0 of /dir/torn: deleted by hand"):
            await v.fs.sync_remote()
        assert list(v.blocks.live[torn].dirty) == [0]
        assert whole not in v.blocks.live  # sent

    async with volume(tmp_path) as v:  # still here at the next mount, and sent when it can be
        fh = await v.fs.open(torn, 0)
        assert await v.fs.read(fh, 0, PAGE_BYTES) == b"n" * PAGE_BYTES
        await v.fs.release(fh)
        await v.fs.sync_remote()
        assert v.blocks.room.dirty_bytes == 0


async def test_an_fsync_that_waits_for_discord_fails_as_well(clock, tmp_path) -> None:
    async with volume(tmp_path, durability="remote") as v:
        ino = await half_written(v)
        fh = await v.fs.open(ino, 2)
        with pytest.raises(ContentLost) as caught:
            await v.fs.fsync(fh, False)
        assert caught.value.errno == errno.EIO
        await v.fs.release(fh)


async def test_what_cannot_be_sent_is_tried_ever_more_seldom_also_when_room_is_short(
    clock, tmp_path
) -> None:
    async with volume(tmp_path) as v:
        await half_written(v)
        await trio.sleep(10)
        before = v.uploader.state.failures
        assert before
        v.blocks.room.pressure.set()
        await trio.sleep(3600)
        assert v.uploader.state.failures - before < 20
        v.store.missing = False
        await trio.sleep(600)
        assert v.blocks.room.dirty_bytes == 0


async def test_a_dirty_block_that_the_disk_does_not_give_back_ends_a_sync(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", os.urandom(BLOCK))
        os.truncate(v.blocks.files.path((ino, 0)), 5)
        with pytest.raises(ContentLost, match="block 0 of /a"):
            await v.fs.sync_remote()


async def test_a_full_disk_does_not_end_a_sync(clock, tmp_path, monkeypatch) -> None:
    async with volume(tmp_path) as v:
        await v.make(b"a", os.urandom(BLOCK))

        def full(*_):
            raise LocalDiskError(errno.ENOSPC)

        with monkeypatch.context() as patch, trio.move_on_after(3600) as scope:
            patch.setattr(v.blocks, "snapshot", full)
            await v.fs.sync_remote()
        assert scope.cancelled_caught
        await v.fs.sync_remote()


async def test_a_long_file_is_forgotten_at_its_removal(clock, tmp_path) -> None:
    """Not a moment later: nothing of it is uploaded any more, nor takes room."""
    async with volume(tmp_path, upload=False) as v:
        await v.make(b"long", os.urandom(300 * BLOCK))
        await v.fs.unlink(ROOT_INO, b"long")
        assert v.blocks.room.dirty_bytes == 0
        assert not v.blocks.queue
        assert v.blocks.live == {}
