"""`sync`: what lies below a path is on Discord when this returns."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from stashcordfs.cli.mountpoint import real_path
from stashcordfs.cli.output import follow
from stashcordfs.errors import StashcordError, UsageError
from stashcordfs.ops.control import ControlClient
from stashcordfs.volumes import mount_holding, read_mounts, volume_of

if TYPE_CHECKING:
    from pathlib import Path

    from stashcordfs.cli.main import Globals


@click.command("sync")
@click.argument("path")
@click.pass_obj
def command(globals_: Globals, path: str) -> None:
    """Return when Discord has all that was written below PATH."""
    settings = globals_.settings()
    place = real_path(path)
    mount = mount_holding(place, read_mounts())
    if mount is None:
        raise UsageError(f"{path} is not on a mounted volume")
    if not place.exists():
        raise UsageError(f"{path} does not exist")
    below = str(place.relative_to(mount.mountpoint))
    below = "" if below == "." else below
    control = ControlClient(volume_of(settings.state_dir, mount.name).control_path)
    # The kernel holds written pages that the daemon has not seen. Only a process other than the
    # daemon can ask for them without waiting for itself.
    for name in control.call("open_for_writing", path=below)["paths"]:
        flush(mount.mountpoint / str(name))
    follow(control.stream("sync", path=below), label=f"Uploading {path}")


def flush(path: Path) -> None:
    """Fsync a file by name; one that is gone meanwhile needs none."""
    descriptor = None
    for flags in (os.O_RDONLY, os.O_WRONLY):
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            break
        except FileNotFoundError:
            return
        except PermissionError:
            continue
    if descriptor is None:
        raise StashcordError(f"{path}: no permission to open it; run sync as its owner or as root")
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise StashcordError(f"{path}: fsync failed: {error.strerror}") from error
    finally:
        os.close(descriptor)
