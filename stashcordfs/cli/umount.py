"""`umount`: drain with visible progress, unmount, and wait until the daemon has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stashcordfs.cli.mountpoint import find_mount, is_dead, refuse_busy, unmount, wait_for_exit
from stashcordfs.cli.output import follow
from stashcordfs.config import format_size
from stashcordfs.errors import StashcordError, UsageError
from stashcordfs.ops.control import ControlClient, NotRunning
from stashcordfs.volumes import Mount, volume_of

if TYPE_CHECKING:
    from pathlib import Path

    from stashcordfs.cli.main import Globals

_EXIT_DEADLINE_S = 120.0


@click.command("umount")
@click.argument("targets", nargs=-1, required=True, metavar="MOUNTPOINT...")
@click.option("--no-wait", is_flag=True, help="Leave what is not on Discord to the next mount.")
@click.pass_obj
def command(globals_: Globals, targets: tuple[str, ...], no_wait: bool) -> None:
    """Unmount each MOUNTPOINT (or volume name) after Discord has everything."""
    settings = globals_.settings()
    mounts = []
    for target in targets:
        mount = find_mount(target)
        if mount is None:
            raise UsageError(f"no volume is mounted at {target}; see stashcordfs list")
        mounts.append(mount)
    for mount in mounts:
        end_mount(settings.state_dir, mount, wait=not no_wait)


def end_mount(state_dir: Path, mount: Mount, *, wait: bool) -> None:
    """Drain if wanted, unmount, and wait for the daemon's end."""
    volume = volume_of(state_dir, mount.name)
    if is_dead(mount.mountpoint):
        unmount(mount.mountpoint)
        click.echo(f"{mount.mountpoint}: the daemon was gone; the mount is cleared")
        return
    refuse_busy(mount.mountpoint)
    pid = volume.holder()
    control = ControlClient(volume.control_path)
    lost = ""
    try:
        if wait:
            lost = _drain(control, mount.name)
        status = control.call("status")
        left, blocks = int(status["dirty_bytes"]), int(status["dirty_blocks"])
    except NotRunning:  # it is on its way out already
        left = blocks = 0
    unmount(mount.mountpoint)
    if pid and not wait_for_exit(pid, timeout_s=_EXIT_DEADLINE_S):
        raise StashcordError(f"unmounted, but process {pid} has not ended; see {volume.log_path}")
    if left:
        text = f"{format_size(left)} in {blocks} blocks not on Discord yet; the next mount goes on"
        click.echo(text, err=True)
    if lost:
        raise StashcordError(f"unmounted; {lost}; see stashcordfs verify")


def _drain(control: ControlClient, name: str) -> str:
    """Wait until Discord has all; else what it cannot have, in one line."""
    try:
        last = follow(control.stream("drain"), label=f"Uploading {name}")
        return str(last.get("left", ""))
    except KeyboardInterrupt:
        raise StashcordError(
            f"interrupted: {name} stays mounted and uploading goes on; "
            "stashcordfs umount --no-wait unmounts without waiting"
        ) from None
