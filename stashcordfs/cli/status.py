"""`status`: what a volume is doing, for a person or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from stashcordfs.cli.mountpoint import find_volume
from stashcordfs.cli.output import print_table
from stashcordfs.config import format_size
from stashcordfs.ops.control import ControlClient, NotRunning
from stashcordfs.volumes import VolumeDir, list_volumes

if TYPE_CHECKING:
    from stashcordfs.cli.main import Globals

_ANSWER_S = 10.0
# The contract's fields; unknown while nobody has the journal open.
_UNKNOWN = (
    "pid",
    "dirty_bytes",
    "pending_packs",
    "unsettled",
    "unsettled_since",
    "uploaded_bytes",
    "messages_sent",
    "requests",
    "rate_limited",
    "cache_bytes",
    "token",
    "segment",
    "discord_age_s",
    "last_error",
)


@click.command("status")
@click.argument("target", required=False, metavar="[NAME|MOUNTPOINT]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (a list for several).")
@click.pass_obj
def command(globals_: Globals, target: str | None, as_json: bool) -> None:
    """Show a volume's state, or that of all volumes."""
    settings = globals_.settings()
    if target is None:
        volumes = list_volumes(settings.state_dir)
    else:
        volumes = [find_volume(settings.state_dir, target)]
    states = [ask(volume) for volume in volumes]
    if as_json:
        click.echo(json.dumps(states[0] if len(states) == 1 else states))
    elif not states:
        click.echo("No volumes yet. Try: stashcordfs demo DIRECTORY")
    elif len(states) == 1:
        print_table(("What", "Value"), [(n, _shown(n, v)) for n, v in states[0].items()])
    else:
        columns = ("name", "state", "dirty_bytes", "pending_packs", "unsettled", "last_error")
        print_table(columns, [[_shown(n, state.get(n)) for n in columns] for state in states])


def ask(volume: VolumeDir) -> dict[str, Any]:
    """Ask the daemon, or say that there is none."""
    try:
        return ControlClient(volume.control_path, timeout_s=_ANSWER_S).call("status")
    except NotRunning:
        unknown: dict[str, Any] = dict.fromkeys(_UNKNOWN)
        holder = volume.holder()
        state = "unmounted" if holder is None else "starting or stopping"
        return {"name": volume.name, "state": state, **unknown, "pid": holder}


def _shown(name: str, value: object) -> str:
    if value is None or value == "":
        return "-"
    return format_size(value) if name.endswith("_bytes") and isinstance(value, int) else str(value)
