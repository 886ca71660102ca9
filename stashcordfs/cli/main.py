"""The command `stashcordfs`: global options, the list of commands, and how errors end.

Each command lives in its own module and is imported when it is called, so that --help is quick.
"""

from __future__ import annotations

# ruff: noqa: ARG002  click hands its context to methods that need none
import importlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stashcordfs import __version__
from stashcordfs.cli import mount_helper
from stashcordfs.config import PREFIX, Settings, load_settings
from stashcordfs.errors import StashcordError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COMMANDS = {
    "demo": "Try it: a server on this machine, a volume, a mounted directory.",
    "sandbox": "The Discord-compatible server for trying and testing.",
    "mkfs": "Make a volume in Discord channels.",
    "mount": "Mount a volume.",
    "umount": "Wait until Discord has everything, then unmount.",
    "status": "Show what a volume is doing.",
    "sync": "Return when Discord has what lies below a path.",
    "fsck": "Check a volume's journal and local state, and mend them.",
    "verify": "Check that Discord still has everything.",
    "gc": "Take off Discord what nothing needs any more.",
    "export": "Copy everything to a folder or a bucket, or write the journal as JSON.",
    "list": "List the volumes of this machine.",
    "destroy": "Remove a volume's local state.",
    "recover": "Get a volume back from Discord on this machine.",
    "trash": "Bring back what was deleted or overwritten.",
    "purge": "Remove a file for good, from Discord and its history too.",
    "key": "Manage passphrases and recovery keys.",
}


@dataclass(slots=True)
class Globals:
    """The options before the command's name."""

    flags: dict[str, object] = field(default_factory=dict)
    config_file: Path | None = None

    def settings(
        self, *, volume: str | None = None, flags: Mapping[str, object] | None = None
    ) -> Settings:
        """Read the settings, with the command's own flags on top."""
        every = {**self.flags, **(flags or {})}
        return load_settings(every, volume=volume, config_file=self.config_file)

    def environment(self) -> dict[str, str]:
        """The environment in which another process finds the same settings."""
        result = dict(os.environ)
        for name, value in self.flags.items():
            if value is not None:
                result[PREFIX + name.upper()] = str(value)
        named = self.config_file or os.environ.get(PREFIX + "CONFIG")
        if named:
            result[PREFIX + "CONFIG"] = str(Path(named).expanduser().absolute())
        return result


class _Commands(click.Group):
    """Loads a command's module when it is called, and turns every error into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"stashcordfs.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(  # type: ignore[override]  # never returns, in either mode of click's
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> None:
        given = sys.argv[1:] if args is None else list(args)
        if mount_helper.is_helpers_call(given):
            sys.exit(mount_helper.run(given))
        extra["standalone_mode"] = False
        try:
            code = super().main(args, prog_name or "stashcordfs", **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            code = 2
        except click.ClickException as error:
            code = _fail(error.format_message(), code=error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            code = _fail("interrupted", code=1)
        except StashcordError as error:
            code = _fail(str(error), code=error.exit_code)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            code = _fail(f"{where}{error.strerror or error}", code=1)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, *, code: int) -> int:
    line = " ".join(message.split())
    label = click.style("error:", fg="red") if sys.stderr.isatty() else "error:"
    click.echo(f"stashcordfs: {label} {line}", err=True)
    return code


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stashcordfs")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with settings.")
@click.option("--state-dir", help="Where volumes keep their local state.")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--log-format", help="auto, text or json.")
@click.pass_context
def main(
    ctx: click.Context,
    config: Path | None,
    state_dir: str | None,
    log_level: str | None,
    log_format: str | None,
) -> None:
    """A file system whose files live, encrypted, in Discord channels.

    Start with: stashcordfs demo DIRECTORY
    """
    ctx.obj = Globals(
        {
            "state_dir": str(Path(state_dir).absolute()) if state_dir else None,
            "log_level": log_level,
            "log_format": log_format,
        },
        config,
    )


if __name__ == "__main__":
    main()
