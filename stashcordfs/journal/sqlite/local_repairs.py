"""Mending what the journal says of this machine's own bytes. The caller holds the volume's lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import apsw

from stashcordfs.errors import JournalError
from stashcordfs.journal.outbox import bitmap_of
from stashcordfs.journal.sqlite import schema
from stashcordfs.journal.sqlite.repairs import writable
from stashcordfs.types import DAMAGED_CHUNK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def lose_blocks(path: Path, blocks: Mapping[tuple[int, int], int], block_bytes: int) -> int:
    """Unsent blocks (inode, index) of which only these pages are left; how many are damaged now.

    Where Discord has nothing older, what is not there is an error when it is read, never zeros.
    """
    damaged = 0
    try:
        with writable(path) as connection, connection:
            for (ino, index), pages in blocks.items():
                start = index * block_bytes
                connection.execute(
                    "INSERT OR IGNORE INTO chunk_list SELECT ino, ?2, ?3, min(?4, size - ?5)"
                    " FROM inodes WHERE ino = ?1 AND size > ?5",
                    (ino, index, DAMAGED_CHUNK, block_bytes, start),
                )
                if connection.changes():
                    damaged += 1
                    connection.execute(
                        "UPDATE inodes SET stored = (SELECT sum(valid_length) FROM chunk_list l"
                        " WHERE l.ino = inodes.ino) WHERE ino = ?",
                        (ino,),
                    )
                for table in ("dirty", "cached"):
                    if table == "cached" or not pages:
                        connection.execute(
                            f"DELETE FROM {table} WHERE ino = ? AND idx = ?",  # noqa: S608
                            (ino, index),
                        )
                connection.execute(
                    "UPDATE dirty SET pages = ? WHERE ino = ? AND idx = ?",
                    (bitmap_of(pages), ino, index),
                )
            if damaged:  # in no segment
                connection.execute(schema.WANT_CHECKPOINT)
    except apsw.Error as error:
        raise JournalError(f"the journal {path} cannot be mended: {error}") from error
    return damaged


def forget_cached(path: Path, blocks: Sequence[tuple[int, int]]) -> None:
    """Blocks (inode, index) that are not here as they should be: fetched anew when read."""
    try:
        with writable(path) as connection, connection:
            for block in blocks:
                connection.execute("DELETE FROM cached WHERE ino = ? AND idx = ?", block)
    except apsw.Error as error:
        raise JournalError(f"the journal {path} cannot be mended: {error}") from error
