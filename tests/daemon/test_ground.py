"""What the state stands on: noted when what the last run left is taken up, not before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stashcordfs.daemon import ground
from stashcordfs.journal import Journal
from stashcordfs.vfs.blocks import Blocks

sys.path.append(str(Path(__file__).resolve().parents[1] / "vfs"))
from harness import volume


@pytest.fixture
def boot(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "boot_id"
    path.write_text("first\n")
    monkeypatch.setattr(ground, "_BOOT_ID", path)
    return path


@pytest.fixture
def journal(tmp_path):
    made = Journal.create(tmp_path / "journal.sqlite", clock_ns=lambda: 1, uid=0, gid=0)
    yield made
    made.close()


async def test_a_power_cut_stays_one_until_the_start_after_it_is_done(tmp_path, boot, journal):
    assert not await ground.power_was_lost(tmp_path, journal)  # its first run
    await ground.stand_here(tmp_path, journal)
    assert not await ground.power_was_lost(tmp_path, journal)

    boot.write_text("second\n")
    for _ in range(2):  # as often as a start is killed in its middle
        assert await ground.power_was_lost(tmp_path, journal)
    await ground.stand_here(tmp_path, journal)
    assert not await ground.power_was_lost(tmp_path, journal)


async def test_a_clean_end_is_no_power_cut_on_whatever_ground(tmp_path, boot, journal):
    await ground.stand_here(tmp_path, journal)
    await ground.ended_cleanly(tmp_path, journal)
    boot.write_text("second\n")
    assert not await ground.power_was_lost(tmp_path, journal)


async def test_a_run_notes_its_ground_when_it_has_taken_up_what_was_left(tmp_path, monkeypatch):
    events: list[str] = []
    load = Blocks.load

    async def loaded(blocks, *, power_lost):
        await load(blocks, power_lost=power_lost)
        events.append("loaded")

    async def begun(_: Journal) -> None:
        events.append("begun")

    monkeypatch.setattr(Blocks, "load", loaded)
    async with volume(tmp_path, upload=False, begun=begun):
        assert events == ["loaded", "begun"]
