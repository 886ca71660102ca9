"""`destroy`: forget a volume on this machine. What is on Discord stays."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from stashcordfs.errors import StashcordError, UsageError
from stashcordfs.volumes import VolumeDir

if TYPE_CHECKING:
    from stashcordfs.cli.main import Globals


@click.command("destroy")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def command(globals_: Globals, name: str, yes: bool) -> None:
    """Remove all local state of the volume NAME: journal, cache, data not uploaded yet.

    Its messages on Discord stay; delete its channels there to remove them too.
    """
    volume = VolumeDir(globals_.settings().state_dir, name)
    record = volume.read_record()
    channels = ", ".join(str(channel) for channel in (*record.channels, record.journal_channel))
    used = [past.mount_name for past in volume.all_past() if past.holder() is not None]
    if used:
        raise StashcordError(f"{used[0]} is mounted: unmount it first")
    with volume.lock():  # a mounted volume is refused here
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("--yes: needed, since there is no terminal to ask on")
            click.confirm(
                f"Remove {volume.path}? What has not reached Discord yet is lost for good",
                abort=True,
            )
        volume.remove()
    click.echo(f"Removed {volume.path}. The messages on Discord stay, in channels {channels}.")
