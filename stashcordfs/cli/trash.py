"""`trash`: what was deleted or overwritten, and bringing it back."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import click

from stashcordfs.cli.output import print_table
from stashcordfs.config import format_size
from stashcordfs.errors import UsageError
from stashcordfs.ops.control import ControlClient, NotRunning
from stashcordfs.volumes import VolumeDir

if TYPE_CHECKING:
    from stashcordfs.cli.main import Globals

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@click.group("trash")
def command() -> None:
    """What was deleted or overwritten, for as long as history_days says.

    Only what Discord had of it can come back. PATH is from the volume's root.
    """


@command.command("list")
@click.argument("name")
@click.argument("path", required=False)
@click.option("--json", "as_json", is_flag=True, help="A list of objects.")
@click.pass_obj
def list_(globals_: Globals, name: str, path: str | None, as_json: bool) -> None:
    """Show what is in the trash of the volume NAME, at PATH and below."""
    items: list[dict[str, Any]] = _ask(globals_, name, "list", path=path)["items"]
    if as_json:
        click.echo(json.dumps(items))
    elif not items:
        click.echo("Nothing is in the trash.")
    else:
        print_table(
            ("Id", "Deleted", "Size", "Path", "Note"),
            [(str(i["id"]), _when(i), format_size(i["size"]), i["path"], _note(i)) for i in items],
        )


@command.command("restore")
@click.argument("name")
@click.argument("what", metavar="ID|PATH")
@click.option("--to", metavar="PATH", help="Where it should be, from the volume's root.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def restore(globals_: Globals, name: str, what: str, to: str | None, as_json: bool) -> int:
    """Bring back a file, or a folder's PATH with all that was below.

    Of several versions of a path the newest; an ID names a certain one. Nothing is overwritten.

    Exit code: 0 when all came back, 1 when something is in the way of a part of it.
    """
    done = _ask(globals_, name, "restore", what=what, to=to)
    if as_json:
        click.echo(json.dumps(done))
        return 1 if done["in_the_way"] else 0
    for path in done["paths"]:
        click.echo(f"restored: {path}")
    for path in done["in_the_way"]:
        click.echo(f"left in the trash, something is there: {path}")
    click.echo(f"{name}: {done['files']} files are back")
    return 1 if done["in_the_way"] else 0


@command.command("empty")
@click.argument("name")
@click.option("--older-than", metavar="AGE", help="Only what was deleted so long ago: 12h, 3d.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def empty(globals_: Globals, name: str, older_than: str | None, yes: bool) -> None:
    """Forget what is in the trash. It cannot be brought back then; space is freed later."""
    age_s = 0 if older_than is None else parse_age(older_than)
    if not yes:
        click.confirm(f"Empty the trash of {name}?", abort=True, err=True)
    done = _ask(globals_, name, "empty", older_than_s=age_s)
    click.echo(f"{name}: {done['files']} files are forgotten")


def parse_age(text: str) -> int:
    """A time span in seconds; UsageError."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if match is None:
        raise UsageError(f"--older-than {text}: write it as 90m, 12h or 3d")
    return int(match[1]) * _UNITS_S[match[2]]


def _ask(globals_: Globals, name: str, act: str, **request: Any) -> dict[str, Any]:
    settings = globals_.settings(volume=name)
    volume = VolumeDir(settings.state_dir, name)
    volume.read_record()
    try:
        return ControlClient(volume.control_path).call(f"trash_{act}", **request)
    except NotRunning:
        from stashcordfs.daemon import trashing
        from stashcordfs.daemon.opened import trash_volume

        return trash_volume(settings, name, getattr(trashing, f"{act}_trash"), request)


def _when(item: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item["deleted"]))


def _note(item: dict[str, Any]) -> str:
    blocks = item["incomplete_blocks"]
    return f"incomplete: Discord lacked {blocks} blocks" if blocks else ""
