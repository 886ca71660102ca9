"""`fsck`: check a volume's journal and local state, and mend what can be mended."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from stashcordfs.cli.output import print_table, stages

if TYPE_CHECKING:
    from stashcordfs.cli.main import Globals


@click.command("fsck")
@click.argument("name")
@click.option("--repair", is_flag=True, help="Mend what is wrong. The volume must not be mounted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def command(globals_: Globals, name: str, repair: bool, as_json: bool) -> int:
    """Check the journal and the local state of the volume NAME. Discord is not asked.

    A mounted volume is checked as well, but for its local files. --repair copies the journal first
    and keeps everything that it can: what has lost its name is under lost+found afterwards; blocks
    whose content is not known any more give an I/O error, never zeros.

    Exit code: 0 when all is well (afterwards, with --repair), 1 when something is wrong.
    """
    from stashcordfs.daemon import fsck_volume

    settings = globals_.settings(volume=name)
    with stages() as progress:
        report = fsck_volume(settings, name, repair=repair, progress=progress)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _show(report)
    return 0 if report["clean"] else 1


def _show(report: dict[str, Any]) -> None:
    for text in report["repaired"]:
        click.echo(f"mended: {text}")
    if report["journal_copy"]:
        click.echo(f"The journal as it was: {report['journal_copy']}")
    if report["findings"]:
        print_table(
            ("What", "Check", "Says"),
            [(f["severity"], f["check"], f["text"]) for f in report["findings"]],
            style=lambda row: "red" if row[0] == "error" else "yellow",
        )
    told = len(report["findings"])
    if (left := report["errors"] + report["notes"] - told) > 0:
        click.echo(f"... and {left} more of these kinds")
    for text in report["skipped"]:
        click.echo(f"Not checked: {text}")
    if report["clean"]:
        notes = f" ({report['notes']} notes: the next mount tidies up)" if report["notes"] else ""
        click.echo(f"{report['name']}: no errors{notes}")
    else:
        click.echo(f"{report['name']}: {report['errors']} errors")
