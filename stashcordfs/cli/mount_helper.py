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

from stashcordfs.volumes import FSNAME_PREFIX

if TYPE_CHECKING:
    from collections.abc import Sequence

_WRONG_USE, _FAILED = 1, 32  # mount(8), "EXIT STATUS"


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(_WRONG_USE, f"{self.prog}: {message}\n")


def is_helpers_call(args: Sequence[str], commands: Sequence[str]) -> bool:
    """Whether these are the arguments of a mount helper: no command, and a place to mount on."""
    return len(args) >= 2 and args[0] not in commands and args[1].startswith("/")


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
    name = given.source.removeprefix(FSNAME_PREFIX)
    chosen = ["-o", ",".join(options)] if options else []
    return ["mount", *chosen, "--", name, given.folder]


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
