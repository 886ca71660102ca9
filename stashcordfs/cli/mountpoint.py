"""Checks around a mountpoint: what is mounted there, whether it can be used, who keeps it busy.

The commands mount, umount, demo, status and sync share it. Nothing here talks to a daemon.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import subprocess
from pathlib import Path

from stashcordfs.cli.users import find_users
from stashcordfs.errors import StashcordError, UsageError
from stashcordfs.volumes import (
    Mount,
    VolumeDir,
    list_volumes,
    mount_holding,
    read_mounts,
    volume_of,
)

_DEAD = {errno.ENOTCONN, errno.ECONNABORTED}
_USERS_TOLD = 8


def real_path(path: str | Path) -> Path:
    """The absolute path without links; works below a dead mount too."""
    return Path(os.path.realpath(path))


def mount_at(path: Path) -> Mount | None:
    """Our mount at exactly this place."""
    mount = mount_holding(path, read_mounts())
    return mount if mount is not None and mount.mountpoint == path else None


def find_mount(target: str) -> Mount | None:
    """Our mount of that name or at that place. A name wins only when it looks like one."""
    at_place = mount_at(real_path(target))
    if at_place is not None or "/" in target:
        return at_place
    return next((mount for mount in reversed(read_mounts()) if mount.name == target), None)


def find_volume(state_dir: Path, target: str) -> VolumeDir:
    """The volume of that name, or that is mounted at that place."""
    mount = find_mount(target)
    if mount is not None:
        return volume_of(state_dir, mount.name)
    if "/" in target or target in {".", ".."}:
        raise UsageError(f"no volume is mounted at {target}")
    volume = VolumeDir(state_dir, target)
    volume.read_record()
    return volume


def is_dead(path: Path) -> bool:
    """Whether a FUSE mount is there whose process is gone.

    By opening it: the kernel goes on answering `stat` from its cache, as long as attributes live.
    """
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in _DEAD
    return False


def clear_dead(path: Path) -> None:
    """Unmount what a killed process has left."""
    if is_dead(path):
        unmount(path)


def prepare_mountpoint(path: Path, state_dir: Path) -> None:
    """Clear a dead mount, then make sure that the directory can be mounted on."""
    clear_dead(path)
    if mount := mount_at(path):
        raise UsageError(f"{path}: volume {mount.name} is mounted there already")
    if not path.exists():
        raise UsageError(f"{path} does not exist; make it first: mkdir -p {path}")
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory; name an empty directory")
    with os.scandir(path) as entries:
        if next(entries, None) is not None:
            raise UsageError(f"{path} is not empty; name an empty directory")
    refuse_below(state_dir, path)


def refuse_below(state_dir: Path, mountpoint: Path) -> None:
    """State below the mountpoint would be hidden by the mount, and wait for itself.

    A mountpoint within the state could hide a part of it, such as an empty folder of blocks.
    """
    if mountpoint.is_relative_to(real_path(state_dir)):
        raise UsageError(
            f"{mountpoint} lies in state_dir, {state_dir}, which is the program's own; "
            "name a directory outside it"
        )
    if real_path(state_dir).is_relative_to(mountpoint):
        raise UsageError(
            f"state_dir: {state_dir} lies below the mountpoint {mountpoint}; "
            "set STASHCORDFS_STATE_DIR to a directory outside it"
        )


def unmount(path: Path) -> None:
    """Unmount, or say who keeps it busy."""
    program = shutil.which("fusermount3")
    if program is None:
        raise StashcordError("fusermount3 is missing; install the package fuse3")
    done = subprocess.run(
        [program, "-u", "--", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode == 0 or mount_at(path) is None:
        return
    refuse_busy(path)
    told = done.stderr.strip() or "fusermount3 failed"
    hint = "" if os.geteuid() == 0 else "; root sees whose it is: sudo fuser -vm " + str(path)
    raise StashcordError(f"{path} is still mounted: {told}{hint}")


def refuse_busy(path: Path) -> None:
    """Raise StashcordError when something that we can see uses the mount at `path`."""
    if users := find_users(path):
        more = f" and {len(users) - _USERS_TOLD} more" if len(users) > _USERS_TOLD else ""
        raise StashcordError(
            f"{path} is in use by {', '.join(users[:_USERS_TOLD])}{more}: "
            "leave it or end them, then unmount again"
        )


def wait_for_exit(pid: int, *, timeout_s: float | None = None) -> bool:
    """Wait until a process that is no child of ours has ended; False when it has not in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(None if timeout_s is None else timeout_s * 1000))
    finally:
        os.close(descriptor)


def known_volumes(state_dir: Path) -> list[tuple[VolumeDir, Path | None]]:
    """All volumes with the place where each is mounted."""
    places = {mount.name: mount.mountpoint for mount in read_mounts()}
    return [(volume, places.get(volume.name)) for volume in list_volumes(state_dir)]
