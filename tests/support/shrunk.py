"""A volume whose daemon has a block cache smaller than a user may set: a few files overflow it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mounted import NAME, DemoVolume

_DAEMON = Path(__file__).resolve().parents[1] / "crash" / "daemon.py"


class ShrunkVolume(DemoVolume):
    """Its daemon is this process's child, started through tests/crash/daemon.py."""

    cache_bytes = 4 << 20

    def __init__(self, folder: Path, **more: Any) -> None:
        super().__init__(folder, **more)
        self._daemon: subprocess.Popen[bytes] | None = None
        self._shrunk = folder / "shrunk.json"
        self._shrunk.write_text(json.dumps({"cache_bytes": self.cache_bytes}))

    def mount(self, *options: str) -> None:
        read_end, write_end = os.pipe()
        log = (self.folder / "daemon.log").open("ab")
        program = [sys.executable, str(_DAEMON), str(self._shrunk), "mount", "--foreground"]
        program += ["--ready-fd", str(write_end), *self.options, *options]
        program += ["--", NAME, str(self.mountpoint)]
        with log, os.fdopen(read_end, encoding="utf-8") as told:
            try:
                self._daemon = subprocess.Popen(
                    program, stderr=log, pass_fds=[write_end], env=self.environment
                )
            finally:
                os.close(write_end)
            if not told.read():
                raise RuntimeError((self.folder / "daemon.log").read_text())

    def umount(self) -> None:
        super().umount()
        self._reap()

    def end(self) -> None:
        super().end()
        self._reap()

    def _reap(self) -> None:
        if self._daemon is not None:
            self._daemon.wait(30)
            self._daemon = None
