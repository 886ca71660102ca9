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
from stashcordfs.journal.sqlite.local_repairs import forget_cached, lose_blocks
from stashcordfs.journal.sqlite.repairs import LostFile, mend, rebuild_indexes
from stashcordfs.journal.sqlite.salvage import salvage
from stashcordfs.journal.sqlite.schema import VERSION
from stashcordfs.journal.sqlite.telling_checks import check_garbage, check_told

__all__ = [
    "VERSION",
    "Fault",
    "Inspection",
    "LostFile",
    "check_chunk_lists",
    "check_chunks",
    "check_garbage",
    "check_inodes",
    "check_local",
    "check_names",
    "check_packs",
    "check_reach",
    "check_told",
    "check_trash",
    "forget_cached",
    "inspect",
    "lose_blocks",
    "mend",
    "readable",
    "rebuild_indexes",
    "salvage",
]
