"""Reads the mount after a crash and says what is not as it must be. It changes nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ledger import DIRECTORY, XATTR, Operation, attribute, is_file, target_of
from model import Allowed, Cut, State, allowed, judge_names
from pages import PAGE_BYTES, PageMaker

_PIECE_BYTES = 1 << 20
_TOLD = 6  # faults told of one file
_LAST = 12  # operations told of a file with a fault


@dataclass(slots=True)
class Verdict:
    """What was found, and the state that the next round starts from."""

    wrong: list[str] = field(default_factory=list)
    state: State = field(default_factory=State)
    damaged: set[str] = field(default_factory=set)  # cannot serve the next round
    pages: int = 0
    acknowledged_pages: int = 0

    def add(self, other: Verdict) -> None:
        """What was found of one file."""
        self.wrong += other.wrong
        self.state.names |= other.state.names
        self.state.files |= other.state.files
        self.damaged |= other.damaged
        self.pages += other.pages
        self.acknowledged_pages += other.acknowledged_pages


class Checker:
    def __init__(self, mount: Path, maker: PageMaker) -> None:
        self._mount = mount
        self._maker = maker

    def check(
        self, start: State, by_writer: Mapping[str, Sequence[Operation]], cut: Cut
    ) -> Verdict:
        """Compare names, then every page of every file."""
        verdict = Verdict()
        found = self._look(verdict)
        names = judge_names(start, by_writer, found, cut)
        verdict.wrong += names.wrong
        for path, told in found.items():
            file = names.names.get(path, told)
            if file is not None and not is_file(path, file):
                verdict.state.names[path] = file
            elif file is None:
                verdict.damaged.add(path)
            else:
                operations = by_writer.get(path.split("/")[0], ())
                may_be = [file, *sorted(names.others.get(path, set()) - {file})]
                one = self._first_right(
                    path, {f: allowed(f, start, operations, cut) for f in may_be}
                )
                one.wrong = [f"{wrong}; {_story(file, operations)}" for wrong in one.wrong]
                verdict.add(one)
        return verdict

    def _first_right(self, path: str, may_be: Mapping[int, Allowed]) -> Verdict:
        """Of the files that it may be, the first with nothing wrong; else the first."""
        found = []
        for file, may in may_be.items():
            one = Verdict()
            self._check_file(path, file, may, one)
            if not one.wrong:
                return one
            found.append(one)
        return found[0]

    def exactly(self, state: State) -> Verdict:
        """Compare with a state that nothing may have changed."""
        writers = {path.split("/")[0]: () for path in state.names}
        return self.check(state, writers, Cut(0.0, power=False))

    def _look(self, verdict: Verdict) -> dict[str, int | None]:
        found: dict[str, int | None] = {}

        def failed(error: OSError) -> None:
            verdict.wrong.append(f"{error.filename} cannot be listed: {error.strerror}")

        for folder, folders, files in os.walk(self._mount, onerror=failed):
            below = Path(folder).relative_to(self._mount)
            for name in folders:
                found[str(below / name)] = DIRECTORY
            for name in files:
                path = Path(folder) / name
                if path.is_symlink():
                    found[str(below / name)] = _link(path)
                else:
                    found |= self._look_at_file(path, str(below / name))
        return found

    def _look_at_file(self, path: Path, name: str) -> dict[str, int | None]:
        """Which file it is; and its attribute, if it has one."""
        found = {name: self._identity(path)}
        try:
            file, value = (int(part) for part in os.getxattr(path, XATTR).split(b":"))
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
        else:
            if found[name] is None:
                found[name] = file
            found[attribute(name.partition("/")[0], file)] = value
        return found

    def _identity(self, path: Path) -> int | None:
        """Which file a name leads to, by its first page; None when that does not tell."""
        try:
            with path.open("rb", buffering=0) as file:
                page = self._maker.read(file.read(PAGE_BYTES))
        except OSError:
            return None  # told when its contents are checked
        return None if page is None else page.file

    def _check_file(self, path: str, file: int, may: Allowed, verdict: Verdict) -> None:
        try:
            fd = os.open(self._mount / path, os.O_RDONLY)
        except OSError as error:
            verdict.wrong.append(f"{path} cannot be opened: {error.strerror}")
            verdict.damaged.add(path)
            return
        wrong: list[str] = []
        versions: list[int] = []
        size = 0
        try:
            size = os.fstat(fd).st_size
            if not may.size(size):
                wrong.append(f"its size is {size}, allowed {_sizes(may)}")
            for start in range(0, size, _PIECE_BYTES):
                data = os.pread(fd, min(_PIECE_BYTES, size - start), start)
                if len(data) != min(_PIECE_BYTES, size - start):
                    wrong.append(f"{len(data)} bytes read at {start} of {size}")
                for at in range(0, len(data), PAGE_BYTES):
                    number = (start + at) // PAGE_BYTES
                    page = data[at : at + PAGE_BYTES]
                    if self._is_cut(page, file, number, may):
                        verdict.damaged.add(path)  # as it may be, but no version says it
                        versions.append(0)
                        continue
                    version, fault = self._judge(page, file, number, may.versions(number))
                    versions.append(version)
                    if fault:
                        synced = "acknowledged" if number < len(may.floor) else "not acknowledged"
                        wrong.append(f"page {number} ({synced}): {fault}")
        except OSError as error:
            wrong.append(f"cannot be read: {error.strerror}")
        finally:
            os.close(fd)
        verdict.pages += len(versions)
        verdict.acknowledged_pages += min(len(may.floor), len(versions))
        if wrong:
            verdict.damaged.add(path)
            more = f" and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
            verdict.wrong.append(f"{path} (file {file:x}): {'; '.join(wrong[:_TOLD])}{more}")
        verdict.state.names[path] = file
        verdict.state.files[file] = (size, versions)

    def _is_cut(self, data: bytes, file: int, number: int, may: Allowed) -> bool:
        """Whether it is the beginning of an allowed page, and zeros where those are allowed."""
        return any(
            not any(data[at:]) and data[:at] == self._maker.make(file, number, version)[:at]
            for at in may.zeros_within(number)
            if at < len(data)
            for version in may.versions(number)
        )

    def _judge(self, data: bytes, file: int, number: int, may: set[int]) -> tuple[int, str]:
        """The version of a page, and what is wrong with it."""
        for version in may:
            if self._maker.make(file, number, version)[: len(data)] == data:
                return version, ""
        if not any(data):
            return 0, f"zeros, allowed {_hex(may)}"
        page = self._maker.read(data)
        if page is None:
            head = self._maker.read(data[:64])
            kept = f" (its first 64 bytes are of version {head.version:x})" if head else ""
            zeros = len(data) - len(data.rstrip(b"\0"))
            return 0, f"not a page{kept}, {zeros} zeros at its end, allowed {_hex(may)}"
        if (page.file, page.number) != (file, number):
            return 0, f"page {page.number} of file {page.file:x}"
        older = bool(may) and page.version < min(may)
        word = "older than acknowledged" if older else "not to be expected"
        return 0, f"version {page.version:x}, {word}, allowed {_hex(may)}"


def _story(file: int, operations: Sequence[Operation]) -> str:
    """What was last done to a file, for the report."""
    own = [op for op in operations if op.about.get("file") == file and op.kind != "names"]
    told = []
    for op in own[-_LAST:]:
        about = op.about
        what = op.kind
        if op.kind == "truncate":
            what += f" {about['size']}"
        elif op.kind == "write":
            pages = f"{about['first']}+{about['count']}"
            what += f" {about['version']:x} pages {pages} to {about['end']}"
        told.append(what if op.done is not None else f"{what} (not done)")
    return f"last done: {', '.join(told)}"


def _link(path: Path) -> int | None:
    target = str(path.readlink())
    number = int(target.removeprefix("link-") or 0)
    return number if target == target_of(number) else None


def _hex(versions: set[int]) -> str:
    return "{" + ", ".join(f"{v:x}" for v in sorted(versions)) + "}"


def _sizes(may: Allowed) -> str:
    grown = "".join(f", growing {low} to {high}" for low, high in may.growing)
    return f"{sorted(may.sizes)}{grown}"
