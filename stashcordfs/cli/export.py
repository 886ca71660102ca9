"""`export`: take everything along: the journal as JSON lines, all data in a folder or a bucket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stashcordfs.cli.mountpoint import real_path
from stashcordfs.cli.output import print_table, stages
from stashcordfs.config import format_size
from stashcordfs.errors import UsageError
from stashcordfs.volumes import mount_holding, read_mounts

if TYPE_CHECKING:
    from stashcordfs.cli.main import Globals

_SHOWN = 20


@click.command("export")
@click.argument("name")
@click.option("--journal", metavar="FILE|-", help="Write the journal as JSON lines (-: stdout).")
@click.option("--to", metavar="DIR|s3://BUCKET/PREFIX", help="Copy all files there.")
@click.option("--endpoint-url", metavar="URL", help="The S3-compatible server, if not Amazon's.")
@click.option("--delete", is_flag=True, help="Remove from the copy what the volume has no more.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def command(
    globals_: Globals,
    name: str,
    journal: str | None,
    to: str | None,
    endpoint_url: str | None,
    delete: bool,
    as_json: bool,
) -> int:
    """Export the volume NAME, mounted or not. Nothing of it is changed.

    --to can be repeated: what is there already and has not changed is not copied again. Everything
    that was copied is read back and compared.

    Exit code: 0 when everything was copied, else 1.
    """
    if journal is None and to is None:
        raise UsageError("say what to export: --journal FILE, or --to DIR")
    if to is None and (endpoint_url or delete):
        raise UsageError("--endpoint-url and --delete belong to --to")
    if journal == "-" and as_json:
        raise UsageError("--json and --journal - would both write to stdout")
    if to is not None and "://" not in to:
        mount = mount_holding(real_path(to), read_mounts())
        if mount is not None and mount.name == name:
            raise UsageError(f"{to} lies on volume {name} itself; name a folder elsewhere")
    from stashcordfs.daemon import export_data, export_journal

    settings = globals_.settings(volume=name)
    report: dict[str, Any] = {"name": name}
    with stages() as progress:
        if journal is not None:
            path = None if journal == "-" else Path(journal)
            report["records"] = export_journal(settings, name, path, progress=progress)
        if to is not None:
            report |= export_data(
                settings, name, to, endpoint_url=endpoint_url, delete=delete, progress=progress
            )
    if as_json:
        click.echo(json.dumps(report))
    elif journal != "-" or to is not None:
        _show(report, to, err=journal == "-")
    return 0 if report.get("clean", True) else 1


def _show(report: dict[str, Any], to: str | None, *, err: bool) -> None:
    name = report["name"]
    if "records" in report:
        click.echo(f"{name}: {report['records']} records of the journal", err=err)
    if to is None:
        return
    size = format_size(report["copied_bytes"])
    click.echo(
        f"{name}: {report['copied_files']} files copied to {to} ({size}), "
        f"{report['unchanged']} unchanged, {report['removed']} removed",
        err=err,
    )
    for what, count in report["not_kept"].items():
        click.echo(f"Not kept there, but in the manifest: {what} of {count} entries", err=err)
    failed = sorted(report["failed"].items())
    if failed:
        print_table(("Not copied", "Why"), failed[:_SHOWN])
        if len(failed) > _SHOWN:
            click.echo(f"... and {len(failed) - _SHOWN} more: see --json", err=err)
