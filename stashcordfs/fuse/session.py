"""One mount's session with the kernel: mounting, serving, ending. One per process (pyfuse3)."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import select
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import trio

from stashcordfs.errors import StashcordError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stashcordfs.fuse.operations import StashcordOperations

log = logging.getLogger(__name__)

_READ_AHEAD_KIB = 1024
# Over the 64 reads that may wait for the network: kernel read-ahead and write-back share this, so
# that stuck reads would else hold up what others write (fs/fuse/dev.c, fuse_block_alloc).
_MAX_BACKGROUND = 96
_CONNECTIONS = Path("/sys/fs/fuse/connections")
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the numbers are the same on all machines
_FSCONFIG_CMD_CREATE = 6  # linux/mount.h
_LEFT_S = 1.0  # for what is under way at the end
_MIN_TASKS = 16
_MAX_TASKS = 600  # room for `stat` while many reads and fsyncs wait for the network


class Session:
    """Mounts `operations` at `mountpoint`."""

    def __init__(
        self,
        operations: StashcordOperations,
        mountpoint: Path,
        *,
        options: Iterable[str],
    ) -> None:
        """`options`: libfuse's. Nothing is mounted yet."""
        self._operations = operations
        self._mountpoint = mountpoint
        self._options = set(options)
        self._serving = False
        self._stopped = trio.Event()

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Mounted inside, unmounted after. StashcordError says why a mount failed."""
        try:
            pyfuse3.init(self._operations, str(self._mountpoint), self._options)
        except RuntimeError as error:
            hint = "are fuse3 and /dev/fuse there?"
            if "allow_other" in self._options and os.geteuid() != 0:
                hint = "allow_other needs the line user_allow_other in /etc/fuse.conf"
            text = f"cannot mount at {self._mountpoint}: {error}; {hint}"
            raise StashcordError(text) from error
        try:
            _tune(self._mountpoint)
            yield
        finally:
            pyfuse3.close(unmount=True)

    async def serve(self) -> None:
        """Serve requests until unmounted or `stop`.

        pyfuse3 waits for the handlers under way. Those that wait for the network are given up soon
        after the end: their programs, if they are still there, get an error when the connection to
        the kernel closes.
        """
        self._serving = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up, nursery.cancel_scope)
            nursery.start_soon(self._watch_connection)
            await pyfuse3.main(_MIN_TASKS, _MAX_TASKS)
            nursery.cancel_scope.cancel()

    async def _give_up(self, serving: trio.CancelScope) -> None:
        await self._stopped.wait()
        await trio.sleep(_LEFT_S)
        serving.cancel()

    async def _watch_connection(self) -> None:
        """Notice that the kernel has ended it, when the last user of a detached mount has gone.

        An epoll that asks for nothing tells of errors alone (epoll_ctl(2)), so no request wakes it.
        """
        with select.epoll() as ended:
            ended.register(_device(), 0)
            await trio.lowlevel.wait_readable(ended.fileno())
            self._stopped.set()

    def stop(self) -> None:
        """End `serve`."""
        if self._serving:
            pyfuse3.terminate()
        self._stopped.set()


def _device() -> int:
    """The connection's descriptor, which pyfuse3 keeps to itself. There is one a process."""
    return next(
        int(path.name)
        for path in Path("/proc/self/fd").iterdir()
        if os.path.realpath(path) == "/dev/fuse"
    )


def _tune(mountpoint: Path) -> None:
    """Raise what pyfuse3 cannot negotiate. Needs root and is never required."""
    # The device number without asking the file system, which does not serve yet. The kernel
    # escapes blanks in paths; of mounts over one another the last is ours.
    escaped = re.sub(r"[ \t\n\\]", lambda found: f"\\{ord(found[0]):03o}", str(mountpoint))
    device = ""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields = line.split(" ")
        if fields[4] == escaped and " - fuse.stashcordfs " in line:
            device = fields[2]
    if not device:
        return
    _write_tuned(Path(f"/sys/class/bdi/{device}/read_ahead_kb"), _READ_AHEAD_KIB)
    name = f"{device.partition(':')[2]}/max_background"
    try:
        connections = _open_connections()
    except OSError as error:
        log.info("left as it is: %s (%s)", name, error.strerror)
        return
    try:
        _write_tuned(Path(f"/proc/self/fd/{connections}") / name, _MAX_BACKGROUND)
    finally:
        os.close(connections)


def _write_tuned(path: Path, value: int) -> None:
    try:
        path.write_text(f"{value}\n", encoding="ascii")
    except OSError as error:
        log.info("left as it is: %s (%s)", path, error.strerror)


def _open_connections() -> int:
    """The kernel's directory of FUSE connections. OSError when it can't be had.

    systemd mounts it, and each connection's files are its user's. Elsewhere, as in containers, root
    gets a mount of it that nobody else sees (fsopen(2)).
    """
    if _CONNECTIONS.is_mount():
        return os.open(_CONNECTIONS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    control = _syscall(_FSOPEN, b"fusectl", 1)  # FSOPEN_CLOEXEC
    try:
        _syscall(_FSCONFIG, control, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(_FSMOUNT, control, 1, 0)  # FSMOUNT_CLOEXEC
    finally:
        os.close(control)


def _syscall(number: int, *args: int | bytes | None) -> int:
    """A system call that Python has no function for. OSError."""
    result = ctypes.CDLL(None, use_errno=True).syscall(number, *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)
