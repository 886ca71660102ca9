"""`mkfs`: make a volume in Discord channels."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from stashcordfs.cli.output import read_secret
from stashcordfs.config import PREFIX
from stashcordfs.volumes import check_name

if TYPE_CHECKING:
    from stashcordfs.cli.main import Globals


@click.command("mkfs")
@click.argument("name")
@click.option("--channel", "channels", type=int, multiple=True, required=True, metavar="ID")
@click.option("--journal-channel", type=int, metavar="ID", help="Default: the first --channel.")
@click.option("--api-url", help="The API's base URL with version.")
@click.option("--block-size", help="Unit of caching and sealing, such as 1MiB.")
@click.pass_obj
def command(
    globals_: Globals,
    name: str,
    channels: tuple[int, ...],
    journal_channel: int | None,
    api_url: str | None,
    block_size: str | None,
) -> None:
    """Make the volume NAME in Discord channels, and print its recovery key, once."""
    check_name(name)
    from stashcordfs.daemon import mkfs

    flags = {"api_url": api_url, "block_size": block_size}
    settings = globals_.settings(volume=name, flags=flags)
    if settings.passphrase is not None:
        passphrase = settings.passphrase.reveal()
    else:
        passphrase = read_secret(
            f"New passphrase for {name}", variable=PREFIX + "PASSPHRASE", confirm=True
        )
    made = mkfs(
        settings,
        name,
        channels=list(channels),
        journal_channel=journal_channel,
        block_size=settings.block_size,
        passphrase=passphrase,
        progress=_say,
    )
    click.echo(f"Volume {name} is made: {made.volume_uuid}")
    click.echo(f"Recovery key: {made.recovery_key}")
    click.echo(
        "Keep the recovery key on paper, away from this machine. It is shown only now. "
        "Without it and without the passphrase nobody can read the volume."
    )


def _say(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(text, err=True)
