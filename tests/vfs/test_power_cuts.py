"""Power cuts at moments that matter, and at moments of chance (`cuts.py`, a small part of it)."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from stashcordfs.errors import LocalDiskError, StashcordError
from stashcordfs.journal.sqlite.database import Database
from stashcordfs.types import PAGE_BYTES, ROOT_INO

sys.path.insert(0, str(Path(__file__).parent))
import cuts
from harness import BLOCK, inline, volume


@pytest.mark.parametrize("seed", range(0, 24, 6))
def test_whatever_is_cut_nothing_synced_is_lost(seed) -> None:
    assert [text for more in range(6) for text in cuts.run(seed + more)] == []


@pytest.mark.parametrize("without", cuts.SYNCS)
def test_without_any_of_the_syncs_something_is_lost(without) -> None:
    assert any(cuts.run(seed, without=without) for seed in range(12))


class Held:
    """Local files' syncs wait inside, as on a slow disk, until they may go on."""

    def __init__(self, v, monkeypatch) -> None:
        self.may = threading.Event()
        sync = v.blocks.files.sync

        def slow(keys):
            self.may.wait(10)
            sync(keys)

        monkeypatch.setattr(v.blocks.files, "sync", slow)


@pytest.mark.parametrize("kept", [0, 100, BLOCK + 100])
async def test_a_file_that_is_cut_and_written_anew_during_a_sync_falls_back(
    tmp_path, monkeypatch, kept
) -> None:  # on the real clock: a thread must be under way
    old, new = os.urandom(2 * BLOCK), os.urandom(2 * BLOCK)
    async with volume(tmp_path / "s", upload=False) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.write(fh, 0, old)
        held, done = Held(v, monkeypatch), trio.Event()

        async def sync() -> None:  # the timer's
            await v.durability.sync()
            done.set()

        v.nursery.start_soon(sync)
        await trio.testing.wait_all_tasks_blocked()
        await v.fs.setattr(made.ino, size=kept)
        await v.write(fh, kept, new[kept:])
        held.may.set()
        await done.wait()

        cuts.Disk(tmp_path / "s").cut(tmp_path / "cut", random.Random(0), power=False)
        await v.fs.release(fh)
    for file in (tmp_path / "cut" / "blocks").glob("n*/*"):
        with file.open("r+b") as local:  # what was not synced is gone
            local.truncate(kept)

    async with volume(tmp_path / "cut", upload=False, power_lost=True) as v:
        assert await v.read(made.ino) == old[:kept]


async def test_an_fsync_that_waited_for_another_waits_for_the_next_one_too(
    tmp_path, monkeypatch
) -> None:
    """Two programs fsync a file while the timer's sync has it: one of them syncs for both."""
    async with volume(tmp_path, upload=False) as v:
        fh, _ = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.fs.write(fh, 0, b"first")
        gates = [trio.Event(), trio.Event()]
        begun: list[int] = []
        returned: list[int] = []

        async def gated(call, *args, **more):
            if call == v.blocks.files.sync:
                begun.append(len(begun))
                await gates[begun[-1]].wait()
            await trio.lowlevel.checkpoint()
            return call(*args)

        monkeypatch.setattr(trio.to_thread, "run_sync", gated)

        async def fsync(number: int) -> None:
            await v.fs.fsync(fh, False)
            returned.append(number)

        v.nursery.start_soon(v.durability.sync)
        await trio.testing.wait_all_tasks_blocked()
        await v.fs.write(fh, 0, b"again")
        v.nursery.start_soon(fsync, 1)
        v.nursery.start_soon(fsync, 2)
        await trio.testing.wait_all_tasks_blocked()
        gates[0].set()
        await trio.testing.wait_all_tasks_blocked()
        assert returned == []
        gates[1].set()
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(returned) == [1, 2]
        assert len(begun) == 2


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """In order: syncs of the journal, and cuts of local files."""
    told: list[str] = []
    sync = Database._sync_wal

    def noted(database):
        sync(database)
        told.append("sync")

    monkeypatch.setattr(Database, "_sync_wal", noted)
    return told


def note_cuts(v, monkeypatch, events) -> None:
    resize = v.blocks.files.resize

    def noted(key, size):
        events.append(f"cut to {size}")
        resize(key, size)

    monkeypatch.setattr(v.blocks.files, "resize", noted)


async def test_synced_bytes_go_after_the_journals_word_at_the_second_cut_too(
    clock, tmp_path, monkeypatch, events
) -> None:
    async with volume(tmp_path, upload=False) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.write(fh, 0, os.urandom(BLOCK))
        await v.fs.fsync(fh, False)
        note_cuts(v, monkeypatch, events)
        events.clear()
        await v.fs.setattr(made.ino, size=9000)
        await v.fs.setattr(made.ino, size=5000)
        assert events == ["sync", "cut to 9000", "sync", "cut to 5000"]
        await v.fs.release(fh)


@pytest.mark.parametrize("power_lost", [False, True])
async def test_synced_bytes_of_an_earlier_run_go_after_the_journals_word(
    clock, tmp_path, monkeypatch, events, power_lost
) -> None:
    async with volume(tmp_path, upload=False) as v:
        ino = await v.make(b"a", os.urandom(BLOCK))
        await v.durability.sync()
    async with volume(tmp_path, upload=False, power_lost=power_lost) as v:
        note_cuts(v, monkeypatch, events)
        events.clear()
        await v.fs.setattr(ino, size=9000)
        assert events == ["sync", "cut to 9000"]


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("size", [100, PAGE_BYTES, BLOCK + 100])
async def test_a_kill_at_any_step_of_a_cut_leaves_the_old_file_or_the_new(
    clock, tmp_path, monkeypatch, size, synced
) -> None:
    """Between the commit and the mark too: neither may speak of pages that the other denies."""
    old, moments = os.urandom(2 * BLOCK), []
    async with volume(tmp_path / "s") as v:
        ino = await v.make(b"a", os.urandom(2 * BLOCK))
        await v.fs.sync_remote()
        await v.blocks.evict(1 << 30)  # what is not marked comes from Discord
        v.store.offline = True
        fh = await v.fs.open(ino, 2)
        await v.write(fh, 0, old)
        await (v.fs.fsync(fh, False) if synced else v.durability.commit())
        disk = cuts.Disk(tmp_path / "s")

        def killed_around(place, name) -> None:
            call = getattr(place, name)

            def around(*args, **more):
                for when in ("before", "after"):
                    if when == "after":
                        result = call(*args, **more)
                    moments.append(f"{len(moments)}, {when} {name}")
                    disk.cut(tmp_path / moments[-1], random.Random(0), power=False)
                return result

            monkeypatch.setattr(place, name, around)

        killed_around(v.journal, "commit")
        killed_around(v.blocks._marks, "update")
        killed_around(v.blocks.files, "resize")
        await v.fs.setattr(ino, size=size)
        monkeypatch.undo()
        monkeypatch.setattr(trio.to_thread, "run_sync", inline)
        await v.fs.release(fh)

    assert len(moments) >= 4
    for moment in moments:
        async with volume(tmp_path / moment, upload=False) as v:
            found = await v.read(ino)
            assert found in (old, old[:size]), moment
            await v.fs.setattr(ino, size=2 * BLOCK)  # nothing that was cut comes back
            assert await v.read(ino) == found.ljust(2 * BLOCK, b"\0"), moment


async def test_what_was_not_synced_never_shows_through_a_hole(clock, tmp_path) -> None:
    async with volume(tmp_path, upload=False) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.write(fh, 0, b"k" * PAGE_BYTES)
        await v.fs.setattr(made.ino, size=2 * BLOCK)
        await v.fs.fsync(fh, False)
        await v.write(fh, 2 * PAGE_BYTES, b"x" * PAGE_BYTES)
        await v.write(fh, BLOCK, b"x" * PAGE_BYTES)
        cuts.Disk(tmp_path).cut(tmp_path / "cut", random.Random(0), power=False)
        await v.fs.release(fh)
    async with volume(tmp_path / "cut", upload=False, power_lost=True) as v:
        fh = await v.fs.open(made.ino, 2)
        await v.write(fh, BLOCK + PAGE_BYTES, b"n" * PAGE_BYTES)
        await v.fs.release(fh)
        wanted = (b"k" * PAGE_BYTES).ljust(BLOCK + PAGE_BYTES, b"\0") + b"n" * PAGE_BYTES
        assert await v.read(made.ino) == wanted.ljust(2 * BLOCK, b"\0")


async def test_pages_that_were_cut_away_have_no_row_any_more(clock, tmp_path) -> None:
    async with volume(tmp_path, upload=False) as v:
        ino = await v.make(b"a", os.urandom(BLOCK))
        await v.durability.sync()
        await v.fs.setattr(ino, size=PAGE_BYTES + 1)
        assert [row[3] for row in await v.journal.all_dirty()] == [0b11]


@pytest.mark.parametrize("power_lost", [False, True])
async def test_synced_bytes_whose_local_file_has_gone_are_an_error_and_never_zeros(
    clock, tmp_path, power_lost, caplog
) -> None:
    async with volume(tmp_path) as v:
        sent = await v.make(b"sent", b"s" * BLOCK)
        await v.fs.sync_remote()
    async with volume(tmp_path, upload=False) as v:
        ino = await v.make(b"a", b"d" * (BLOCK + 100))
        fh = await v.fs.open(sent, 2)
        await v.write(fh, BLOCK, b"more")
        await v.fs.release(fh)
        await v.durability.sync()
        keys = [v.blocks.live[each].key for each in (ino, sent)]
        for key in keys:
            v.blocks.files.remove(key)
    for _ in range(2):
        async with volume(tmp_path, upload=False, power_lost=power_lost) as v:
            assert (await v.fs.getattr(ino)).size == BLOCK + 100
            assert (await v.fs.getattr(sent)).size == BLOCK + 4
            for each, offset in ((ino, 0), (ino, BLOCK), (sent, BLOCK)):
                fh = await v.fs.open(each, 0)
                with pytest.raises(StashcordError):
                    await v.fs.read(fh, offset, 100)
                await v.fs.release(fh)
            fh = await v.fs.open(sent, 0)
            assert await v.fs.read(fh, 0, BLOCK) == b"s" * BLOCK
            await v.fs.release(fh)
            assert await v.journal.all_dirty() == []
    assert caplog.text.count("are gone with their local file path=a") == 2


@pytest.mark.parametrize("power_lost", [False, True])
async def test_synced_bytes_whose_local_file_has_gone_do_not_read_as_what_was_before(
    clock, tmp_path, power_lost
) -> None:
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", b"o" * 3 * BLOCK)
        await v.fs.sync_remote()
    async with volume(tmp_path, upload=False) as v:
        fh = await v.fs.open(ino, 2)
        await v.write(fh, BLOCK, b"n" * 100)
        await v.fs.release(fh)
        await v.durability.sync()
        v.blocks.files.remove(v.blocks.live[ino].key)
    for _ in range(2):
        async with volume(tmp_path, upload=False, power_lost=power_lost) as v:
            fh = await v.fs.open(ino, 0)
            assert await v.fs.read(fh, 0, BLOCK) == b"o" * BLOCK
            with pytest.raises(StashcordError):
                await v.fs.read(fh, BLOCK + 200, 100)  # of the block, as a whole, nothing is sure
            assert await v.fs.read(fh, 2 * BLOCK, BLOCK) == b"o" * BLOCK
            await v.fs.release(fh)
            assert await v.journal.all_dirty() == []


@pytest.mark.parametrize("power_lost", [False, True])
async def test_a_row_of_pages_that_were_cut_away_costs_nothing_without_its_local_file(
    clock, tmp_path, power_lost
) -> None:
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", b"o" * BLOCK)
        await v.fs.sync_remote()
    async with volume(tmp_path, upload=False) as v:
        fh = await v.fs.open(ino, 2)
        await v.write(fh, 10 * PAGE_BYTES, b"n" * PAGE_BYTES)
        await v.fs.fsync(fh, False)
        await v.fs.setattr(ino, size=2 * PAGE_BYTES)
        await v.fs.fsync(fh, False)
        await v.fs.release(fh)
        assert [pages for _, _, _, pages in await v.journal.all_dirty()] == [0]
        v.blocks.files.remove(v.blocks.live[ino].key)
    for _ in range(2):
        async with volume(tmp_path, upload=False, power_lost=power_lost) as v:
            assert await v.read(ino) == b"o" * 2 * PAGE_BYTES
            assert await v.journal.all_dirty() == []


async def test_a_local_file_longer_than_its_inode_is_cut_at_the_start(clock, tmp_path) -> None:
    """Killed between the truncation and the cut of the local file, of which nothing is dirty."""
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", b"d" * 2 * BLOCK)
        await v.fs.sync_remote()
        await v.journal.truncate(ino, BLOCK, BLOCK, 1)
        await v.journal.cached_remove([ino << 32 | 1])
    async with volume(tmp_path) as v:
        await v.fs.setattr(ino, size=2 * BLOCK)
        fh = await v.fs.open(ino, 2)
        await v.write(fh, BLOCK + PAGE_BYTES, b"n")
        await v.fs.release(fh)
        wanted = (b"d" * BLOCK).ljust(BLOCK + PAGE_BYTES, b"\0") + b"n"
        assert await v.read(ino) == wanted.ljust(2 * BLOCK, b"\0")


async def test_no_chunk_is_ever_longer_than_the_size_in_the_journal(clock, tmp_path) -> None:
    """Else the file's next growth would show what was cut away with the size."""
    async with volume(tmp_path) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.fs.write(fh, 0, b"x" * 5000)
        await v.uploader.flush()
        entry = await v.journal.chunk_at(made.ino, 0)
        assert entry is not None
        assert entry.valid_length <= (await v.journal.getattr(made.ino)).size
        await v.fs.release(fh)


async def test_a_closed_file_that_grows_is_forgotten_in_memory(clock, tmp_path) -> None:
    async with volume(tmp_path, upload=False) as v:
        ino = await v.make(b"a")
        await v.fs.setattr(ino, size=5000)
        assert v.blocks.live == {}


async def test_after_a_power_cut_no_dirty_block_counts_as_whole_by_an_old_row(
    clock, tmp_path
) -> None:
    """Its base had been merged beside what was written, without a sync; then the process dies."""
    data = os.urandom(2 * PAGE_BYTES)
    async with volume(tmp_path) as v:
        ino = await v.make(b"a", data)
        await v.fs.sync_remote()
        await v.blocks.evict(1 << 30)
        v.store.offline = True
        fh = await v.fs.open(ino, 2)
        await v.write(fh, 0, b"n" * PAGE_BYTES)
        await v.fs.fsync(fh, False)
        await v.journal.cached_add(ino << 32)  # as when the base is merged, which the cut undoes
        await v.fs.release(fh)
    for power_lost in (True, False):
        async with volume(tmp_path, power_lost=power_lost, upload=False) as v:
            assert await v.journal.cached_page(-1, 10) == []
    async with volume(tmp_path, upload=False) as v:
        assert await v.read(ino) == b"n" * PAGE_BYTES + data[PAGE_BYTES:]


async def test_a_file_emptied_closed_and_written_anew_during_a_sync_falls_back(
    tmp_path, monkeypatch
) -> None:
    """The sync holds an object that was left: another one stands for the inode when it ends."""
    async with volume(tmp_path, upload=False) as v:
        ino = await v.make(b"a", b"x" * 5000)
        held, done = Held(v, monkeypatch), trio.Event()

        async def sync() -> None:  # the timer's
            await v.durability.sync()
            done.set()

        v.nursery.start_soon(sync)
        await trio.testing.wait_all_tasks_blocked()
        await v.fs.setattr(ino, size=0)
        fh = await v.fs.open(ino, 2)
        await v.write(fh, 0, b"y" * 5000)
        await v.durability.commit()
        held.may.set()
        await done.wait()
        assert await v.journal.synced_sizes() == [(ino, 0)]
        await v.fs.release(fh)


async def test_a_write_that_failed_beyond_the_end_leaves_nothing(
    clock, tmp_path, monkeypatch
) -> None:
    """Else it could be neither synced nor sent, and its beginning would show in a later hole."""
    async with volume(tmp_path) as v:
        fh, made = await v.fs.create(ROOT_INO, b"a", 0o644, 2, 0, 0)
        await v.write(fh, 0, b"x" * 5000)
        write = v.blocks.files.write

        def full(key, offset, data):
            write(key, offset, data[:50])
            raise LocalDiskError(errno.ENOSPC)

        with monkeypatch.context() as patch:
            patch.setattr(v.blocks.files, "write", full)
            with pytest.raises(LocalDiskError):
                await v.fs.write(fh, 3 * BLOCK, b"y" * 100)
        await v.fs.fsync(fh, False)
        assert await v.journal.synced_sizes() == []
        await v.fs.sync_remote()
        await v.write(fh, 3 * BLOCK + 100, b"z")
        await v.fs.release(fh)
        assert await v.read(made.ino) == (b"x" * 5000).ljust(3 * BLOCK + 100, b"\0") + b"z"
