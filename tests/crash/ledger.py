"""The ledger: what a writer was about to do, and what was acknowledged. It lies outside the mount.

One JSON list a line, appended by a single write(2); the machine that keeps it does not crash.

    ["begin", t, n, kind, {...}]   about to do operation n; it may happen from now on
    ["done", t, n]                 it was acknowledged
    ["error", t, n, errno]         it was refused
    ["wrong", t, text]             the writer read something that it had not written

Kinds: `write` {file, first, count, version, end, direct}, `truncate` {file, size}, `fsync` {file},
`close` {file}, `names` {path: file, DIRECTORY or null for gone} and `fsyncdir`. Times are
CLOCK_MONOTONIC, which all processes of a machine share.

Among the names are two that lead to no contents: a symbolic link, whose number is below DIRECTORY
and stands in its target; and a file's attribute, as `WRITER/#FILE` with its value, below DIRECTORY
too. So what is true of names is asked of both.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = -1  # in place of a file's id
XATTR = "user.crash"  # its value: FILE:VALUE


def is_file(path: str, file: int) -> bool:
    """Whether it has contents: no folder, no symbolic link, no attribute."""
    return file > DIRECTORY and not is_attribute(path)


def is_attribute(path: str) -> bool:
    return "/#" in path


def attribute(writer: str, file: int) -> str:
    """Where a file's attribute stands among the names."""
    return f"{writer}/#{file:x}"


def target_of(link: int) -> str:
    """What a symbolic link with this number holds."""
    return f"link-{link}"


@dataclass(slots=True)
class Operation:
    """One operation of one writer. `done` is None when it was never acknowledged."""

    number: int
    kind: str
    about: dict[str, Any]
    begun: float
    done: float | None = None


@dataclass(frozen=True, slots=True)
class Trouble:
    """An error or a wrong read. `errno` 0: a wrong read."""

    at: float
    errno: int
    text: str


class Ledger:
    """For the writer."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._number = 0

    def _put(self, *line: object) -> None:
        os.write(self._fd, json.dumps(line).encode() + b"\n")

    def begin(self, kind: str, about: dict[str, Any]) -> int:
        self._number += 1
        self._put("begin", time.monotonic(), self._number, kind, about)
        return self._number

    def done(self, number: int) -> None:
        self._put("done", time.monotonic(), number)

    def error(self, number: int, code: int) -> None:
        self._put("error", time.monotonic(), number, code)

    def wrong(self, text: str) -> None:
        self._put("wrong", time.monotonic(), text)


def read(path: Path) -> tuple[list[Operation], list[Trouble]]:
    """For the checker: all operations in order, and what went wrong."""
    operations: list[Operation] = []
    troubles: list[Trouble] = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        word, at, *rest = json.loads(line)
        if word == "begin":
            number, kind, about = rest
            operations.append(Operation(number, kind, about, at))
        elif word == "done":
            operations[rest[0] - 1].done = at
        elif word == "error":
            number, code = rest
            op = operations[number - 1]
            troubles.append(Trouble(at, code, f"{op.kind} {op.about}: {os.strerror(code)}"))
        else:
            troubles.append(Trouble(at, 0, rest[0]))
    return operations, troubles
