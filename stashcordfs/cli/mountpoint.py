"""Checks around a mountpoint: what is mounted there, whether it can be used, who keeps it busy.

The commands mount, umount, demo, status and sync share it. Nothing here talks to a daemon.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import subprocess
from pathlib import Path

from stashcordfs.errors import StashcordError, UsageError
from stashcordfs.volumes import Mount, VolumeDir, list_volumes, mount_holding, read_mounts

_DEAD = {errno.ENOTCONN, errno.ECONNABORTED}


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
        return VolumeDir(state_dir, mount.name)
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
    """State below the mountpoint would be hidden by the mount, and wait for itself."""
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
    if users := find_users(path):
        raise StashcordError(f"{path} is still mounted: in use by {', '.join(users)}")
    raise StashcordError(f"{path} is still mounted: {done.stderr.strip() or 'fusermount3 failed'}")


def find_users(mountpoint: Path, proc: Path = Path("/proc")) -> list[str]:
    """Processes with a file, working directory or mapping below the mountpoint, as "PID (name)"."""
    users = []
    own = str(os.getpid())
    for process in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)):
        if process.name != own and any(_lies_below(link, mountpoint) for link in _links(process)):
            try:
                name = (process / "comm").read_text().strip()
            except OSError:  # it has ended meanwhile
                continue
            users.append(f"{process.name} ({name})")
    return users


def _links(process: Path) -> list[str]:
    found = []
    candidates = [process / "cwd", process / "root", process / "exe"]
    with contextlib.suppress(OSError):  # ended, or another user's
        candidates += list((process / "fd").iterdir())
    for link in candidates:
        try:
            found.append(str(link.readlink()))
        except OSError:
            continue
    try:
        maps = (process / "maps").read_text(errors="surrogateescape")
    except OSError:
        return found
    return found + [line.partition("/")[1] + line.partition("/")[2] for line in maps.splitlines()]


def _lies_below(target: str, mountpoint: Path) -> bool:
    return target == str(mountpoint) or target.startswith(f"{mountpoint}/")


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
