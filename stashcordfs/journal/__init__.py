"""The journal: names, attributes, chunk lists, where chunks are, and what is still to upload.

`rules` holds the POSIX rules once, over the `engine` protocol; `sqlite/` is the default engine;
`journal` is the facade of whole transactions that the vfs awaits.
"""

from __future__ import annotations

from stashcordfs.journal.engine import ChunkEntry, Intent
from stashcordfs.journal.journal import Journal
from stashcordfs.journal.trash import Trashed

__all__ = ["ChunkEntry", "Intent", "Journal", "Trashed"]
