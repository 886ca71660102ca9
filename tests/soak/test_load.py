"""A small part of `make soak-fsx`, -fsstress, -fio and -stress; and what they would see."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
from fio import soak_fio
from fsstress import soak_fsstress
from fsx import Exerciser, Result, Wrong, soak_fsx
from mounted import fuse_missing
from stressors import LEFT_OUT, STRESSORS, soak_stress

mounts = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(fuse_missing()), reason=fuse_missing() or "fuse"),
]


def mounted(test):
    for mark in mounts:
        test = mark(test)
    return test


@mounted
def test_one_file_by_every_kind_of_access(tmp_path):
    result = soak_fsx(tmp_path, minutes=0, seed=3, least=120)

    assert result.problems == []
    assert result.remounts == 1
    assert {"kept_write", "direct_write", "cut"} <= result.operations.keys()


@mounted
def test_many_processes_on_one_tree(tmp_path):
    result = soak_fsstress(tmp_path, minutes=0.04, seed=3, processes=3)

    assert result.problems == []
    assert result.own_files > 0
    assert result.operations["create"] > 0


@mounted
def test_fio_finds_what_it_has_written(tmp_path):
    result = soak_fio(tmp_path, minutes=0, seed=3, size="2m", jobs=("random", "mapped"))

    assert result.problems == []
    assert result.written_bytes == 4 << 20
    assert result.again_bytes == 4 << 20


@mounted
def test_stress_ng_has_nothing_to_say(tmp_path):
    few = ("rename", "fstat")
    result = soak_stress(tmp_path, minutes=0, seconds_each=1, stressors=few)

    assert result.problems == []
    assert all(result.operations[name] for name in few)


# The soaks themselves


def test_no_stressor_is_both_run_and_left_out():
    assert not set(STRESSORS) & LEFT_OUT.keys()


def test_a_byte_that_is_not_as_it_was_written_is_seen(tmp_path):
    exerciser = Exerciser(tmp_path / "file", Result(seed=1))
    for _ in range(20):
        exerciser.append()
    exerciser.check()
    with (tmp_path / "file").open("r+b") as file:
        file.seek(1000)
        file.write(os.urandom(8))
    with pytest.raises(Wrong, match="at 100"):
        exerciser.check()
    exerciser.close()
