from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import sys
import threading
import types
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

import stashcordfs.cli.destroy
import stashcordfs.cli.mount
import stashcordfs.cli.mountpoint as mp
from stashcordfs.cli import umount as umount_module
from stashcordfs.cli.main import COMMANDS, main
from stashcordfs.cli.output import parse_time
from stashcordfs.cli.users import find_users
from stashcordfs.errors import StashcordError, UsageError
from stashcordfs.ops.control import serve_control
from stashcordfs.volumes import Mount, VolumeDir, VolumeRecord


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("STASHCORDFS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STASHCORDFS_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text("")
    monkeypatch.setenv("STASHCORDFS_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def volume(tmp_path):
    volume = VolumeDir(tmp_path / "state", "v")
    volume.write_record(VolumeRecord("uuid-1", (11, 12), 10, "https://x/api/v10", 1 << 20))
    return volume


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def mounted(volume, place, monkeypatch):
    """As if the volume were mounted at `place`; what is there is a plain directory."""
    mounts = [Mount("v", place, "0:1")]
    monkeypatch.setattr(mp, "read_mounts", lambda: mounts)
    monkeypatch.setattr("stashcordfs.cli.sync.read_mounts", lambda: mounts)
    return mounts


def run(*args: str, stdin: str | None = None):
    return CliRunner().invoke(main, list(args), input=stdin)


@contextlib.contextmanager
def daemon(volume, handlers):
    """A control socket that answers with these handlers, on a loop of its own."""
    ready = threading.Event()
    stop: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, volume.control_path, handlers)
            stop.append((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            ready.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert ready.wait(10)
    try:
        yield
    finally:
        token, scope = stop[0]
        token.run_sync_soon(scope.cancel)
        thread.join()


def test_help_names_every_command_and_each_has_help() -> None:
    shown = run("--help").output
    for name in COMMANDS:
        assert name in shown
        assert run(name, "--help").exit_code == 0
    assert "version" in run("--version").output


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nonsense"], "No such command"),
        (["mount", "v"], "Missing argument"),
        (["mount", "none", "/mnt"], "no volume named none"),
        (["--log-level", "loud", "list"], "--log-level: write one of"),
        (["status", "/"], "no volume is mounted at /"),
        (["umount", "/"], "no volume is mounted at /"),
        (["sync", "/"], "not on a mounted volume"),
        (["destroy", "none"], "no volume named none"),
        (["mkfs", "a/b", "--channel", "1"], "no volume name"),
        (["mount", "v", "/mnt", "-o", "token=x"], "STASHCORDFS_TOKEN"),
    ],
)
def test_wrong_use_is_one_line_on_stderr_and_code_2(args, says) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("stashcordfs: error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_command_shows_the_help_with_code_2() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.output


def test_an_error_of_the_system_is_one_line_too(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STASHCORDFS_STATE_DIR", str(tmp_path / "file/x"))
    monkeypatch.setattr(
        "stashcordfs.cli.status.list_volumes", lambda _dir: (tmp_path / "none").read_text()
    )
    result = run("status")
    assert result.exit_code == 1
    assert "No such file or directory" in result.stderr


def test_list_shows_volumes_for_people_and_programs(volume, mounted) -> None:
    assert "v\t-\t11 12\thttps://x/api/v10" in run("list").output
    with volume.lock():
        (row,) = json.loads(run("list", "--json").output)
    assert row["mountpoint"] == str(mounted[0].mountpoint)
    assert row["channels"] == ["11", "12"]


def test_without_volumes_list_and_status_say_what_to_try() -> None:
    assert "stashcordfs demo" in run("list").output
    assert "stashcordfs demo" in run("status").output
    assert json.loads(run("status", "--json").output) == []


def test_status_of_an_unmounted_volume_has_the_contracts_fields(volume) -> None:
    state = json.loads(run("status", "v", "--json").output)
    assert state["state"] == "unmounted"
    assert {"dirty_bytes", "pending_packs", "rate_limited", "last_error"} < set(state)
    with volume.lock():
        assert json.loads(run("status", "--json").output)["state"] == "starting or stopping"


def test_status_asks_the_daemon(volume, mounted, place) -> None:
    async def status(request):
        return {"name": "v", "state": "mounted", "dirty_bytes": 2048, "last_error": ""}

    with daemon(volume, {"status": status}):
        assert json.loads(run("status", str(place), "--json").output)["dirty_bytes"] == 2048
        assert "dirty_bytes\t2 KiB" in run("status", "v").output
        other = VolumeDir(volume.state_dir, "w")
        other.write_record(volume.read_record())
        assert "v\tmounted\t2 KiB\t-\t-" in run("status").output


def test_destroy_removes_the_state_only_and_says_so(volume) -> None:
    assert "--yes: needed" in run("destroy", "v").stderr
    with volume.lock():
        assert "in use by process" in run("destroy", "v", "--yes").stderr
    assert volume.exists()
    result = run("destroy", "v", "--yes")
    assert result.exit_code == 0
    assert "messages on Discord stay, in channels 11, 12, 10" in result.output
    assert not volume.path.exists()


def test_destroy_asks_on_a_terminal(volume, monkeypatch) -> None:
    terminal = types.SimpleNamespace(isatty=lambda: True)
    fake = types.SimpleNamespace(stdin=terminal)
    monkeypatch.setattr(stashcordfs.cli.destroy, "sys", fake)
    assert run("destroy", "v", stdin="n\n").exit_code == 1
    assert volume.exists()
    assert run("destroy", "v", stdin="y\n").exit_code == 0


@pytest.fixture
def fake_daemon(monkeypatch):
    """Stands for stashcordfs.daemon and records what it was asked."""
    calls: list[tuple] = []
    module = types.ModuleType("stashcordfs.daemon")

    def mkfs(settings, name, **kwargs):
        calls.append(("mkfs", name, kwargs))
        kwargs["progress"]("working")
        return types.SimpleNamespace(volume_uuid="u-1", recovery_key="R-K")

    def change_keys(settings, name, action, **kwargs):
        calls.append((action, name, kwargs))
        return "NEW-KEY" if action == "add" else [{"id": 1, "kind": "passphrase"}]

    def run_mount(settings, name, mountpoint, options, ready):
        calls.append(("mount", name, settings, mountpoint, options))
        ready()

    for function in (mkfs, change_keys, run_mount):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "stashcordfs.daemon", module)
    return calls


def test_mkfs_hands_over_and_shows_the_recovery_key_once(fake_daemon, monkeypatch) -> None:
    args = ("mkfs", "new", "--channel", "5", "--channel", "6", "--block-size", "2MiB")
    assert "STASHCORDFS_PASSPHRASE" in run(*args).stderr
    monkeypatch.setenv("STASHCORDFS_PASSPHRASE", "secret")
    result = run(*args)
    assert result.exit_code == 0
    assert result.output.count("R-K") == 1
    ((_, name, kwargs),) = fake_daemon
    assert name == "new"
    assert kwargs["channels"] == [5, 6]
    assert kwargs["block_size"] == 2 << 20
    assert kwargs["passphrase"] == "secret"


def test_key_commands_unlock_by_passphrase_or_recovery_key(
    volume, fake_daemon, monkeypatch
) -> None:
    monkeypatch.setenv("STASHCORDFS_PASSPHRASE", "old")
    monkeypatch.setenv("STASHCORDFS_RECOVERY_KEY", "R-K")
    monkeypatch.setenv("STASHCORDFS_NEW_PASSPHRASE", "new")
    assert run("key", "show", "v").output == "slot\tkind\n1\tpassphrase\n"
    assert run("key", "change", "v").exit_code == 0
    assert "NEW-KEY" in run("key", "add", "v", "--recovery", "--recovery-key").output
    assert run("key", "remove", "v", "2").exit_code == 0
    show, change, add, remove = (kwargs for _, _, kwargs in fake_daemon)
    assert show["passphrase"] is show["recovery_key"] is None
    assert (change["passphrase"], change["new_passphrase"]) == ("old", "new")
    assert (add["passphrase"], add["recovery_key"]) == (None, "R-K")
    assert add["new_passphrase"] is None
    assert remove["slot_id"] == "2"


def test_a_foreground_mount_hands_options_and_settings_over(
    volume, place, fake_daemon, monkeypatch
) -> None:
    import logging

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setenv("STASHCORDFS_TOKEN", "t0ken")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    result = run("mount", "v", str(place), "--foreground", "-o", "ro,noatime,upload_delay_s=7")
    assert result.exit_code == 0, result.stderr
    ((_, name, settings, mountpoint, options),) = fake_daemon
    assert (name, mountpoint, options) == ("v", place, {"ro": True, "noatime": True})
    assert settings.upload_delay_s == 7
    assert os.environ["STASHCORDFS_UPLOAD_DELAY_S"] == "7"  # SIGHUP reads it again
    root.handlers[0].close()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("write this"), 2),
        (ExceptionGroup("tasks", [ExceptionGroup("more", [UsageError("write this")])]), 2),
        (ExceptionGroup("tasks", [ValueError("fault")]), 1),
    ],
)
def test_an_error_among_the_daemons_tasks_is_told_as_itself(
    volume, place, fake_daemon, monkeypatch, error, code
) -> None:
    import logging

    def run_mount(*_args):
        raise error

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys.modules["stashcordfs.daemon"], "run_mount", run_mount)
    result = run("mount", "v", str(place), "--foreground")
    assert result.exit_code == code
    if code == 2:
        assert result.stderr.endswith("stashcordfs: error: write this\n")


@pytest.mark.parametrize(
    ("script", "code", "says"),
    [
        ("import os, sys; os.write(int(sys.argv[sys.argv.index('--ready-fd') + 1]), b'{}')", 0, ""),
        ("import sys; sys.exit('stashcordfs: error: token: not set')", 1, "token: not set"),
        (
            "import sys; print('stashcordfs: error: bad', file=sys.stderr); sys.exit(2)",
            2,
            "error: bad",
        ),
        ("raise SystemExit(3)", 1, "ended with code 3; see"),
    ],
)
def test_a_background_mount_returns_when_ready_or_with_the_daemons_error(
    volume, place, monkeypatch, tmp_path, script, code, says
) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}" "$@"\n')
    program.chmod(0o700)
    fake = types.SimpleNamespace(executable=str(program))
    monkeypatch.setattr(stashcordfs.cli.mount, "sys", fake)
    monkeypatch.setenv("STASHCORDFS_PASSPHRASE", f"file:{tmp_path}/p")
    result = run("mount", "v", str(place))
    assert result.exit_code == code
    assert says in result.stderr


def test_a_volume_in_use_is_not_mounted_again(volume, place, monkeypatch) -> None:
    monkeypatch.setenv("STASHCORDFS_PASSPHRASE", "x")
    with volume.lock():
        result = run("mount", "v", str(place))
    assert result.exit_code == 1
    assert f"in use by process {os.getpid()}" in result.stderr


def test_mountpoints_that_cannot_be_used_are_named(place, tmp_path, monkeypatch) -> None:
    state = tmp_path / "state"
    for path, says in [
        (tmp_path / "none", "mkdir -p"),
        (tmp_path / "config.toml", "not a directory"),
        (tmp_path, "not empty"),
    ]:
        with pytest.raises(UsageError, match=says):
            mp.prepare_mountpoint(path, state)
    with pytest.raises(UsageError, match="lies below the mountpoint"):
        mp.prepare_mountpoint(place, place / "state")
    with pytest.raises(
        UsageError, match="outside it"
    ):  # a fresh volume's folder of blocks is empty
        mp.prepare_mountpoint(place, place.parent)
    monkeypatch.setattr(mp, "read_mounts", lambda: [Mount("w", place, "0:1")])
    with pytest.raises(UsageError, match="volume w is mounted there already"):
        mp.prepare_mountpoint(place, state)


def test_a_dead_mount_is_cleared_first(place, tmp_path, monkeypatch) -> None:
    def gone(*_args):  # while stat still answers, from the kernel's cache
        raise OSError(errno.ENOTCONN, "gone")

    cleared = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", gone)
        assert mp.is_dead(place)
    assert not mp.is_dead(place)
    monkeypatch.setattr(mp, "is_dead", lambda _path: not cleared)
    monkeypatch.setattr(mp, "unmount", cleared.append)
    mp.prepare_mountpoint(place, tmp_path / "state")
    assert cleared == [place]


def test_a_busy_mount_says_by_whom(place, mounted, tmp_path, monkeypatch) -> None:
    proc = tmp_path / "proc"
    for pid in ("7", "8", "9"):
        (proc / pid / "fd").mkdir(parents=True)
    (proc / "7/cwd").symlink_to(place / "sub")
    (proc / "7/comm").write_text("bash\n")
    (proc / "8/fd/3").symlink_to("/elsewhere")
    (proc / "9/maps").write_text(f"00-01 rw-s 00 00:00 0\n00-01 r--p 00 00:00 1   {place}/lib.so\n")
    (proc / "9/comm").write_text("prog\n")
    (proc / "self").mkdir()
    (proc / "self/mountinfo").write_text(
        f"1 0 0:9 / {place} rw - fuse.stashcordfs discord:v rw\n"
        f"2 1 0:5 / {place}/below\\040it rw - tmpfs tmpfs rw\n"
        f"3 0 0:9 / /bound rw - fuse.stashcordfs discord:v rw\n"
        f"4 0 0:5 / {place}-beside rw - tmpfs tmpfs rw\n"
    )
    backing = tmp_path / "block/loop3/loop/backing_file"
    backing.parent.mkdir(parents=True)
    backing.write_text(f"{place}/image\n")
    assert find_users(place, proc, tmp_path / "block") == [
        f"7 (bash: working directory {place}/sub)",
        f"9 (prog: mapped file {place}/lib.so)",
        f"a mount at {place}/below it (umount {place}/below it)",
        "a mount at /bound (umount /bound)",
        f"/dev/loop3 over {place}/image (losetup -d /dev/loop3)",
    ]
    monkeypatch.setattr(mp, "find_users", lambda _place: [f"{n} (bash)" for n in range(10)])
    with pytest.raises(StashcordError, match=r"in use by 0 \(bash\).* and 2 more: leave it or end"):
        mp.unmount(place)
    monkeypatch.setattr(mp, "find_users", lambda _place: [])
    with pytest.raises(StashcordError, match=r"still mounted: .*fusermount3"):
        mp.unmount(place)
    monkeypatch.setattr(mp.shutil, "which", lambda _name: None)
    with pytest.raises(StashcordError, match="install the package fuse3"):
        mp.unmount(place)


def test_waiting_for_a_process() -> None:
    assert not mp.wait_for_exit(os.getpid(), timeout_s=0)
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert mp.wait_for_exit(child)
    os.waitpid(child, 0)
    assert mp.wait_for_exit(child)


@pytest.fixture
def unmounted(monkeypatch):
    """Collects what `umount` would unmount."""
    done: list[Path] = []
    monkeypatch.setattr(umount_module, "unmount", done.append)
    monkeypatch.setattr(mp, "find_users", lambda _place: [])
    return done


def test_umount_drains_first_unless_told_not_to(volume, mounted, place, unmounted) -> None:
    asked = []

    async def drain(request):
        asked.append("drain")
        for left in (5, 0):
            yield {"pending_bytes": left}

    async def status(request):
        asked.append("status")
        return {"dirty_bytes": 4096 if len(asked) > 2 else 0, "dirty_blocks": 1}

    with daemon(volume, {"drain": drain, "status": status}):
        assert run("umount", str(place)).exit_code == 0
        result = run("umount", "v", "--no-wait")
    assert result.exit_code == 0
    assert "4 KiB in 1 blocks not on Discord yet" in result.stderr
    assert asked == ["drain", "status", "status"]
    assert unmounted == [place, place]


def test_umount_refuses_a_busy_mount_and_clears_a_dead_one(
    volume, mounted, place, unmounted, monkeypatch
) -> None:
    assert run("umount", "v").exit_code == 0  # no daemon answers: nothing to drain
    monkeypatch.setattr(mp, "find_users", lambda _place: ["7 (bash)"])
    result = run("umount", "v")
    assert result.exit_code == 1
    assert "in use by 7 (bash)" in result.stderr
    monkeypatch.setattr(umount_module, "is_dead", lambda _place: True)
    assert "the mount is cleared" in run("umount", "v").output
    assert unmounted == [place, place]


def test_an_interrupted_drain_leaves_the_mount(volume, mounted, unmounted, monkeypatch) -> None:
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(umount_module, "follow", interrupted)
    result = run("umount", "v")
    assert result.exit_code == 1
    assert "stays mounted" in result.stderr
    assert unmounted == []


def test_a_daemon_that_does_not_end_is_reported(
    volume, mounted, place, unmounted, monkeypatch
) -> None:
    monkeypatch.setattr(umount_module, "wait_for_exit", lambda _pid, timeout_s: False)
    with volume.lock():
        result = run("umount", "v")
    assert f"process {os.getpid()} has not ended" in result.stderr


def test_sync_fsyncs_what_is_open_for_writing_and_then_waits(
    volume, mounted, place, monkeypatch
) -> None:
    (place / "d").mkdir()
    (place / "d/open").write_text("x")
    synced, asked = [], []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink())
    )

    async def open_for_writing(request):
        asked.append(("open", request["path"]))
        return {"paths": ["d/open", "d/gone"]}

    async def sync(request):
        asked.append(("sync", request["path"]))
        yield {"pending_bytes": 0}

    with daemon(volume, {"open_for_writing": open_for_writing, "sync": sync}):
        assert run("sync", str(place / "d")).exit_code == 0
        assert run("sync", str(place)).exit_code == 0
    assert synced == [place / "d/open"] * 2
    assert asked == [("open", "d"), ("sync", "d"), ("open", ""), ("sync", "")]
    assert "does not exist" in run("sync", str(place / "none")).stderr


def test_a_failed_fsync_fails_the_sync(place, monkeypatch) -> None:
    from stashcordfs.cli.sync import flush

    def fail(_fd):
        raise OSError(errno.EIO, "Input/output error")

    (place / "f").write_text("x")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StashcordError, match="fsync failed: Input/output error"):
        flush(place / "f")
    monkeypatch.setattr(os, "open", lambda *_a: (_ for _ in ()).throw(PermissionError()))
    with pytest.raises(StashcordError, match="as its owner or as root"):
        flush(place / "f")


@pytest.mark.parametrize("text", ["yesterday", "0001-01-01T00:00+14:00"])
def test_a_time_that_is_none_is_told(text) -> None:
    with pytest.raises(UsageError, match="write it as"):
        parse_time(text)


def test_a_volume_is_not_copied_into_itself(volume, place, monkeypatch) -> None:
    module = importlib.import_module("stashcordfs.cli.export")
    monkeypatch.setattr(module, "read_mounts", lambda: [Mount("v", place, "0:1")])
    result = run("export", "v", "--to", str(place / "copy"))
    assert (result.exit_code, "lies on volume v itself" in result.stderr) == (2, True)
