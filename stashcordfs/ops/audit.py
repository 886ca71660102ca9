"""STATE/NAME/audit.log: what was done to a volume that cannot be undone. JSON lines, no names."""

from __future__ import annotations

import errno
import json
import os
import time
from typing import TYPE_CHECKING

from stashcordfs.errors import LocalDiskError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


class AuditLog:
    """Appends lines, durably."""

    def __init__(self, path: Path, now_s: Callable[[], float] = time.time) -> None:
        """The file is made with the first line."""
        self._path = path
        self._now_s = now_s

    def __call__(self, told: Mapping[str, object]) -> None:
        """Add a line with the time (UTC) before what is told. LocalDiskError."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._now_s()))
        line = json.dumps({"time": moment, **told})
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            descriptor = os.open(self._path, flags, 0o600)
            try:
                os.write(descriptor, line.encode() + b"\n")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise LocalDiskError(error.errno or errno.EIO, f"audit log: {error}") from error
