"""Looking at a journal, checking and mending it: what `recovery` uses of the SQLite engine."""

from __future__ import annotations

from stashcordfs.journal.sqlite.checks import (
    check_chunk_lists,
    check_chunks,
    check_inodes,
    check_local,
    check_names,
    check_packs,
    check_reach,
    check_trash,
)
from stashcordfs.journal.sqlite.inspection import Fault, Inspection, inspect, readable
from stashcordfs.journal.sqlite.repairs import LostFile, forget_cached, mend, rebuild_indexes
from stashcordfs.journal.sqlite.salvage import salvage
from stashcordfs.journal.sqlite.schema import VERSION

__all__ = [
    "VERSION",
    "Fault",
    "Inspection",
    "LostFile",
    "check_chunk_lists",
    "check_chunks",
    "check_inodes",
    "check_local",
    "check_names",
    "check_packs",
    "check_reach",
    "check_trash",
    "forget_cached",
    "inspect",
    "mend",
    "readable",
    "rebuild_indexes",
    "salvage",
]
