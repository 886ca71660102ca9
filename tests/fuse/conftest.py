"""Loads modules of tests/support, which is no package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def load_support():
    folder = str(Path(__file__).parents[1] / "support")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module
