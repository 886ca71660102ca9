"""`recover`: get a volume back on a bare machine, from Discord alone."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from stashcordfs.cli.output import parse_time, print_table, read_secret, stages
from stashcordfs.config import PREFIX, format_size
from stashcordfs.volumes import check_name

if TYPE_CHECKING:
    from stashcordfs.cli.main import Globals

_SHOWN = 20


@click.command("recover")
@click.argument("name")
@click.option("--channel", "channels", type=int, multiple=True, required=True, metavar="ID")
@click.option("--journal-channel", type=int, metavar="ID", help="Default: the first --channel.")
@click.option("--api-url", help="The API's base URL with version.")
@click.option("--at", metavar="TIME", help="The state of then: 2026-11-25T14:00 (local), or ...Z.")
@click.option("--expect", type=int, metavar="N", help="Refuse if segment N is not there.")
@click.option("--dry-run", is_flag=True, help="Say what would come back; keep and change nothing.")
@click.option("--from-packs", is_flag=True, help="Rebuild from the packs alone: the last resort.")
@click.option(
    "--recovery-key",
    "use_recovery_key",
    is_flag=True,
    help=f"Unlock with the recovery key ({PREFIX}RECOVERY_KEY, or asked) instead.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def command(
    globals_: Globals,
    name: str,
    channels: tuple[int, ...],
    journal_channel: int | None,
    api_url: str | None,
    at: str | None,
    expect: int | None,
    dry_run: bool,
    from_packs: bool,
    use_recovery_key: bool,
    as_json: bool,
) -> None:
    """Get a volume back from its channels, as the volume NAME of this machine.

    It needs the channels, the bot token, and the passphrase or the recovery key. The machine that
    had it before, if it is still alive, turns read-only. What that machine alone had is listed.

    Run again after an interruption, it goes on where it was.
    """
    check_name(name)
    from stashcordfs.daemon import Wanted, recover_volume

    settings = globals_.settings(volume=name, flags={"api_url": api_url})
    passphrase = recovery_key = None
    if use_recovery_key:
        recovery_key = read_secret("Recovery key", variable=PREFIX + "RECOVERY_KEY")
    elif settings.passphrase is not None:
        passphrase = settings.passphrase.reveal()
    else:
        passphrase = read_secret(f"Passphrase of {name}", variable=PREFIX + "PASSPHRASE")
    wanted = Wanted(
        channels=channels,
        journal_channel=journal_channel or channels[0],
        passphrase=passphrase,
        recovery_key=recovery_key,
        at_ns=None if at is None else parse_time(at),
        expect=expect,
        dry_run=dry_run,
        from_packs=from_packs,
    )
    with stages() as progress:
        report = recover_volume(settings, name, wanted, progress=progress)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    what = "would come back" if report["dry_run"] else "is back"
    size = format_size(report["bytes"])
    click.echo(f"{report['name']} {what}: {report['inodes']} files and folders, {size}")
    if report["segment"]:
        made = time.localtime(report["segment_time_ns"] // 10**9)
        when = time.strftime("%Y-%m-%d %H:%M:%S", made)
        click.echo(f"As of segment {report['segment']}, made {when}; nothing newer was found.")
    for note in report["notes"]:
        click.echo(f"Note: {note}")
    if report["missing"]:
        lost = format_size(report["missing_bytes"])
        click.echo(f"Never uploaded: {lost} of {report['missing_files']} files")
        rows = [(m["path"], format_size(m["bytes"]), _fate(m)) for m in report["missing"]]
        print_table(("Path", "Lost", "Now"), rows[:_SHOWN])
        _more(report, report["missing_files"])
    if report["older"]:
        click.echo(f"With older content in places: {report['older_files']} files")
        print_table(("Path",), [(path,) for path in report["older"][:_SHOWN]])
        _more(report, report["older_files"])
    if missing := report.get("missing_packs"):
        click.echo(f"Missing on Discord: {len(missing)} packs")
        damaged = report["damaged"]
        counts = [(path, str(count)) for path, count in damaged.items()]
        print_table(("Damaged file", "Blocks"), counts[:_SHOWN])
        _more(report, len(damaged))
    click.echo(f"{report['requests']} requests, {report['seconds']:.1f} s")
    if not report["dry_run"]:
        click.echo(f"Mount it: stashcordfs mount {report['name']} DIRECTORY")


def _fate(missing: dict[str, Any]) -> str:
    now = "ends before it" if missing["cut"] and not missing["blocks"] else "I/O error there"
    older = missing["in_trash"]
    return now if older is None else f"{now}; older content: trash restore NAME {older} --to PATH"


def _more(report: dict[str, Any], count: int) -> None:
    if count > _SHOWN:
        click.echo(f"... and {count - _SHOWN} more: see {report.get('report', '--json')}")
