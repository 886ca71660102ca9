"""What may be there after a crash: no more and no less than the acknowledgements allow.

Contents. Of each page: the version of the last acknowledgement that covers it, or one written
later; never an older one, zeros, or a page from elsewhere. Of the size: what it was at that
acknowledgement or later, or a page's edge inside a write that was growing the file. Pages that only
a truncation has made are zeros, version 0.

Zeros only where a truncation that was not acknowledged raised the size over bytes that had not come
from the kernel's cache yet: the kernel sends the new size first, as local file systems do.

Acknowledged by: fsync, and msync of all that is mapped. In a killed process also by close, which
hands the kernel's pages to the process, and by a direct write; their size and names may lose the
last moments (`GRACE_S`).

Names. There is one moment, not before the last fsync or fsyncdir began and not older than the
grace, at which the whole namespace was as it is found. Each writer's folder must match a state
between two of its operations, and these times must overlap for all writers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ledger import Operation
from pages import PAGE_BYTES

GRACE_S = 0.5  # 50 ms by design; the rest is for a busy machine


@dataclass(slots=True)
class State:
    """What is known to be there: names, and of each file its size and its pages' versions."""

    names: dict[str, int] = field(default_factory=dict)
    files: dict[int, tuple[int, list[int]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return {"names": self.names, "files": self.files}


@dataclass(frozen=True, slots=True)
class Cut:
    """The crash: when, whether the power went, and how old names may be."""

    at: float
    power: bool
    names_s: float = GRACE_S


@dataclass(slots=True)
class Allowed:
    """What one file may hold."""

    floor: list[int]  # version of each page at the last acknowledgement
    later: dict[int, set[int]]  # versions written after it
    sizes: set[int]
    growing: list[tuple[int, int]]
    zeros: list[tuple[int, int]]  # ranges of bytes

    def size(self, found: int) -> bool:
        return found in self.sizes or (
            not found % PAGE_BYTES and any(low < found <= high for low, high in self.growing)
        )

    def versions(self, page: int) -> set[int]:
        at_floor = {self.floor[page]} if page < len(self.floor) else set()
        zeros = {0} if self._may_be_zeros(page * PAGE_BYTES) else set()
        return at_floor | self.later.get(page, set()) | zeros

    def _may_be_zeros(self, at: int) -> bool:
        return any(low <= at < high for low, high in self.zeros)

    def zeros_within(self, page: int) -> list[int]:
        """Where in a page zeros may begin."""
        at = page * PAGE_BYTES
        return [low - at for low, _ in self.zeros if at < low < at + PAGE_BYTES]


def allowed(file: int, start: State, operations: Sequence[Operation], cut: Cut) -> Allowed:
    """From one writer's operations, of which those on `file` count."""
    own = [op for op in operations if op.about.get("file") == file and op.kind != "names"]
    changes = [op for op in own if op.kind in ("write", "truncate")]
    acknowledged = max((op.number for op in own if _acknowledges(op, cut)), default=0)
    size, pages = start.files.get(file, (0, []))
    pages = list(pages)
    before = [op for op in changes if op.number < acknowledged]
    after = changes[len(before) :]
    for op in before:
        size = _apply(op, size, pages)
    result = Allowed(pages, defaultdict(set), {size}, [], [])
    sent = size  # the least that the process knows of
    for op in after:
        if op.kind == "truncate":
            size = op.about["size"]
            if size > sent:
                result.zeros.append((sent, size))
            sent = size
        else:
            first, end = op.about["first"], op.about["end"]
            for page in range(first, first + op.about["count"]):
                result.later[page].add(op.about["version"])
            # A page on its way is sent again after those behind it (writeback_order.py): until then
            # the file is longer, and that page has what it had before, and zeros.
            page_end = -(-sent // PAGE_BYTES) * PAGE_BYTES
            if sent < page_end < end:
                result.zeros.append((sent, page_end))
            if end > size:
                result.growing.append((size, end))
                size = end
        result.sizes.add(size)
    if not cut.power:
        _raise_by_direct(result, after)
    return result


def _acknowledges(op: Operation, cut: Cut) -> bool:
    if op.done is None:
        return False
    return op.kind == "fsync" or (
        op.kind == "close" and not cut.power and op.done <= cut.at - GRACE_S
    )


def _apply(op: Operation, size: int, pages: list[int]) -> int:
    if op.kind == "truncate":
        to: int = op.about["size"]
        del pages[-(-to // PAGE_BYTES) :]
        pages += [0] * (-(-to // PAGE_BYTES) - len(pages))
        return to
    first, count = op.about["first"], op.about["count"]
    pages[first : first + count] = [op.about["version"]] * count
    return max(size, op.about["end"])


def _raise_by_direct(result: Allowed, after: Sequence[Operation]) -> None:
    """A direct write is in the process when it returns, wherever the size is safe anyway."""
    safe = min(result.sizes) // PAGE_BYTES
    for op in after:
        if op.kind != "write" or op.done is None or not op.about["direct"]:
            continue
        version = op.about["version"]
        for page in range(op.about["first"], op.about["first"] + op.about["count"]):
            if page < min(safe, len(result.floor)):
                result.floor[page] = version
                result.later[page] = {v for v in result.later[page] if v >= version}


# ---------------------------------------------------------------------- names


@dataclass(frozen=True, slots=True)
class _Lived:
    """A state of one writer's names, and when it may have been the true one."""

    names: dict[str, int]
    since: float
    until: float


def _states(start: Mapping[str, int], operations: Iterable[Operation]) -> list[_Lived]:
    changes = [op for op in operations if op.kind == "names"]
    names, since = dict(start), -math.inf
    states = []
    for op in changes:
        until = math.inf if op.done is None else op.done
        states.append(_Lived(dict(names), since, until))
        for path, file in op.about.items():
            if file is None:
                names.pop(path, None)
            else:
                names[path] = file
        since = op.begun
    states.append(_Lived(names, since, math.inf))
    return states


@dataclass(slots=True)
class NamesVerdict:
    """The names as they were at one allowed moment, or what is wrong.

    `others`: of a file that does not tell which it is (an empty one), all that it may be.
    """

    names: dict[str, int]
    wrong: list[str]
    others: dict[str, set[int]] = field(default_factory=dict)


def judge_names(
    start: State,
    by_writer: Mapping[str, Sequence[Operation]],
    found: Mapping[str, int | None],
    cut: Cut,
) -> NamesVerdict:
    """`found`: file id (None: not to be told) or DIRECTORY of every path."""
    synced = [
        op.begun
        for operations in by_writer.values()
        for op in operations
        if op.kind in ("fsync", "fsyncdir") and op.done is not None
    ]
    earliest = max([cut.at - cut.names_s, *synced])
    wrong: list[str] = []
    matching: dict[str, list[_Lived]] = {}
    for writer, operations in by_writer.items():
        mine = {p: f for p, f in found.items() if _belongs(p, writer)}
        begin = {p: f for p, f in start.names.items() if _belongs(p, writer)}
        states = _states(begin, operations)
        same = [state for state in states if _same(state.names, mine)]
        if not same:
            wrong.append(f"names of {writer} are what they never were: {_nearest(states, mine)}")
        elif not [state for state in same if state.until >= earliest]:
            late = earliest - max(state.until for state in same)
            missing = _nearest(states[-1:], mine)
            wrong.append(f"names of {writer} are {late:.3f} s older than allowed: {missing}")
        matching[writer] = same
    if wrong:
        return NamesVerdict({}, wrong)
    verdict = _one_moment(matching, earliest)
    recent = [s for same in matching.values() for s in same if s.until >= earliest]
    for path in (path for path, file in found.items() if file is None):
        verdict.others[path] = {s.names[path] for s in recent if path in s.names}
    return verdict


def _one_moment(matching: Mapping[str, Sequence[_Lived]], earliest: float) -> NamesVerdict:
    moments = {earliest, *(s.since for same in matching.values() for s in same)}
    for moment in sorted(m for m in moments if m >= earliest):
        chosen = [
            next((s for s in same if s.since <= moment <= s.until), None)
            for same in matching.values()
        ]
        if None not in chosen:
            joined = {path: file for s in chosen if s is not None for path, file in s.names.items()}
            return NamesVerdict(joined, [])
    return NamesVerdict({}, ["names of the writers are from different moments"])


def _belongs(path: str, writer: str) -> bool:
    return path == writer or path.startswith(f"{writer}/")


def _same(wanted: Mapping[str, int], found: Mapping[str, int | None]) -> bool:
    return wanted.keys() == found.keys() and all(
        found[path] is None or found[path] == file for path, file in wanted.items()
    )


def _nearest(states: Sequence[_Lived], found: Mapping[str, int | None]) -> str:
    """How the nearest state differs, for the report."""

    def differing(state: _Lived) -> list[str]:
        paths = sorted(state.names.keys() | found.keys())
        return [
            f"{path}: {_shown(state.names.get(path, 'nothing'))} expected,"
            f" {_shown(found.get(path, 'nothing'))} found"
            for path in paths
            if path not in found
            or path not in state.names
            or found[path] not in (None, state.names[path])
        ]

    return "; ".join(min((differing(state) for state in states), key=len)[:4])


def _shown(file: int | str | None) -> str:
    if file is None:
        return "some file"
    return f"{file:x}" if isinstance(file, int) and file >= 0 else str(file)
