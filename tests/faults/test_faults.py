"""A few rows of the fault matrix in each run of the tests; all of them with `make soak-faults`."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import mounted
from cells import bytes_of
from matrix import Cell, Matrix, Result
from rows import ROWS, WITHOUT_ROW, Row

spec = importlib.util.spec_from_file_location("faults_run", Path(__file__).with_name("run.py"))
assert spec is not None
assert spec.loader is not None
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
]
CHOSEN = [
    "answer lost, nonce forgotten",
    "429, shared",
    "a link expires while read",
    "not yet on the CDN, 404 once",
]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    with Matrix.on(tmp_path_factory.mktemp("faults") / "volume") as running:
        yield running


@pytest.mark.parametrize("name", CHOSEN)
def test_a_fault_is_borne(matrix, name):
    (row,) = [row for row in ROWS if row.name == name]
    result = matrix.run(row)
    assert result.problems == []
    assert min(result.struck) > 0


def test_a_service_that_is_gone_fails_reads_and_nothing_else(matrix):
    row = Row("gone", None, [{"kind": "reset", "for_s": 3600}], may_fail=True)
    result = matrix.run(row, only={"cold read", "cached read", "fsync", "create", "list"})
    assert result.problems == []
    assert result.cells["cold read"].outcome == "EIO"


# The matrix itself: what it calls wrong


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (bytes_of("s", 100), "ok"),
        (bytes_of("s", 99), "SHORT"),
        (bytes(100), "ZEROS"),
        (bytes_of("t", 100), "WRONG"),
    ],
)
def test_a_cell_tells_wrong_data(tmp_path, data, says):
    from cells import main

    (tmp_path / "file").write_bytes(data)
    assert main("read", str(tmp_path / "file"), "s", "100") == says
    assert main("read", str(tmp_path / "none"), "s", "100") == "ENOENT"


def test_every_behaviour_has_a_row_or_a_reason():
    from stashcordfs.sandbox.behaviours import BEHAVIOURS

    assert {row.number for row in ROWS} - {None} | WITHOUT_ROW.keys() == BEHAVIOURS.keys()
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_an_interrupted_run_goes_on_where_the_commit_is_the_same(tmp_path, monkeypatch):
    ran = []

    class Stub:
        def run(self, row):
            ran.append(row.name)
            return Result(row.name, row.number, {"write": Cell("ok", 0.1)}, problems=["bad"])

    monkeypatch.setattr(Matrix, "on", lambda _: contextlib.nullcontext(Stub()))
    rows, state = [Row("a", 1), Row("b", 2)], tmp_path / "state"

    def go(rows, commit):
        kept = run.Kept(state, commit)
        return run.run(rows, tmp_path, jobs=2, kept=kept), kept

    first, _ = go(rows[:1], "abc")
    assert (go(rows[:1], "abc")[0], ran) == (first, ["a"])
    results, kept = go(rows, "abc")
    assert ([result.row for result in results], results[0].problems) == (["a", "b"], ["bad"])
    assert ran == ["a", "b"]
    go(rows, "abc with changes")
    go(rows[1:], "another")
    assert ran == ["a", "b", "a", "b", "b"]
    kept.end()
    assert not state.exists()


def test_a_row_is_judged_by_what_it_may():
    row = Row("r", None, may_fail=True)
    cells = {"cold read": Cell("EIO", 3.1), "sync": Cell("HANG", 20), "write": Cell("EIO", 0.1)}
    result = Result("r", None, cells)
    result.judge(row)
    assert result.problems == ["sync: HANG", "write: EIO"]
