"""`python -m stashcordfs.sandbox`: the server as a process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stashcordfs.sandbox.server import run
from stashcordfs.sandbox.settings import SandboxSettings


def _default_dir() -> Path:
    return Path.home() / ".local/state/stashcordfs/sandbox"


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text}: write a number from 0 to 65535")
    return int(text)


def parse(arguments: list[str] | None = None) -> SandboxSettings:
    base = SandboxSettings(dir=_default_dir())
    parser = argparse.ArgumentParser(
        prog="stashcordfs sandbox run", description="A Discord-compatible server on loopback."
    )
    parser.add_argument("--dir", type=Path, default=base.dir, help="where all of it is kept")
    parser.add_argument("--host", default=base.host)
    parser.add_argument("--port", type=_port, default=0, help="0: the last one, or a free one")
    for name, text in (
        ("attachment_bytes", "limit of one attachment"),
        ("request_bytes", "limit of one request"),
        ("max_attachments", "attachments in a message"),
        ("link_lifetime_s", "how long a CDN link lives"),
        ("nonce_window_s", "how long a nonce is remembered"),
        ("premium_tier", "the guild's boost level"),
        ("bandwidth", "bytes per second of a download; 0: unlimited"),
    ):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(base, name), help=text)
    parser.add_argument("--latency-s", type=float, default=0.0, help="added to each API answer")
    parser.add_argument("--no-rate-limits", dest="rate_limits", action="store_false")
    parser.add_argument("--no-read-history", dest="read_history", action="store_false")
    parser.add_argument("--no-attach-files", dest="attach_files", action="store_false")
    parser.add_argument("--no-send-messages", dest="send_messages", action="store_false")
    parser.add_argument("--message-content", action="store_true", help="the intent, on")
    return SandboxSettings(**vars(parser.parse_args(arguments)))


def main(arguments: list[str] | None = None) -> None:
    """Serve, or say in one line why not."""
    settings = parse(arguments)
    try:
        run(settings)
    except OSError as error:
        where = error.filename or f"{settings.host}:{settings.port}"
        sys.exit(f"stashcordfs sandbox run: error: {where}: {error.strerror}")


if __name__ == "__main__":
    main()
