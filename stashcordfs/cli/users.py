"""Who keeps a mount busy: processes, other mounts, loop devices. From /proc and /sys alone.

It sees what its user may see: without root, of other users' processes nothing. It opens nothing on
the mount, which may be stuck.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from stashcordfs.volumes import unescape

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROC, _BLOCK = Path("/proc"), Path("/sys/block")
_PLACES = {"cwd": "working directory", "root": "root directory", "exe": "program"}
_DELETED = " (deleted)"


def find_users(mountpoint: Path, proc: Path = _PROC, block: Path = _BLOCK) -> list[str]:
    """What uses the mount, as "PID (COMMAND: what PATH)" or "a mount at PATH", for a person."""
    return [
        *_processes(mountpoint, proc),
        *_mounts(mountpoint, proc / "self/mountinfo"),
        *_loop_devices(mountpoint, block),
    ]


def _processes(mountpoint: Path, proc: Path) -> Iterator[str]:
    own = str(os.getpid())
    for process in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)):
        if process.name == own:
            continue
        used = next((use for use in _uses(process) if _lies_below(use[1], mountpoint)), None)
        if used is None:
            continue
        try:
            name = (process / "comm").read_text(errors="replace").strip()
        except OSError:  # it has ended meanwhile
            continue
        yield f"{process.name} ({name}: {used[0]} {used[1]})"


def _uses(process: Path) -> Iterator[tuple[str, str]]:
    """How and which file a process uses; nothing when it has ended, or is another user's."""
    for name, how in _PLACES.items():
        yield from _resolved(process / name, how)
    try:
        descriptors = sorted((process / "fd").iterdir())
    except OSError:
        descriptors = []
    for link in descriptors:
        yield from _resolved(link, "open file")
    try:
        maps = (process / "maps").read_text(errors="surrogateescape")
    except OSError:
        return
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)  # the last is the path, blanks and all
        if len(fields) == 6:
            yield "mapped file", unescape(fields[5])


def _resolved(link: Path, how: str) -> Iterator[tuple[str, str]]:
    try:
        yield how, str(link.readlink())
    except OSError:
        return


def _mounts(mountpoint: Path, mountinfo: Path) -> Iterator[str]:
    """What is mounted below, and binds of it elsewhere, which keep it alive."""
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    places = [(line.split(" ")[2], Path(unescape(line.split(" ")[4]))) for line in lines]
    device = next((device for device, at in reversed(places) if at == mountpoint), None)
    for other, at in places:
        if at != mountpoint and (other == device or at.is_relative_to(mountpoint)):
            yield f"a mount at {at} (umount {at})"


def _loop_devices(mountpoint: Path, block: Path) -> Iterator[str]:
    for told in sorted(block.glob("loop*/loop/backing_file")):
        try:
            file = told.read_text(errors="surrogateescape").strip()
        except OSError:
            continue
        if _lies_below(file, mountpoint):
            device = told.parents[1].name
            yield f"/dev/{device} over {file} (losetup -d /dev/{device})"


def _lies_below(target: str, mountpoint: Path) -> bool:
    plain = target.removesuffix(_DELETED)
    return plain == str(mountpoint) or plain.startswith(f"{mountpoint}/")
