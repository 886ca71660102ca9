"""Fixtures for every room. The sandbox is a process of its own, as it is for a user."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class RunningSandbox:
    """One server process; `restart` keeps its folder and port."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self._arguments = arguments
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "stashcordfs.sandbox",
                "--dir",
                str(self.folder),
                *self._arguments,
            ],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            said = json.loads(stdout.readline())
        self.api_url: str = said["api_url"]
        self.token: str = said["token"]
        self.guild_id: str = said["guild_id"]
        self.channel_ids: list[str] = said["channel_ids"]

    @property
    def base_url(self) -> str:
        return self.api_url.removesuffix("/api/v10")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)

    def restart(self) -> None:
        self.stop()
        self.start()

    def admin(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.base_url}/_sandbox/{path}", data=data)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def stats(self) -> dict[str, Any]:
        return self.admin("stats")

    def faults(self, *rules: dict[str, Any]) -> None:
        self.admin("faults", {"rules": list(rules)})

    def clock(self, advance_s: float) -> None:
        self.admin("clock", {"advance_s": advance_s})

    def settings(self, **changes: object) -> None:
        self.admin("settings", changes)

    def damage(self, attachment_id: int | str, action: str, **more: object) -> None:
        self.admin(f"attachments/{attachment_id}", {"action": action, **more})


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[RunningSandbox]:
    server = RunningSandbox(tmp_path / "sandbox")
    yield server
    if server.process.poll() is None:
        server.stop()
