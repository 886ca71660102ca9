"""What a recovery tells of losses."""

from __future__ import annotations

from stashcordfs.daemon.recovering import _losses
from stashcordfs.journal.changes import Lost
from stashcordfs.types import Ino


class Paths:
    async def paths_of(self, ino):
        return [b"file-%d" % ino]

    async def told_path(self, ino):
        return b"file-%d" % ino

    async def names_of(self, ino):
        return []

    async def trash_page(self, after, limit):
        return []


async def test_every_loss_is_told_by_path_however_many_there_are() -> None:
    lost = [Lost(Ino(n), 0, 10) for n in range(3000)]
    older = [(Ino(n), 0) for n in range(5000, 7000)]

    report = await _losses(Paths(), lost, older)

    assert len(report["missing"]) == report["missing_files"] == 3000
    assert len(report["older"]) == report["older_files"] == 2000
