"""`demo`: a sandbox, a volume in it and a mount, in one command; and its end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from stashcordfs.cli.mount import start_daemon
from stashcordfs.cli.mountpoint import (
    clear_dead,
    find_mount,
    prepare_mountpoint,
    real_path,
    refuse_below,
    wait_for_exit,
)
from stashcordfs.cli.sandbox import sandbox_argv
from stashcordfs.cli.umount import end_mount
from stashcordfs.config import PREFIX
from stashcordfs.errors import StashcordError, UsageError
from stashcordfs.volumes import VolumeDir

if TYPE_CHECKING:
    from stashcordfs.cli.main import Globals

NAME = "demo"
_EXIT_DEADLINE_S = 30.0


@click.command("demo")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--stop", is_flag=True, help="Unmount and end the server; the files are kept.")
@click.pass_obj
def command(globals_: Globals, mountpoint: Path, stop: bool) -> None:
    """Mount a volume on MOUNTPOINT that lives on a Discord-like server on this machine."""
    settings = globals_.settings()
    volume = VolumeDir(settings.state_dir, NAME)
    if stop:
        _stop(volume, mountpoint)
        return
    place = real_path(mountpoint)
    mount = find_mount(NAME)
    if mount is not None and volume.holder() is not None:
        raise UsageError(f"the demo is mounted already, at {mount.mountpoint}")
    refuse_below(settings.state_dir, place)
    clear_dead(place)
    place.mkdir(parents=True, exist_ok=True)
    prepare_mountpoint(place, settings.state_dir)
    server = start_sandbox(volume)
    environment = {
        PREFIX + "TOKEN": f"plain:{server['token']}",
        PREFIX + "PASSPHRASE": f"file:{_passphrase_file(volume)}",
        PREFIX + "API_URL": str(server["api_url"]),
    }
    if not volume.exists():
        _mkfs(globals_, server, environment)
    demo_settings = globals_.settings(volume=NAME)
    start_daemon(globals_, demo_settings, NAME, place, extra_environment=environment)
    program = Path(sys.executable).with_name("stashcordfs")
    click.echo(
        f"""Mounted: {place}
Files that you put there are stored, encrypted, on a Discord-like server on this machine
({server["api_url"]}, its data is in {volume.path / "sandbox"}).

  cp -r /etc/skel {place}
      put something there
  {program} status {NAME}
      see what it does
  {program} sync {place}
      wait until the server has everything
  {program} demo --stop {place}
      stop it; the same command without --stop goes on"""
    )


def _passphrase_file(volume: VolumeDir) -> Path:
    path = volume.path / "passphrase"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123  a descriptor
            file.write(secrets.token_urlsafe(18))
    return path


def _mkfs(globals_: Globals, server: dict[str, Any], environment: dict[str, str]) -> None:
    from stashcordfs.config import load_settings
    from stashcordfs.daemon import mkfs

    settings = load_settings(volume=NAME, environ={**globals_.environment(), **environment})
    assert settings.passphrase is not None
    mkfs(
        settings,
        NAME,
        channels=[int(channel) for channel in server["channel_ids"]][:1],
        journal_channel=None,
        block_size=settings.block_size,
        passphrase=settings.passphrase.reveal(),
        progress=lambda _text: None,
    )


def start_sandbox(volume: VolumeDir) -> dict[str, Any]:
    """Start the server detached, or find it running; return what it said when it listened."""
    volume.create()
    said = volume.path / "sandbox.json"
    before = _read_server(said)
    if before and _is_sandbox(int(before["pid"])):
        return before
    # The volume's record holds the URL: the same port again.
    port = urlsplit(str(before["api_url"])).port if before else 0
    argv = sandbox_argv("--dir", str(volume.path / "sandbox"), "--port", str(port))
    log = os.open(
        volume.path / "sandbox.log",
        os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC,
        0o600,
    )
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    finally:
        os.close(log)
    assert process.stdout is not None
    with process.stdout as stdout:
        line = stdout.readline()
    if not line:
        process.wait()
        raise StashcordError(f"the sandbox did not start; see {volume.path / 'sandbox.log'}")
    server: dict[str, Any] = {**json.loads(line), "pid": process.pid}
    temporary = said.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(server), encoding="utf-8")
    temporary.replace(said)
    process.returncode = 0  # it stays; we are not to wait for it
    return server


def _read_server(said: Path) -> dict[str, Any] | None:
    try:
        server: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return server


def _is_sandbox(pid: int) -> bool:
    """Whether that process is a sandbox: pids are used again."""
    try:
        return b"stashcordfs.sandbox" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _stop(volume: VolumeDir, mountpoint: Path) -> None:
    mount = find_mount(str(real_path(mountpoint)))
    if mount is not None and mount.name != NAME:
        raise UsageError(f"{mountpoint} is volume {mount.name}; use stashcordfs umount")
    if mount is not None:
        end_mount(volume.state_dir, mount, wait=True)
    elif not volume.path.exists():
        raise UsageError(f"there is no demo in {volume.state_dir}: nothing to stop")
    elif volume.holder() is not None:
        raise UsageError(f"the demo is not mounted at {mountpoint}; see stashcordfs list")
    server = _read_server(volume.path / "sandbox.json")
    if server and _is_sandbox(pid := int(server["pid"])):
        os.kill(pid, signal.SIGTERM)
        if not wait_for_exit(pid, timeout_s=_EXIT_DEADLINE_S):
            raise StashcordError(f"the sandbox, process {pid}, has not ended")
    click.echo(f"Stopped. The files are kept in {volume.path}.")
