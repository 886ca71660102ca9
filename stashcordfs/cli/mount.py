"""`mount`: in the background by default, returning when mounted or with the daemon's own error."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from stashcordfs.cli.mountpoint import prepare_mountpoint, real_path, wait_for_exit
from stashcordfs.cli.output import parse_time, read_secret
from stashcordfs.config import PREFIX, SETTING_NAMES, Settings
from stashcordfs.errors import StashcordError, UsageError, first_of
from stashcordfs.volumes import FSNAME_PREFIX, VolumeBusy, VolumeDir, read_mounts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stashcordfs.cli.main import Globals

log = logging.getLogger(__name__)

_ENDING_S = 30.0
_SECRETS = ("token", "passphrase")


@click.command("mount")
@click.argument("name")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--foreground", is_flag=True, help="Stay, and log to the terminal.")
@click.option("-o", "options", multiple=True, help="Mount options and settings, by comma.")
@click.option("--at", metavar="TIME", help="Read-only, as it was then: 2026-11-25T14:00, or ...Z.")
@click.option("--ready-fd", type=int, hidden=True, help="Where to tell that it is mounted.")
@click.pass_obj
def command(
    globals_: Globals,
    name: str,
    mountpoint: Path,
    foreground: bool,
    options: tuple[str, ...],
    at: str | None,
    ready_fd: int | None,
) -> None:
    """Mount the volume NAME on the empty directory MOUNTPOINT.

    -o takes ro, noatime, uid=1000, what else docs/posix.md has, and any setting, such as
    cache_bytes=5GiB.

    With --at, what Discord knew at that time, as far back as history_days; the volume itself may be
    mounted elsewhere meanwhile.
    """
    name = name.removeprefix(FSNAME_PREFIX)
    at_ns = None if at is None else parse_time(at)
    flags, mount_options = split_options(options)
    settings = globals_.settings(volume=name, flags=flags)
    if foreground:
        os.environ.update(export(globals_, settings, flags))  # what SIGHUP reads again
        _run(settings, name, real_path(mountpoint), mount_options, ready_fd, at_ns)
        return
    start_daemon(globals_, settings, name, mountpoint, options=options, flags=flags, at_ns=at_ns)
    if at_ns is not None:
        _tell_past(VolumeDir(settings.state_dir, name).past(at_ns))


def split_options(options: Sequence[str]) -> tuple[dict[str, object], dict[str, str | bool]]:
    """-o values, as settings and as options of the mount itself."""
    flags: dict[str, object] = {}
    mount_options: dict[str, str | bool] = {}
    for option in filter(None, ",".join(options).split(",")):
        key, has_value, value = option.partition("=")
        if key in _SECRETS:
            raise UsageError(f"-o {key}: not here, where others see it; set {PREFIX}{key.upper()}")
        if key in SETTING_NAMES:
            flags[key] = value if has_value else "true"
        else:
            mount_options[key] = value if has_value else True
    return flags, mount_options


def export(
    globals_: Globals, settings: Settings, flags: Mapping[str, object] | None = None
) -> dict[str, str]:
    """The environment in which the daemon, elsewhere and later, finds the same settings."""
    environment = globals_.environment()
    for name, value in (flags or {}).items():
        environment[PREFIX + name.upper()] = str(value)
    environment[PREFIX + "STATE_DIR"] = str(settings.state_dir)
    for name in _SECRETS:
        secret = getattr(settings, name)
        if secret is not None and secret.kind == "file":
            environment[PREFIX + name.upper()] = secret.absolute_reference()
    return environment


def start_daemon(
    globals_: Globals,
    settings: Settings,
    name: str,
    mountpoint: Path,
    *,
    options: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    extra_environment: Mapping[str, str] | None = None,
    at_ns: int | None = None,
) -> None:
    """Start `mount --foreground` detached; return when it has mounted, or raise its error."""
    volume = VolumeDir(settings.state_dir, name)
    volume.read_record()
    if at_ns is not None:
        volume = volume.past(at_ns)
    place = real_path(mountpoint)
    prepare_mountpoint(place, settings.state_dir)
    if (pid := _holder(volume)) is not None:
        text = f"volume {volume.mount_name} is in use by process {pid}: mounted already?"
        raise VolumeBusy(text, pid=pid)
    environment = {**export(globals_, settings, flags), **(extra_environment or {})}
    if settings.passphrase is None and not (extra_environment or {}).get(PREFIX + "PASSPHRASE"):
        passphrase = read_secret(f"Passphrase of {name}", variable=PREFIX + "PASSPHRASE")
        environment[PREFIX + "PASSPHRASE"] = f"plain:{passphrase}"
    read_end, write_end = os.pipe()
    argv = [sys.executable, "-m", "stashcordfs.cli.main", "mount", "--foreground"]
    argv += ["--ready-fd", str(write_end)]
    argv += [part for option in options for part in ("-o", option)]
    if at_ns is not None:
        argv += ["--at", VolumeDir(settings.state_dir, name).past(at_ns).when]
    with tempfile.TemporaryFile() as errors, open(read_end, encoding="utf-8") as told:  # noqa: PTH123  a descriptor
        try:
            process = subprocess.Popen(
                [*argv, "--", name, str(place)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[write_end],
                env=environment,
                cwd="/",
            )
        finally:
            os.close(write_end)
        answer = told.read()
        if answer:
            process.returncode = 0  # it stays; we are not to wait for it
            return
        code = process.wait()
        raise _failure(errors, code, log=volume.log_path)


def _holder(volume: VolumeDir) -> int | None:
    """The process that has the volume. One that was just unmounted is given time to end."""
    pid = volume.holder()
    if pid and all(mount.name != volume.mount_name for mount in read_mounts()):
        wait_for_exit(pid, timeout_s=_ENDING_S)
        pid = volume.holder()
    return pid


def _failure(errors: IO[bytes], code: int, *, log: Path) -> StashcordError:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else f"the daemon ended with code {code}"
    text = last.removeprefix("stashcordfs: error: ")
    if code == UsageError.exit_code:
        return UsageError(text)
    return StashcordError(text if lines and text != last else f"{text}; see {log}")


def _run(
    settings: Settings,
    name: str,
    mountpoint: Path,
    options: Mapping[str, str | bool],
    ready_fd: int | None,
    at_ns: int | None,
) -> None:
    from stashcordfs.daemon import run_mount
    from stashcordfs.ops.logging import configure_logging

    volume = VolumeDir(settings.state_dir, name)
    volume.read_record()
    if at_ns is not None:
        volume = volume.past(at_ns)
        volume.create()
    prepare_mountpoint(mountpoint, settings.state_dir)
    redactor = configure_logging(
        level=settings.log_level,
        log_format=settings.log_format,
        file=volume.log_path if ready_fd is not None else None,
    )
    for secret in _SECRETS:
        if (value := getattr(settings, secret)) is not None:
            redactor.add(value.reveal())

    ready = partial(_tell_ready, ready_fd)
    try:
        if at_ns is None:
            run_mount(settings, name, mountpoint, options, ready)
        else:
            from stashcordfs.daemon import run_mount_at

            run_mount_at(settings, name, at_ns, mountpoint, options, ready)
    except BaseExceptionGroup as group:
        # Raised beside the daemon's other tasks, which were cancelled: the first of ours tells why.
        log.exception("mount failed volume=%s", name)
        if group.subgroup(StashcordError) is None:
            raise
        raise first_of(group) from group
    except StashcordError as error:  # a person's to mend: one line, as on the terminal
        log.error("mount failed volume=%s: %s", name, error)  # noqa: TRY400
        log.debug("raised here", exc_info=True)
        raise
    except Exception:
        log.exception("mount failed volume=%s", name)  # stderr may be closed by now
        raise


def _tell_ready(ready_fd: int | None) -> None:
    """Detach from the process that waits at the other end of `ready_fd`, and tell it."""
    if ready_fd is None:
        return
    # Not earlier: an automount point lets only one process group pass until it is mounted
    # (autofs_oz_mode), to which systemd makes mount(8), and so us, belong.
    if os.getpgrp() != os.getpid():
        os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)  # until here the starter reads our last words
    os.close(null)
    with contextlib.suppress(BrokenPipeError), open(ready_fd, "w", encoding="utf-8") as told:  # noqa: PTH123  a descriptor
        json.dump({"ready": True}, told)


def _tell_past(past: VolumeDir) -> None:
    """What time was found, and what of it is not there."""
    report = json.loads((past.path / "report.json").read_text(encoding="utf-8"))
    made = time.localtime(report["segment_time_ns"] // 10**9)
    when = time.strftime("%Y-%m-%d %H:%M:%S", made)
    click.echo(f"As of segment {report['segment']}, made {when}; read-only.")
    if report["missing_files"]:
        click.echo(f"{report['missing_files']} files were not on Discord by then, or not wholly")
