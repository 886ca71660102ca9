"""What fsck has mended of what Discord is told: a bare machine gets the volume back after it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parent))
from damage import edit
from test_recover import BLOCK, channel, fill, recovered, told, tree, volume

from stashcordfs.errors import DiscordUnavailable
from stashcordfs.recovery import fsck
from stashcordfs.types import ROOT_INO

__all__ = ["channel"]

CHANGES_LOST = "DELETE FROM changes WHERE id = (SELECT min(id) FROM changes)"
UNREADABLE = "UPDATE changes SET changeset = x'01'"
FORGET = "UPDATE objects SET object_id = number WHERE kind = 2 AND number > 1"
SEGMENT_LOST = "UPDATE objects SET sealed = NULL WHERE kind = 2 AND message = 0"
SEGMENT_CHANGED = "UPDATE objects SET sealed = x'01' WHERE kind = 2 AND message = 0"


async def _refused(*_, **__):
    raise DiscordUnavailable("no answer")


@pytest.mark.parametrize("damage", [CHANGES_LOST, UNREADABLE, SEGMENT_LOST, SEGMENT_CHANGED])
async def test_what_was_never_told_comes_back_by_a_checkpoint(
    clock, tmp_path, channel, damage
) -> None:
    cut = damage in {SEGMENT_LOST, SEGMENT_CHANGED}
    async with volume(tmp_path / "old", telling=told(channel)) as v:
        await fill(v)
        await v.fs.sync_remote()
        channel.put = _refused
        for name in (b"a", b"b", b"c"):
            await v.make(name, name)
            v.journal.commit()
        if cut:
            await v.publisher._cut()
        else:
            v.publisher.run = _refused
        before = await tree(v)
        v.nursery.cancel_scope.cancel()
    del channel.put
    edit(tmp_path / "old" / "journal.sqlite", damage)
    place = fsck.Place(tmp_path / "old", BLOCK, 0)
    found = fsck.check(place, mounted=False, progress=lambda *_: None)
    assert set(found.errors) == {"objects" if cut else "changes"}
    found = fsck.repair(place, progress=lambda *_: None)
    assert found.clean, found.as_json()
    async with volume(tmp_path / "old", telling=told(channel)) as v:
        await v.fs.sync_remote()
        await v.publisher.finish()
        assert await tree(v) == before
    assert fsck.check(place, mounted=False, progress=lambda *_: None).notes.total() <= 1
    async with recovered(channel, tmp_path, store=tmp_path / "old" / "store") as v:
        assert (v.lost, v.older) == ([], [])
        assert await tree(v) == before
        await v.fs.unlink(ROOT_INO, b"a")
        await v.fs.sync_remote()
        assert v.fence.reason == ""


async def test_a_journal_that_forgot_its_segments_stops_itself_and_forks_nothing(
    clock, tmp_path, channel, monkeypatch
) -> None:
    monkeypatch.setattr("stashcordfs.vfs.journal_channel.OVERLAP", 0)  # ids are no times here
    async with volume(tmp_path / "old", telling=told(channel)) as v:
        await fill(v)
        await v.fs.sync_remote()
        for n in range(3):
            await v.fs.mkdir(ROOT_INO, b"d%d" % n, 0o755, 0, 0)
            await v.fs.sync_remote()
        await trio.sleep(86_400)  # the daily look has seen them all, and will not do so again
        before = await tree(v)
    journal = tmp_path / "old" / "journal.sqlite"
    edit(journal, FORGET)
    place = fsck.Place(tmp_path / "old", BLOCK, 0)
    assert fsck.repair(place, progress=lambda *_: None).repaired
    async with volume(tmp_path / "old", telling=told(channel)) as v:
        await v.fs.mkdir(ROOT_INO, b"more", 0o755, 0, 0)
        await trio.sleep(120)
        assert "another machine" in v.fence.reason
    async with recovered(channel, tmp_path, store=tmp_path / "old" / "store") as v:
        assert await tree(v) == before
