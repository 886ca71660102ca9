"""The units are what systemd understands."""

from __future__ import annotations

import os
import re
import shutil
import stat
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


def test_others_may_reach_the_mountpoint_and_a_dead_one_is_no_failure(tmp_path):
    lines = (UNITS[0].parent / "stashcordfs@.service").read_text().splitlines()
    (before,) = [line for line in lines if line.startswith("ExecStartPre=")]
    command = before.removeprefix("ExecStartPre=-/bin/sh -c ").strip("'").replace("$$", "$")
    place = tmp_path / "srv" / "stashcordfs" / "photos"
    environment = {"PATH": os.defpath, "MOUNTPOINT": str(place)}
    subprocess.run(["sh", "-c", command], env=environment, umask=0o077, check=True)
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o755


def test_the_service_has_no_mount_namespace_of_its_own():
    hiding = re.compile(
        r"(Protect(System|Home|Kernel|Control|Proc)|Private|Read(Write|Only)|Inacc)"
    )
    lines = [line for unit in UNITS for line in unit.read_text().splitlines()]
    assert not [line for line in lines if hiding.match(line)]


def test_the_timer_scrubs_the_volume_in_a_month():
    service = next(unit for unit in UNITS if unit.name == "stashcordfs-verify@.service")
    timer = service.with_suffix(".timer").read_text()
    assert "--subset 1/30" in service.read_text()
    assert "OnCalendar=daily" in timer
