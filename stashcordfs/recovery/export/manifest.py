"""What a copy has copied: one JSON line an entry, appended as it goes, rewritten when it is done.

A later line of a path stands for an earlier one. A last line that is not whole was cut short, and
its entry is copied again. In memory an entry takes some 500 bytes. Knows nothing of where it lies.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stashcordfs.errors import ObjectCorrupt
from stashcordfs.recovery.export.names import from_text, from_time, kind_of, to_text, to_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

FORMAT, SCHEMA = "stashcordfs-copy", 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of the volume, with what its inode says. `path` is from the root, without a slash.

    `link` is another path of the same inode that holds the content. Times in ns.
    """

    path: bytes
    ino: int
    mode: int
    uid: int
    gid: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    rdev: int = 0
    nlink: int = 1
    target: bytes | None = None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Copied:
    """An entry as it was copied: its content's SHA-256 and, in a bucket, its key."""

    entry: Entry
    sha256: bytes = b""
    key: str = ""
    link: bytes | None = None

    def same_as(self, entry: Entry) -> bool:
        """Whether nothing of the inode can have changed since. Every change moves its ctime."""
        mine = self.entry
        return (mine.ino, mine.size, mine.mtime_ns, mine.ctime_ns, mine.mode) == (
            entry.ino, entry.size, entry.mtime_ns, entry.ctime_ns, entry.mode
        )  # fmt: skip


@dataclass(slots=True)
class Manifest:
    """All entries by path. `uuid` is the volume's."""

    uuid: str
    copied: dict[bytes, Copied] = field(default_factory=dict)

    def head(self) -> bytes:
        """The first line."""
        return _line({"format": FORMAT, "schema": SCHEMA, "uuid": self.uuid})

    def lines(self) -> Iterator[bytes]:
        """The whole file, in order of paths."""
        yield self.head()
        for path in sorted(self.copied):
            yield line_of(self.copied[path])

    def read(self, data: Iterator[bytes]) -> None:
        """Take up lines. ObjectCorrupt: another volume's, a newer schema, or none at all."""
        try:
            first = json.loads(next(data))
            if first["format"] != FORMAT or first["schema"] != SCHEMA:
                raise ObjectCorrupt("the manifest there is of another format: update this program")
        except (StopIteration, ValueError, KeyError, TypeError) as error:
            raise ObjectCorrupt("what lies there is no manifest of an export") from error
        if first["uuid"] != self.uuid:
            raise ObjectCorrupt(f"there is a copy of another volume, {first['uuid']}")
        for line in data:
            if not line.endswith(b"\n"):
                return  # cut short
            found, gone = _read(line)
            if gone:
                self.copied.pop(found.entry.path, None)
            else:
                self.copied[found.entry.path] = found


class Log:
    """The manifest's file while a copy goes on: each line is handed to the system at once."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist."""
        self.path = path
        self._file = -1

    def load(self, manifest: Manifest) -> bool:
        """Take up what an earlier run has left; False when there is nothing."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            manifest.read(iter(file))
        return True

    def begin(self, manifest: Manifest) -> None:
        """Write the file anew, whole or not at all, and be ready for more lines."""
        temporary = self.path.with_name(self.path.name + ".part")
        with temporary.open("wb") as file:
            file.writelines(manifest.lines())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self.close()
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, copied: Copied, *, gone: bool = False) -> None:
        """Append one line."""
        os.write(self._file, line_of(copied, gone=gone))

    def close(self) -> None:
        """No more lines."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def line_of(copied: Copied, *, gone: bool = False) -> bytes:
    """One entry's line. `gone`: it is not there any more."""
    entry = copied.entry
    fields: dict[str, Any] = {
        "path": to_text(entry.path),
        "kind": kind_of(entry.mode),
        "mode": entry.mode,
        "uid": entry.uid,
        "gid": entry.gid,
        "size": entry.size,
        "atime": to_time(entry.atime_ns),
        "mtime": to_time(entry.mtime_ns),
        "ctime": to_time(entry.ctime_ns),
        "ino": entry.ino,
    }
    if gone:
        fields["gone"] = True
    if entry.rdev:
        fields["device"] = [os.major(entry.rdev), os.minor(entry.rdev)]
    if entry.target is not None:
        fields["target"] = to_text(entry.target)
    if entry.xattrs:
        fields["xattrs"] = [
            {"name": to_text(name), "base64": base64.b64encode(value).decode()}
            for name, value in entry.xattrs
        ]
    if copied.sha256:
        fields["sha256"] = copied.sha256.hex()
    if copied.key:
        fields["key"] = copied.key
    if copied.link is not None:
        fields["link"] = to_text(copied.link)
    return _line(fields)


def _line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _read(line: bytes) -> tuple[Copied, bool]:
    try:
        fields = json.loads(line)
        device = fields.get("device", [0, 0])
        entry = Entry(
            from_text(fields["path"]),
            int(fields["ino"]),
            int(fields["mode"]),
            int(fields["uid"]),
            int(fields["gid"]),
            int(fields["size"]),
            from_time(fields["atime"]),
            from_time(fields["mtime"]),
            from_time(fields["ctime"]),
            os.makedev(*device) if any(device) else 0,
            target=from_text(fields["target"]) if "target" in fields else None,
            xattrs=tuple(
                (from_text(item["name"]), base64.b64decode(item["base64"]))
                for item in fields.get("xattrs", ())
            ),
        )
        link = from_text(fields["link"]) if "link" in fields else None
        sha256 = bytes.fromhex(fields.get("sha256", ""))
        return Copied(entry, sha256, fields.get("key", ""), link), bool(fields.get("gone"))
    except (ValueError, KeyError, TypeError) as error:
        raise ObjectCorrupt("the manifest of the copy there is damaged") from error
