"""The journal as JSON lines, one record a line: for people, scripts, and another program.

It reads by a second connection, one snapshot, and streams: beside a mounted volume as well, as of
its last commit. Together with docs/format.md, the passphrase and the volume's record in the journal
channel, what it writes is enough to fetch and open everything. Blocking; the schema is described in
docs/export.md.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from stashcordfs.errors import JournalError
from stashcordfs.journal.inspection import VERSION as JOURNAL_VERSION
from stashcordfs.journal.inspection import inspect
from stashcordfs.recovery.export.names import kind_of, to_text, to_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stashcordfs.journal.inspection import Inspection
    from stashcordfs.types import Ino

    Record = dict[str, Any]
    Progress = Callable[[str, int, int], None]

FORMAT, SCHEMA = "stashcordfs-journal", 1
_FOLDERS_KEPT = 1 << 16  # paths of folders in memory
_DEEPEST = 4096
_ROOT = 1
_TICK = 4096

_PACKS = """
SELECT id, object_id, epoch, size, channel, message, attachment, filename FROM packs
WHERE message != 0 AND id BETWEEN ?1 AND ?2 ORDER BY id
"""
_INODES = """
SELECT i.ino, i.mode, i.nlink, i.uid, i.gid, i.rdev, i.size, i.atime_ns, i.mtime_ns, i.ctime_ns,
  t.target
FROM inodes i LEFT JOIN symlinks t USING (ino) WHERE i.ino BETWEEN ?1 AND ?2 ORDER BY i.ino
"""
_BLOCKS = """
SELECT l.ino, l.idx, l.valid_length, c.chunk_id, c.pack, c.number, c.offset, c.length,
  c.plain_length, c.codec, p.message
FROM chunk_list l LEFT JOIN chunks c ON c.id = l.chunk LEFT JOIN packs p ON p.id = c.pack
WHERE l.ino BETWEEN ?1 AND ?2 ORDER BY l.ino, l.idx
"""


@dataclass(frozen=True, slots=True)
class About:
    """What the first line says of the volume."""

    name: str
    uuid: str
    block_size: int
    channels: tuple[int, ...]
    journal_channel: int
    made_ns: int


def journal_records(path: Path, about: About, *, progress: Progress) -> Iterator[Record]:
    """Every record, in order. JournalError when the journal cannot be read."""
    with inspect(path) as look:
        if look.version != JOURNAL_VERSION:
            raise JournalError(
                f"the journal has format {look.version}, this program knows {JOURNAL_VERSION}; "
                "mount it once, so that it is migrated"
            )
        counts: Counter[str] = Counter()
        for record in _Walk(look, about, progress).records():
            counts[record["type"]] += 1
            yield record
        yield {"type": "end", "counts": dict(counts)}


def write_lines(path: Path | None, records: Iterator[Record]) -> int:
    """Write records to a new file, whole or not at all, or to stdout (None); how many. OSError."""
    if path is None:
        return _write(records, lambda line: os.write(1, line))
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb", opener=_private) as file:
        count = _write(records, file.write)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return count


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _write(records: Iterator[Record], put: Callable[[bytes], int]) -> int:
    count = 0
    for record in records:
        line = memoryview(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        while line:  # a pipe takes what it can
            line = line[put(line) :]  # type: ignore[arg-type]
        count += 1
    return count


class _Walk:
    def __init__(self, look: Inspection, about: About, progress: Progress) -> None:
        self._look = look
        self._about = about
        self._progress = progress
        self._folder = lru_cache(_FOLDERS_KEPT)(self._path_of_folder)
        self._done = 0

    def records(self) -> Iterator[Record]:
        yield self._volume()
        for stage, table, records in (
            ("packs", "packs", self._packs),
            ("files and folders", "inodes", self._inodes),
            ("blocks", "chunk_list", self._blocks),
            ("synced blocks that only this machine has", "dirty", self._unsent),
        ):
            total = self._look.number(f"SELECT count(*) FROM {table}")  # noqa: S608  constants
            self._done = 0
            for record in records():
                self._done += 1
                if self._done % _TICK == 0:
                    self._progress(stage, self._done, total)
                yield record
            self._progress(stage, self._done, self._done)

    def _volume(self) -> Record:
        about = self._about
        return {
            "type": "volume",
            "format": FORMAT,
            "schema": SCHEMA,
            "name": about.name,
            "uuid": about.uuid,
            "block_size": about.block_size,
            "channels": [str(channel) for channel in about.channels],
            "journal_channel": str(about.journal_channel),
            "journal_version": self._look.version,
            "made": to_time(about.made_ns),
        }

    def _packs(self) -> Iterator[Record]:
        for row in self._look.sliced("packs", _PACKS):
            number, object_id, epoch, size, channel, message, attachment, filename = row
            yield {
                "type": "pack",
                "pack": number,
                "object_id": object_id.hex(),
                "epoch": epoch,
                "size": size,
                "channel": str(channel),
                "message": str(abs(message)),
                "attachment": str(attachment),
                "filename": filename,
                "missing": message < 0,
            }

    def _inodes(self) -> Iterator[Record]:
        for row in self._look.sliced("inodes", _INODES):
            ino, mode, nlink, uid, gid, rdev, size, atime, mtime, ctime, target = row
            record: Record = {
                "type": "inode",
                "ino": ino,
                "kind": kind_of(mode),
                "mode": stat.S_IMODE(mode),
                "uid": uid,
                "gid": gid,
                "links": nlink,
                "size": size,
                "atime": to_time(atime),
                "mtime": to_time(mtime),
                "ctime": to_time(ctime),
                "paths": [to_text(path) for path in self._paths(ino)],
                "xattrs": self._xattrs(ino),
            }
            if target is not None:
                record["target"] = to_text(target)
            if rdev:
                record["device"] = [os.major(rdev), os.minor(rdev)]
            yield record

    def _paths(self, ino: Ino) -> Iterator[bytes]:
        """Every path of an inode from the root, without a slash at its beginning."""
        if ino == _ROOT:
            yield b""
        names = "SELECT parent, name FROM dirents WHERE ino = ? ORDER BY parent, name"
        for parent, name in list(self._look.rows(names, (ino,))):
            folder = self._folder(parent)
            yield b"%b/%b" % (folder, name) if folder else bytes(name)

    def _path_of_folder(self, ino: Ino) -> bytes:
        parts: list[bytes] = []
        at: int = ino
        while at != _ROOT:
            row = next(
                self._look.rows("SELECT parent, name FROM dirents WHERE ino = ? LIMIT 1", (at,)),
                None,
            )
            if row is None or len(parts) > _DEEPEST:
                raise JournalError(f"no path leads to folder {ino}: run fsck first")
            at = row[0]
            parts.append(bytes(row[1]))
        return b"/".join(reversed(parts))

    def _xattrs(self, ino: Ino) -> list[Record]:
        rows = self._look.rows("SELECT name, value FROM xattrs WHERE ino = ?", (ino,))
        return [
            {"name": to_text(bytes(name)), "base64": base64.b64encode(value).decode()}
            for name, value in rows
        ]

    def _blocks(self) -> Iterator[Record]:
        for row in self._look.sliced("chunk_list", _BLOCKS):
            ino, index, valid, chunk_id, pack, number, offset, length, plain, codec, message = row
            record: Record = {"type": "block", "ino": ino, "index": index, "valid": valid}
            if message is not None:
                record |= {
                    "pack": pack,
                    "number": number,
                    "offset": offset,
                    "length": length,
                    "plain_length": plain,
                    "codec": codec,
                    "chunk_id": chunk_id.hex(),
                }
            yield {**record, "lost": message is None or message <= 0}

    def _unsent(self) -> Iterator[Record]:
        for ino, index in self._look.rows("SELECT ino, idx FROM dirty ORDER BY ino, idx"):
            yield {"type": "unsent", "ino": ino, "index": index}
