"""`list`: the volumes of this machine, and where each is mounted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from stashcordfs.cli.mountpoint import known_volumes
from stashcordfs.cli.output import print_table

if TYPE_CHECKING:
    from stashcordfs.cli.main import Globals


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
@click.pass_obj
def command(globals_: Globals, as_json: bool) -> None:
    """List the volumes that this machine knows."""
    rows = []
    for volume, place in known_volumes(globals_.settings().state_dir):
        record = volume.read_record()
        mounted = volume.holder() is not None
        rows.append(
            {
                "name": volume.name,
                "uuid": record.uuid,
                "mountpoint": str(place) if place and mounted else "",
                "channels": [str(channel) for channel in record.channels],
                "api_url": record.api_url,
            }
        )
    if as_json:
        click.echo(json.dumps(rows))
    elif not rows:
        click.echo("No volumes yet. Try: stashcordfs demo DIRECTORY")
    else:
        print_table(
            ("name", "mounted at", "channels", "server"),
            [
                (
                    str(row["name"]),
                    str(row["mountpoint"] or "-"),
                    " ".join(row["channels"]),
                    str(row["api_url"]),
                )
                for row in rows
            ],
        )
