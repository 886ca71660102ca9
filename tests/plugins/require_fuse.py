"""With STASHCORDFS_REQUIRE_FUSE=1, a skipped test marked `fuse` is a failed one.

A machine without /dev/fuse would otherwise pass the CI without having mounted anything.
Loaded by `-p require_fuse` (the Makefile puts this directory on PYTHONPATH).
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (
        report.skipped
        and os.environ.get("STASHCORDFS_REQUIRE_FUSE") == "1"
        and item.get_closest_marker("fuse") is not None
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped, but STASHCORDFS_REQUIRE_FUSE=1: {report.longrepr}"
    return report
