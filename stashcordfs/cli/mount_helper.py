"""The way from mount(8), /etc/fstab and systemd to `mount`.

mount(8) runs `/sbin/mount.fuse.stashcordfs SOURCE DIR [-sfnv] [-o OPTIONS] [-t TYPE]` if that is
there, else fuse3's own `/sbin/mount.fuse`, which runs `stashcordfs SOURCE DIR -o OPTIONS`. Both
come here. A remount is between mount(8) and the kernel.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

_WRONG_USE, _FAILED = 1, 32  # mount(8), "EXIT STATUS"


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(_WRONG_USE, f"{self.prog}: {message}\n")


def is_helpers_call(args: Sequence[str]) -> bool:
    """Whether /sbin/mount.fuse calls: SOURCE DIR -o OPTIONS, where a volume may be named as a
    command is. None of the commands takes a path and then -o.
    """
    return len(args) == 4 and args[1].startswith("/") and args[2] == "-o"


def mount_arguments(args: Sequence[str]) -> list[str] | None:
    """Arguments for `stashcordfs`; None when nothing is to be done."""
    parser = _Arguments(prog="mount.fuse.stashcordfs", add_help=False)
    parser.add_argument("source")
    parser.add_argument("folder")
    parser.add_argument("-o", dest="options", action="append", default=[])
    for ignored in ("-t", "-N"):
        parser.add_argument(ignored)
    for flag in ("-f", "-n", "-s", "-v", "-r", "-w"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args(args)
    if given.f:
        return None
    options = [option for option in ",".join(given.options).split(",") if option]
    if given.r:
        options.append("ro")
    if "remount" in options:
        return ["--", "mount", "-i", "-o", ",".join(options), given.folder]
    # As of any other file system; libfuse would leave both out.
    options += [word for word in ("dev", "suid") if f"no{word}" not in options]
    return ["mount", "-o", ",".join(options), "--", given.source, given.folder]


def main() -> None:
    """`mount.fuse.stashcordfs`, and `mount.stashcordfs`. Exits as mount(8) wants it."""
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Mount, or remount; the exit code."""
    from stashcordfs.cli.main import main as command

    arguments = mount_arguments(args)
    if arguments is None:
        return 0
    if arguments[0] == "--":
        return subprocess.run(arguments[1:], check=False).returncode
    try:
        command(arguments)
    except SystemExit as end:
        if not end.code:
            return 0
        return _WRONG_USE if end.code == 2 else _FAILED
    return 0
