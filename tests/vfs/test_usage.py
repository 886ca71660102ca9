"""What statfs says is used, and what `max_size` refuses."""

from __future__ import annotations

import errno

import pytest
from harness import BLOCK, volume

from stashcordfs.errors import FsError
from stashcordfs.types import ROOT_INO

PAGE = 4096


async def used(v):
    told = await v.fs.statfs()
    return (told.blocks - told.free) * told.block_bytes


async def test_used_is_what_du_counts_before_and_after_the_upload(clock, tmp_path):
    async with volume(tmp_path) as v:
        ino = await v.make(b"f", b"x" * BLOCK)
        await v.fs.setattr(ino, size=1 << 40)
        assert await used(v) == BLOCK == (await v.fs.getattr(ino)).blocks * 512
        await v.uploader.flush(lambda _: True)
        assert await used(v) == BLOCK == (await v.fs.getattr(ino)).blocks * 512
        await v.fs.setattr(ino, size=PAGE)
        assert await used(v) == PAGE
        await v.fs.unlink(ROOT_INO, b"f")
        assert await used(v) == 0


async def test_used_is_counted_anew_at_the_next_mount(clock, tmp_path):
    async with volume(tmp_path) as v:
        await v.make(b"f", b"x" * BLOCK)
        await v.uploader.flush(lambda _: True)
    async with volume(tmp_path) as v:
        assert await used(v) == BLOCK


async def refused(call):
    with pytest.raises(FsError) as why:
        await call
    return why.value.errno


async def test_a_full_volume_takes_what_it_has_already_and_no_more(clock, tmp_path):
    async with volume(tmp_path) as v:
        v.fs.usage.max_bytes = 2 * BLOCK
        ino = await v.make(b"f", b"x" * BLOCK)
        await v.uploader.flush(lambda _: True)
        fh = await v.fs.open(ino, 2)
        await v.fs.write(fh, BLOCK, b"y" * BLOCK)
        assert (await v.fs.statfs()).free == 0
        assert await refused(v.fs.write(fh, 2 * BLOCK, b"z")) == errno.ENOSPC
        assert await refused(v.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0)) == errno.ENOSPC
        await v.fs.write(fh, PAGE, b"over what was stored")
        await v.fs.write(fh, BLOCK, b"and over what waits")
        await v.fs.setattr(ino, size=4 * BLOCK)  # a hole costs nothing
        assert await refused(v.fs.write(fh, 3 * BLOCK, b"z")) == errno.ENOSPC
        await v.fs.setattr(ino, size=BLOCK)
        await v.fs.write(fh, 3 * BLOCK, b"there is room again")
        await v.fs.release(fh)


async def test_without_a_bound_there_is_room(clock, tmp_path):
    async with volume(tmp_path) as v:
        assert (await v.fs.statfs()).available * PAGE == 1 << 50
