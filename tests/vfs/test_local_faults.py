"""The local disk: rot, holes, a full or failing disk, and what a start may believe."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from stashcordfs.errors import FsError, LocalDiskError
from stashcordfs.journal.sqlite.reserve import FOR_CHANGES_BYTES, FOR_REMOVAL_BYTES
from stashcordfs.types import ROOT_INO
from stashcordfs.vfs.room import CacheLimits, Room

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, volume

UNIT = 4096  # of the checksums


def flip(v, ino, offset: int) -> None:
    """Change one byte of the local file behind the program's back."""
    path = Path(v.blocks.files.path((ino, 0)))
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("offset", [0, BLOCK - 1, BLOCK + 70, 2 * BLOCK + 99])
async def test_rot_in_a_clean_block_is_noticed_and_fetched_anew(clock, tmp_path, offset) -> None:
    data = os.urandom(2 * BLOCK + 100)
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", data)
        await v.fs.sync_remote()
        flip(v, ino, offset)

        assert await v.read(ino) == data
        assert v.blocks.rotten == 1
        assert v.store.fetched > 0
        assert await v.read(ino) == data
        assert v.blocks.rotten == 1


async def test_rot_without_a_network_is_an_error_not_wrong_data(clock, tmp_path) -> None:
    async with volume(tmp_path, deadline_s=2) as v:
        ino = await v.make(b"a", os.urandom(BLOCK))
        await v.fs.sync_remote()
        flip(v, ino, 5)
        v.store.offline = True

        with pytest.raises(FsError) as caught:
            await v.read(ino)
        assert caught.value.errno == errno.EIO


async def test_fetched_blocks_have_checksums_too(clock, tmp_path) -> None:
    data = os.urandom(BLOCK)
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", data)
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        assert await v.read(ino) == data
        flip(v, ino, 77)

        assert await v.read(ino) == data
        assert v.blocks.rotten == 1


@pytest.mark.parametrize("size", [1, UNIT - 1, BLOCK // 2, BLOCK + 3])
async def test_a_cut_clean_block_keeps_its_check(clock, tmp_path, size) -> None:
    data = os.urandom(2 * BLOCK)
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", data)
        await v.fs.sync_remote()
        await v.fs.setattr(ino, size=size)
        await v.fs.setattr(ino, size=2 * BLOCK)
        v.store.offline = True

        assert await v.read(ino) == data[:size].ljust(2 * BLOCK, b"\0")
        flip(v, ino, 0)
        v.store.offline = False
        assert await v.read(ino) == data[:size].ljust(2 * BLOCK, b"\0")
        assert v.blocks.rotten == 1


async def test_a_local_file_that_became_shorter_is_never_read_as_zeros(clock, tmp_path) -> None:
    data = os.urandom(2 * BLOCK)
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", data)
        await v.fs.sync_remote()
        os.truncate(v.blocks.files.path((ino, 0)), BLOCK + 5)
        assert await v.read(ino) == data

        dirty = await v.make(b"b", data)
        os.truncate(v.blocks.files.path((dirty, 0)), BLOCK + 5)
        with pytest.raises(LocalDiskError):
            await v.read(dirty)


async def test_a_marked_page_that_was_never_written_is_no_data(
    clock, tmp_path, monkeypatch
) -> None:
    """The process is killed between the mark and the write."""
    data = os.urandom(BLOCK)
    async with volume(tmp_path, upload=False) as v:
        v.nursery.start_soon(v.uploader.run)
        ino = await v.make(b"a", data)
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        v.store.offline = True

        def killed(*_):
            raise LocalDiskError(errno.EIO)

        fh = await v.fs.open(ino, 2)
        with monkeypatch.context() as patch:
            patch.setattr(v.blocks.files, "write", killed)
            update = v.blocks._marks.update
            calls: list[int] = []
            patch.setattr(  # the mark is not taken back either
                v.blocks._marks,
                "update",
                lambda *a: calls.append(1) or len(calls) > 1 or update(*a),
            )
            with pytest.raises(LocalDiskError):
                await v.fs.write(fh, 4096, b"x" * 4096)
    async with volume(tmp_path) as v:
        assert await v.read(ino) == data


async def test_old_checksums_do_not_outlive_an_append_whose_upload_was_the_last_act(
    clock, tmp_path, monkeypatch
) -> None:
    """Killed after the upload's commit, before the next: the block must not end where it did."""
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", b"a" * 4096)
        await v.fs.sync_remote()
        await v.durability.sync()
        fh = await v.fs.open(ino, 2)
        await v.fs.write(fh, 4096, b"b" * 4096)
        await v.durability.commit()
        with monkeypatch.context() as patch:  # what comes after the commit never happens
            patch.setattr(v.journal, "cached_add", _nothing)
            await v.fs.sync_remote()
    async with volume(tmp_path) as v:
        assert await v.read(ino) == b"a" * 4096 + b"b" * 4096


async def _nothing(*_: object) -> None:
    await trio.lowlevel.checkpoint()


async def test_a_file_given_up_during_its_sync_is_no_failure(clock, tmp_path, monkeypatch) -> None:
    async with volume(tmp_path, upload=False) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.fs.write(fh, 0, b"data")
        sync = v.blocks.files.sync

        def late(keys):
            for key in keys:
                v.blocks.files.remove(key)
            sync(keys)

        monkeypatch.setattr(v.blocks.files, "sync", late)
        await v.fs.fsync(fh, False)
        assert v.blocks.live[made.ino].sync_failed is None


async def test_a_failed_sync_is_never_turned_into_a_success(clock, tmp_path, monkeypatch) -> None:
    async with volume(tmp_path) as v:
        v.store.offline = True
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        other, _ = await v.fs.create(ROOT_INO, b"b", 0o644, 2, 0, 0)
        await v.fs.write(fh, 0, b"data")
        await v.fs.write(other, 0, b"data")

        def failing(keys):
            raise LocalDiskError(errno.EIO, "the disk failed")

        with monkeypatch.context() as patch:
            patch.setattr(v.blocks.files, "sync", failing)
            with pytest.raises(LocalDiskError):
                await v.fs.fsync(fh, False)
        for _ in range(2):
            with pytest.raises(LocalDiskError):
                await v.fs.fsync(fh, False)
        await v.fs.fsync(other, False)  # others are not concerned

        v.store.offline = False
        await v.fs.sync_remote()  # Discord has it: the doubt is over
        await v.fs.write(fh, 4, b" and more")
        await v.fs.fsync(fh, False)
        assert await v.read(made.ino) == b"data and more"


async def test_a_full_disk_serves_reads_without_keeping_them(clock, tmp_path, monkeypatch) -> None:
    data = os.urandom(3 * BLOCK)
    async with volume(tmp_path, min_free_bytes=1 << 20) as v:
        ino = await v.make(b"a", data)
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        monkeypatch.setattr(v.blocks.room, "_free_bytes", lambda: 0)
        v.blocks.room._free = -1

        assert await v.read(ino) == data
        assert v.blocks.clean_blocks == 0


async def test_a_disk_filled_by_others_refuses_names_then_removals_and_goes_on_by_itself(
    clock, tmp_path, monkeypatch
) -> None:
    async with volume(tmp_path) as v:
        ino, _ = [await v.make(name, b"x" * 5000) for name in (b"a", b"gone")]
        await v.fs.sync_remote()
        assert v.blocks.room.used_bytes > 0
        reserve = v.journal._db.reserve
        monkeypatch.setattr(reserve, "refill", lambda: None)
        reserve.ahead_bytes = FOR_CHANGES_BYTES - 1
        for refused in (
            lambda: v.make(b"b"),
            lambda: v.fs.symlink(ROOT_INO, b"b", b"a", 0, 0),
            lambda: v.fs.link(ino, ROOT_INO, b"b"),
            lambda: v.fs.rename(ROOT_INO, b"a", ROOT_INO, b"b", noreplace=False, exchange=False),
            lambda: v.fs.setattr(ino, mode=0o600),
            lambda: v.fs.setxattr(ino, b"user.x", b"y"),
        ):
            with pytest.raises(FsError, check=lambda e: e.errno == errno.ENOSPC):
                await refused()
        assert v.blocks.room.used_bytes == 0  # clean blocks gave way first
        assert await v.read(ino) == b"x" * 5000
        await v.fs.setattr(ino, size=10)
        await v.fs.unlink(ROOT_INO, b"gone")
        reserve.ahead_bytes = FOR_REMOVAL_BYTES - 1
        with pytest.raises(FsError, check=lambda e: e.errno == errno.ENOSPC):
            await v.fs.unlink(ROOT_INO, b"a")
        await v.fs.sync_remote()  # what must go on does
        reserve.ahead_bytes = FOR_CHANGES_BYTES
        await v.make(b"b")
        await v.fs.unlink(ROOT_INO, b"a")


async def test_a_full_disk_makes_writers_wait_and_fail_in_the_end(
    clock, tmp_path, monkeypatch
) -> None:
    async with volume(tmp_path, min_free_bytes=1 << 20, deadline_s=5) as v:
        monkeypatch.setattr(v.blocks.room, "_free_bytes", lambda: 0)
        v.blocks.room._free = -1
        with pytest.raises(FsError) as caught:
            await v.make(b"a", b"x")
        assert caught.value.errno == errno.ENOSPC


async def test_writers_are_slowed_down_smoothly(clock) -> None:
    """The nearer the budget's end, the longer a MiB takes; below three quarters it is free."""
    mib = 1 << 20
    limits = CacheLimits(1000 * mib, 0, 100 * mib)

    async def none(at_least: int) -> int:
        await trio.lowlevel.checkpoint()
        return 0

    room = Room(limits, free_bytes=lambda: 1 << 50, evict=none, clock=trio.current_time)
    taken = []
    for _ in range(100):
        begun = trio.current_time()
        await room.for_write(mib)
        taken.append(trio.current_time() - begun)
        room.dirty_bytes += mib

    assert not any(taken[:76])
    assert taken[76:] == sorted(taken[76:])
    assert 0 < taken[77] < 0.05 < taken[99] <= 0.2


async def test_an_fsync_waits_for_the_sync_that_has_its_file_in_hand(
    tmp_path, monkeypatch
) -> None:  # on the real clock: a thread must be under way
    async with volume(tmp_path, upload=False) as v:
        fh, _ = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.fs.write(fh, 0, b"data")
        may, synced = threading.Event(), []
        sync = v.blocks.files.sync

        def slow(keys):
            may.wait(10)
            sync(keys)
            synced.extend(keys)

        monkeypatch.setattr(v.blocks.files, "sync", slow)
        v.nursery.start_soon(v.durability.sync)  # the timer's
        await trio.testing.wait_all_tasks_blocked()
        returned, done = [], trio.Event()

        async def fsync() -> None:
            await v.fs.fsync(fh, False)
            returned.append(list(synced))
            done.set()

        v.nursery.start_soon(fsync)
        await trio.testing.wait_all_tasks_blocked()
        assert not returned
        may.set()
        await done.wait()
        assert returned[0]


async def test_a_read_that_waits_while_its_file_is_cut_gets_nothing(clock, tmp_path) -> None:
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", os.urandom(BLOCK))
        await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
        fetch, may = v.store.fetch, trio.Event()

        async def slow(*args):
            await may.wait()
            return await fetch(*args)

        v.store.fetch = slow
        fh = await v.fs.open(ino, 0)
        got: list[bytes] = []

        async def read() -> None:
            got.append(await v.fs.read(fh, 1000, 100))

        v.nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await v.fs.setattr(ino, size=500)
        may.set()
        await trio.sleep(1)
        assert got == [b""]


async def test_writers_in_line_fail_together_when_nothing_moves(clock, tmp_path) -> None:
    async with volume(tmp_path, dirty_bytes=8 * BLOCK, deadline_s=5) as v:
        v.store.offline = True
        await v.make(b"full", os.urandom(7 * BLOCK))
        begun, failed = trio.current_time(), []

        async def write(name: bytes) -> None:
            try:
                await v.make(name, os.urandom(4 * BLOCK))
            except FsError as error:
                failed.append((error.errno, trio.current_time() - begun))

        async with trio.open_nursery() as nursery:
            for n in range(6):
                nursery.start_soon(write, b"%d" % n)

        assert [code for code, _ in failed] == [errno.ENOSPC] * 6
        assert max(after for _, after in failed) < 10


async def test_a_sync_whose_rows_could_not_be_written_is_owed_still(
    clock, tmp_path, monkeypatch
) -> None:
    async with volume(tmp_path, upload=False) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.fs.write(fh, 0, b"data")

        async def full(*_):
            await trio.lowlevel.checkpoint()
            raise LocalDiskError(errno.ENOSPC)

        with monkeypatch.context() as patch:
            patch.setattr(v.journal, "put_dirty", full)
            with pytest.raises(LocalDiskError):
                await v.fs.fsync(fh, False)
        await v.fs.fsync(fh, False)
        assert [ino for ino, *_ in await v.journal.all_dirty()] == [made.ino]


async def test_doubtful_bytes_are_not_taken_for_a_whole_block(clock, tmp_path, monkeypatch) -> None:
    """After a failed sync the local bytes do not count, neither now nor after a kill."""
    async with volume(tmp_path) as v:
        v.store.offline = True
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.fs.write(fh, 0, os.urandom(BLOCK))
        await v.journal.cached_add(made.ino << 32)  # as after a merge of its base

        def failing(keys):
            raise LocalDiskError(errno.EIO, "the disk failed")

        with monkeypatch.context() as patch:
            patch.setattr(v.blocks.files, "sync", failing)
            with pytest.raises(LocalDiskError):
                await v.fs.fsync(fh, False)
        v.store.offline = False
        await v.fs.sync_remote()
        assert await v.journal.cached_page(-1, 10) == []


async def test_a_size_of_a_file_that_is_no_more_stops_no_start(clock, tmp_path) -> None:
    async with volume(tmp_path, upload=False) as v:
        ino = await v.make(b"a")
        await v.journal.set_attributes(ino, size=10, synced=5)
        await v.journal.purge(await v.journal.getattr(ino), local=False)
        assert await v.journal.synced_sizes() == []
        await v.journal.size_synced(ino, 5, whole=False)  # as a run before this rule left it
    async with volume(tmp_path, power_lost=True) as v:
        assert await v.journal.synced_sizes() == []


async def test_a_file_that_grows_by_truncation_during_a_sync_keeps_its_size(
    tmp_path, monkeypatch
) -> None:  # on the real clock: a thread must be under way
    async with volume(tmp_path, upload=False) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.fs.write(fh, 0, b"x" * 5000)
        await v.fs.fsync(fh, False)
        await v.fs.write(fh, 0, b"y")
        may = threading.Event()
        sync = v.blocks.files.sync

        def slow(keys):
            may.wait(10)
            sync(keys)

        monkeypatch.setattr(v.blocks.files, "sync", slow)
        v.nursery.start_soon(v.durability.sync)  # the timer's
        await trio.testing.wait_all_tasks_blocked()
        await v.fs.setattr(made.ino, size=9000)
        may.set()
        await v.fs.fsync(fh, False)

        assert await v.journal.synced_sizes() == []  # nothing to fall back to
        await v.fs.release(fh)

    async with volume(tmp_path, upload=False, power_lost=True) as v:
        assert (await v.fs.getattr(made.ino)).size == 9000


async def test_what_is_on_discord_does_not_fall_back(tmp_path, monkeypatch) -> None:
    async with volume(tmp_path) as v:
        fh, _ = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.fs.write(fh, 0, b"x" * 5000)
        may = threading.Event()
        sync = v.blocks.files.sync

        def slow(keys):
            may.wait(10)
            sync(keys)

        monkeypatch.setattr(v.blocks.files, "sync", slow)
        v.nursery.start_soon(v.durability.sync)
        await trio.testing.wait_all_tasks_blocked()
        await v.fs.write(fh, 5000, b"z" * 5000)
        await v.uploader.flush()
        may.set()
        await v.durability.sync()

        assert await v.journal.synced_sizes() == []
        await v.fs.release(fh)


@pytest.mark.parametrize("kept", [0, 100])
async def test_a_file_that_is_cut_and_grows_by_truncation_keeps_its_synced_size(
    kept, tmp_path
) -> None:
    async with volume(tmp_path, upload=False) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.fs.write(fh, 0, b"x" * 5000)
        await v.fs.setattr(made.ino, mtime_ns=1)  # the size goes to the journal ahead of the bytes
        await v.fs.setattr(made.ino, size=kept)
        await v.fs.release(fh)
        await v.durability.commit()
        fh = await v.fs.open(made.ino, 2)  # with nothing kept, nothing was left in memory
        await v.fs.setattr(made.ino, size=9000)
        await v.fs.fsync(fh, False)

        assert await v.journal.synced_sizes() == []
        await v.fs.release(fh)

    async with volume(tmp_path, upload=False, power_lost=True) as v:
        assert await v.read(made.ino) == b"x" * kept + bytes(9000 - kept)
