"""`verify`: does Discord still have everything, and can it be opened?"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import click

from stashcordfs.cli.output import print_table, stages
from stashcordfs.config import format_size
from stashcordfs.errors import StashcordError, UsageError
from stashcordfs.ops.control import ControlClient, NotRunning
from stashcordfs.volumes import VolumeDir

if TYPE_CHECKING:
    from collections.abc import Callable

    from stashcordfs.cli.main import Globals

Part = tuple[int, int]


def _part(_: click.Context, __: click.Parameter, value: str | None) -> Part | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value)
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise UsageError(f"--subset {value}: give a part such as 1/30")
    return int(match[1]), int(match[2])


@click.command("verify")
@click.argument("name")
@click.option("--data", is_flag=True, help="Download everything, open it, compare it.")
@click.option(
    "--subset",
    "part",
    metavar="N/T",
    callback=_part,
    help="Only the next N of T parts; the next run goes on there.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def command(globals_: Globals, name: str, data: bool, part: Part | None, as_json: bool) -> int:
    """Check that Discord still has what the volume NAME counts on. Mounted or not.

    What is missing is told by path, and sent anew where this machine still has it.

    Exit code: 0 when nothing is missing, else 1.
    """
    settings = globals_.settings(volume=name)
    volume = VolumeDir(settings.state_dir, name)
    volume.read_record()
    with stages() as progress:
        try:
            outcome = _in_daemon(volume, data=data, part=part, progress=progress)
        except NotRunning:
            from stashcordfs.daemon import verify_volume

            outcome = verify_volume(settings, name, data=data, part=part, progress=progress)
    if as_json:
        click.echo(json.dumps(outcome))
    else:
        _show(name, outcome)
    return 0 if outcome["clean"] else 1


def _in_daemon(
    volume: VolumeDir, *, data: bool, part: Part | None, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    for event in ControlClient(volume.control_path).stream("verify", data=data, part=part):
        if "outcome" in event:
            outcome: dict[str, Any] = event["outcome"]
            return outcome
        progress(str(event["stage"]), int(event["done"]), int(event["total"]))
    raise StashcordError("the daemon ended the verify without an outcome; see its log")


def _show(name: str, outcome: dict[str, Any]) -> None:
    opened = f", {format_size(outcome['opened_bytes'])} opened" if outcome["opened_bytes"] else ""
    count = outcome["objects"]
    objects = f", {count} segments and parts of checkpoints" if count else ""
    click.echo(
        f"{name}: {outcome['checked_packs']} of {outcome['packs']} packs checked{opened}{objects}"
    )
    for key, says in (
        ("found_again", "packs that were missing are there again"),
        ("corrected_chunks", "places of chunks corrected by their packs' tables"),
        ("from_other_copy", "blocks now refer to another copy"),
        ("resent_blocks", "blocks are sent anew from this machine"),
    ):
        if outcome[key]:
            click.echo(f"{outcome[key]} {says}")
    for what in ("missing", "corrupt"):
        for filename in outcome[f"{what}_packs"]:
            click.echo(f"{what}: pack {filename}")
        for what_object in outcome[f"{what}_objects"]:
            click.echo(f"{what}: {what_object}")
    if outcome["checkpoint_wanted"]:
        click.echo("a new checkpoint takes the place of what is missing of the journal")
    if outcome["damaged"]:
        rows = [(path, str(count)) for path, count in sorted(outcome["damaged"].items())]
        print_table(("Damaged file", "Blocks"), rows)
    if outcome["clean"]:
        click.echo(f"{name}: nothing is missing")
    else:
        click.echo(f"{name}: {outcome['damaged_blocks']} blocks are lost")
