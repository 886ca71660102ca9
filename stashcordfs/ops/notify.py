"""systemd's notification protocol (sd_notify): a datagram of NAME=VALUE lines to NOTIFY_SOCKET.

Without NOTIFY_SOCKET every call does nothing, so callers need not ask whether systemd is there.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Notifier:
    """Tells the service manager about start, progress and stop. Never raises, never blocks."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # Linux's abstract namespace
            self._address = "\0" + self._address[1:]
        watchdog_us = int(environ.get("WATCHDOG_USEC") or 0)
        if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            watchdog_us = 0
        self.watchdog_interval_s = watchdog_us / 2e6  # half of the limit; 0: none wanted

    def send(self, **values: str) -> bool:
        """Send the lines; False when there is nobody to tell or it could not be told."""
        if not self._address:
            return False
        message = "\n".join(f"{name}={value}" for name, value in values.items()).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            try:
                sock.sendto(message, self._address)
            except OSError:
                return False
        return True

    def ready(self, status: str = "Mounted") -> bool:
        return self.send(READY="1", STATUS=status)

    def status(self, text: str) -> bool:
        return self.send(STATUS=text.replace("\n", " "))

    def stopping(self, status: str = "Draining") -> bool:
        return self.send(STOPPING="1", STATUS=status)

    def reloading(self) -> bool:
        """Must be followed by `ready` when done (Type=notify-reload compares the clocks)."""
        return self.send(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))

    def extend_timeout(self, seconds: float) -> bool:
        """While draining: we are alive and need at least this much longer."""
        return self.send(EXTEND_TIMEOUT_USEC=str(int(seconds * 1e6)))

    def watchdog(self) -> bool:
        return self.send(WATCHDOG="1")
