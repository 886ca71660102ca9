"""The token is reset while mounted: local work goes on, and a new one is taken up by itself."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
mounted = importlib.import_module("mounted")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def volume(tmp_path):
    port = free_port()
    settings = {"metrics_port": str(port), "upload_delay_s": "0.2"}
    with mounted.DemoVolume.running(tmp_path / "v", settings=settings) as running:
        running.port = port
        running.token_file = tmp_path / "token"
        keep(running, running.token)
        running.umount()
        running.environment["STASHCORDFS_TOKEN"] = f"file:{running.token_file}"
        running.mount()
        yield running


def keep(volume, token: str) -> None:
    volume.token_file.write_text(token)
    volume.token_file.chmod(0o600)


def reset_token(volume) -> str:
    return str(volume.admin("token", {})["token"])


def asked(volume, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{volume.port}/{path}", timeout=30) as answer:
        return str(answer.read().decode())


def until_rejected(volume) -> dict:
    while (state := volume.status())["token"] != "rejected":
        pass
    return state


def test_a_reset_token_is_told_and_a_new_one_taken_up_without_a_remount(volume):
    path = volume.mountpoint / "before"
    path.write_bytes(b"b" * 100_000)
    volume.sync()
    assert volume.status()["token"] == "accepted"
    pid = volume.pid()
    new = reset_token(volume)
    (volume.mountpoint / "after").write_bytes(b"a" * 100_000)
    state = until_rejected(volume)
    assert state["dirty_bytes"] >= 100_000
    assert 0 <= state["token_retry_s"] <= 60
    assert str(volume.token_file) in state["token_advice"]
    assert "token\trejected" in volume.command("status", mounted.NAME)
    assert json.loads(asked(volume, "health"))["token"] == "rejected"
    assert "stashcordfs_token_rejected 1.0" in asked(volume, "metrics")
    assert path.read_bytes() == b"b" * 100_000
    refused = volume.server_stats()["invalid"]
    keep(volume, new)
    volume.sync()
    state = volume.status()
    assert (state["token"], state["dirty_bytes"], state["pid"]) == ("accepted", 0, pid)
    assert "stashcordfs_token_rejected 0.0" in asked(volume, "metrics")
    assert volume.server_stats()["invalid"] - refused <= 1
    log = (volume.state / mounted.NAME / "log").read_text()
    assert new not in log
    volume.remount(without_cache=True)
    assert (volume.mountpoint / "after").read_bytes() == b"a" * 100_000


def test_a_slow_command_for_the_token_holds_up_nothing_at_sighup(volume, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    volume.umount()
    volume.environment["STASHCORDFS_TOKEN"] = f"cmd:cat {gate}"
    with ThreadPoolExecutor(1) as other:
        told = other.submit(gate.write_text, volume.token)
        volume.mount()
        told.result()
        os.kill(volume.pid(), signal.SIGHUP)
        with gate.open("w") as answer:  # opens when its command runs, which now waits for us
            (volume.mountpoint / "meanwhile").write_bytes(b"m")
            assert volume.status()["state"] == "mounted"
            answer.write(volume.token)
    volume.sync()
    while "settings reloaded" not in (volume.state / mounted.NAME / "log").read_text():
        assert volume.status()["state"] == "mounted"
