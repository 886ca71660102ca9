"""`sandbox run`: the Discord-compatible server, as the process that was started."""

from __future__ import annotations

import importlib.util
import os
import sys

import click

from stashcordfs.errors import UsageError


@click.group("sandbox")
def command() -> None:
    """The Discord-compatible server for trying and testing."""


@command.command("run", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(args: tuple[str, ...]) -> None:
    """Run the server until SIGTERM; options as in `sandbox run --help`.

    Prints one JSON line when it listens: api_url, token, guild_id, channel_ids.
    """
    os.execv(sys.executable, sandbox_argv(*args))  # noqa: S606  this is the server from now on


def sandbox_argv(*args: str) -> list[str]:
    """The server's command line; UsageError when its extra is not installed."""
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise UsageError(
            "the sandbox is not installed; install it with: pip install 'stashcordfs[sandbox]'"
        )
    return [sys.executable, "-m", "stashcordfs.sandbox", *args]
