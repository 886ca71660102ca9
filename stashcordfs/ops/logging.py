"""Logs: readable lines on a terminal and in STATE/NAME/log, JSON lines where a machine reads them.

The redactor works on the finished line, tracebacks included, so that no way into the log passes
it by. Other rooms use the standard library's `logging` and know nothing of this module.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
import time
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

LOG_BYTES = 10 * 1024 * 1024
LOG_FILES = 3
_COLOURS = {"DEBUG": "2", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class Redactor:
    """Replaces secrets by ***. Handed the secrets by whoever resolves them, at any time."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: set[str] = set()
        for secret in secrets:
            self.add(secret)

    def add(self, secret: str) -> None:
        if secret:
            # As it is, and as repr or JSON would write it.
            self._secrets |= {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1]}

    def clean(self, text: str) -> str:
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


class TextFormatter(logging.Formatter):
    """One line for a person: local time, severity, logger, message, extra fields."""

    def __init__(self, redactor: Redactor, *, colours: bool = False) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self.redactor = redactor
        self._colours = colours

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's own name
        line = super().formatMessage(record)
        line += "".join(f" {name}={value}" for name, value in _extra(record).items())
        colour = _COLOURS.get(record.levelname)
        return f"\033[{colour}m{line}\033[0m" if self._colours and colour else line

    def format(self, record: logging.LogRecord) -> str:
        return self.redactor.clean(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line; extra fields of the record are fields of the object."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self.redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return self.redactor.clean(json.dumps(entry, default=str))


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class _PrivateRotatingFile(logging.handlers.RotatingFileHandler):
    """Rotated, and its owner's alone: paths of damaged files may stand in it."""

    def _open(self) -> IO[str]:  # type: ignore[override]  # a text file either way
        def private(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_CLOEXEC, 0o600)

        return open(self.baseFilename, self.mode, encoding="utf-8", opener=private)


def configure_logging(
    *,
    level: str,
    log_format: str = "auto",
    file: Path | None = None,
    stream: IO[str] | None = None,
    redactor: Redactor | None = None,
) -> Redactor:
    """Send the root logger to `file` (rotated) or `stream` (stderr); replaces what was set."""
    redactor = redactor or Redactor()
    handler: logging.Handler
    target = stream or sys.stderr
    if file is not None:
        handler = _PrivateRotatingFile(file, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1)
    else:
        handler = logging.StreamHandler(target)
    colours = file is None and target.isatty() and not os.environ.get("NO_COLOR")
    handler.setFormatter(
        JsonFormatter(redactor)
        if log_format == "json"
        else TextFormatter(redactor, colours=colours)
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    set_level(level)
    return redactor


def redact(secret: str) -> None:
    """Keep a secret out of the log that was resolved after `configure_logging`."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, TextFormatter | JsonFormatter):
            handler.formatter.redactor.add(secret)


def set_level(level: str) -> None:
    """Change the least severity that is logged; libraries that log each request stay quieter."""
    logging.getLogger().setLevel(level.upper())
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
