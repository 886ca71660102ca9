"""`gc`: take off Discord what nothing needs any more."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from stashcordfs.cli.output import print_table, stages
from stashcordfs.config import format_size
from stashcordfs.errors import StashcordError
from stashcordfs.ops.control import ControlClient, NotRunning
from stashcordfs.volumes import VolumeDir

if TYPE_CHECKING:
    from collections.abc import Callable

    from stashcordfs.cli.main import Globals

_ROWS = (  # what, messages, bytes
    ("held by Discord", "messages", "held_bytes"),
    ("  in use (files and trash)", None, "live_bytes"),
    ("  kept for history", None, "history_bytes"),
    ("  needless, in messages that are needed", None, "dead_bytes"),
    ("waiting to be deleted", "condemned_messages", "condemned_bytes"),
    ("packed anew", "repacked_messages", "repacked_bytes"),
    ("deleted", "deleted_messages", "deleted_bytes"),
    ("orphans found", "orphans", "orphan_bytes"),
    ("orphans deleted", "orphans_deleted", None),
)


@click.command("gc")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def command(globals_: Globals, name: str, as_json: bool) -> None:
    """Take off Discord what the volume NAME does not need any more. Mounted or not.

    A mount does this by itself, within its share of the requests. Here it is done now, orphans are
    looked for, and a report is given. What nothing needs any more goes in two steps: it is
    condemned, and an hour later deleted, by the mount or by the next gc.
    """
    settings = globals_.settings(volume=name)
    volume = VolumeDir(settings.state_dir, name)
    volume.read_record()
    with stages() as progress:
        try:
            outcome = _in_daemon(volume, progress)
        except NotRunning:
            from stashcordfs.daemon import collect_volume

            outcome = collect_volume(settings, name, progress=progress)
    if as_json:
        click.echo(json.dumps(outcome))
        return
    rows = [
        (
            what,
            "" if messages is None else str(outcome[messages]),
            "" if size is None else format_size(outcome[size]),
        )
        for what, messages, size in _ROWS
    ]
    print_table(("What", "Messages", "Bytes"), rows)
    click.echo(f"{name}: {outcome['requests']} requests")


def _in_daemon(volume: VolumeDir, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    for event in ControlClient(volume.control_path).stream("gc"):
        if "outcome" in event:
            outcome: dict[str, Any] = event["outcome"]
            return outcome
        progress(str(event["stage"]), 0, 0)
    raise StashcordError("the daemon ended the run without an outcome; see its log")
