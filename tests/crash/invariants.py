"""What must hold of a journal that nobody has open, and between a journal and the server.

Read from copies, with SQLite alone: nothing here imports the program.
"""

from __future__ import annotations

import base64
import contextlib
import shutil
import sqlite3
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BLOCK_BYTES = 256 << 10  # the rig's volumes have such blocks
_ROOT = 1

# Each finds rows that must not be.
_NEVER = {
    "a name without an inode": (
        "SELECT d.parent, d.name FROM dirents d LEFT JOIN inodes i ON i.ino = d.ino"
        " WHERE i.ino IS NULL"
    ),
    "a name in a folder that is none": (
        "SELECT d.parent, d.name FROM dirents d LEFT JOIN inodes i ON i.ino = d.parent"
        f" WHERE i.ino IS NULL OR (i.mode & {stat.S_IFMT(0o170000)}) != {stat.S_IFDIR}"
    ),
    "links of a file miscounted": (
        "SELECT i.ino, i.nlink, count(d.ino) FROM inodes i LEFT JOIN dirents d ON d.ino = i.ino"
        f" WHERE (i.mode & {stat.S_IFMT(0o170000)}) != {stat.S_IFDIR}"
        " GROUP BY i.ino HAVING i.nlink != count(d.ino)"
    ),
    "a folder with another number of names than one": (
        "SELECT i.ino, i.nlink, count(d.ino) FROM inodes i LEFT JOIN dirents d ON d.ino = i.ino"
        f" WHERE (i.mode & {stat.S_IFMT(0o170000)}) = {stat.S_IFDIR} AND i.nlink > 0"
        f" AND i.ino != {_ROOT} GROUP BY i.ino HAVING count(d.ino) != 1"
    ),
    "links of a folder miscounted": (
        "SELECT f.ino, f.nlink, (SELECT count(*) FROM dirents d JOIN inodes s ON s.ino = d.ino"
        f" WHERE d.parent = f.ino AND (s.mode & {stat.S_IFMT(0o170000)}) = {stat.S_IFDIR}) AS sub"
        f" FROM inodes f WHERE (f.mode & {stat.S_IFMT(0o170000)}) = {stat.S_IFDIR}"
        " AND f.nlink > 0 AND f.nlink != 2 + sub"
    ),
    "stored bytes miscounted": (
        "SELECT i.ino, i.stored, coalesce(l.bytes, 0) FROM inodes i LEFT JOIN"
        " (SELECT ino, sum(valid_length) AS bytes FROM chunk_list GROUP BY ino) l ON l.ino = i.ino"
        " WHERE i.stored != coalesce(l.bytes, 0)"
    ),
    "a chunk list of no inode": (
        "SELECT l.ino, l.idx FROM chunk_list l LEFT JOIN inodes i ON i.ino = l.ino"
        " WHERE i.ino IS NULL"
    ),
    "a chunk list entry without its chunk": (
        "SELECT l.ino, l.idx, l.chunk FROM chunk_list l LEFT JOIN chunks c ON c.id = l.chunk"
        " WHERE c.id IS NULL AND NOT (l.chunk = 0 AND l.ino IN (SELECT ino FROM trash))"
    ),  # Discord never had that block of what was deleted
    "a chunk list entry longer than its chunk": (
        "SELECT l.ino, l.idx, l.valid_length, c.plain_length"
        " FROM chunk_list l JOIN chunks c ON c.id = l.chunk WHERE l.valid_length > c.plain_length"
    ),
    "a chunk list entry beyond its file's end": (
        "SELECT l.ino, l.idx, l.valid_length, i.size FROM chunk_list l JOIN inodes i ON i.ino=l.ino"
        " WHERE l.idx * :block_bytes + l.valid_length > i.size"
    ),
    "a chunk list entry in a pack that is not confirmed": (
        "SELECT l.ino, l.idx, p.filename FROM chunk_list l JOIN chunks c ON c.id = l.chunk"
        " LEFT JOIN packs p ON p.id = c.pack WHERE p.id IS NULL OR p.message = 0"
    ),
    "a chunk without its pack": (
        "SELECT c.id FROM chunks c LEFT JOIN packs p ON p.id = c.pack WHERE p.id IS NULL"
    ),
    "an unconfirmed pack that no intent knows": (
        "SELECT p.filename FROM packs p LEFT JOIN intent_packs i ON i.pack = p.id"
        " WHERE p.message = 0 AND i.pack IS NULL"
    ),
    "an intent's pack without pack or intent": (
        "SELECT ip.intent, ip.pack FROM intent_packs ip LEFT JOIN intents i ON i.id = ip.intent"
        " LEFT JOIN packs p ON p.id = ip.pack WHERE i.id IS NULL OR p.id IS NULL"
    ),
    "a dirty block of no inode": (
        "SELECT d.ino, d.idx FROM dirty d LEFT JOIN inodes i ON i.ino = d.ino WHERE i.ino IS NULL"
    ),
    "a cached block of no inode": (
        "SELECT c.ino, c.idx FROM cached c LEFT JOIN inodes i ON i.ino = c.ino WHERE i.ino IS NULL"
    ),
}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A copy of the database and its WAL: looking must not move what is in the WAL."""
    with tempfile.TemporaryDirectory(prefix="crash-journal-") as folder:
        copy = Path(folder) / path.name
        for suffix in ("", "-wal"):
            source = path.with_name(path.name + suffix)
            if source.exists():
                shutil.copyfile(source, copy.with_name(copy.name + suffix))
        with contextlib.closing(sqlite3.connect(copy)) as database:
            yield database


def check_journal(path: Path, *, block_bytes: int = BLOCK_BYTES) -> list[str]:
    """What is wrong with a journal whose process is gone."""
    wrong: list[str] = []
    with _opened(path) as database:
        for (text,) in database.execute("PRAGMA integrity_check"):
            if text != "ok":
                wrong.append(f"journal: {text}")
        for what, sql in _NEVER.items():
            rows = database.execute(sql, {"block_bytes": block_bytes}).fetchall()
            if rows:
                wrong.append(f"journal: {what}: {rows[:3]} ({len(rows)} in all)")
        wrong += _unreachable(database)
    return wrong


def _unreachable(database: sqlite3.Connection) -> list[str]:
    """Folders that no path from the root leads to: a rename made a ring, or lost a branch."""
    rows = database.execute(
        "WITH RECURSIVE below(ino) AS (VALUES (1) UNION"
        " SELECT d.ino FROM dirents d JOIN below b ON d.parent = b.ino)"
        " SELECT ino FROM inodes WHERE nlink > 0 AND ino NOT IN (SELECT ino FROM below)"
    ).fetchall()
    return [f"journal: inodes that no path leads to: {rows[:3]} ({len(rows)})"] if rows else []


def open_intents(path: Path) -> int:
    """How many uploads the journal does not know the outcome of."""
    with _opened(path) as database:
        return int(database.execute("SELECT count(*) FROM intents").fetchone()[0])


@dataclass(slots=True)
class ServerVerdict:
    """Journal and server compared."""

    packs: int = 0
    missing: list[str] = field(default_factory=list)  # the journal counts on them
    twice: list[str] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)  # there; their intent is still open
    orphans: list[str] = field(default_factory=list)  # there; the journal knows nothing of them


def _filename(object_id: bytes) -> str:
    """An object's attachment by docs/format.md."""
    return base64.b32encode(object_id).decode("ascii").rstrip("=").lower()


def check_server(journal: Path, server: Path, *, record_prefix: str) -> ServerVerdict:
    """`server`: the sandbox's folder."""
    with _opened(server / "messages.sqlite3") as database:
        names = [
            str(name)
            for (name,) in database.execute("SELECT filename FROM attachments")
            if not name.startswith(record_prefix)
        ]
    with _opened(journal) as database:
        packs = dict(database.execute("SELECT filename, message FROM packs").fetchall())
        told = {_filename(bytes(r[0])) for r in database.execute("SELECT object_id FROM objects")}
    # Segments, checkpoints and claims: each segment's message carries the one before once more.
    there = Counter(name for name in names if name not in told)
    return ServerVerdict(
        packs=len(packs),
        missing=sorted(name for name, message in packs.items() if message and name not in there),
        twice=sorted(name for name, count in there.items() if count > 1),
        unsettled=sorted(name for name in there if packs.get(name) == 0),
        orphans=sorted(name for name in there if name not in packs),
    )
