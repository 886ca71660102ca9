"""The fuzzer's targets read their seeds and refuse what is changed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import targets


@pytest.mark.parametrize("target", targets.TARGETS)
def test_a_target_reads_a_seed_and_refuses_another_length(target) -> None:
    seeds = targets.seeds(target)
    assert not all(targets.is_refused(target, data) for data in seeds)
    assert all(targets.is_refused(target, data + b"\1") for data in seeds)
    assert targets.is_refused(target, b"s" + bytes(300))
