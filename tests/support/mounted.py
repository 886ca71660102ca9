"""A volume mounted over a sandbox, each started by its command, as a user would.

    with DemoVolume.running(folder) as volume:
        (volume.mountpoint / "file").write_text("text")
        volume.sync()
        volume.remount(without_cache=True)

Shared by the end-to-end test, the acceptance run and the bench. It imports nothing of the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "stashcordfs.cli.main"]
QUICK_MKFS = [sys.executable, str(Path(__file__).with_name("quick_mkfs.py"))]
NAME = "demo"
_ENDING_S = 30


def fuse_missing() -> str:
    """Why nothing can be mounted here; empty when it can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs /dev/fuse"
    return "" if shutil.which("fusermount3") else "needs fusermount3"


class DemoVolume:
    options: tuple[str, ...] = ()
    mount_within_s = 120.0

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, str] | None = None,
        server: list[str],
        strong_keys: bool = False,
        again: bool = False,
    ) -> None:
        """Start the sandbox and make the volume, not mounted yet. `settings` by name.

        `strong_keys`: with key slots that cost what a user's do. `again`: the folder is one that
        was used before, and its volume is taken up; the passphrase must be among the settings.
        """
        self.folder = folder
        self.mountpoint = folder / "mnt"
        self.state = folder / "state"
        self.server_folder = folder / "server"
        self.mountpoint.mkdir(parents=True, exist_ok=again)
        self._server_options = server
        self.start_server()
        try:
            self.token = str(self.server["token"])
            self.environment = {
                **{k: v for k, v in os.environ.items() if not k.startswith("STASHCORDFS_")},
                "HOME": str(folder),  # no configuration file of the user's
                "STASHCORDFS_STATE_DIR": str(self.state),
                "STASHCORDFS_TOKEN": f"plain:{self.token}",
                "STASHCORDFS_PASSPHRASE": f"plain:{secrets.token_hex(8)}",
                "STASHCORDFS_API_URL": str(self.server["api_url"]),
                **{f"STASHCORDFS_{k.upper()}": v for k, v in (settings or {}).items()},
            }
            if not again:
                self.command(
                    "mkfs", NAME, "--channel", str(self.server["channel_ids"][0]),
                    program=COMMAND if strong_keys else QUICK_MKFS,
                )  # fmt: skip
        except BaseException:
            self.end_server()
            raise

    @classmethod
    @contextlib.contextmanager
    def running(
        cls,
        folder: Path,
        *,
        settings: Mapping[str, str] | None = None,
        server: tuple[str, ...] = (),
        strong_keys: bool = False,
        options: tuple[str, ...] = (),
    ) -> Iterator[DemoVolume]:
        """Mounted inside; afterwards unmounted, without waiting, and the sandbox ended.

        `options` are the mount command's.
        """
        volume = cls(folder, settings=settings, server=list(server), strong_keys=strong_keys)
        volume.options = options
        try:
            volume.mount()
            yield volume
        finally:
            volume.end()

    def end(self) -> None:
        """Unmount, by force where it must be, and end the sandbox; whatever the test has done."""
        try:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                if self.is_mounted():
                    self.command("umount", "--no-wait", str(self.mountpoint), timeout_s=_ENDING_S)
            while self.is_mounted():  # busy, or mounted over itself
                subprocess.run(["fusermount3", "-uz", str(self.mountpoint)], check=True)
        finally:
            self.end_server()

    def command(self, *args: str, timeout_s: float = 1800, program: list[str] = COMMAND) -> str:
        """Run one of the program's commands; what it printed. RuntimeError with its words."""
        done = subprocess.run(
            [*program, *args],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{args[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def mount(self, *options: str) -> None:
        self.command(
            "mount", *self.options, *options, NAME, str(self.mountpoint),
            timeout_s=self.mount_within_s,
        )  # fmt: skip

    @contextlib.contextmanager
    def server_halted(self) -> Iterator[None]:
        """The server's process stands still inside: connections are made, nothing is answered."""
        self._server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._server.send_signal(signal.SIGCONT)

    def umount(self) -> None:
        self.command("umount", str(self.mountpoint))

    def is_mounted(self) -> bool:
        """Without asking the file system, which may be stuck."""
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        return f" {self.mountpoint} " in mounts

    def sync(self) -> None:
        self.command("sync", str(self.mountpoint))

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.command("status", NAME, "--json"))
        return status

    def pid(self) -> int:
        return int(self.status()["pid"])

    def remount(self, *, without_cache: bool = False) -> None:
        """Unmount, waiting for Discord, and mount again, maybe with nothing kept locally."""
        self.umount()
        if without_cache:
            shutil.rmtree(self.state / NAME / "blocks")
        self.mount()

    def server_stats(self) -> dict[str, Any]:
        """What the sandbox itself has counted."""
        told: dict[str, Any] = self.admin("stats")
        return told

    def admin(self, path: str, body: object = None) -> Any:
        """Ask the sandbox itself, or tell it `body`: faults, clock, settings."""
        base = str(self.server["api_url"]).partition("/api/")[0]
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{base}/_sandbox/{path}", data=data)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def api(self, method: str, path: str) -> Any:
        """A request with the bot's token, whose limits are the daemon's, too."""
        request = urllib.request.Request(
            f"{self.server['api_url']}{path}",
            method=method,
            headers={"Authorization": f"Bot {self.token}", "User-Agent": "DiscordBot (test, 1)"},
        )
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as refused:
                if refused.code != 429:
                    raise
                time.sleep(json.load(refused)["retry_after"])

    def start_server(self) -> None:
        """Start the sandbox; after `end_server`, again with what it had, at the same place."""
        self._server_log = (self.folder / "sandbox.log").open("a")
        self._server = subprocess.Popen(
            [*COMMAND, "sandbox", "run", "--dir", str(self.server_folder), *self._server_options],
            stdout=subprocess.PIPE,
            stderr=self._server_log,
            text=True,
        )
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            self.end_server()
            raise RuntimeError((self.folder / "sandbox.log").read_text())
        self.server: dict[str, Any] = json.loads(line)

    def end_server(self) -> None:
        self._server.send_signal(signal.SIGCONT)
        self._server.terminate()
        self._server.wait(_ENDING_S)
        if self._server.stdout is not None:
            self._server.stdout.close()
        self._server_log.close()


def fetch_json(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        told: dict[str, Any] = json.load(answer)
    return told
