from __future__ import annotations

import pytest

from stashcordfs.journal import Journal


@pytest.fixture
def journal(tmp_path):
    made = Journal.create(tmp_path / "journal.sqlite", clock_ns=lambda: 7, uid=1000, gid=1000)
    yield made
    made.close()
