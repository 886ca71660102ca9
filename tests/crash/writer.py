"""A program under load: makes, fills, overwrites, maps, cuts, marks, links, renames and removes its
own files.

Several run at once, each in a folder of its own. Everything it does is in its ledger before it is
done, and acknowledged there after. It ends by itself when the file system goes away (that is what
is tested), at SIGTERM, or after --seconds.

    python writer.py MOUNT --ledger FILE --start FILE --seed N --number N --round N
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ledger import (
    DIRECTORY,
    XATTR,
    Ledger,
    attribute,
    is_attribute,
    is_file,
    target_of,
)
from pages import PAGE_BYTES, PageMaker

_MOST_FILES = 14
_MOST_PAGES = 500  # of one file: it spans several blocks
_MOST_PAGES_ALL = 2600

_PIECE_BYTES = 64 << 10


class Refused(Exception):
    """The file system answered with an error: nothing more can be relied on."""


class Writer:
    def __init__(
        self, mount: Path, name: str, ledger: Ledger, maker: PageMaker, chance: random.Random,
        *, files: dict[int, list[Any]], names: dict[str, int], ids: int,
    ) -> None:  # fmt: skip
        self.mount = mount
        self.name = name
        self.ledger = ledger
        self.maker = maker
        self.chance = chance
        self.files = files  # id -> [size, versions of its pages]
        self.names = names  # path below the mount -> id
        self._next_file = self._next_version = ids
        self._ends_at = float("inf")

    # ------------------------------------------------------------ the ledger

    @contextmanager
    def _told(self, kind: str, **about: Any) -> Iterator[None]:
        number = self.ledger.begin(kind, about)
        try:
            yield
        except OSError as error:
            self.ledger.error(number, error.errno or 0)
            raise Refused from error
        self.ledger.done(number)

    @contextmanager
    def _told_names(self, **delta: int | None) -> Iterator[None]:
        with self._told("names", **delta):
            yield
        for path, file in delta.items():
            if file is None:
                self.names.pop(path, None)
            else:
                self.names[path] = file

    # ------------------------------------------------------------ choosing

    def _paths(self, *, folders: bool = False) -> list[str]:
        if folders:
            return [p for p, f in self.names.items() if f == DIRECTORY and p != self.name]
        return [p for p, f in self.names.items() if is_file(p, f)]

    def _a_file(self) -> tuple[str, int] | None:
        paths = self._paths()
        if not paths:
            return None
        path = self.chance.choice(paths)
        return path, self.names[path]

    def _new_path(self) -> str:
        folder = self.chance.choice([self.name, *self._paths(folders=True)])
        self._next_file += 1
        return f"{folder}/n{self._next_file:x}"

    def _version(self) -> int:
        self._next_version += 1
        return self._next_version

    # ------------------------------------------------------------ contents

    def _write(self, fd: int, file: int, first: int, count: int, *, direct: bool = False) -> None:
        size, versions = self.files[file]
        version, end = self._version(), (first + count) * PAGE_BYTES
        if end > size and not direct:  # its last page may be a part of one
            end = max(size, end - self.chance.choice([0, 0, self.chance.randrange(PAGE_BYTES)]))
        data = self.maker.make_run(file, first, count, version)[: end - first * PAGE_BYTES]
        about = {"file": file, "first": first, "count": count, "version": version}
        with self._told("write", **about, end=end, direct=direct):
            if direct:
                with mmap.mmap(-1, len(data)) as aligned:
                    aligned[:] = data
                    done = os.pwrite(fd, aligned, first * PAGE_BYTES)
            else:
                done = os.pwrite(fd, data, first * PAGE_BYTES)
            if done != len(data):
                self.ledger.wrong(f"wrote {done} of {len(data)} bytes: {about}")
        versions[first : first + count] = [version] * count
        self.files[file][0] = max(size, end)

    def _append(self, fd: int, file: int) -> None:
        size = self.files[file][0]
        first = size // PAGE_BYTES
        room = _MOST_PAGES - first
        if room > 0:
            self._write(fd, file, first, min(room, self._length()))

    def _grow(self, fd: int, file: int) -> None:
        """A hole at the end: zeros, where nothing may show through."""
        size, versions = self.files[file]
        room = _MOST_PAGES - len(versions)
        if size % PAGE_BYTES == 0 and room > 0:
            more = min(room, self._length())
            with self._told("truncate", file=file, size=size + more * PAGE_BYTES):
                os.ftruncate(fd, size + more * PAGE_BYTES)
            self.files[file] = [size + more * PAGE_BYTES, versions + [0] * more]

    def _length(self) -> int:
        return self.chance.choice(
            [1, 2, self.chance.randrange(1, 40), self.chance.randrange(1, 300)]
        )

    def _overwrite(self, fd: int, file: int, *, direct: bool = False) -> None:
        size, _ = self.files[file]
        whole = size // PAGE_BYTES
        if whole:
            first = self.chance.randrange(whole)
            self._write(fd, file, first, min(self._length(), whole - first), direct=direct)

    def _cut(self, fd: int, file: int) -> None:
        size, versions = self.files[file]
        to = self.chance.choice(
            [0, self.chance.randrange(size + 1), size // PAGE_BYTES * PAGE_BYTES]
        )
        with self._told("truncate", file=file, size=to):
            os.ftruncate(fd, to)
        self.files[file] = [to, versions[: -(-to // PAGE_BYTES)]]

    def _fsync(self, fd: int, file: int) -> None:
        with self._told("fsync", file=file):
            os.fsync(fd) if self.chance.random() < 0.7 else os.fdatasync(fd)

    def _close(self, fd: int, file: int) -> None:
        with self._told("close", file=file):
            os.close(fd)

    def _session(self, fd: int, file: int) -> None:
        for _ in range(self.chance.randrange(1, 4)):
            what = self.chance.random()
            if what < 0.45:
                self._overwrite(fd, file)
            elif what < 0.88:
                self._append(fd, file)
            elif what < 0.97:
                self._cut(fd, file)
            else:
                self._grow(fd, file)
            if self.chance.random() < 0.35:
                self._fsync(fd, file)

    # ------------------------------------------------------------ operations

    def make(self) -> None:
        if len(self._paths()) >= _MOST_FILES or self._full():
            return self.remove()
        fd, file = self._open_new(self._new_path())
        self._append(fd, file)
        self._session(fd, file)
        return self._close(fd, file)

    def _full(self) -> bool:
        return sum(len(versions) for _, versions in self.files.values()) > _MOST_PAGES_ALL

    def _open_new(self, path: str) -> tuple[int, int]:
        file = self._next_file = self._next_file + 1
        with self._told_names(**{path: file}):
            fd = os.open(self.mount / path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.files[file] = [0, []]
        return fd, file

    def change(self) -> None:
        if found := self._a_file():
            path, file = found
            fd = self._open(path, os.O_RDWR)
            self._session(fd, file)
            self._close(fd, file)

    def _open(self, path: str, flags: int) -> int:
        try:
            return os.open(self.mount / path, flags)
        except OSError as error:
            self.ledger.error(self.ledger.begin("open", {"path": path}), error.errno or 0)
            raise Refused from error

    def change_directly(self) -> None:
        if found := self._a_file():
            path, file = found
            fd = self._open(path, os.O_RDWR | os.O_DIRECT)
            self._overwrite(fd, file, direct=True)
            self._close(fd, file)

    def map(self) -> None:
        """Store into a shared mapping, and msync all of it, or leave that to the kernel."""
        found = self._a_file()
        whole = self.files[found[1]][0] // PAGE_BYTES if found else 0
        if not found or not whole:
            return
        path, file = found
        fd = self._open(path, os.O_RDWR)
        with mmap.mmap(fd, whole * PAGE_BYTES) as mapped:
            for _ in range(self.chance.randrange(1, 4)):
                first = self.chance.randrange(whole)
                self._store(mapped, file, first, min(self._length(), whole - first))
                if self.chance.random() < 0.5:
                    with self._told("fsync", file=file):
                        mapped.flush()
        self._close(fd, file)

    def _store(self, mapped: mmap.mmap, file: int, first: int, count: int) -> None:
        version = self._version()
        about = {"file": file, "first": first, "count": count, "version": version}
        end = (first + count) * PAGE_BYTES
        with self._told("write", **about, end=end, direct=False):
            mapped[first * PAGE_BYTES : end] = self.maker.make_run(file, first, count, version)
        self.files[file][1][first : first + count] = [version] * count

    def cut_by_name(self) -> None:
        """truncate(2): nothing is open."""
        if found := self._a_file():
            path, file = found
            size, versions = self.files[file]
            to = self.chance.randrange(size + 1)
            with self._told("truncate", file=file, size=to):
                os.truncate(self.mount / path, to)
            self.files[file] = [to, versions[: -(-to // PAGE_BYTES)]]

    def mark(self) -> None:
        """Set or remove an extended attribute, mostly followed by an fsync of the file."""
        if found := self._a_file():
            path, file = found
            fd = self._open(path, os.O_RDWR)
            where = attribute(self.name, file)
            if where in self.names and self.chance.random() < 0.3:
                with self._told_names(**{where: None}):
                    os.removexattr(fd, XATTR)
            else:
                value = -self._version()  # no file's number
                with self._told_names(**{where: value}):
                    os.setxattr(fd, XATTR, b"%d:%d" % (file, value))
            if self.chance.random() < 0.7:
                self._fsync(fd, file)
            self._close(fd, file)

    def symlink(self) -> None:
        """Make one, or move or remove one."""
        links = [p for p, f in self.names.items() if f < DIRECTORY and not is_attribute(p)]
        new = self._new_path()
        if len(links) < 4:
            link = -self._version()
            with self._told_names(**{new: link}):
                (self.mount / new).symlink_to(target_of(link))
            return
        path = self.chance.choice(links)
        if self.chance.random() < 0.5:
            with self._told_names(**{path: None}):
                (self.mount / path).unlink()
        else:
            with self._told_names(**{path: None, new: self.names[path]}):
                (self.mount / path).rename(self.mount / new)

    def empty(self) -> None:
        """As `>` does it: opened with O_TRUNC and written anew."""
        if found := self._a_file():
            path, file = found
            with self._told("truncate", file=file, size=0):
                fd = os.open(self.mount / path, os.O_RDWR | os.O_TRUNC)
            self.files[file] = [0, []]
            self._append(fd, file)
            if self.chance.random() < 0.5:
                self._fsync(fd, file)
            self._close(fd, file)

    def save(self) -> None:
        """As editors save: a new file, synced, renamed over the old one."""
        if found := self._a_file():
            target, old = found
            path = self._new_path()
            fd, file = self._open_new(path)
            self._append(fd, file)
            if self.chance.random() < 0.8:
                self._fsync(fd, file)
            self._close(fd, file)
            gone = self._gone_with(target)
            with self._told_names(**{path: None, target: file, **gone}):
                (self.mount / path).rename(self.mount / target)
            self._forget(old)
            if self.chance.random() < 0.4:
                self._fsyncdir()

    def _gone_with(self, path: str) -> dict[str, None]:
        """What goes with a file's last name: its attribute."""
        file = self.names[path]
        last = sum(f == file and not is_attribute(p) for p, f in self.names.items()) == 1
        where = attribute(self.name, file)
        return {where: None} if last and where in self.names else {}

    def _forget(self, file: int) -> None:
        if file not in self.names.values():
            self.files.pop(file, None)

    def _fsyncdir(self) -> None:
        fd = self._open(self.name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with self._told("fsyncdir"):
                os.fsync(fd)
        finally:
            os.close(fd)

    def move(self) -> None:
        if found := self._a_file():
            path, file = found
            new = self._new_path()
            with self._told_names(**{path: None, new: file}):
                (self.mount / path).rename(self.mount / new)

    def link(self) -> None:
        if (found := self._a_file()) and len(self._paths()) < _MOST_FILES:
            path, file = found
            new = self._new_path()
            with self._told_names(**{new: file}):
                (self.mount / new).hardlink_to(self.mount / path)

    def remove(self) -> None:
        if found := self._a_file():
            path, file = found
            with self._told_names(**{path: None, **self._gone_with(path)}):
                (self.mount / path).unlink()
            self._forget(file)

    def folder(self) -> None:
        """Make one, or move one with what is in it, or remove an empty one."""
        folders = self._paths(folders=True)
        if len(folders) < 3:
            new = self._new_path()
            with self._told_names(**{new: DIRECTORY}):
                (self.mount / new).mkdir()
            return
        old = self.chance.choice(folders)
        inside = {p: f for p, f in self.names.items() if p.startswith(f"{old}/")}
        if not inside:
            with self._told_names(**{old: None}):
                (self.mount / old).rmdir()
            return
        new = f"{self.name}/m{self._version():x}"
        moved: dict[str, int | None] = {old: None, new: DIRECTORY}
        for path, file in inside.items():
            moved |= {path: None, new + path.removeprefix(old): file}
        with self._told_names(**moved):
            (self.mount / old).rename(self.mount / new)

    def look(self) -> None:
        """Read what is there now: the last version, whatever the caches do."""
        if found := self._a_file():
            path, file = found
            size, versions = self.files[file]
            fd = self._open(path, os.O_RDONLY)
            got = b""
            try:
                # A death in the middle of a read cuts it short; only the next one fails.
                while piece := os.pread(fd, size + 1 - len(got), len(got)):
                    got += piece
            except OSError as error:
                self.ledger.error(self.ledger.begin("read", {"path": path}), error.errno or 0)
                raise Refused from error
            finally:
                os.close(fd)
            wanted = b"".join(self.maker.make(file, n, v) for n, v in enumerate(versions))[:size]
            if got != wanted:
                self.ledger.wrong(f"{path} (file {file:x}): {self._difference(file, got)}")

    def write_behind_read_ahead(self) -> None:
        """Read a little, close, open anew and write what may just be fetched ahead."""
        if found := self._a_file():
            path, file = found
            fd = self._open(path, os.O_RDONLY)
            try:
                for piece in range(3):  # one after another, so that more is fetched
                    os.pread(fd, _PIECE_BYTES, piece * _PIECE_BYTES)
                os.close(fd)
            except OSError as error:
                self.ledger.error(self.ledger.begin("read", {"path": path}), error.errno or 0)
                raise Refused from error
            fd = self._open(path, os.O_RDWR)
            for _ in range(self.chance.randrange(1, 4)):
                self._overwrite(fd, file)
            if self.chance.random() < 0.3:
                self._fsync(fd, file)
            self._close(fd, file)

    def _difference(self, file: int, got: bytes) -> str:
        """What was read, beside what was written."""
        size, versions = self.files[file]
        if len(got) != size:
            return f"{len(got)} bytes read of {size}"
        for number, version in enumerate(versions):
            data = got[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
            if data != self.maker.make(file, number, version)[: len(data)]:
                page = self.maker.read(data)
                other = f"version {page.version:x}" if page else "no page"
                told = other if any(data) else "zeros"
                return f"page {number} of {len(versions)} is read as {told}, not {version:x}"
        return "read otherwise the second time"

    def run(self, seconds: float, *, overwriting: bool = False) -> None:
        self._ends_at = time.monotonic() + seconds
        if self.name not in self.names:
            with self._told_names(**{self.name: DIRECTORY}):
                (self.mount / self.name).mkdir()
        acts = {
            self.make: 4, self.change: 6, self.change_directly: 2, self.empty: 1, self.save: 3,
            self.move: 2, self.link: 2, self.remove: 1, self.folder: 1, self.look: 2,
            self._fsyncdir: 1, self.map: 3, self.cut_by_name: 1, self.mark: 3, self.symlink: 2,
            self.write_behind_read_ahead: 1,
        }  # fmt: skip
        if overwriting:
            acts = {
                self.change: 1, self.change_directly: 1, self.map: 1,
                self.write_behind_read_ahead: 2,
            }  # fmt: skip
        while time.monotonic() < self._ends_at:
            self.chance.choices(list(acts), list(acts.values()))[0]()

    def stop(self, *_: object) -> None:
        """End after the act under way."""
        self._ends_at = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mount", type=Path)
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="JSON: files, names")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--number", type=int, required=True, help="of this writer")
    parser.add_argument("--round", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--overwriting", action="store_true", help="only change what is there")
    options = parser.parse_args()
    start = json.loads(options.start.read_text(encoding="utf-8"))
    name = f"w{options.number}"
    names = {p: f for p, f in start["names"].items() if p == name or p.startswith(f"{name}/")}
    files = {int(k): v for k, v in start["files"].items() if int(k) in names.values()}
    writer = Writer(
        options.mount, name, Ledger(options.ledger), PageMaker(options.seed),
        random.Random(f"{options.seed}/{options.round}/{options.number}"),
        files=files, names=names,
        ids=(options.round + 1) << 32 | options.number << 24,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, writer.stop)
    try:
        writer.run(options.seconds, overwriting=options.overwriting)
    except Refused:
        os._exit(0)  # at once: closing what is open would fail as well


if __name__ == "__main__":
    main()
