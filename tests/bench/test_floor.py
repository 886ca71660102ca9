"""The bench itself is run by hand; what it leans on must not break meanwhile."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).resolve().parents[1] / "support")]
spec = importlib.util.spec_from_file_location("bench", Path(__file__).with_name("run.py"))
assert spec is not None
assert spec.loader is not None
bench = sys.modules["bench"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
reason = importlib.import_module("mounted").fuse_missing()

pytestmark = [pytest.mark.fuse, pytest.mark.skipif(bool(reason), reason=reason or "fuse")]


def test_the_do_nothing_file_system_mounts_and_serves(tmp_path) -> None:
    place = tmp_path / "floor"
    with bench.floor(place):
        (place / "name").write_bytes(b"thrown away")
        assert [path.name for path in place.iterdir()] == ["name"]
        assert (place / "name").stat().st_size == 11
    assert list(place.iterdir()) == []
