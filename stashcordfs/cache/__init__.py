"""The local block cache: bytes on local disk, bounded. It knows no journal and no network.

`files` keeps one sparse file per inode at the file's own offsets; `marks` says, in a mapped file
that outlives a killed process, which pages were written since their block was last uploaded.
What a block *is* (absent, clean, dirty, being sealed) is decided by `vfs.blocks` alone.
"""

from __future__ import annotations

from stashcordfs.cache.files import LocalFiles, folder_name, read_owners
from stashcordfs.cache.marks import Mark, Marks
from stashcordfs.cache.sums import agrees, sums_of, units_around

__all__ = [
    "LocalFiles",
    "Mark",
    "Marks",
    "agrees",
    "folder_name",
    "read_owners",
    "sums_of",
    "units_around",
]
