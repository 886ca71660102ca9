"""A fresh machine, the units and /etc/fstab, under a real systemd; make soak-systemd starts it.

    python tests/systemd/run.py [--write] [--dir FOLDER] [--base FOLDER]

As root. A minimal Debian 12 is made (kept under --base for the next time), booted in a container.
There: make demo as the first command, make install, a volume, its service. Each check has a name;
the first that fails ends the run with exit code 1. With --write the findings go to
docs/evidence/systemd.json.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
import evidence
from machine import Failed, Machine, until

UNIT, PLACE = "stashcordfs@photos", "/srv/stashcordfs/photos"
SECRETS = "/etc/stashcordfs/photos"
MIB = 1 << 20
_DATABASE = (
    "import sqlite3; d = sqlite3.connect('db'); d.execute('pragma journal_mode=wal'); "
    "d.execute('create table t(a)'); d.execute('insert into t values(1)'); d.commit()"
)
_TOOLS = ("debootstrap", "systemd-nspawn", "nsenter")


class Checks:
    """What was found, in order."""

    def __init__(self) -> None:
        self.done: list[dict[str, object]] = []
        self.problems: list[str] = []
        self.facts: dict[str, object] = {}
        self._at = time.monotonic()

    def passed(self, name: str) -> None:
        now = time.monotonic()
        self.done.append({"check": name, "seconds": round(now - self._at, 1)})
        self._at = now
        print(f"ok  {name}", flush=True)

    def expect(self, true: object, why: str) -> None:
        if not true:
            raise Failed(why)


class Server:
    """The sandbox, outside the machine; a fault of the network is its process standing still."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._process = process
        self.about = json.loads(process.stdout.readline())

    @contextmanager
    def halted(self) -> Iterator[None]:
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "stashcordfs.cli.main", "sandbox", "run", "--dir", folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield Server(process)
    finally:
        process.terminate()
        process.wait()


def fresh(machine: Machine, checks: Checks) -> None:
    """The README's first commands, on a machine that has nothing."""
    install = "apt-get install -y -qq --no-install-recommends git make >/dev/null 2>&1"
    machine.run(f"apt-get update -qq; DEBIAN_FRONTEND=noninteractive {install}")
    machine.run("git clone -q /checkout stashcordfs && git clone -q /checkout tested")
    told = machine.run("cd stashcordfs && make demo")
    checks.expect("Mounted: /root/stashcordfs-demo" in told, told[-2000:])
    machine.run("cp -r /etc/skel stashcordfs-demo/ && ls stashcordfs-demo/skel/.bashrc")
    checks.passed("make demo is the first command, and ends with a mounted directory")
    machine.run("cd stashcordfs && make demo-stop && ! mountpoint -q ~/stashcordfs-demo")
    checks.passed("make demo-stop unmounts")
    told = machine.run(
        "cd tested && make test PYTEST_ARGS='tests/config tests/fuse tests/cli/test_demo.py'"
    )
    checks.expect(" passed" in told, told[-2000:])
    checks.passed("make test installs what it needs and runs (some of the tests)")
    machine.run("cd stashcordfs && make install && stashcordfs --version")
    checks.passed("make install puts the command on the PATH")


def start(machine: Machine, checks: Checks, about: dict) -> None:
    """docs/service.md, its first lines."""
    passphrase = secrets.token_hex(8)
    environment = (
        f"export STASHCORDFS_TOKEN=file:{SECRETS}.token "
        f"STASHCORDFS_PASSPHRASE=file:{SECRETS}.passphrase STASHCORDFS_API_URL={about['api_url']}"
    )
    machine.run(
        "install -d -m 700 /etc/stashcordfs; umask 077; "
        f"echo {about['token']} > {SECRETS}.token; echo {passphrase} > {SECRETS}.passphrase; "
        f"{environment}; stashcordfs mkfs photos --channel {about['channel_ids'][0]}"
    )
    told = machine.run(f"systemd-analyze verify {UNIT}.service stashcordfs-verify@photos.timer")
    checks.expect(not told, told)
    score = machine.run(f"systemd-analyze security --no-pager {UNIT} | tail -1").strip()
    checks.facts["exposure"] = score.rpartition(": ")[2]
    checks.passed("systemd-analyze verify finds nothing")
    machine.run(f"systemctl enable --now {UNIT} && grep -q ' {PLACE} ' /proc/self/mountinfo")
    status = machine.show(UNIT, "StatusText")
    checks.expect(status == f"Mounted at {PLACE}", f"StatusText: {status}")
    checks.passed("systemctl start returns when the volume is mounted")
    pid = machine.show(UNIT, "MainPID")
    machine.run(f"[ $(readlink /proc/{pid}/ns/mnt) = $(readlink /proc/1/ns/mnt) ]")
    machine.run(f"echo hello > {PLACE}/hello && chmod 644 {PLACE}/hello")
    machine.run(f"su -s /bin/sh -c 'cat {PLACE}/hello' daemon")
    checks.passed("all users of the machine see the mount and get to it")


def use(machine: Machine, checks: Checks) -> None:
    """The hardening hinders nothing."""
    machine.run(
        f"cd {PLACE} && cp -a /usr/lib/python3.11/json tree && ln -s tree link && mkfifo fifo && "
        "setfattr -n user.a -v b hello 2>/dev/null; chown daemon hello && chmod 4755 hello && "
        f"head -c {64 * MIB} /dev/urandom > big && sync -f . && "
        f'python3 -c "{_DATABASE}" && '
        "sha256sum big db tree/*.py > /root/sums"
    )
    machine.run(f"stashcordfs sync {PLACE} && systemctl restart {UNIT}")
    same(machine)
    checks.passed("files, links, FIFOs, SQLite, a restart: the same bytes, with the hardening on")


def same(machine: Machine) -> None:
    machine.run(f"cd {PLACE} && sha256sum -c --quiet /root/sums")


def reload(machine: Machine, checks: Checks) -> None:
    config = "/etc/stashcordfs/config.toml"
    machine.run(f"echo 'log_level = \"debug\"' > {config}; systemctl reload {UNIT}")
    until("reloaded", lambda: "settings reloaded" in machine.log_of(UNIT), within_s=20)
    checks.expect(machine.show(UNIT, "StatusText") == f"Mounted at {PLACE}", "StatusText is lost")
    machine.run(f"echo 'cache_bytes = \"lots\"' > {config}; systemctl reload {UNIT}")
    until("refused", lambda: "settings not reloaded" in machine.log_of(UNIT), within_s=20)
    machine.run(f"rm {config}; systemctl is-active {UNIT}")
    checks.passed("systemctl reload reads the settings; wrong ones are told and passed over")


def killed(machine: Machine, checks: Checks) -> None:
    """Also when the kernel has forgotten the mountpoint, whose attributes live for an hour."""
    drop_in = f"/etc/systemd/system/{UNIT}.service.d"
    machine.run(
        f"mkdir -p {drop_in}; printf '[Service]\\nEnvironment=STASHCORDFS_ATTR_TIMEOUT_S=0\\n' "
        f"> {drop_in}/a.conf; systemctl daemon-reload; systemctl restart {UNIT}"
    )
    machine.run(f"systemctl kill -s KILL --kill-who=main {UNIT}")
    machine.run(f"sleep 1; ! stat {PLACE} 2>/dev/null")
    seconds = until(
        "started again", lambda: machine.show(UNIT, "ActiveState") == "active", within_s=60
    )
    checks.facts["restart_after_kill_s"] = round(seconds, 1)
    same(machine)
    machine.run(f"rm -r {drop_in}; systemctl daemon-reload; systemctl restart {UNIT}")
    checks.passed("a killed daemon is started again and its dead mountpoint cleared")


def stopped(machine: Machine, checks: Checks, sandbox: Server) -> None:
    machine.run(f"head -c {4 * MIB} /dev/urandom > {PLACE}/late; systemctl stop {UNIT}")
    checks.expect("left_bytes=0 left_blocks=0" in machine.log_of(UNIT), "not drained")
    status = machine.show(UNIT, "StatusText")
    checks.expect(status == "Unmounted; Discord has everything", f"StatusText: {status}")
    machine.run(f"systemctl start {UNIT}")
    checks.passed("systemctl stop waits until Discord has everything")
    with sandbox.halted():
        begun = time.monotonic()
        machine.run(f"head -c {4 * MIB} /dev/urandom > {PLACE}/later; systemctl stop {UNIT}")
        checks.facts["stop_without_network_s"] = round(time.monotonic() - begun, 1)
    status = machine.show(UNIT, "StatusText")
    checks.expect("4 MiB in 4 blocks are not on Discord yet" in status, f"StatusText: {status}")
    checks.expect(machine.show(UNIT, "Result") == "success", "the stop failed")
    machine.run(f"systemctl start {UNIT}; stashcordfs sync {PLACE}")
    checks.passed("without a network it stops all the same, says what is left, and goes on later")


def failing(machine: Machine, checks: Checks) -> None:
    machine.run(f"systemctl stop {UNIT}; touch {PLACE}/in-the-way; systemctl start {UNIT} || true")
    checks.expect(machine.show(UNIT, "ActiveState") == "failed", "wrong use is tried again")
    checks.expect("is not empty" in machine.log_of(UNIT), "no line about the mountpoint")
    machine.run(f"rm {PLACE}/in-the-way; systemctl reset-failed {UNIT}")
    checks.passed("a mountpoint that is not empty: one line, no second try")
    machine.run(f"cp {SECRETS}.passphrase /root/kept; echo no > {SECRETS}.passphrase")
    machine.run(f"systemctl start {UNIT} || true")
    until("given up", lambda: machine.show(UNIT, "ActiveState") == "failed", within_s=300)
    log = machine.log_of(UNIT)
    checks.facts["tries_with_wrong_passphrase"] = log.count("error: wrong passphrase")
    checks.expect("error: wrong passphrase" in log, "no line about the passphrase")
    checks.expect("Traceback" not in log, "a traceback")
    machine.run(f"cp /root/kept {SECRETS}.passphrase; systemctl reset-failed {UNIT}")
    checks.passed("a wrong passphrase: one line a try, and an end of trying")
    machine.run(
        f"cp {SECRETS}.token /root/kept; echo wrong > {SECRETS}.token; systemctl start {UNIT}"
    )
    until("told", lambda: "Discord rejects the token" in machine.log_of(UNIT), within_s=60)
    machine.run(f"cat {PLACE}/hello; cp /root/kept {SECRETS}.token; systemctl restart {UNIT}")
    machine.run(f"echo more >> {PLACE}/hello; stashcordfs sync {PLACE}")
    checks.passed("a refused token: told, mounted all the same, mended by a restart")


def scrubbed(machine: Machine, checks: Checks) -> None:
    machine.run("systemctl enable --now stashcordfs-verify@photos.timer")
    machine.run("systemctl start stashcordfs-verify@photos.service")
    checks.passed("the daily scrub runs beside the mount")


def shut_down(machine: Machine, checks: Checks) -> None:
    """The drain comes before the end of the network and of the mount; the next boot mounts."""
    machine.run(f"head -c {100 * MIB} /dev/urandom > {PLACE}/a; sha256sum {PLACE}/a > /root/sums")
    dirty = json.loads(machine.run("stashcordfs status photos --json"))["dirty_bytes"]
    checks.facts["dirty_bytes_at_shutdown"] = dirty
    checks.facts["shutdown_s"] = round(machine.power_off(), 1)
    checks.expect(dirty > 0, "nothing was left to drain")
    checks.facts["boot_s"] = round(machine.boot(), 1)
    log = machine.run(f"journalctl -b -1 -u {UNIT} --no-pager -o cat")
    checks.expect("left_bytes=0 left_blocks=0" in log, "the shutdown did not drain")
    same(machine)
    checks.expect(machine.show(UNIT, "ActiveState") == "active", "not mounted at boot")
    checks.passed("a shutdown drains before the network ends; the next boot mounts")


def from_fstab(machine: Machine, checks: Checks) -> None:
    machine.run(f"systemctl disable --now {UNIT}; mkdir -p /mnt/photos")
    machine.run(
        f'umask 077; printf \'token = "file:{SECRETS}.token"\\npassphrase = '
        f'"file:{SECRETS}.passphrase"\\n\' > /etc/stashcordfs/config.toml'
    )
    by_hand = "mount -t fuse.stashcordfs discord:photos /mnt/photos"
    machine.run(f"{by_hand} && cat /mnt/photos/hello && stashcordfs umount /mnt/photos")
    checks.passed("mount -t fuse.stashcordfs, and umount")
    if not Path("/dev/autofs").exists():
        checks.facts["automount"] = "not tried: no /dev/autofs here"
        return
    options = "_netdev,nofail,noauto,x-systemd.automount,x-systemd.idle-timeout=5"
    machine.run(
        f"echo 'discord:photos /mnt/photos fuse.stashcordfs {options} 0 0' >> /etc/fstab; "
        "systemctl daemon-reload; systemctl restart remote-fs.target"
    )
    machine.run("! grep -q 'fuse.stashcordfs' /proc/self/mountinfo")
    machine.run("su -s /bin/sh -c 'cat /mnt/photos/hello' daemon", timeout_s=60)
    checks.passed("x-systemd.automount mounts when somebody first looks")
    until(
        "idle", lambda: machine.show("mnt-photos.mount", "ActiveState") == "inactive", within_s=60
    )
    machine.run("cat /mnt/photos/hello", timeout_s=60)
    checks.passed("x-systemd.idle-timeout unmounts, and the next look mounts again")


def all_checks(machine: Machine, checks: Checks, sandbox: Server) -> None:
    checks.facts["systemd"] = machine.run("systemctl --version | head -1").split()[1]
    fresh(machine, checks)
    start(machine, checks, sandbox.about)
    use(machine, checks)
    reload(machine, checks)
    killed(machine, checks)
    stopped(machine, checks, sandbox)
    failing(machine, checks)
    scrubbed(machine, checks)
    shut_down(machine, checks)
    from_fstab(machine, checks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--base", type=Path, default=evidence.ROOT / ".venv" / ".debian")
    parser.add_argument("--write", action="store_true", help="write the evidence")
    options = parser.parse_args()
    if os.geteuid() or (missing := [tool for tool in _TOOLS if not shutil.which(tool)]):
        print(
            f"needs root and {', '.join(missing if not os.geteuid() else _TOOLS)}", file=sys.stderr
        )
        return 2
    commit, begun, checks = evidence.commit_now(), time.monotonic(), Checks()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stashcordfs-systemd-") as name:
        folder = Path(name)
        with (
            server(folder / "server") as sandbox,
            Machine.running(folder, base=options.base, checkout=evidence.ROOT) as machine,
        ):
            try:
                all_checks(machine, checks, sandbox)
            except Failed as error:
                checks.problems.append(str(error))
                print(machine.log_of(UNIT)[-4000:], file=sys.stderr)
    found = {
        **checks.facts,
        "checks": checks.done,
        "problems": checks.problems,
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps(found, indent=1))
    if options.write:
        evidence.write("systemd", made_by="make soak-systemd", commit=commit, found=found)
    return int(bool(checks.problems))


if __name__ == "__main__":
    sys.exit(main())
