"""What packs tell, in whatever order they are read: the newest of each block and name counts."""

from __future__ import annotations

import itertools

import pytest

from stashcordfs.journal.gathered import Gathered
from stashcordfs.journal.snapshot import opened, unkept
from stashcordfs.types import ChunkRef

BLOCK = 1000
IDS = [bytes([n]) * 32 for n in range(6)]


def chunk(number, chunk_id):
    return ChunkRef(chunk_id, b"pack", 7, number, 24 + 100 * number, 100, 90, 1)


OLD = (
    0, 100, [chunk(0, IDS[0]), chunk(1, IDS[1])],
    [(10, 0, 5, IDS[0], 900), (11, 0, 6, IDS[1], 90)],
    [(10, 1, b"old name", 900, 0o100644), (10, 3, b"link", 900, 0o100644)],
)  # fmt: skip
NEW = (
    1, 200, [chunk(0, IDS[2])],
    [(10, 0, 9, IDS[2], 800), (10, 2, 8, IDS[5], 50), (12, 1, 7, IDS[1], 30)],
    [(10, 2, b"new name", 2050, 0o100600)],
)  # fmt: skip


@pytest.fixture(params=[(OLD, NEW), (NEW, OLD)], ids=["in order", "newest first"])
def gathered(request, tmp_path):
    with Gathered.begun(tmp_path / "gathered") as made:
        for pack in request.param:
            made.add(*pack)
        made.settle()
        yield made
    assert list(tmp_path.iterdir()) == []


def test_the_highest_sequence_of_a_block_counts(gathered) -> None:
    assert list(gathered.blocks()) == [
        (10, 0, IDS[2], 800, True),
        (10, 2, IDS[5], 50, False),  # no pack has that chunk
        (11, 0, IDS[1], 90, True),
        (12, 1, IDS[1], 30, True),
    ]


def test_the_names_of_the_newest_pack_count(gathered) -> None:
    assert list(gathered.names()) == [(10, 2050, 0o100600, [(2, b"new name")])]


def test_what_has_no_name_is_told_with_its_end(gathered) -> None:
    assert gathered.nameless(BLOCK) == [(2, True, 0), (11, False, 90), (12, False, 1030)]


def test_chunks_come_back_by_pack(gathered) -> None:
    assert gathered.chunks(0, b"pack", 7) == OLD[2]
    assert gathered.chunks(1, b"pack", 7) == NEW[2]
    assert gathered.chunks(2, b"pack", 7) == []


def test_the_highest_inode_may_be_a_folder_alone(tmp_path) -> None:
    with Gathered.begun(tmp_path / "gathered") as made:
        assert made.highest_ino() == 0
        made.add(*OLD)
        assert made.highest_ino() == 11
        made.add(1, 300, [], [], [(9, 50, b"name", 1, 0o100644)])
        assert made.highest_ino() == 50


def test_several_names_in_one_pack_are_all_kept(tmp_path) -> None:
    with Gathered.begun(tmp_path / "gathered") as made:
        made.add(*OLD)
        made.settle()
        names = list(itertools.chain.from_iterable(found[3] for found in made.names()))
    assert names == [(1, b"old name"), (3, b"link")]


def test_a_scratch_file_is_not_synced(tmp_path) -> None:
    with opened(tmp_path / "scratch") as db:
        unkept(db)
        assert db.pragma("journal_mode") == "off"
        assert db.pragma("synchronous") == 0
