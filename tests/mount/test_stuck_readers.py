"""200 readers of what is not cached, and no network: the mount serves everybody else, and ends."""

from __future__ import annotations

import errno
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from stashcordfs.cli.mountpoint import wait_for_exit

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
mounted = importlib.import_module("mounted")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can raise max_background anywhere"),
]
READERS, MOST_WAITING = 200, 64
SETTINGS = {"network_deadline_s": "600", "read_ahead_bytes": "0"}

# Each thread reads one file of its own, and tells its number and the errno, or 0.
_READ_ALL = """
import json, os, sys, threading

def read(number):
    code, fd = 0, os.open(f"{sys.argv[1]}/{number}", os.O_RDONLY)
    try:
        code = 0 if os.pread(fd, 131072, 0)[:8] == b"%08d" % number else -1
    except OSError as error:
        code = error.errno
    told.acquire()
    print(json.dumps([number, code]), flush=True)
    told.release()

told = threading.Lock()
threads = [threading.Thread(target=read, args=(n,)) for n in range(int(sys.argv[2]))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


class Readers:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.codes: dict[int, int] = {}

    def await_told(self, count: int) -> None:
        """Return when so many have ended; at the end of the output, whatever it holds."""
        while len(self.codes) < count and (line := self.process.stdout.readline()):
            number, code = json.loads(line)
            self.codes[number] = code

    def tell_more(self) -> bool:
        """Whether another one ends within a second."""
        return bool(select.select([self.process.stdout], [], [], 1.0)[0])


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stuck")
    with mounted.DemoVolume.running(folder, settings=SETTINGS) as volume:
        (volume.mountpoint / "cold").mkdir()
        for number in range(READERS):
            data = b"%08d" % number + os.urandom(262136)
            (volume.mountpoint / "cold" / str(number)).write_bytes(data)
        (volume.mountpoint / "warm").write_bytes(b"warm")
        yield volume


@pytest.fixture
def volume(running):
    """Mounted, with nothing cached."""
    if running.is_mounted():
        running.umount()
    (running.state / mounted.NAME / "blocks").rename(running.folder / f"old-{os.urandom(4).hex()}")
    running.mount()
    return running


@contextmanager
def stuck_readers(volume):
    """The network is gone and as many readers as may be wait for it. It comes back at the end."""
    with (
        volume.server_halted(),
        subprocess.Popen(
            [sys.executable, "-c", _READ_ALL, volume.mountpoint / "cold", str(READERS)],
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        ) as process,
    ):
        readers = Readers(process)
        try:
            readers.await_told(READERS - MOST_WAITING)
            yield readers
        finally:
            process.kill()


def test_64_wait_the_others_fail_at_once_and_the_mount_serves_everybody_else(volume):
    place = volume.mountpoint
    with stuck_readers(volume) as readers:
        assert len(readers.codes) == READERS - MOST_WAITING
        assert set(readers.codes.values()) == {errno.EIO}
        assert (place / "cold/0").stat().st_size == 262144
        assert len(list((place / "cold").iterdir())) == READERS
        with (place / "new").open("wb") as file:
            file.write(b"x" * 3_000_000)
            file.flush()
            os.fsync(file.fileno())
        (place / "new").rename(place / "renamed")
        assert (place / "renamed").read_bytes() == b"x" * 3_000_000
        (place / "renamed").unlink()
        assert volume.status()["state"] == "mounted"
        assert not readers.tell_more()
        volume._server.send_signal(signal.SIGCONT)
        readers.await_told(READERS)
        assert sorted(readers.codes) == list(range(READERS))
        assert list(readers.codes.values()).count(0) == MOST_WAITING
    for number in range(READERS):
        assert (place / "cold" / str(number)).read_bytes().startswith(b"%08d" % number)


def test_a_plain_unmount_is_refused_and_says_by_whom_it_is_used(volume):
    with stuck_readers(volume) as readers:
        place = str(volume.mountpoint)
        plain = subprocess.run(["fusermount3", "-u", place], capture_output=True, check=False)
        assert plain.returncode
        with pytest.raises(RuntimeError, match=rf"in use by {readers.process.pid} \("):
            volume.command("umount", "--no-wait", place)
        assert volume.is_mounted()
        assert len(readers.codes) == READERS - MOST_WAITING


def test_at_sigterm_the_readers_get_an_error_and_nothing_is_left(volume):
    with stuck_readers(volume) as readers:
        pid = int((volume.state / mounted.NAME / "lock").read_text())
        os.kill(pid, signal.SIGTERM)
        readers.await_told(READERS)
        assert len(readers.codes) == READERS
        assert 0 not in readers.codes.values()
        assert wait_for_exit(pid, timeout_s=60)
        assert not volume.is_mounted()
        assert list(volume.mountpoint.iterdir()) == []
    volume.mount()
    assert (volume.mountpoint / "cold/7").read_bytes().startswith(b"00000007")


def test_killed_readers_go_and_a_lazy_unmount_ends_the_daemon(volume):
    with stuck_readers(volume) as readers:
        pid = int((volume.state / mounted.NAME / "lock").read_text())
        subprocess.run(["umount", "-l", str(volume.mountpoint)], check=True)
        assert not volume.is_mounted()
        readers.process.kill()
        readers.process.wait()
        assert wait_for_exit(pid, timeout_s=60)
    volume.mount()
    assert (volume.mountpoint / "cold/7").read_bytes().startswith(b"00000007")
