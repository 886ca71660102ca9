"""Where an fsync waits for Discord too: who asks for it, what it waits for, and when it fails."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from stashcordfs.errors import DiscordUnavailable, FsError
from stashcordfs.store.limits import LearnedLimits
from stashcordfs.types import ROOT_INO, Limits
from stashcordfs.vfs import durability
from stashcordfs.vfs.uploading import UploadSettings

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, volume

NAME = b"user.stashcordfs.durability"
LAZY = UploadSettings(delay_s=3600, delay_max_s=7200)  # nothing is sent by its age


async def open_with(v, name: bytes, data: bytes, *, parent=ROOT_INO) -> tuple[int, int]:
    fh, made = await v.fs.create(parent, name, 0o644, os.O_RDWR, 0, 0)
    await v.write(fh, 0, data)
    return fh, made.ino


async def dirty(v, ino: int) -> bool:
    live = v.blocks.live.get(ino)
    return live is not None and any(d.uploaded < d.version for d in live.dirty.values())


async def test_by_default_an_fsync_does_not_wait_for_discord(clock, tmp_path) -> None:
    async with volume(tmp_path, settings=LAZY) as v:
        v.store.offline = True
        fh, ino = await open_with(v, b"a", b"x" * BLOCK)
        await v.fs.fsync(fh, datasync=False)

        assert await dirty(v, ino)
        assert trio.current_time() < 1


async def test_an_fsync_on_a_remote_mount_returns_when_discord_has_the_data(
    clock, tmp_path
) -> None:
    async with volume(tmp_path, settings=LAZY, durability="remote") as v:
        fh, ino = await open_with(v, b"a", b"x" * BLOCK)
        await v.fs.fsync(fh, datasync=True)

        assert not await dirty(v, ino)
        assert v.store.puts == 1


async def test_it_waits_for_its_own_file_and_no_other(clock, tmp_path) -> None:
    async with volume(tmp_path, settings=LAZY, durability="remote") as v:
        _, other = await open_with(v, b"other", os.urandom(BLOCK))
        fh, _ = await open_with(v, b"a", os.urandom(BLOCK))
        await v.fs.fsync(fh, datasync=False)

        assert await dirty(v, other)


def slow(store, *, seconds: float) -> list[float]:
    """Lets each message take so long. The times at which they began."""
    put, begun = store.put, []

    async def slowly(packs, *, nonce):
        begun.append(trio.current_time())
        await trio.sleep(seconds)
        return await put(packs, nonce=nonce)

    store.put = slowly
    return begun


async def test_what_somebody_waits_for_goes_before_what_is_older(clock, tmp_path) -> None:
    async with volume(tmp_path, durability="remote") as v:
        v.store._learned = LearnedLimits(Limits(max_request_bytes=2 * BLOCK))
        begun = slow(v.store, seconds=5)
        _, bulk = await open_with(v, b"bulk", os.urandom(40 * BLOCK))
        _, ino = await open_with(v, b"a", os.urandom(BLOCK // 2))
        await v.durability.remote({v.blocks.live[ino]})

        assert not await dirty(v, ino)
        assert len(v.blocks.live[bulk].dirty) > 30
        assert len(begun) <= 6  # of 21: two were on their way, then two with ours, then two more


async def test_a_folder_asks_for_all_below_it_and_the_nearest_wins(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        outer = (await v.fs.mkdir(ROOT_INO, b"outer", 0o755, 0, 0)).ino
        inner = (await v.fs.mkdir(outer, b"inner", 0o755, 0, 0)).ino
        deep = (await v.fs.mkdir(inner, b"deep", 0o755, 0, 0)).ino
        file = await v.make(b"f", parent=deep)
        remote = v.fs._levels.is_remote

        assert not await remote(file)
        await v.fs.setxattr(outer, NAME, b"remote")
        assert [await remote(i) for i in (ROOT_INO, outer, inner, deep, file)] == [False] + 4 * [
            True
        ]
        await v.fs.setxattr(inner, NAME, b"local")
        assert [await remote(i) for i in (outer, inner, deep, file)] == [True, False, False, False]
        await v.fs.rename(inner, b"deep", outer, b"deep", noreplace=False, exchange=False)
        assert await remote(file)
        await v.fs.removexattr(outer, NAME)
        assert not await remote(file)
        await v.fs.setxattr(ROOT_INO, NAME, b"remote")
        assert [await remote(i) for i in (ROOT_INO, file, inner)] == [True, True, False]


async def test_local_below_a_remote_mount(clock, tmp_path) -> None:
    async with volume(tmp_path, settings=LAZY, durability="remote") as v:
        scratch = (await v.fs.mkdir(ROOT_INO, b"scratch", 0o755, 0, 0)).ino
        await v.fs.setxattr(scratch, NAME, b"local")
        fh, ino = await open_with(v, b"a", b"x" * BLOCK, parent=scratch)
        await v.fs.fsync(fh, datasync=False)

        assert await dirty(v, ino)
        await v.fs.fsyncdir(await v.fs.opendir(ROOT_INO))
        assert await dirty(v, ino)


async def test_of_several_names_one_that_asks_is_enough_and_no_name_never_does(
    clock, tmp_path
) -> None:
    async with volume(tmp_path, durability="remote") as v:
        folder = (await v.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0)).ino
        await v.fs.setxattr(folder, NAME, b"local")
        fh, ino = await open_with(v, b"a", b"x", parent=folder)
        remote = v.fs._levels.is_remote

        assert not await remote(ino)
        await v.fs.link(ino, ROOT_INO, b"b")
        assert await remote(ino)
        await v.fs.unlink(ROOT_INO, b"b")
        await v.fs.unlink(folder, b"a")
        assert not await remote(ino)
        await v.fs.removexattr(folder, NAME)
        assert not await remote(ino)
        await v.fs.fsync(fh, datasync=False)


async def test_the_attribute_is_checked_and_kept(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        folder = (await v.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0)).ino
        file = await v.make(b"f", parent=folder)
        for ino, value, wanted in [
            (folder, b"both", errno.EINVAL),
            (folder, b"", errno.EINVAL),
            (folder, b"remote\n", errno.EINVAL),
            (file, b"remote", errno.ENOTDIR),
        ]:
            with pytest.raises(FsError) as refused:
                await v.fs.setxattr(ino, NAME, value)
            assert refused.value.errno == wanted
            assert list(await v.fs.listxattr(ino)) == []
        await v.fs.setxattr(folder, NAME, b"remote")

    async with volume(tmp_path) as v:
        assert await v.fs.getxattr(folder, NAME) == b"remote"
        assert list(await v.fs.listxattr(folder)) == [NAME]
        assert await v.fs._levels.is_remote(file)


async def test_a_removed_folder_is_forgotten(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        folder = (await v.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0)).ino
        await v.fs.setxattr(folder, NAME, b"remote")
        await v.fs.rmdir(ROOT_INO, b"d")

        assert v.fs._levels._marked == {}


async def test_fsyncdir_waits_for_what_lies_below(clock, tmp_path) -> None:
    async with volume(tmp_path, settings=LAZY, durability="remote") as v:
        folder = (await v.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0)).ino
        sub = (await v.fs.mkdir(folder, b"s", 0o755, 0, 0)).ino
        inside = await v.make(b"a", os.urandom(BLOCK), parent=sub)
        beside = await v.make(b"b", os.urandom(BLOCK))
        await v.fs.fsyncdir(await v.fs.opendir(folder))

        assert not await dirty(v, inside)
        assert await dirty(v, beside)


async def test_fsyncs_that_come_together_share_a_message(clock, tmp_path) -> None:
    async with volume(tmp_path, settings=LAZY, durability="remote") as v:
        handles = [(await open_with(v, b"%d" % n, os.urandom(900)))[0] for n in range(100)]
        async with trio.open_nursery() as nursery:
            for fh in handles:
                nursery.start_soon(v.fs.fsync, fh, False)

        assert v.blocks.room.dirty_bytes == 0
        assert v.store.puts == 1


async def test_without_discord_it_fails_after_the_deadline_and_the_data_is_safe_here(
    clock, tmp_path
) -> None:
    async with volume(tmp_path, deadline_s=60, durability="remote") as v:
        v.store.offline = True
        fh, ino = await open_with(v, b"a", b"x" * BLOCK)
        begun = trio.current_time()
        with pytest.raises(DiscordUnavailable, match="no network"):
            await v.fs.fsync(fh, datasync=False)

        assert 60 <= trio.current_time() - begun < 61

    async with volume(tmp_path, power_lost=True) as v:
        assert await v.read(ino) == b"x" * BLOCK


async def test_a_later_fsync_succeeds_when_discord_is_back_though_the_delay_had_grown(
    clock, tmp_path
) -> None:
    async with volume(tmp_path, deadline_s=60, durability="remote") as v:
        v.store.offline = True
        fh, ino = await open_with(v, b"a", b"x" * BLOCK)
        await trio.sleep(1000)
        v.store.offline = False
        await v.fs.fsync(fh, datasync=False)

        assert not await dirty(v, ino)


async def test_it_waits_as_long_as_something_is_acknowledged(clock, tmp_path) -> None:
    async with volume(tmp_path, deadline_s=6, durability="remote") as v:
        v.store._learned = LearnedLimits(Limits(max_request_bytes=2 * BLOCK))
        slow(v.store, seconds=4)
        fh, ino = await open_with(v, b"a", os.urandom(12 * BLOCK))
        begun = trio.current_time()
        await v.fs.fsync(fh, datasync=False)

        assert trio.current_time() - begun > 8
        assert not await dirty(v, ino)


async def test_many_fsyncs_during_an_outage_ask_no_oftener_than_one(clock, tmp_path) -> None:
    async with volume(tmp_path, deadline_s=60, durability="remote") as v:
        tries = []
        put = v.store.put

        async def counted(packs, *, nonce):
            tries.append(trio.current_time())
            return await put(packs, nonce=nonce)

        v.store.put = counted
        v.store.offline = True

        async def insist(number: int) -> None:
            fh, _ = await open_with(v, b"%d" % number, os.urandom(100))
            for _ in range(10):
                with pytest.raises(DiscordUnavailable):
                    await v.fs.fsync(fh, datasync=False)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(insist, number)

        assert trio.current_time() > 600
        assert len(tries) < 30  # the first delays double from 1 s; then one in half a minute


async def test_no_more_wait_than_leave_room_for_other_requests(
    clock, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(durability, "_MAX_WAITING", 2)
    async with volume(tmp_path, deadline_s=60, durability="remote") as v:
        v.store.offline = True
        handles = [(await open_with(v, b"%d" % n, b"x"))[0] for n in range(3)]
        failed = []

        async def fails(fh: int) -> None:
            with pytest.raises(DiscordUnavailable):
                await v.fs.fsync(fh, datasync=False)
            failed.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            for fh in handles:
                nursery.start_soon(fails, fh)

        assert failed[0] < 1
        assert failed[1] >= 60


async def test_a_block_that_cannot_be_sent_does_not_keep_the_uploader_spinning(
    clock, tmp_path
) -> None:
    async with volume(tmp_path, deadline_s=60) as v:
        ino = await v.make(b"a", os.urandom(BLOCK))
        await v.fs.sync_remote()
        await v.blocks.evict(1 << 40)
        tries = []

        async def fill(live, index):
            tries.append(index)
            raise FsError(errno.EIO)

        v.blocks.fill = fill
        fh = await v.fs.open(ino, os.O_RDWR)
        await v.write(fh, 4096, b"x" * 4096)
        with trio.move_on_after(20):
            await v.fs.sync_remote()

        assert 1 < len(tries) < 10
        assert stat.S_ISREG((await v.fs.getattr(ino)).mode)
