"""One volume under test: its sandbox, which outlives every crash, and its daemon, which does not.

The daemon is this process's own child, started through `daemon.py`, so that its death is seen at
once and nothing else is ever killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invariants import BLOCK_BYTES
from power import LoopDisk

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "support"))
from mounted import COMMAND, NAME, fetch_json, fuse_missing  # noqa: E402  support is no package

__all__ = ["HERE", "NAME", "Rig", "RigError", "fuse_missing"]

_READY_S = 60.0
_SETTINGS = {
    "UPLOAD_DELAY_S": "0.2",
    "UPLOAD_DELAY_MAX_S": "2",
    "SETTLE_DELAY_S": "0.3",
    "MIN_FREE_BYTES": "16 MiB",
    "LOG_LEVEL": "info",
}


class RigError(Exception):
    """The volume cannot be used as it must be: it did not mount, or not in time."""


class Rig:
    def __init__(
        self, folder: Path, *, disk: LoopDisk | None = None, options: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.disk = disk
        self.mountpoint = folder / "mnt"
        self.state = (disk.path if disk else folder) / "state"
        self.server_folder = folder / "server"
        self.mountpoint.mkdir(parents=True)
        self._options = dict(options)
        self._options_path = folder / "options.json"
        self._order = folder / "site.json"
        self._boot = folder / "boot_id"
        self.new_boot()
        self._log = (folder / "sandbox.log").open("w")
        self._log_read = 0
        self.mount_s = 0.5  # how long the last mount took
        self._daemon: subprocess.Popen[bytes] | None = None
        self._server = subprocess.Popen(
            [*COMMAND, "sandbox", "run", "--dir", str(self.server_folder), "--no-rate-limits"],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        try:
            assert self._server.stdout is not None
            told = json.loads(self._server.stdout.readline() or "{}")
            if not told:
                raise RigError((folder / "sandbox.log").read_text())
            self._admin = str(told["api_url"]).partition("/api/")[0] + "/_sandbox"
            self.environment = {
                **{k: v for k, v in os.environ.items() if not k.startswith("STASHCORDFS_")},
                "HOME": str(folder),
                "STASHCORDFS_STATE_DIR": str(self.state),
                "STASHCORDFS_TOKEN": f"plain:{told['token']}",
                "STASHCORDFS_PASSPHRASE": "plain:crash",
                "STASHCORDFS_API_URL": str(told["api_url"]),
                **{f"STASHCORDFS_{key}": value for key, value in _SETTINGS.items()},
            }
            channel = str(told["channel_ids"][0])
            self.command("mkfs", NAME, "--channel", channel, "--block-size", str(BLOCK_BYTES))
            os.sync()
        except BaseException:
            self.end_server()
            raise

    @property
    def volume(self) -> Path:
        return self.state / NAME

    @property
    def journal(self) -> Path:
        return self.volume / "journal.sqlite"

    # ------------------------------------------------------------ the server

    def faults(self, rules: list[dict[str, Any]]) -> None:
        """Replace what goes wrong at the server."""
        body = json.dumps({"rules": rules}).encode()
        request = urllib.request.Request(
            f"{self._admin}/faults", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()

    def stats(self) -> dict[str, Any]:
        return fetch_json(f"{self._admin}/stats")

    def end_server(self) -> None:
        if self._server.poll() is None:
            self._server.terminate()
            self._server.wait(30)
        if self._server.stdout is not None:
            self._server.stdout.close()
        self._log.close()

    # ------------------------------------------------------------ the daemon

    def _wrapped(self, *args: str) -> list[str]:
        more = {"boot_id": str(self._boot), "site": str(self._order), **self._options}
        self._options_path.write_text(json.dumps(more), encoding="utf-8")
        return [sys.executable, str(HERE / "daemon.py"), str(self._options_path), *args]

    def command(self, *args: str, timeout_s: float = 120.0) -> str:
        """Run a command to its end. RigError with its words when it fails."""
        done = subprocess.run(
            self._wrapped(*args),
            env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RigError(f"{args[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def begin(self, *args: str) -> subprocess.Popen[bytes]:
        """Start a command whose end nobody waits for yet."""
        return subprocess.Popen(
            self._wrapped(*args),
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def start(self, **options: Any) -> int:
        """Start the daemon, not waiting for it. Returns the descriptor that tells it is ready."""
        self._options |= options
        told, tells = os.pipe()
        with (self.folder / "daemon.err").open("ab") as errors:
            self._daemon = subprocess.Popen(
                [
                    *self._wrapped("mount", "--foreground", "--ready-fd", str(tells), "--"),
                    NAME,
                    str(self.mountpoint),
                ],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=errors, pass_fds=[tells], start_new_session=True,
            )  # fmt: skip
        os.close(tells)
        return told

    def mount(self, **options: Any) -> float:
        """Start the daemon and wait until it is mounted. Returns how long that took, in s."""
        begun = time.monotonic()
        told = self.start(**options)
        try:
            ready = select.select([told], [], [], _READY_S)[0]
            if not ready or not os.read(told, 100):
                words = (self.folder / "daemon.err").read_text(errors="replace").splitlines()
                raise RigError(f"not mounted: {words[-1] if words else 'no word of it'}")
        finally:
            os.close(told)
        self.mount_s = time.monotonic() - begun
        return self.mount_s

    def umount(self) -> None:
        """Unmount when the server has everything; the daemon has ended then."""
        self.command("umount", str(self.mountpoint))
        self._reap()

    def sync(self) -> None:
        self.command("sync", str(self.mountpoint))

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.command("status", NAME, "--json"))
        return told

    def is_alive(self) -> bool:
        return self._daemon is not None and self._daemon.poll() is None

    def arm(self, site: str, count: int, *, after_s: float = 0.0) -> None:
        """Let the daemon kill itself there, or so much later."""
        order = {"name": site, "count": count, "after_s": after_s}
        self._order.write_text(json.dumps(order), encoding="utf-8")
        if self._daemon is not None:
            with contextlib.suppress(ProcessLookupError):
                self._daemon.send_signal(signal.SIGUSR2)

    def died_within(self, seconds: float) -> bool:
        """Whether it dies by itself in that time; an end in good order is no death."""
        assert self._daemon is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._daemon.wait(seconds)
        return self._daemon.returncode == -signal.SIGKILL

    def kill(self) -> float:
        """SIGKILL. Returns when it died, which may have been before; the daemon is gone then."""
        at = time.monotonic()
        if self._daemon is not None:
            self._daemon.kill()
            self._reap()
        died = self._order.with_suffix(".died")
        if died.exists():
            at = min(at, float(died.read_text(encoding="ascii") or at))
            died.unlink()
        return at

    def _reap(self) -> None:
        if self._daemon is not None:
            self._daemon.wait(60)
            self._daemon = None

    def clear_mount(self) -> None:
        """Detach what a killed daemon has left mounted."""
        subprocess.run(
            ["fusermount3", "-uz", str(self.mountpoint)], check=False, capture_output=True
        )

    # ------------------------------------------------------------ state

    def new_errors(self) -> list[str]:
        """What the log calls an error since the last call: a fault that was caught, but is one."""
        path = self.volume / "log"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        new = text[self._log_read :] if len(text) >= self._log_read else text  # rotated
        self._log_read = len(text)
        told: list[str] = []
        for line in new.splitlines():
            if line[:4].isdigit():  # a record begins with its time
                told.append(line)
            elif told and line.strip(" |+-"):  # of a traceback, the last line says what it was
                told[-1] = f"{told[-1].split(' ... ')[0]} ... {line.strip(' |')}"
        return [line for line in told if " ERROR " in line]

    def forget_blocks(self) -> None:
        """Remove the block cache, as anybody may while nothing is dirty and nothing mounted."""
        shutil.rmtree(self.volume / "blocks")

    def new_boot(self) -> None:
        """From the next mount on it is another boot."""
        self._boot.write_text(f"{uuid.uuid4()}\n", encoding="ascii")

    def restore_power(self) -> None:
        """After a cut: the local disk recovers, and the machine has booted anew."""
        assert self.disk is not None
        self.clear_mount()
        self.disk.restore()
        self.new_boot()

    def close(self) -> None:
        """End everything that this rig has started."""
        self.kill()
        self.clear_mount()
        self.end_server()
        if self.disk is not None:
            self.disk.unmount()
