"""What `user.stashcordfs.state` and its like say, from a write to Discord."""

from __future__ import annotations

import errno

import pytest
import trio
from harness import BLOCK, volume

from stashcordfs.errors import FsError
from stashcordfs.types import ROOT_INO
from stashcordfs.vfs.telling import LAST_ERROR, PENDING_BYTES, STATE


async def told(v, ino):
    return await v.fs.getxattr(ino, STATE), int(await v.fs.getxattr(ino, PENDING_BYTES))


async def test_a_file_is_local_until_it_is_uploaded(clock, tmp_path):
    async with volume(tmp_path) as v:
        ino = await v.make(b"f", bytes(5000))
        assert await told(v, ino) == (b"local", 8192)
        assert await told(v, ROOT_INO) == (b"local", 8192)
        await v.uploader.flush(lambda _: True)
        assert await told(v, ino) == (b"on-discord", 0)
        assert await told(v, ROOT_INO) == (b"on-discord", 0)


async def test_a_file_whose_message_is_on_its_way_is_uploading(clock, tmp_path):
    async with volume(tmp_path) as v:
        ino = await v.make(b"f", bytes(BLOCK))
        live = v.blocks.live[ino]
        live.dirty[0].sealing = True
        assert await told(v, ino) == (b"uploading", BLOCK)
        live.dirty[0].sealing = False


async def test_a_folder_tells_of_all_below_it(clock, tmp_path):
    async with volume(tmp_path) as v:
        outer = await v.fs.mkdir(ROOT_INO, b"outer", 0o755, 0, 0)
        inner = await v.fs.mkdir(outer.ino, b"inner", 0o755, 0, 0)
        beside = await v.fs.mkdir(ROOT_INO, b"beside", 0o755, 0, 0)
        for number in range(300):
            await v.make(b"%d" % number, b"x", parent=inner.ino)
        nameless, _ = await v.fs.create(inner.ino, b"gone", 0o644, 2, 0, 0)
        await v.fs.write(nameless, 0, b"x")
        await v.fs.unlink(inner.ino, b"gone")
        assert await told(v, outer.ino) == (b"local", 300 * 4096)
        assert await told(v, beside.ino) == (b"on-discord", 0)
        await v.fs.release(nameless)


async def test_they_are_not_listed_and_cannot_be_set(clock, tmp_path):
    async with volume(tmp_path) as v:
        ino = await v.make(b"f")
        for name in (STATE, PENDING_BYTES, LAST_ERROR):
            with pytest.raises(FsError) as refused:
                await v.fs.setxattr(ino, name, b"on-discord")
            assert refused.value.errno == errno.EPERM
        assert await v.fs.listxattr(ino) == []
        assert await v.fs.getxattr(ino, LAST_ERROR) == b""
        await trio.lowlevel.checkpoint()
