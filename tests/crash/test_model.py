"""The crash tester's own rules: what it allows, and what it tells of."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
ledger = importlib.import_module("ledger")
model = importlib.import_module("model")
checker = importlib.import_module("checker")
pages = importlib.import_module("pages")
PAGE = pages.PAGE_BYTES
CUT = model.Cut(100.0, power=True)


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("commit", "begins"), [("abc", 7), ("abd", 0)])
def test_a_run_goes_on_where_the_commit_is_the_same(tmp_path, monkeypatch, commit, begins):
    run = load("crash_run", HERE / "run.py")
    monkeypatch.setattr(run.evidence, "commit_now", lambda: commit)
    state = tmp_path / "state"
    rows = [{"round": number} for number in range(7)]
    told = {"mode": "kill", "seed": 1, "commit": "abc", "next": 7, "rows": rows}
    state.write_text(json.dumps(told))
    one = run.Run(run._parse(["kill", "--state", str(state)]), tmp_path)
    one.resume()
    assert (one.begin_at, len(one.rows)) == (begins, begins)


def done(number: int, kind: str, **about) -> object:
    return ledger.Operation(number, kind, about, float(number), number + 0.5)


def test_a_hole_that_was_synced_is_zeros_and_nothing_else():
    operations = [
        done(1, "write", file=5, first=0, count=1, version=9, end=PAGE, direct=False),
        done(2, "truncate", file=5, size=3 * PAGE),
        done(3, "fsync", file=5),
    ]
    may = model.allowed(5, model.State(), operations, CUT)
    assert [may.versions(page) for page in range(3)] == [{9}, {0}, {0}]
    assert may.sizes == {3 * PAGE}


def test_a_write_into_a_hole_counts_from_its_sync_on():
    operations = [
        done(1, "truncate", file=5, size=2 * PAGE),
        done(2, "fsync", file=5),
        done(3, "write", file=5, first=1, count=1, version=9, end=2 * PAGE, direct=False),
    ]
    assert model.allowed(5, model.State(), operations, CUT).versions(1) == {0, 9}
    operations.append(done(4, "fsync", file=5))
    assert model.allowed(5, model.State(), operations, CUT).versions(1) == {9}


@pytest.mark.parametrize(("end", "allowed"), [(4 * PAGE, [3878]), (4000, [])])
def test_the_page_of_a_cut_may_be_sent_after_those_behind_it(end, allowed):
    operations = [
        done(1, "write", file=5, first=0, count=1, version=9, end=PAGE, direct=False),
        done(2, "fsync", file=5),
        done(3, "truncate", file=5, size=3878),
        done(4, "write", file=5, first=0, count=-(-end // PAGE), version=10, end=end, direct=False),
    ]
    may = model.allowed(5, model.State(), operations, CUT)
    assert may.zeros_within(0) == allowed
    assert may.versions(0) == {9, 10}
    operations.append(done(5, "fsync", file=5))
    assert model.allowed(5, model.State(), operations, CUT).zeros_within(0) == []


@pytest.mark.parametrize("lost", ["attribute", "link", None])
def test_an_attribute_and_a_link_that_were_synced_must_be_there(tmp_path, lost):
    folder = tmp_path / "w0"
    folder.mkdir()
    maker = pages.PageMaker(1)
    (folder / "f").write_bytes(maker.make(5, 0, 9))
    if lost != "attribute":
        os.setxattr(folder / "f", ledger.XATTR, b"5:-7")
    if lost != "link":
        (folder / "l").symlink_to(ledger.target_of(-8))
    start = model.State({"w0": -1, "w0/f": 5}, {5: (PAGE, [9])})
    operations = [
        done(1, "names", **{ledger.attribute("w0", 5): -7}),
        done(2, "names", **{"w0/l": -8}),
        done(3, "fsync", file=5),
    ]
    found = checker.Checker(tmp_path, maker).check(start, {"w0": operations}, CUT)
    assert bool(found.wrong) == bool(lost)
    if not lost:
        assert found.state.names == {"w0": -1, "w0/f": 5, "w0/l": -8, "w0/#5": -7}


def test_an_empty_file_may_be_any_that_had_its_name_lately(tmp_path):
    """A new file, never synced, was renamed over a synced one: the cut has emptied it."""
    (tmp_path / "w0").mkdir()
    (tmp_path / "w0" / "f").touch()
    start = model.State({"w0": -1, "w0/f": 5}, {5: (PAGE, [9])})
    operations = [
        done(1, "names", **{"w0/g": 6}),
        done(2, "write", file=6, first=0, count=1, version=10, end=PAGE, direct=False),
        done(3, "names", **{"w0/g": None, "w0/f": 6}),
    ]
    check = checker.Checker(tmp_path, pages.PageMaker(1)).check
    found = check(start, {"w0": operations}, model.Cut(4.0, power=True, names_s=5.0))
    assert found.wrong == []
    assert found.state.names["w0/f"] == 6
    synced = [*operations[:1], done(2, "fsync", file=5)]
    assert check(start, {"w0": synced}, model.Cut(4.0, power=True, names_s=5.0)).wrong
