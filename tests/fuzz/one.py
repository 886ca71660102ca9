"""One target under atheris: `python tests/fuzz/one.py TARGET [options of libFuzzer] CORPUS`."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["stashcordfs.store", "stashcordfs.crypto"]):
    import targets

target = sys.argv.pop(1)


def one(data: bytes) -> None:
    targets.is_refused(target, data)


atheris.Setup(sys.argv, one)
atheris.Fuzz()
