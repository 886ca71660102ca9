from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trio
import trio.testing

sys.path.insert(0, str(Path(__file__).parent))
from harness import inline


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    """A virtual clock; what threads do is done on the loop, or it would jump meanwhile."""
    monkeypatch.setattr(trio.to_thread, "run_sync", inline)
    return trio.testing.MockClock(autojump_threshold=0)
