"""One SQLite database, opened by recommended practice, with group transactions and a durable sync.

Writes gather in one open transaction, committed after `GROUP_OPERATIONS` or by the caller's timer:
a transaction of its own for each costs ten times more. `synchronous=NORMAL` leaves a commit safe
against a killed process; `sync` makes it safe against a power cut, by an fdatasync of the WAL
through our own descriptor in a thread (SQLite's own descriptors are never touched: closing a
second one of the database file would drop its locks, https://sqlite.org/howtocorrupt.html 2.2).

What a group changes in the replicated tables is recorded, and stored as a row of `changes` by the
group's own transaction: neither a killed process nor a power cut can part the two.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import apsw
import apsw.bestpractice
import trio

from stashcordfs.errors import JournalError, LocalDiskError
from stashcordfs.journal.sqlite import checksums, schema
from stashcordfs.journal.sqlite.recording import Recorder
from stashcordfs.journal.sqlite.reserve import Reserve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

log = logging.getLogger(__name__)

GROUP_OPERATIONS = 512
_CHECKPOINT_PAGES = 1000  # a WAL under 4 MiB is left alone
_RESTART_PAGES = 16 << 10  # one of 64 MiB is to begin anew
_LAST_PAGES = 2000  # so much may be copied on the loop
_CHANGESET_BYTES = 1 << 20  # a group ends early here, as a segment takes whole groups
_LAST_CHANGE = """
SELECT max((SELECT coalesce(max(id), 0) FROM changes),
           (SELECT coalesce(max(last_change), 0) FROM objects))
"""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A committed row of `changes`: whether names changed in it, and what else did.

    `touched`: (inode, block) for content, (inode, -1) for size, times and other attributes.
    """

    id: int
    names: bool
    touched: frozenset[tuple[int, int]]


def prepare_apsw() -> None:
    """Set apsw up as every connection to a journal needs it. Must precede the first."""
    checksums.available()
    if apsw.bestpractice.connection_dqs not in apsw.connection_hooks:
        apsw.bestpractice.apply(
            (
                apsw.bestpractice.connection_wal,
                apsw.bestpractice.connection_busy_timeout,
                apsw.bestpractice.connection_enable_foreign_keys,
                apsw.bestpractice.connection_dqs,
            )
        )


def _ours(error: apsw.Error) -> JournalError | LocalDiskError:
    if isinstance(error, apsw.FullError):
        return LocalDiskError(errno.ENOSPC, f"journal: {error}")
    if getattr(error, "extendedresult", 0) == apsw.SQLITE_IOERR_DATA:
        return LocalDiskError(errno.EIO, "journal: a page is damaged; run stashcordfs fsck")
    if isinstance(error, apsw.IOError):
        return LocalDiskError(errno.EIO, f"journal: {error}")
    return JournalError(f"journal: {error}")


class _Operation:
    """One operation inside the group: a savepoint, undone when it fails half-way."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._writes = 0

    def __enter__(self) -> Self:
        self._database.begin()
        self._database.run("SAVEPOINT op")
        self._writes = self._database.total_changes()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._database.run("RELEASE op")
            self._database.count_operation()
        else:
            self._database.undo(wrote=self._database.total_changes() != self._writes)


class Database:
    """The connection that writes. On the event loop; nothing else may use it."""

    def __init__(self, path: Path, *, create: bool) -> None:
        """Open or create, and migrate. Raises JournalError."""
        prepare_apsw()
        self.path = path
        if create == path.exists():
            what = "is there already" if create else "is missing: recover it from Discord"
            raise JournalError(f"the journal {path} {what}")
        try:
            self._connection = apsw.Connection(str(path))
            path.chmod(0o600)
            if create:
                checksums.begin(self._connection)
            else:
                checksums.suit(self._connection)
            self._connection.pragma("synchronous", "normal")
            self._connection.pragma("wal_autocheckpoint", 0)
            self._connection.pragma("cache_size", -16_000)  # KiB
            self._migrate(create=create)
        except apsw.Error as error:
            raise JournalError(f"the journal {path} cannot be opened: {error}") from error
        self.operation = _Operation(self)
        self.rollbacks = 0
        self.undone: Callable[[], None] | None = None  # called after writes were rolled back
        self.written: Callable[[], None] | None = None  # called at a group's first write
        self.recorded: Callable[[Recorded], None] | None = None  # called after its commit
        self.now_ns: Callable[[], int] = time.time_ns
        self.names_changed = False  # noted by the group's operations, for `recorded`
        self.touched: set[tuple[int, int]] = set()
        self._open = False
        self._written = False
        self._operations = 0
        self._commits = 0
        self._synced = 0
        self._poison: LocalDiskError | None = None
        self._syncing: trio.Event | None = None
        self._wal = -1
        self.reserve = Reserve(path)
        self._execute = self._connection.execute
        self._recorder = Recorder(self._connection)
        self._unstored: list[bytes] = []
        self._changes_to_tell: list[Recorded] = []
        newest = self._connection.execute(_LAST_CHANGE).get
        self.last_change = int(newest)

    def _migrate(self, *, create: bool) -> None:
        found = int(self._connection.pragma("user_version") or 0)
        if not create and self._connection.pragma("application_id") != schema.APPLICATION_ID:
            raise JournalError(f"{self.path} is no journal of StashcordFS")
        schema.check_version(found)
        if 0 < found < schema.VERSION:
            self._copy(self.path.with_suffix(f".before-{schema.VERSION}"))
        steps = (
            [schema.SCHEMA]
            if create
            else [schema.MIGRATIONS[n] for n in range(found, schema.VERSION)]
        )
        with self._connection:
            for step in steps:
                self._connection.execute(step)
            self._connection.pragma("user_version", schema.VERSION)
            self._connection.pragma("application_id", schema.APPLICATION_ID)

    def _copy(self, target: Path) -> None:
        """By SQLite, as the WAL may hold what the database file does not. Whole, or not there."""
        part = target.with_name(target.name + ".part")
        part.unlink(missing_ok=True)
        self._connection.execute("VACUUM INTO ?", (str(part),))
        part.chmod(0o600)
        part.replace(target)

    # ------------------------------------------------------------------ statements

    def run(self, sql: str, bindings: Sequence[Any] = ()) -> None:
        """Execute one statement. SQLite's failures become JournalError or LocalDiskError."""
        try:
            self._execute(sql, bindings)
        except apsw.Error as error:
            raise _ours(error) from error

    def one(self, sql: str, bindings: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row, or None."""
        if not self._open:
            self._start()
        try:
            return self._execute(sql, bindings).fetchone()
        except apsw.Error as error:
            raise _ours(error) from error

    def all(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows."""
        if not self._open:
            self._start()
        try:
            return self._execute(sql, bindings).fetchall()
        except apsw.Error as error:
            raise _ours(error) from error

    def changes(self) -> int:
        """How many rows the last statement changed."""
        return self._connection.changes()

    def total_changes(self) -> int:
        """How many rows this connection has changed."""
        return self._connection.total_changes()

    # ------------------------------------------------------------------ the group

    def _start(self) -> None:
        """Open the group. Reading needs one too: else each query takes and drops the WAL's lock.

        Deferred: the first write makes it a writer's, which nobody contends for.
        """
        self.run("BEGIN")
        self._open = True

    def begin(self) -> None:
        """Open the group for writing."""
        if self._poison is not None:
            raise self._poison
        if not self._open:
            self._start()
        if not self._written:
            self._written = True
            self.reserve.refill()
            self._recorder.begin()
            if self.written is not None:
                self.written()

    def undo(self, *, wrote: bool) -> None:
        """Take back the operation under way; the group's others stay.

        A full or failing disk may have made SQLite take back the whole group, with operations that
        were answered already: then nothing more is written, as memory and journal differ.
        """
        if self._lost():
            self.rollbacks += 1
            return
        self.run("ROLLBACK TO op")
        self.run("RELEASE op")
        if wrote:  # a refusal has written nothing, and what is in memory stays right
            self.rollbacks += 1
            if self.undone is not None:
                self.undone()

    def _lost(self) -> bool:
        if not self._open or self._connection.in_transaction:
            return False
        self._open = self._written = False
        self._operations = 0
        self._recorder.drop()
        self._poison = LocalDiskError(errno.EIO, "journal: a group of changes was lost; mount anew")
        log.error("%s", self._poison)
        return True

    def count_operation(self) -> None:
        """One more operation in the group; a full group is committed."""
        self._operations += 1
        full = self._recorder.size_bytes >= _CHANGESET_BYTES
        if full or self._operations >= min(GROUP_OPERATIONS, self.reserve.operations):
            self.commit()

    @property
    def schema_version(self) -> int:
        """The format that recorded changes are of."""
        return schema.VERSION

    def unrecorded(self) -> AbstractContextManager[None]:
        """What changes inside is of this machine only. Within an operation."""
        return self._recorder.paused()

    def _record(self) -> None:
        """Store what the group has changed, within its transaction."""
        if changeset := self._recorder.take():
            self._unstored.append(changeset)
        while self._unstored:  # a full disk may have refused one: it must not be missing for ever
            made = (self.last_change + 1, self.now_ns(), self._unstored[0])
            self.run("INSERT INTO changes VALUES (?,?,?)", made)
            del self._unstored[0]
            self.last_change += 1
            self._changes_to_tell.append(
                Recorded(self.last_change, self.names_changed, frozenset(self.touched))
            )
        self.names_changed = False
        self.touched.clear()

    def commit(self) -> None:
        """Commit the group: safe against a killed process from here on."""
        if self._lost():
            assert self._poison is not None
            raise self._poison
        if self._open:
            try:
                if self._written:
                    self._record()
                self.run("COMMIT")
            except LocalDiskError:
                self.rollbacks += 1
                if not self._lost():
                    self._recorder.begin()  # the group stays open, and may grow
                raise
            self._commits += self._written
            self._open = self._written = False
            self._operations = 0
            told, self._changes_to_tell = self._changes_to_tell, []
            if self.recorded is not None:
                for change in told:
                    self.recorded(change)

    async def sync(self) -> None:
        """Commit; return when all commits so far are on the disk. One fdatasync for all who wait.

        A failed fdatasync is never tried again into a success: the kernel may have dropped the
        pages (fsync(2), "errors"). Everything that writes fails from then on.
        """
        if self._poison is not None:
            raise self._poison
        self.commit()
        wanted = self._commits
        while self._synced < wanted:
            if self._poison is not None:
                raise self._poison
            if self._syncing is not None:
                await self._syncing.wait()
                continue
            self._syncing = trio.Event()
            covers = self._commits
            try:
                await trio.to_thread.run_sync(self._sync_wal)
                self._synced = covers
            except OSError as error:
                self._poison = LocalDiskError(
                    error.errno or errno.EIO, f"journal sync: {error.strerror}"
                )
            finally:
                self._syncing.set()
                self._syncing = None

    def _sync_wal(self) -> None:
        if self._wal < 0:
            self._wal = os.open(f"{self.path}-wal", os.O_RDONLY | os.O_CLOEXEC)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        os.fdatasync(self._wal)

    async def checkpoint(self) -> None:
        """Copy a long WAL back into the database, by a second connection in a thread.

        SQLite begins the WAL anew when everything in it was copied, and while the loop goes on
        writing there is always something that was not. So the last pages of a very long one are
        copied here: else it would grow for as long as somebody writes, and look-ups slow down.
        """
        self.commit()  # an open read holds back what may be copied, and the WAL's new start
        pages, _ = await trio.to_thread.run_sync(self._checkpoint)
        if pages < _RESTART_PAGES:
            return
        self.commit()
        pages, copied = await trio.to_thread.run_sync(self._checkpoint)
        self.commit()
        if pages and pages - copied < _LAST_PAGES:  # else it failed, or a reader holds it back
            self._copy_back(self._connection)

    def _checkpoint(self) -> tuple[int, int]:
        """How many pages the WAL has, and how many of them are copied; of a short one none."""
        wal = Path(f"{self.path}-wal")
        if not wal.exists() or wal.stat().st_size < _CHECKPOINT_PAGES * 4096:
            return 0, 0
        second = None
        try:
            second = apsw.Connection(str(self.path))
            # It must read first: a connection learns of the WAL by reading.
            second.execute("SELECT count(*) FROM volume").fetchall()
            return self._copy_back(second)
        except apsw.Error as error:
            log.warning("checkpoint of the WAL failed: %s", error)
            return 0, 0
        finally:
            if second is not None:
                second.close()

    @staticmethod
    def _copy_back(connection: apsw.Connection) -> tuple[int, int]:
        try:
            return connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error as error:
            log.warning("checkpoint of the WAL failed: %s", error)
            return 0, 0

    def scrub(self) -> None:
        """Leave nothing in the file and its WAL of what was deleted. JournalError, LocalDiskError.

        It blocks: the whole file is written anew (https://sqlite.org/lang_vacuum.html), about a
        second for 100 MiB. What has been deleted lies in free pages before, and in the WAL.
        """
        self.commit()
        self.run("PRAGMA secure_delete = 1")  # what follows leaves no traces in the first place
        self.run("VACUUM")
        try:
            if self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)[0] != 0:
                raise JournalError("the journal's WAL is in use by another process; try again")
        except apsw.BusyError as error:
            raise JournalError("the journal is in use by another process; try again") from error
        except apsw.Error as error:
            raise _ours(error) from error
        finally:
            self.reserve.forget()
            self.run("PRAGMA secure_delete = 0")

    def close(self) -> None:
        """Commit and close."""
        try:
            self.commit()
        finally:
            self._recorder.drop()
            self._connection.close()
            self.reserve.close()
            if self._wal >= 0:
                os.close(self._wal)
                self._wal = -1
