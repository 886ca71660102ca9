"""The program as a person uses it: processes, a real mount, a server on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from stashcordfs.cli.mountpoint import mount_at, wait_for_exit

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(
        not Path("/dev/fuse").exists() or shutil.which("fusermount3") is None,
        reason="needs /dev/fuse and fusermount3",
    ),
]


class Demo:
    def __init__(self, root: Path) -> None:
        self.place = root / "mnt"
        self.state = root / "state"
        keep = {k: v for k, v in os.environ.items() if not k.startswith("STASHCORDFS_")}
        (root / "config.toml").write_text("upload_delay_s = 600\n")
        self.env = keep | {
            "STASHCORDFS_STATE_DIR": str(self.state),
            "STASHCORDFS_CONFIG": str(root / "config.toml"),
        }

    def run(self, *args: str, code: int = 0, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "stashcordfs.cli.main", *args],
            env=self.env | env,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def status(self) -> dict:
        return json.loads(self.run("status", "demo", "--json"))

    @property
    def server(self) -> dict:
        return json.loads((self.state / "demo/sandbox.json").read_text())


@pytest.fixture
def demo(tmp_path):
    demo = Demo(tmp_path)
    demo.run("demo", str(demo.place))
    yield demo
    demo.run("demo", "--stop", str(demo.place))
    assert mount_at(demo.place) is None


def test_a_first_use_from_mount_to_remount_without_the_cache(demo) -> None:
    content = os.urandom(3_000_000)
    (demo.place / "dir").mkdir()
    (demo.place / "dir/secret-name").write_bytes(content)
    with (demo.place / "open").open("w") as file:
        file.write("still open")
        file.flush()
        demo.run("sync", str(demo.place))
    state = demo.status()
    assert state["state"] == "mounted"
    assert state["dirty_bytes"] == state["pending_packs"] == state["unsettled"] == 0
    assert state["uploaded_bytes"] > len(content)
    assert state["messages_sent"] >= 1
    assert state["rate_limited"] == 0
    demo.run("umount", str(demo.place))
    assert list(demo.place.iterdir()) == []
    assert not wait_for_pid(state["pid"])
    shutil.rmtree(demo.state / "demo/blocks")
    demo.run("demo", str(demo.place))
    assert (demo.place / "dir/secret-name").read_bytes() == content
    assert (demo.place / "open").read_text() == "still open"
    token = demo.server["token"]
    stored = b"".join(
        p.read_bytes() for p in (demo.state / "demo/sandbox").rglob("*") if p.is_file()
    )
    assert b"secret-name" not in stored
    assert content[1000:1064] not in stored
    assert token not in (demo.state / "demo/log").read_text()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert token.encode() not in process.read_bytes()
        except OSError:
            continue


def wait_for_pid(pid: int) -> bool:
    """Whether the process is still there."""
    return not wait_for_exit(pid, timeout_s=30)


def test_a_busy_mount_stays_and_names_who_uses_it(demo) -> None:
    with (demo.place / "f").open("w"):
        assert f"in use by {os.getpid()} (" in demo.run("umount", str(demo.place), code=1)
    assert mount_at(demo.place) is not None


def test_a_killed_daemon_loses_nothing_that_was_fsynced(demo) -> None:
    with (demo.place / "f").open("w") as file:
        file.write("kept")
        file.flush()
        os.fsync(file.fileno())
    pid = demo.status()["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for_exit(pid)
    assert demo.status()["state"] == "unmounted"
    demo.run("demo", str(demo.place))
    assert (demo.place / "f").read_text() == "kept"


def test_sigterm_drains_and_unmounts(demo) -> None:
    (demo.place / "f").write_text("sent")
    pid = demo.status()["pid"]
    os.kill(pid, signal.SIGTERM)
    assert wait_for_exit(pid, timeout_s=60)
    assert mount_at(demo.place) is None
    assert "left_bytes=0" in (demo.state / "demo/log").read_text()


def test_bad_input_gets_a_line_and_a_code(demo, tmp_path) -> None:
    assert "mounted already" in demo.run("demo", str(demo.place), code=2)
    assert "in use by process" in demo.run("destroy", "demo", "--yes", code=1)
    demo.run("umount", str(demo.place))
    env = {
        "STASHCORDFS_TOKEN": demo.server["token"],
        "STASHCORDFS_PASSPHRASE": "wrong",
        "STASHCORDFS_API_URL": demo.server["api_url"],
    }
    place = str(demo.place)
    assert "passphrase" in demo.run("mount", "demo", place, code=1, **env)
    log = (demo.state / "demo/log").read_text()
    assert "passphrase for this volume" in log
    assert "Traceback" not in log
    assert "not empty" in demo.run("mount", "demo", str(tmp_path), code=2, **env)
    channel = demo.server["channel_ids"][0]
    mkfs = ("mkfs", "other", "--channel", channel)
    assert "already holds volume" in demo.run(*mkfs, code=2, **env)
    assert "token" in demo.run(*mkfs, code=1, **env | {"STASHCORDFS_TOKEN": "wrong"})
    assert "no such channel" in demo.run("mkfs", "other", "--channel", "5", code=1, **env)


def test_keys_are_added_changed_and_used(demo) -> None:
    demo.run("umount", str(demo.place))
    passphrase = (demo.state / "demo/passphrase").read_text()
    env = {"STASHCORDFS_TOKEN": demo.server["token"], "STASHCORDFS_PASSPHRASE": passphrase}
    assert demo.run("key", "show", "demo").count("\n") == 3
    made = demo.run("key", "add", "demo", "--recovery", **env)
    recovery = made.splitlines()[0].removeprefix("Recovery key: ")
    demo.run(
        *("key", "change", "demo", "--recovery-key"),
        STASHCORDFS_RECOVERY_KEY=recovery,
        STASHCORDFS_NEW_PASSPHRASE="another",
        STASHCORDFS_TOKEN=demo.server["token"],
    )
    place = str(demo.place)
    assert "passphrase" in demo.run("mount", "demo", place, code=1, **env)
    demo.run("mount", "demo", place, **env | {"STASHCORDFS_PASSPHRASE": "another"})


def test_metrics_and_health_answer_while_mounted(demo) -> None:
    import socket

    demo.run("umount", str(demo.place))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    demo.run("demo", str(demo.place), STASHCORDFS_METRICS_PORT=str(port))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        told = answer.read()
    assert b"stashcordfs_dirty_bytes 0.0" in told
    (age,) = re.findall(rb"^stashcordfs_discord_age_seconds (\S+)$", told, re.MULTILINE)
    assert 0 <= float(age) < 3600
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
        assert json.load(answer)["state"] == "mounted"
