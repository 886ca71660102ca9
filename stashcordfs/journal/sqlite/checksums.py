"""Checksums of the journal's pages: SQLite's checksum VFS, where this apsw has it.

Each page carries eight bytes of checksum, written with it and compared whenever SQLite reads it
from the disk (https://sqlite.org/cksumvfs.html). A flipped bit is an error then, not another value.
It costs less than can be measured: docs/fsck.md. Pages in the WAL have SQLite's own checksums,
which count when a process opens it.

A journal with checksums must be written by programs that keep them. Where this apsw cannot, they
are taken off when the journal is opened.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

import apsw

if TYPE_CHECKING:
    from apsw import Connection

_RESERVED = 8  # bytes a page; it is this number that makes the VFS check
_EXTENSION = "cksumvfs"


@functools.cache
def available() -> bool:
    """Put the checksum VFS below all connections made from here on; False: apsw has none."""
    try:
        extra = importlib.import_module("apsw.sqlite_extra")
        if not extra.has(_EXTENSION) or not hasattr(apsw.Connection, "reserve_bytes"):
            return False
        connection = apsw.Connection(":memory:")
        try:
            extra.load(connection, _EXTENSION)
        finally:
            connection.close()
    except (ImportError, AttributeError, apsw.Error):
        return False
    return True


def has_checksums(connection: Connection) -> bool:
    """Whether the open database's pages carry checksums."""
    return hasattr(connection, "reserve_bytes") and connection.reserve_bytes() == _RESERVED


def begin(connection: Connection) -> None:
    """Let a new database have checksums, if they are available. Before its first table."""
    if available():
        _reserve(connection, _RESERVED)


def suit(connection: Connection) -> None:
    """Take the checksums off a database if nobody would keep them: they would soon be wrong."""
    if not available() and has_checksums(connection):
        _reserve(connection, 0)


def _reserve(connection: Connection, count: int) -> None:
    # A page's layout does not change in WAL mode (https://sqlite.org/pragma.html#pragma_page_size).
    connection.pragma("journal_mode", "delete")
    connection.reserve_bytes(reserve=count)
    connection.execute("VACUUM")
    connection.pragma("journal_mode", "wal")
