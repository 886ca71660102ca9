from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.errors import FsError
from stashcordfs.types import ROOT_INO, ObjectId
from stashcordfs.vfs.neighbours import Neighbours

sys.path.insert(0, str(Path(__file__).parent))
from harness import volume

if TYPE_CHECKING:
    from stashcordfs.types import Location

PACK = ObjectId(bytes(16))
SIZE = 20 << 20
CONTENT = os.urandom(1 << 16) * (SIZE >> 16)


def fetched(neighbours: Neighbours, start: int, length: int, pack: ObjectId = PACK) -> int:
    """Read a range as the reader does; how many bytes had to come from the network."""
    found = neighbours.take(pack, start, length)
    count = 0
    if found is None:
        count = neighbours.plan(pack, start, length, size=SIZE)
        data = CONTENT[start : start + count]
        neighbours.keep(pack, start, data)
        found = memoryview(data)[:length]
    assert found == CONTENT[start : start + length]
    return count


def test_a_read_on_its_own_fetches_what_it_needs() -> None:
    neighbours = Neighbours()
    assert fetched(neighbours, 5000, 100) == 100
    assert fetched(neighbours, 9 << 20, 100) == 100  # far from it


def test_reads_that_follow_each_other_take_few_requests() -> None:
    neighbours = Neighbours()
    requests = [fetched(neighbours, at, 4096) for at in range(0, SIZE, 4096)]

    assert sum(1 for count in requests if count) <= 10
    assert sum(requests) <= SIZE  # and nothing is fetched twice


def test_a_long_range_is_fetched_as_it_is() -> None:
    neighbours = Neighbours()
    fetched(neighbours, 0, 100)
    assert fetched(neighbours, 200, 1 << 20) == 1 << 20


def test_few_packs_are_kept() -> None:
    neighbours = Neighbours()
    for number in range(6):
        pack = ObjectId(bytes([number]) * 16)
        fetched(neighbours, 0, 100, pack)
        fetched(neighbours, 100, 100, pack)
    assert fetched(neighbours, 200, 100, ObjectId(bytes([5]) * 16)) == 0
    assert fetched(neighbours, 200, 100, ObjectId(bytes(16))) == 100


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 200_000)), max_size=40))
def test_any_reads_get_their_bytes_and_the_pack_is_not_passed(
    reads: list[tuple[int, int]],
) -> None:
    neighbours = Neighbours()
    for start, length in reads:
        count = fetched(neighbours, start, min(length, SIZE - start))
        assert start + count <= SIZE


async def test_a_tree_of_small_files_is_read_by_few_requests(tmp_path: Path) -> None:
    contents = {b"%03d" % n: os.urandom(3000 + n) for n in range(200)}
    async with volume(tmp_path) as v:
        for name, data in contents.items():
            await v.make(name, data)
        await v.uploader.flush()
    shutil.rmtree(tmp_path / "blocks")

    async with volume(tmp_path) as v:
        ranges: list[int] = []
        fetch = v.store.fetch

        async def counted(location: Location, start: int, length: int) -> bytes:
            ranges.append(length)
            return await fetch(location, start, length)

        v.store.fetch = counted
        for name, data in contents.items():
            found = await v.fs.lookup(ROOT_INO, name)
            fh = await v.fs.open(found.ino, os.O_RDONLY)
            assert await v.fs.read(fh, 0, 1 << 20) == data
            await v.fs.release(fh)

    assert len(ranges) <= 6


async def test_what_came_damaged_once_is_asked_for_again(clock: object, tmp_path: Path) -> None:
    async with volume(tmp_path) as v:
        inos = [await v.make(b"%d" % n, os.urandom(4096)) for n in range(20)]
        await v.fs.sync_remote()
        await v.blocks.evict(1 << 30)
        await v.read(inos[0])
        fetch = v.store.fetch

        async def damaged(*args):
            return bytes(len(await fetch(*args)))

        v.store.fetch = damaged
        with pytest.raises(FsError):
            await v.read(inos[1])
        v.store.fetch = fetch
        for ino in inos[1:]:
            assert len(await v.read(ino)) == 4096
