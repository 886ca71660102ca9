"""Mending what the journal says of this machine's own bytes. The caller holds the volume's lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import apsw

from stashcordfs.errors import JournalError
from stashcordfs.journal.outbox import bitmap_of
from stashcordfs.journal.sqlite import schema
from stashcordfs.journal.sqlite.repairs import writable
from stashcordfs.types import DAMAGED_CHUNK, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def lose_blocks(path: Path, blocks: Mapping[tuple[int, int], int], block_bytes: int) -> int:
    """Unsent blocks (inode, index) of which only these pages are left; how many are damaged now.

    What is neither here nor in an older content on Discord is an error when it is read, never
    zeros: then the older content goes with it, as a block has one source for what is not here.
    """
    damaged = 0
    try:
        with writable(path) as connection, connection:
            for (ino, index), pages in blocks.items():
                start = index * block_bytes
                found = connection.execute(
                    "SELECT min(?3, size - ?4), coalesce((SELECT valid_length FROM chunk_list"
                    " WHERE ino = ?1 AND idx = ?2), 0) FROM inodes WHERE ino = ?1 AND size > ?4",
                    (ino, index, block_bytes, start),
                ).fetchone()
                if found is not None and _missing(pages, valid=found[1], end=found[0]):
                    damaged += 1
                    connection.execute(
                        "INSERT OR REPLACE INTO chunk_list VALUES (?,?,?,?)",
                        (ino, index, DAMAGED_CHUNK, found[0]),
                    )
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


def _missing(pages: int, *, valid: int, end: int) -> bool:
    """Whether a block of `end` bytes has some in neither its first `valid` ones nor these pages."""
    beyond = range(valid // PAGE_BYTES, -(-end // PAGE_BYTES)) if valid < end else ()
    return any(not pages >> page & 1 for page in beyond)


def forget_cached(path: Path, blocks: Sequence[tuple[int, int]]) -> None:
    """Blocks (inode, index) that are not here as they should be: fetched anew when read."""
    try:
        with writable(path) as connection, connection:
            for block in blocks:
                connection.execute("DELETE FROM cached WHERE ino = ? AND idx = ?", block)
    except apsw.Error as error:
        raise JournalError(f"the journal {path} cannot be mended: {error}") from error
