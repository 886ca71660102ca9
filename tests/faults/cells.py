"""One file operation in a process of its own, so that one that never returns can be killed.

    python cells.py OPERATION PATH [ARGUMENT...]

Prints `ok`, the errno's name, or what is wrong with the data: ZEROS, SHORT, WRONG, MISSING.
"""

from __future__ import annotations

import errno
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path


def bytes_of(seed: str, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def read(path: Path, seed: str, size: str) -> str:
    """The whole file against what its seed gives."""
    with path.open("rb", buffering=0) as file:
        data = b"".join(iter(lambda: file.read(1 << 20), b""))
    wanted = bytes_of(seed, int(size))
    if data == wanted:
        return "ok"
    if len(data) != len(wanted):
        return "SHORT"
    return "WRONG" if data.strip(b"\0") else "ZEROS"


def write(path: Path, seed: str, size: str) -> str:
    path.write_bytes(bytes_of(seed, int(size)))
    return "ok"


def fsync(path: Path, seed: str, size: str) -> str:
    with path.open("wb", buffering=0) as file:
        file.write(bytes_of(seed, int(size)))
        os.fsync(file.fileno())
    return "ok"


def create(path: Path) -> str:
    path.touch(exist_ok=False)
    return "ok"


def rename(path: Path, other: str) -> str:
    path.rename(other)
    return "ok" if Path(other).exists() and not path.exists() else "MISSING"


def unlink(path: Path) -> str:
    path.unlink()
    return "WRONG" if path.exists() else "ok"


def listing(path: Path, *names: str) -> str:
    return "ok" if sorted(os.listdir(path)) == sorted(names) else "MISSING"  # noqa: PTH208


def alive(path: Path) -> str:
    os.statvfs(path)
    return "ok"


OPERATIONS: dict[str, Callable[..., str]] = {
    "read": read,
    "write": write,
    "fsync": fsync,
    "create": create,
    "rename": rename,
    "unlink": unlink,
    "list": listing,
    "alive": alive,
}


def main(operation: str, path: str, *arguments: str) -> str:
    try:
        return OPERATIONS[operation](Path(path), *arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))


if __name__ == "__main__":
    sys.stdout.write(main(*sys.argv[1:]))
