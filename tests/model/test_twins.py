"""A small part of `make soak-model`, and that it would notice."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import visible
from mounted import fuse_missing
from sides import Side
from soak_model import Findings, play


@pytest.mark.fuse
@pytest.mark.skipif(bool(fuse_missing()), reason=fuse_missing() or "fuse")
def test_the_mount_and_a_plain_folder_stay_alike(tmp_path):
    findings = Findings(seed=7)
    play(tmp_path, findings, games=4, steps=150)

    assert findings.problems == []
    assert findings.steps > 100
    assert findings.remounts >= 1


# What the comparison sees, on two plain folders


@pytest.fixture
def sides(tmp_path):
    made = (Side(tmp_path / "one"), Side(tmp_path / "other"))
    for side in made:
        side.root.mkdir()
        side.do("open", 0, b"a", os.O_RDWR | os.O_CREAT)
        side.do("pwrite", 0, 0, 5000, 1)
    yield made
    for side in made:
        side.close_all()


def looked(sides):
    return [visible.look(side) for side in sides]


def test_what_is_alike_is_found_alike(sides):
    assert visible.differences(*looked(sides)) == []


@pytest.mark.parametrize(
    "operation",
    [
        ("pwrite", 0, 4999, 1, 2),
        ("ftruncate", 0, 5001),
        ("seek", 0, 1, os.SEEK_SET),
        ("chmod", b"a", 0o600),
        ("link", b"a", b"b"),
        ("setxattr", b"a", "user.a", b"1", 0),
        ("symlink", b"a", b"b"),
        ("unlink", b"a"),
    ],
)
def test_what_one_side_alone_does_is_seen(sides, operation):
    assert sides[0].do(*operation)[0] == "ok"
    assert visible.differences(*looked(sides))


def test_a_time_that_moves_for_nothing_is_seen(sides):
    before = looked(sides)
    sides[0].do("utimens", b"a", 5, 5)
    assert visible.times(before, looked(sides), 0)


def test_a_time_that_stays_behind_is_seen(sides):
    for side in sides:
        side.do("utimens", b"a", 5, 5)
    before = looked(sides)
    sides[1].do("utimens", b"a", 5, "now")
    found = visible.look(sides[1])[b"a"].mtime_ns
    assert visible.times(before, looked(sides), found)


def test_a_failure_is_an_outcome(sides):
    assert sides[0].do("rmdir", b"a") == ("error", "ENOTDIR")
    assert sides[0].do("list_changing", b"changing", 90, 7) == ("ok", [])
