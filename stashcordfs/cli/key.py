"""`key`: add, change and remove what opens a volume's key. The data is not rewritten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stashcordfs.cli.output import print_table, read_secret
from stashcordfs.config import PREFIX
from stashcordfs.volumes import VolumeDir

if TYPE_CHECKING:
    from collections.abc import Callable

    from stashcordfs.cli.main import Globals

_use_recovery_key = click.option(
    "--recovery-key",
    "use_recovery_key",
    is_flag=True,
    help=f"Unlock with the recovery key ({PREFIX}RECOVERY_KEY, or asked) instead.",
)


@click.group("key")
def command() -> None:
    """Manage passphrases and recovery keys.

    A new passphrase does not lock out a leaked old one: copies of the old key slot stay on
    Discord for whoever has seen them.
    """


@command.command("show")
@click.argument("name")
@click.pass_obj
def show(globals_: Globals, name: str) -> None:
    """List the key slots of NAME, by number and kind."""
    _change(globals_, name, "show", unlock=False)


@command.command("add")
@click.argument("name")
@click.option("--recovery", is_flag=True, help="Make and print another recovery key.")
@_use_recovery_key
@click.pass_obj
def add(globals_: Globals, name: str, recovery: bool, use_recovery_key: bool) -> None:
    """Add a passphrase to NAME, or a recovery key."""
    _change(
        globals_,
        name,
        "add",
        use_recovery_key=use_recovery_key,
        new=None if recovery else _new_passphrase,
    )


@command.command("change")
@click.argument("name")
@_use_recovery_key
@click.pass_obj
def change(globals_: Globals, name: str, use_recovery_key: bool) -> None:
    """Replace the passphrase of NAME. With --recovery-key: when it is forgotten."""
    _change(globals_, name, "change", use_recovery_key=use_recovery_key, new=_new_passphrase)


@command.command("remove")
@click.argument("name")
@click.argument("slot")
@_use_recovery_key
@click.pass_obj
def remove(globals_: Globals, name: str, slot: str, use_recovery_key: bool) -> None:
    """Remove the key slot number SLOT (see `key show`) of NAME."""
    _change(globals_, name, "remove", use_recovery_key=use_recovery_key, slot=slot)


def _new_passphrase() -> str:
    return read_secret("New passphrase", variable=PREFIX + "NEW_PASSPHRASE", confirm=True)


def _change(
    globals_: Globals,
    name: str,
    action: str,
    *,
    unlock: bool = True,
    use_recovery_key: bool = False,
    slot: str | None = None,
    new: Callable[[], str] | None = None,
) -> None:
    from stashcordfs.daemon import change_keys

    settings = globals_.settings(volume=name)
    VolumeDir(settings.state_dir, name).read_record()
    passphrase = recovery_key = ""
    if unlock and use_recovery_key:
        recovery_key = read_secret("Recovery key", variable=PREFIX + "RECOVERY_KEY")
    elif unlock and settings.passphrase is not None:
        passphrase = settings.passphrase.reveal()
    elif unlock:
        passphrase = read_secret(f"Passphrase of {name}", variable=PREFIX + "PASSPHRASE")
    outcome = change_keys(
        settings,
        name,
        action,
        passphrase=passphrase or None,
        recovery_key=recovery_key or None,
        new_passphrase=new() if new else None,
        slot_id=slot,
    )
    if isinstance(outcome, str):
        click.echo(f"Recovery key: {outcome}")
        click.echo("Keep it on paper, away from this machine. It is shown only now.")
    else:
        print_table(("slot", "kind"), [(str(s["id"]), str(s["kind"])) for s in outcome])
