"""Recording what changes in the replicated tables: one session of SQLite's for a group.

A session notes each changed row's key and old values as it happens, and compares them with the
table when it is asked for the changeset: what was rolled back or undone leaves no trace
(https://sqlite.org/sessionintro.html). Used inside the group's transaction only, by `Database`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import apsw

from stashcordfs.journal.sqlite.schema import REPLICATED_TABLES

if TYPE_CHECKING:
    from collections.abc import Iterator


class Recorder:
    """One session at a time over one connection."""

    def __init__(self, connection: apsw.Connection) -> None:
        """Idle until `begin`."""
        self._connection = connection
        self._session: apsw.Session | None = None

    def begin(self) -> None:
        """Record from here on, if nothing is recorded yet."""
        if self._session is None:
            session = apsw.Session(self._connection, "main")
            session.config(apsw.SQLITE_SESSION_OBJCONFIG_SIZE, True)  # must precede the tables
            for table in REPLICATED_TABLES:
                session.attach(table)
            self._session = session

    @property
    def size_bytes(self) -> int:
        """An upper bound of the changeset's size so far; costs nothing to ask."""
        return 0 if self._session is None else self._session.changeset_size

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Changes inside are not noted, unless their row is noted already."""
        session = self._session
        if session is None:
            yield
            return
        session.enabled = False
        try:
            yield
        finally:
            session.enabled = True

    def take(self) -> bytes:
        """What has changed since `begin`; empty when nothing has. Idle again."""
        session, self._session = self._session, None
        if session is None:
            return b""
        try:
            return b"" if session.is_empty else session.changeset()
        finally:
            session.close()

    def drop(self) -> None:
        """Forget what was recorded: it was rolled back."""
        if self._session is not None:
            self._session.close()
            self._session = None
