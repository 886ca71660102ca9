from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from stashcordfs.cli import demo, output, sandbox
from stashcordfs.cli.main import main
from stashcordfs.errors import StashcordError
from stashcordfs.volumes import Mount, VolumeDir, VolumeRecord

# Says what the sandbox says, keeps its options, and stays until SIGTERM.
SERVER = """
import json, signal, sys
args = sys.argv[sys.argv.index("--dir"):]
port = args[3] if args[3] != "0" else "4711"
print(json.dumps({"api_url": f"http://127.0.0.1:{port}/api/v10", "token": "t0ken",
                  "guild_id": "1", "channel_ids": ["11", "12"]}), flush=True)
signal.pause()
"""


@pytest.fixture
def state(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("STASHCORDFS_"):
            monkeypatch.delenv(name)
    (tmp_path / "config.toml").write_text("")
    monkeypatch.setenv("STASHCORDFS_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("STASHCORDFS_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def world(state, monkeypatch):
    """A sandbox process that only talks, and a daemon and mounts that only remember."""
    seen = types.SimpleNamespace(mkfs=[], started=[], ended=[], mounts=[], state=state)

    def argv(*args: str) -> list[str]:
        return [sys.executable, "-c", SERVER, "stashcordfs.sandbox", *args]

    def mkfs(settings, name, **kwargs):
        seen.mkfs.append((settings, kwargs))
        VolumeDir(state, name).write_record(
            VolumeRecord("u", (11,), 11, settings.api_url, kwargs["block_size"])
        )

    def start(_globals, _settings, name, place, *, extra_environment):
        seen.started.append(extra_environment)
        seen.mounts.append(Mount(name, place, "0:1"))

    def end(_state_dir, mount, *, wait):
        seen.ended.append((mount.name, wait))
        seen.mounts.clear()

    module = types.ModuleType("stashcordfs.daemon")
    module.mkfs = mkfs
    monkeypatch.setitem(sys.modules, "stashcordfs.daemon", module)
    monkeypatch.setattr(demo, "sandbox_argv", argv)
    monkeypatch.setattr(demo, "start_daemon", start)
    monkeypatch.setattr(demo, "end_mount", end)
    monkeypatch.setattr(demo, "find_mount", lambda _target: seen.mounts[0] if seen.mounts else None)
    yield seen
    server = demo._read_server(state / "demo/sandbox.json")
    if server and demo._is_sandbox(server["pid"]):
        os.kill(server["pid"], 15)


def run(*args: str):
    return CliRunner().invoke(main, list(args))


def reap(pid: int) -> None:
    os.waitpid(pid, 0)  # outside the tests init does it


def test_demo_starts_makes_mounts_and_says_how_to_go_on(world, tmp_path) -> None:
    place = tmp_path / "mnt"
    result = run("demo", str(place))
    assert result.exit_code == 0, result.stderr
    assert f"stashcordfs demo --stop {place}" in result.output
    ((settings, kwargs),) = world.mkfs
    assert settings.api_url == "http://127.0.0.1:4711/api/v10"
    assert settings.token.reveal() == "t0ken"
    assert kwargs["channels"] == [11]
    (environment,) = world.started
    assert environment["STASHCORDFS_TOKEN"] == "plain:t0ken"
    passphrase = world.state / "demo/passphrase"
    assert kwargs["passphrase"] == passphrase.read_text()
    for path in (passphrase, world.state / "demo/sandbox.json", world.state / "demo/sandbox.log"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_demo_stops_and_goes_on_at_the_same_port_with_the_same_volume(
    world, tmp_path, monkeypatch
) -> None:
    place = tmp_path / "mnt"
    run("demo", str(place))
    server = demo._read_server(world.state / "demo/sandbox.json")
    waited = []

    def wait(pid, *, timeout_s):
        waited.append(pid)
        reap(pid)
        return True

    monkeypatch.setattr(demo, "wait_for_exit", wait)
    result = run("demo", "--stop", str(place))
    assert result.exit_code == 0, result.stderr
    assert "files are kept" in result.output
    assert world.ended == [("demo", True)]
    assert waited == [server["pid"]]
    assert run("demo", str(place)).exit_code == 0
    again = demo._read_server(world.state / "demo/sandbox.json")
    assert again["api_url"] == server["api_url"]
    assert again["pid"] != server["pid"]
    assert len(world.mkfs) == 1
    # A daemon that was killed leaves the server: it is found, not started twice.
    assert demo.start_sandbox(VolumeDir(world.state, "demo")) == again


def test_a_demo_that_never_was_is_not_stopped(world, tmp_path) -> None:
    result = run("demo", "--stop", str(tmp_path))
    assert (result.exit_code, "nothing to stop" in result.stderr) == (2, True)


def test_a_running_demo_is_not_started_twice_nor_another_mount_stopped(world, tmp_path) -> None:
    place = tmp_path / "mnt"
    run("demo", str(place))
    volume = VolumeDir(world.state, "demo")
    with volume.lock():
        assert "mounted already" in run("demo", str(place)).stderr
        mounts = world.mounts[:]
        world.mounts.clear()
        assert "not mounted at" in run("demo", "--stop", str(place)).stderr
    world.mounts[:] = [Mount("other", mounts[0].mountpoint, "0:2")]
    assert "is volume other" in run("demo", "--stop", str(place)).stderr


def test_a_server_that_does_not_end_is_reported(world, tmp_path, monkeypatch) -> None:
    run("demo", str(tmp_path / "mnt"))
    monkeypatch.setattr(demo, "wait_for_exit", lambda pid, timeout_s: False)
    assert "has not ended" in run("demo", "--stop", str(tmp_path / "mnt")).stderr


def test_a_server_that_does_not_start_is_reported(world, monkeypatch) -> None:
    monkeypatch.setattr(
        demo, "sandbox_argv", lambda *_a: [sys.executable, "-c", "raise SystemExit"]
    )
    with pytest.raises(StashcordError, match=r"see .*sandbox\.log"):
        demo.start_sandbox(VolumeDir(world.state, "demo"))
    assert not demo._is_sandbox(2**22 + 1)


def test_sandbox_run_becomes_the_server(monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(sandbox.os, "execv", lambda program, argv: ran.append(argv))
    assert run("sandbox", "run", "--dir", "/d", "--no-limits").exit_code == 0
    assert ran == [[sys.executable, "-m", "stashcordfs.sandbox", "--dir", "/d", "--no-limits"]]
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda _name: None)
    assert "pip install" in run("sandbox", "run").stderr


def test_progress_and_tables_on_a_terminal(monkeypatch, capsys) -> None:
    events = [{"pending_bytes": 4096}, {"pending_bytes": 0, "last_error": "x"}]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert output.follow(iter(events), label="Uploading") == events[-1]
    assert output.follow(iter([]), label="Uploading") == {}
    output.print_table(("a", "b"), [("1", "2")])
    assert "\t" not in capsys.readouterr().out


def test_a_secret_is_asked_for_on_a_terminal_only(monkeypatch) -> None:
    monkeypatch.setenv("X_SECRET", "given")
    assert output.read_secret("Passphrase", variable="X_SECRET") == "given"
    monkeypatch.delenv("X_SECRET")
    terminal = types.SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(output.sys, "stdin", terminal)
    monkeypatch.setattr(output.click, "prompt", lambda *_a, **_k: "typed")
    assert output.read_secret("Passphrase", variable="X_SECRET") == "typed"


def test_the_settings_reach_another_process(tmp_path, monkeypatch) -> None:
    from stashcordfs.cli.main import Globals
    from stashcordfs.cli.mount import export

    config = tmp_path / "c.toml"
    config.write_text("passphrase = 'file:p'")
    globals_ = Globals({"log_level": "debug", "state_dir": None}, config)
    environment = export(globals_, globals_.settings(), {"dedup": "false"})
    assert environment["STASHCORDFS_CONFIG"] == str(config)
    assert environment["STASHCORDFS_LOG_LEVEL"] == "debug"
    assert environment["STASHCORDFS_DEDUP"] == "false"
    assert environment["STASHCORDFS_PASSPHRASE"] == f"file:{Path.cwd()}/p"
