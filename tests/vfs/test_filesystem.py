from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from stashcordfs.errors import FsError, StoreError
from stashcordfs.types import ROOT_INO, Ino
from stashcordfs.vfs import uploading
from stashcordfs.vfs.uploading import UploadSettings

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, volume


async def test_what_was_written_is_read_before_any_upload(clock: object, tmp_path: Path) -> None:
    data = os.urandom(3 * BLOCK + 17)
    async with volume(tmp_path, upload=False) as v:
        ino = await v.make(b"a", data)

        assert await v.read(ino) == data
        assert (await v.fs.getattr(ino)).size == len(data)
        assert v.store.puts == 0


async def test_everything_comes_back_from_the_store_alone(clock: object, tmp_path: Path) -> None:
    data = os.urandom(5 * BLOCK + 1)
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", data)
        await v.fs.sync_remote()
        assert v.blocks.room.dirty_bytes == 0
    shutil.rmtree(tmp_path / "blocks")

    async with volume(tmp_path) as v:
        assert await v.read(ino) == data


async def test_a_clean_cache_is_warm_after_a_remount(clock: object, tmp_path: Path) -> None:
    data = os.urandom(2 * BLOCK)
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", data)
        await v.fs.sync_remote()

    async with volume(tmp_path) as v:
        v.store.offline = True
        assert await v.read(ino) == data


async def test_dirty_blocks_survive_a_killed_process(clock: object, tmp_path: Path) -> None:
    data = os.urandom(2 * BLOCK + 5)
    async with volume(tmp_path, upload=False) as v:
        ino = await v.make(b"a", data)
        await v.durability.commit()

    async with volume(tmp_path) as v:
        assert await v.read(ino) == data
        await v.fs.sync_remote()
        assert v.store.puts == 1


async def test_synced_blocks_survive_a_power_cut_and_others_fall_back(
    clock: object, tmp_path: Path
) -> None:
    old, new = os.urandom(2 * BLOCK), os.urandom(BLOCK)
    async with volume(tmp_path, upload=False) as v:
        ino = await v.make(b"a", old)
        fh = await v.fs.open(ino, 2)
        await v.fs.fsync(fh, False)
        await v.fs.write(fh, 4 * BLOCK, new)
        await v.fs.release(fh)

    async with volume(tmp_path, power_lost=True, upload=False) as v:
        assert (await v.read(ino))[: 2 * BLOCK] == old


async def test_equal_blocks_are_sent_once(clock: object, tmp_path: Path) -> None:
    block = os.urandom(BLOCK)
    async with volume(tmp_path) as v:
        await v.make(b"a", block * 4)
        await v.fs.sync_remote()
        await v.make(b"b", block)
        await v.fs.sync_remote()

        sent = sum(p.stat().st_size for p in (tmp_path / "store").rglob("*") if p.is_file())
        assert BLOCK < sent < 2 * BLOCK


async def test_a_partial_write_over_an_evicted_block_keeps_the_rest(
    clock: object, tmp_path: Path
) -> None:
    data = bytearray(os.urandom(BLOCK))
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", bytes(data))
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        fh = await v.fs.open(ino, 2)

        await v.fs.write(fh, 100, b"x" * 10)
        data[100:110] = b"x" * 10
        await v.fs.write(fh, 8192, b"y" * 4096)
        data[8192 : 8192 + 4096] = b"y" * 4096
        await v.fs.release(fh)

        assert await v.read(ino) == bytes(data)
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        assert await v.read(ino) == bytes(data)


async def test_page_writes_over_an_evicted_block_fetch_nothing(
    clock: object, tmp_path: Path
) -> None:
    data = bytearray(os.urandom(BLOCK))
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", bytes(data))
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        v.store.offline = True
        fh = await v.fs.open(ino, 2)
        await v.fs.write(fh, 4096, b"y" * 4096)
        assert await v.fs.read(fh, 4096, 4096) == b"y" * 4096
        v.store.offline = False
        v.uploader.wake()
        data[4096:8192] = b"y" * 4096
        await v.fs.sync_remote()
        await v.fs.release(fh)
        assert await v.read(ino) == bytes(data)


async def test_a_missing_chunk_is_eio_for_its_range_only(clock: object, tmp_path: Path) -> None:
    async with volume(tmp_path) as v:
        gone = await v.make(b"gone", os.urandom(BLOCK))
        await v.fs.sync_remote()
        kept = await v.make(b"kept", b"kept")
        await v.blocks.evict(at_least=1 << 30)
        v.store.missing = True

        with pytest.raises(FsError) as caught:
            await v.read(gone)

        assert caught.value.errno == errno.EIO
        assert "deleted by hand" in v.reports[-1]
        assert await v.read(kept) == b"kept"
        v.store.missing = False
        assert len(await v.read(gone)) == BLOCK


async def test_an_upload_that_fails_is_tried_again_with_growing_delay(
    clock: object, tmp_path: Path
) -> None:
    async with volume(tmp_path) as v:
        v.store.offline = True
        ino = await v.make(b"a", b"data")
        await trio.sleep(120)

        assert v.uploader.state.failures >= 3
        assert v.blocks.room.dirty_bytes
        v.store.offline = False
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        assert await v.read(ino) == b"data"


async def test_a_write_during_an_upload_is_not_lost(clock: object, tmp_path: Path) -> None:
    async with volume(tmp_path, settings=UploadSettings(delay_s=0.0)) as v:
        ino = await v.make(b"a", b"1" * BLOCK)
        fh = await v.fs.open(ino, 2)
        for n in range(20):
            await v.fs.write(fh, 0, b"%02d" % n)
            await trio.sleep(0.3)
        await v.fs.release(fh)
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)

        assert await v.read(ino) == b"19" + b"1" * (BLOCK - 2)


async def test_writers_wait_for_room_and_get_enospc_when_nothing_moves(
    clock: object, tmp_path: Path
) -> None:
    async with volume(tmp_path, dirty_bytes=8 * BLOCK, deadline_s=5) as v:
        v.store.offline = True
        with pytest.raises(FsError) as caught:
            await v.make(b"a", os.urandom(64 * BLOCK))
        assert caught.value.errno == errno.ENOSPC

        v.store.offline = False
        await v.fs.sync_remote()
        ino = await v.make(b"b", b"x" * (6 * BLOCK))
        assert await v.read(ino) == b"x" * (6 * BLOCK)


async def test_the_cache_stays_below_its_cap(clock: object, tmp_path: Path) -> None:
    async with volume(tmp_path, cache_bytes=20 * BLOCK, dirty_bytes=8 * BLOCK) as v:
        data = os.urandom(64 * BLOCK)
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        for at in range(0, len(data), BLOCK):
            await v.fs.write(fh, at, data[at : at + BLOCK])
            assert v.blocks.room.used_bytes <= 20 * BLOCK
        await v.fs.release(fh)

        assert await v.read(made.ino) == data
        assert v.blocks.room.used_bytes <= 20 * BLOCK


async def test_unlinked_but_open_stays_readable(clock: object, tmp_path: Path) -> None:
    async with volume(tmp_path) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.fs.write(fh, 0, b"still here")
        await v.fs.unlink(ROOT_INO, b"a")

        assert await v.fs.read(fh, 0, 100) == b"still here"
        await v.fs.release(fh)
        with pytest.raises(FsError):
            await v.journal.getattr(made.ino)
        assert v.blocks.room.dirty_bytes == 0


async def test_holes_are_zeros_and_cost_nothing(clock: object, tmp_path: Path) -> None:
    async with volume(tmp_path) as v:
        ino = await v.make(b"a")
        await v.fs.setattr(ino, size=10 * BLOCK)

        assert await v.read(ino) == bytes(10 * BLOCK)
        assert (await v.fs.getattr(ino)).blocks == 0
        fh = await v.fs.open(ino, 2)
        await v.fs.write(fh, 5 * BLOCK, b"x")
        await v.fs.release(fh)
        assert await v.read(ino) == bytes(5 * BLOCK) + b"x" + bytes(5 * BLOCK - 1)


@pytest.mark.parametrize("seed", range(12))
async def test_random_operations_equal_a_bytearray(
    clock: object, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    model = bytearray()
    for _ in range(3):
        async with volume(
            tmp_path, cache_bytes=12 * BLOCK, dirty_bytes=8 * BLOCK,
            settings=UploadSettings(delay_s=0.5),
        ) as v:  # fmt: skip
            found = await v.fs.lookup(ROOT_INO, b"a")
            ino = found.ino if found else await v.make(b"a")
            fh = await v.fs.open(ino, 2)
            for _ in range(60):
                match rng.randrange(8):
                    case 0:
                        size = rng.randrange(12 * BLOCK)
                        await v.fs.setattr(ino, size=size)
                        model = model[:size].ljust(size, b"\0")
                    case 1:
                        await v.blocks.evict(at_least=1 << 30)
                    case 2:
                        await trio.sleep(rng.random())
                    case 3:
                        await v.fs.fsync(fh, False)
                    case 4:
                        at = rng.randrange(12 * BLOCK)
                        assert await v.fs.read(fh, at, BLOCK) == bytes(model[at : at + BLOCK])
                    case _:
                        at = rng.randrange(10 * BLOCK)
                        if rng.random() < 0.5:
                            at -= at % 4096
                        data = rng.randbytes(rng.choice([1, 100, 4096, 8192, 100_000]))
                        await v.fs.write(fh, at, data)
                        model = model.ljust(at, b"\0")
                        model[at : at + len(data)] = data
            await v.fs.release(fh)
            assert await v.read(ino) == bytes(model)
            assert (await v.fs.getattr(ino)).size == len(model)


async def test_equal_blocks_written_together_are_copied_once_each(
    clock: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with volume(tmp_path, settings=UploadSettings(concurrency=2)) as v:
        copied = 0
        snapshot = v.blocks.snapshot

        def counting(live, index):
            nonlocal copied
            copied += 1
            return snapshot(live, index)

        monkeypatch.setattr(v.blocks, "snapshot", counting)
        for n in range(600):  # more than a message holds at once would not matter: they are equal
            await v.make(b"%d" % n, b"same")
        await v.fs.sync_remote()

        assert copied <= 2 * 600
        assert v.store.puts == 1


async def test_a_round_that_cannot_be_built_lets_its_blocks_go(
    clock: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with volume(tmp_path, upload=False, settings=UploadSettings(delay_s=0.0)) as v:
        first, second = await v.make(b"a", b"one"), await v.make(b"b", b"two")
        add = uploading.RequestBuilder.add
        calls = 0

        async def failing(self, key, data, chunk_id):
            nonlocal calls
            calls += 1
            if calls == 2:
                raise StoreError("no room")
            return await add(self, key, data, chunk_id)

        monkeypatch.setattr(uploading.RequestBuilder, "add", failing)
        with pytest.raises(StoreError):
            await v.uploader._build()

        lives = [v.blocks.live[ino] for ino in (first, second)]
        assert [live.dirty[0].sealing for live in lives] == [False, False]
        assert len((await v.uploader._build()).items) == 2


async def test_a_new_file_is_known_to_have_no_attributes_until_it_gets_one(tmp_path: Path) -> None:
    async with volume(tmp_path) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, os.O_RDWR, 0, 0)
        with pytest.raises(FsError) as caught:
            await v.fs.getxattr(made.ino, b"user.a")
        assert caught.value.errno == errno.ENODATA

        await v.fs.setxattr(made.ino, b"user.a", b"1")

        assert await v.fs.getxattr(made.ino, b"user.a") == b"1"
        await v.fs.release(fh)


async def test_a_removed_cached_file_leaves_nothing_behind(tmp_path: Path) -> None:
    async with volume(tmp_path) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, os.O_RDWR, 0, 0)
        await v.fs.write(fh, 0, os.urandom(2 * BLOCK + 5))
        await v.fs.release(fh)
        await v.uploader.flush()
        await v.durability.commit()
        assert (v.blocks.clean_blocks, v.blocks.live) == (3, {})

        await v.fs.unlink(ROOT_INO, b"a")

        assert (v.blocks.clean_blocks, v.blocks.room.used_bytes) == (0, 0)
        assert await v.journal.cached_page(-1, 10) == []
        assert await v.journal.chunk_at(made.ino, 1) is None
        with pytest.raises(FsError):
            await v.journal.getattr(made.ino)
        assert v.blocks.files.exists((made.ino, 0))  # until the journal is durable
        await v.durability.sync()
        assert not v.blocks.files.exists((made.ino, 0))


async def test_another_deadline_holds_for_reads_at_once(clock: object, tmp_path: Path) -> None:
    async with volume(tmp_path, deadline_s=600) as v:
        ino = await v.make(b"a", os.urandom(BLOCK))
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)

        async def silent(*_: object) -> bytes:
            await trio.sleep_forever()

        v.store.fetch = silent
        v.fs.limit_reads(7)
        begun = trio.current_time()
        with pytest.raises(FsError):
            await v.read(ino)
        assert trio.current_time() - begun == pytest.approx(7)


async def test_a_read_ahead_that_outlives_its_handle_keeps_later_writes(
    clock: object, tmp_path: Path
) -> None:
    data = os.urandom(8 * BLOCK)
    new = os.urandom(4096)
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", data)
        await v.fs.sync_remote()
        await v.blocks.evict(1 << 30)
        fh = await v.fs.open(ino, os.O_RDONLY)
        await v.fs.read(fh, 0, BLOCK)
        live, fetch, arrived = v.blocks.live[ino], v.store.fetch, trio.Event()

        async def slow(*args):
            await arrived.wait()
            return await fetch(*args)

        v.store.fetch = slow
        v.nursery.start_soon(v.fs._reader._read_ahead, live, 1, 7)
        await trio.testing.wait_all_tasks_blocked()
        await v.fs.release(fh)

        fh = await v.fs.open(ino, os.O_RDWR)
        await v.fs.write(fh, 5 * BLOCK + 4096, new)
        arrived.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        await v.fs.release(fh)
        got = await v.read(ino)

    assert got[5 * BLOCK + 4096 : 5 * BLOCK + 8192] == new
    assert got[: 5 * BLOCK + 4096] == data[: 5 * BLOCK + 4096]
    assert got[5 * BLOCK + 8192 :] == data[5 * BLOCK + 8192 :]


async def test_a_removed_folder_still_has_attributes(clock: object, tmp_path: Path) -> None:
    async with volume(tmp_path) as v:
        made = await v.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0)
        await v.fs.rmdir(ROOT_INO, b"d")
        left = await v.fs.getattr(made.ino)
        assert (left.nlink, left.mode) == (0, made.mode)
        for number in range(1100):  # as long as it is among the last thousand
            await v.make(b"f%d" % number)
            await v.fs.unlink(ROOT_INO, b"f%d" % number)
        with pytest.raises(FsError):
            await v.fs.getattr(made.ino)


async def test_times_beyond_what_is_stored_are_cut(clock: object, tmp_path: Path) -> None:
    async with volume(tmp_path) as v:
        ino = await v.make(b"f")
        far = 253_402_300_799 * 10**9  # the year 9999
        assert (await v.fs.setattr(ino, mtime_ns=far)).mtime_ns == 2**63 - 1
        assert (await v.fs.setattr(ino, atime_ns=-far)).atime_ns == -(2**63 - 1)


async def test_a_truncation_to_the_same_size_leaves_mtime(clock: object, tmp_path: Path) -> None:
    async with volume(tmp_path) as v:
        ino = await v.make(b"f", b"data")
        await v.fs.setattr(ino, mtime_ns=7)
        assert (await v.fs.setattr(ino, size=4)).mtime_ns == 7
        assert (await v.fs.setattr(ino, size=3)).mtime_ns > 7


async def test_entries_of_a_folder_that_changes_come_once(clock: object, tmp_path: Path) -> None:
    async with volume(tmp_path) as v:
        stays = [b"stays-%d" % number for number in range(200)]
        for name in stays:
            await v.make(name)
        fh = await v.fs.opendir(ROOT_INO)
        found: list[bytes] = []
        after = 0
        while page := await v.fs.readdir(fh, after, 7):
            after = page[-1][0]
            names = [name for _, name, _ in page]
            found += names
            turn = len(found)
            await v.make(b"new-%d" % turn)
            await v.make(b"short-lived")
            await v.fs.unlink(ROOT_INO, b"short-lived")
            await v.fs.rename(  # over an entry: it keeps its place
                ROOT_INO, b"new-%d" % turn, ROOT_INO, stays[turn % 200],
                noreplace=False, exchange=False,
            )  # fmt: skip
        assert sorted(name for name in found if name.startswith(b"stays")) == sorted(stays)


async def test_a_removed_fifo_that_is_open_can_be_changed(clock: object, tmp_path: Path) -> None:
    # The kernel opens FIFOs itself: that one is in use, only its requests tell.
    async with volume(tmp_path) as v:
        made = await v.fs.mknod(ROOT_INO, b"fifo", stat.S_IFIFO | 0o644, 0, 0, 0)
        await v.fs.unlink(ROOT_INO, b"fifo")

        changed = await v.fs.setattr(made.ino, mode=0o600)

        assert (stat.S_IFMT(changed.mode), stat.S_IMODE(changed.mode)) == (stat.S_IFIFO, 0o600)
        assert await v.fs.getattr(made.ino) == changed
        with pytest.raises(FsError):
            await v.fs.setattr(Ino(made.ino + 99), mode=0o600)
