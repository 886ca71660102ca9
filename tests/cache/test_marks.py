from __future__ import annotations

import mmap
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.cache import Marks
from stashcordfs.errors import LocalDiskError
from stashcordfs.types import Ino

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 1 << 20


def test_a_mark_outlives_the_object_that_made_it(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "marks", BLOCK)
    slot = marks.claim(Ino(7), 3, 5, 11)
    marks.update(slot, 12, 0b101)

    # no close(): a killed process calls none, the mapping is the kernel's
    (found,) = Marks(tmp_path / "marks", BLOCK)

    assert (found.ino, found.generation, found.index) == (7, 3, 5)
    assert (found.version, found.pages) == (12, 0b101)


def test_a_released_slot_is_used_again(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "marks", BLOCK)
    slot = marks.claim(Ino(7), 0, 0, 1, pages=0b1)
    marks.release(slot)

    assert list(marks) == []
    assert marks.claim(Ino(8), 0, 0, 2) == slot
    assert marks.pages(slot) == 0


def test_the_table_grows(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "marks", BLOCK)
    for n in range(5000):
        marks.claim(Ino(n + 1), 0, n, n + 1)
    marks.close()

    assert len(list(Marks(tmp_path / "marks", BLOCK))) == 5000


def test_another_block_size_is_refused(tmp_path: Path) -> None:
    Marks(tmp_path / "marks", BLOCK).close()

    with pytest.raises(LocalDiskError, match="no such table of this volume"):
        Marks(tmp_path / "marks", BLOCK * 2)


def test_a_table_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    with pytest.raises(LocalDiskError):
        Marks(tmp_path / "missing" / "marks", BLOCK)


def test_a_table_that_cannot_grow_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = Marks(tmp_path / "marks", BLOCK)

    class Full(mmap.mmap):
        def resize(self, newsize: int) -> None:
            raise OSError(28, "No space left on device")

    full = Full(marks._table._fd, 0)
    monkeypatch.setattr(marks._table, "map", full)
    monkeypatch.setattr(marks, "_free", [])

    with pytest.raises(LocalDiskError, match="No space"):
        marks.claim(Ino(1), 0, 0, 1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, (1 << 256) - 1)), max_size=30))
def test_the_table_says_what_was_put_into_it(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]]
) -> None:
    marks = Marks(tmp_path_factory.mktemp("marks") / "marks", BLOCK)
    model: dict[int, tuple[int, int, int]] = {}
    for version, (index, pages) in enumerate(steps, start=1):
        if index in model and pages % 3 == 0:
            marks.release(model.pop(index)[0])
        elif index in model:
            marks.update(model[index][0], version, pages)
            model[index] = (model[index][0], version, pages)
        else:
            slot = marks.claim(Ino(1), 0, index, version, pages=pages)
            model[index] = (slot, version, pages)

    assert {m.index: (m.slot, m.version, m.pages) for m in marks} == model
    marks.close()


def test_a_mark_counts_at_every_moment_of_its_update(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "marks", BLOCK)
    slot = marks.claim(Ino(7), 0, 0, 1 << 40)
    least = 1 << 40
    writer = os.fork()
    if not writer:  # as a mount that may be killed at any instruction
        version = least
        while True:
            version += 1
            marks.update(slot, version, 1)
    try:
        with (tmp_path / "marks").open("rb") as file:
            versions = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)).cast("Q")
        at = (4096 + slot * (32 + BLOCK // 4096 // 8)) // 8 + 3
        ends = time.monotonic() + 0.5
        while time.monotonic() < ends:
            assert all(versions[at] >= least for _ in range(1000))
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
