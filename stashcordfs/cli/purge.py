"""`purge`: a file leaves Discord, all history, and this machine, for good."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from stashcordfs.cli.mountpoint import real_path
from stashcordfs.cli.output import stages
from stashcordfs.config import format_size
from stashcordfs.errors import StashcordError, UsageError
from stashcordfs.ops.control import ControlClient, NotRunning
from stashcordfs.volumes import PastDir, VolumeDir, mount_holding, read_mounts, volume_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stashcordfs.cli.main import Globals

_SHOWN = 10
_NAMES_ENDED = (
    "This cannot be undone. It also ends all earlier history: recover --at and mount --at go back "
    "to now at most."
)


@click.command("purge")
@click.argument("path")
@click.option("--volume", "name", metavar="NAME", help="PATH is from the root of this volume.")
@click.option("--recursive", is_flag=True, help="A folder with all that is in it.")
@click.option("--dry-run", is_flag=True, help="Only say what it would end.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; needs --yes or --dry-run.")
@click.pass_obj
def command(
    globals_: Globals,
    path: str,
    name: str | None,
    recursive: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Remove the file at PATH for good: name, content, its versions in history and in the trash.

    PATH is on a mounted volume; with --volume, from that volume's root, and it may be in the trash
    alone. It says what it ends before it asks. Cut short, it goes on with the next mount.
    """
    if as_json and not (yes or dry_run):
        raise UsageError("--json: with --yes or --dry-run only")
    settings = globals_.settings(volume=name)
    volume, path = _meant(settings.state_dir, name, path)

    def confirm(plan: dict[str, Any]) -> bool:
        if as_json and dry_run:
            click.echo(json.dumps(plan))
        elif not as_json:
            _show_plan(plan)
        if dry_run:
            return False
        if not yes:
            click.confirm("Purge?", abort=True, err=True)
        return True

    request = {"path": path, "recursive": recursive}
    with stages() as progress:
        try:
            done = _in_daemon(volume, request, confirm, progress)
        except NotRunning:
            from stashcordfs.daemon.opened import purge_volume

            run = partial(purge_volume, settings, volume.name, request)
            done = run(confirm=confirm, progress=progress)
    if done is not None:
        click.echo(json.dumps(done)) if as_json else _show_done(done)


def _meant(state_dir: Path, name: str | None, path: str) -> tuple[VolumeDir, str]:
    """The volume, and the path from its root."""
    if name is None:
        volume, path = _on_mount(state_dir, path)
    else:
        volume = VolumeDir(state_dir, name)
        volume.read_record()
    used = [past.mount_name for past in volume.all_past() if past.holder() is not None]
    if used:
        raise StashcordError(f"{used[0]} is mounted: unmount it first, as its copy has all names")
    return volume, path


def _on_mount(state_dir: Path, path: str) -> tuple[VolumeDir, str]:
    place = real_path(path)
    mount = mount_holding(place, read_mounts())
    if mount is None:
        raise UsageError(f"{path} is not on a mounted volume; or give --volume NAME")
    volume = volume_of(state_dir, mount.name)
    if isinstance(volume, PastDir):
        raise UsageError(f"{path} is on a mount of the past: give the path on the volume itself")
    return volume, str(place.relative_to(mount.mountpoint))


def _in_daemon(
    volume: VolumeDir,
    request: dict[str, Any],
    confirm: Callable[[dict[str, Any]], bool],
    progress: Callable[[str, int, int], None],
) -> dict[str, Any] | None:
    control = ControlClient(volume.control_path)
    if not confirm(control.call("purge_plan", **request)):
        return None
    for event in control.stream("purge", **request):
        if "outcome" in event:
            outcome: dict[str, Any] = event["outcome"]
            return outcome
        progress(str(event["stage"]), 0, 0)
    raise StashcordError("the daemon ended the purge without an outcome; see its log")


def _show_plan(plan: dict[str, Any]) -> None:
    size = format_size(plan["bytes"])
    what = f"{plan['files']} files ({size}), {plan['folders']} folders"
    click.echo(f"To be purged: {what}, {plan['trashed']} versions in the trash")
    for path in plan["paths"][:_SHOWN]:
        click.echo(f"  {path}")
    if len(plan["paths"]) > _SHOWN:
        click.echo("  ...")
    for path in plan["other_names"]:
        click.echo(f"  its other name: {path}")
    if plan["shared_bytes"]:
        click.echo(f"Content that stays, as other files hold it too: {_shared(plan)}")
    click.echo(_NAMES_ENDED)


def _shared(plan: dict[str, Any]) -> str:
    return f"{format_size(plan['shared_bytes'])} ({', '.join(plan['shared_with'][:_SHOWN])})"


def _show_done(done: dict[str, Any]) -> None:
    click.echo(
        f"Purged: {done['files']} files, {done['trashed']} versions in the trash; "
        f"{done['rewritten_messages']} messages packed anew or dropped, "
        f"{done['history_messages']} messages of history deleted"
    )
    if done["shared_bytes"]:
        click.echo(f"{format_size(done['shared_bytes'])} stay, as other files hold them too")
    if done["still_served"]:
        click.echo(
            f"The CDN still serves {done['still_served']} deleted attachments (sealed). It is "
            "asked again while the volume is mounted: see erasing in stashcordfs status"
        )
