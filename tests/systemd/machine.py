"""A Debian 12 of its own, started by its own systemd in a container of systemd-nspawn. Needs root.

    with Machine.running(folder, checkout=ROOT) as machine:
        machine.run("systemctl is-system-running")

The network is this machine's, so a server on loopback outlives a shutdown of the container.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_PACKAGES = "systemd,systemd-sysv,dbus,ca-certificates,procps"
_DEVICES = ("/dev/fuse", "/dev/autofs")
# What lets this machine's package managers through to their registries, where it has them.
_WAYS_OUT = ("etc/ssl/certs/ca-certificates.crt", "etc/pip.conf", "etc/xdg/pip", "etc/resolv.conf")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BOOT_S, _END_S, _COMMAND_S = 60.0, 180.0, 900.0


class Failed(RuntimeError):
    """A command in the machine ended otherwise than it should."""


def until(what: str, true: Callable[[], object], *, within_s: float) -> float:
    """Wait for it; how long that took. Failed when it does not come true."""
    begun = time.monotonic()
    while not true():
        if time.monotonic() - begun > within_s:
            raise Failed(f"not within {within_s:.0f} s: {what}")
        time.sleep(0.2)
    return time.monotonic() - begun


def fresh_root(base: Path, root: Path) -> None:
    """A minimal Debian 12 at `root`: copied from `base`, which is made by debootstrap once."""
    if not (base / "made").exists():
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm"]
        subprocess.run([*command, base / "root"], check=True, stdout=subprocess.DEVNULL)
        (base / "made").touch()
    subprocess.run(["cp", "-a", "--reflink=auto", base / "root", root], check=True)
    for name in _WAYS_OUT:
        if (source := Path("/", name)).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-rL", source, (root / name).parent], check=True)
    (root / "var/log/journal").mkdir(exist_ok=True)  # kept over a reboot


class Machine:
    """One container; started and ended any number of times."""

    def __init__(self, root: Path, checkout: Path) -> None:
        self.root = root
        self._checkout = checkout
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0

    @classmethod
    @contextlib.contextmanager
    def running(cls, folder: Path, *, base: Path, checkout: Path) -> Iterator[Machine]:
        """Booted inside, ended after. `checkout` is seen as /checkout, read-only."""
        fresh_root(base, folder / "root")
        machine = cls(folder / "root", checkout)
        try:
            machine.boot()
            yield machine
        finally:
            machine.kill()

    def boot(self) -> float:
        """Start it; seconds until systemd has started everything."""
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot"]
        command += ["--console=pipe", "--capability=all", "--directory", str(self.root)]
        command += [f"--bind-ro={self._checkout}:/checkout"]
        command += [f"--bind={device}" for device in _DEVICES if Path(device).exists()]
        with (self.root.parent / "console").open("ab") as console:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console
            )
        return until("booted", self._is_up, within_s=_BOOT_S)

    def _is_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise Failed((self.root.parent / "console").read_text(errors="replace")[-2000:])
        command = ["pgrep", "-P", str(self._process.pid), "-x", "systemd"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if not found:
            return False
        self._leader = int(found)
        state = self.run("systemctl is-system-running", check=False).strip()
        return state in {"running", "degraded"}

    def run(self, command: str, *, check: bool = True, timeout_s: float = _COMMAND_S) -> str:
        """What a shell command of root's prints in the machine, both streams."""
        enter = ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p", "-C"]
        environment = ["env", "-i", "HOME=/root", "LANG=C.UTF-8", f"PATH={_PATH}"]
        done = subprocess.run(
            [*enter, *environment, "bash", "-c", f"cd; {command}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=timeout_s, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise Failed(f"{command}: ended with {done.returncode}: {done.stdout[-2000:]}")
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run(f"systemctl show --value -p {name} {unit}").strip()

    def log_of(self, unit: str) -> str:
        """All that the journal has of a unit, in this boot."""
        return self.run(f"journalctl -b -u {unit} --no-pager -o cat")

    def power_off(self) -> float:
        """Shut it down as a user would; the seconds it took."""
        assert self._process is not None
        begun = time.monotonic()
        self.run("systemctl poweroff", check=False)
        self._process.wait(_END_S)
        return time.monotonic() - begun

    def kill(self) -> None:
        """End it whatever it does."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()  # nspawn asks the systemd inside to shut down
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
