from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from stashcordfs.ops.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def listener(request, tmp_path: Path):
    name = str(tmp_path / "n") if request.param == "path" else f"\0stashcordfs-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        sock.settimeout(5)
        yield sock, name.replace("\0", "@")


def test_each_notification_is_one_datagram_of_lines(listener) -> None:
    sock, name = listener
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "4000000"})
    assert notifier.watchdog_interval_s == 2
    assert notifier.ready()
    assert notifier.status("a\nb")
    assert notifier.stopping()
    assert notifier.reloading()
    assert notifier.extend_timeout(1.5)
    assert notifier.watchdog()
    assert sock.recv(999) == b"READY=1\nSTATUS=Mounted"
    assert sock.recv(999) == b"STATUS=a b"
    assert sock.recv(999) == b"STOPPING=1\nSTATUS=Draining"
    assert sock.recv(999).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    assert sock.recv(999) == b"EXTEND_TIMEOUT_USEC=1500000"
    assert sock.recv(999) == b"WATCHDOG=1"


def test_without_a_service_manager_nothing_is_sent_and_nothing_fails(tmp_path: Path) -> None:
    assert not Notifier({}).ready()
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()


def test_a_watchdog_meant_for_another_process_is_not_ours() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"})
    assert notifier.watchdog_interval_s == 0
