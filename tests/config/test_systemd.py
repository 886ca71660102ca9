"""The units are what systemd understands."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).parents[2] / "systemd").iterdir())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path):
    named = [tmp_path / unit.name.replace("@.", "@photos.") for unit in UNITS]
    for unit, path in zip(UNITS, named, strict=True):
        shutil.copyfile(unit, path)
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, named)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_timer_scrubs_the_volume_in_a_month():
    service = next(unit for unit in UNITS if unit.name == "stashcordfs-verify@.service")
    timer = service.with_suffix(".timer").read_text()
    assert "--subset 1/30" in service.read_text()
    assert "OnCalendar=daily" in timer
