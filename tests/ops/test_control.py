from __future__ import annotations

import logging
import socket

import pytest
import trio

from stashcordfs.errors import StashcordError, UsageError
from stashcordfs.ops.control import ControlClient, NotRunning, serve_control


async def status(request):
    return {"state": "mounted", "asked": request.get("what")}


async def drain(request):
    for left in (2, 1, 0):
        yield {"pending_bytes": left}


async def wrong(request):
    raise UsageError("write something else")


async def failing(request):
    raise StashcordError("could not")
    yield {}


async def broken(request):
    raise ZeroDivisionError


HANDLERS = {
    "status": status,
    "drain": drain,
    "wrong": wrong,
    "failing": failing,
    "broken": broken,
}


@pytest.fixture
async def path(tmp_path, nursery):
    deep = tmp_path / ("d" * 100)  # longer than a socket address may be
    deep.mkdir()
    socket_path = deep / "control.sock"
    socket_path.touch()  # as a killed daemon leaves it
    await nursery.start(serve_control, socket_path, HANDLERS)
    return socket_path


async def test_a_call_returns_the_result_with_its_arguments(path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    client = ControlClient(path)
    answer = await trio.to_thread.run_sync(lambda: client.call("status", what="x"))
    assert answer == {"state": "mounted", "asked": "x"}


async def test_a_stream_yields_each_event_and_a_call_drops_them(path) -> None:
    client = ControlClient(path)
    events = await trio.to_thread.run_sync(lambda: list(client.stream("drain")))
    assert events == [{"pending_bytes": 2}, {"pending_bytes": 1}, {"pending_bytes": 0}]
    assert await trio.to_thread.run_sync(lambda: client.call("drain")) == {}
    assert await trio.to_thread.run_sync(lambda: list(client.stream("status"))) == []


@pytest.mark.parametrize(
    ("cmd", "kind", "text"),
    [
        ("wrong", UsageError, "write something else"),
        ("failing", StashcordError, "could not"),
        ("unheard-of", UsageError, "knows no command"),
    ],
)
async def test_errors_come_back_as_their_kind(path, cmd, kind, text) -> None:
    with pytest.raises(kind, match=text):
        await trio.to_thread.run_sync(lambda: ControlClient(path).call(cmd))


async def test_a_fault_behind_a_command_is_logged_and_the_socket_lives_on(path, caplog) -> None:
    client = ControlClient(path)
    with pytest.raises(StashcordError, match="internal error: ZeroDivisionError"):
        await trio.to_thread.run_sync(lambda: client.call("broken"))
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert (await trio.to_thread.run_sync(lambda: client.call("status")))["state"] == "mounted"


@pytest.mark.parametrize("line", [b"{]\n", b"[1]\n", b"{}\n", b"null\n"])
async def test_what_is_no_request_is_answered_with_an_error(path, line) -> None:
    directory = path.parent
    with socket.socket(socket.AF_UNIX) as raw:
        fd = trio.socket.from_stdlib_socket(raw)
        import os

        opened = os.open(directory, os.O_PATH)
        try:
            await fd.connect(f"/proc/self/fd/{opened}/control.sock")
        finally:
            os.close(opened)
        await fd.send(line)
        assert b'"exit_code": 2' in await fd.recv(4096)


def test_no_daemon_is_its_own_error(tmp_path) -> None:
    with pytest.raises(NotRunning, match="is not mounted"):
        ControlClient(tmp_path / "control.sock").call("status")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "c"))
    with pytest.raises(NotRunning):  # bound once, nobody listens
        ControlClient(tmp_path / "c").call("status")
    (tmp_path / "f").write_text("")
    with pytest.raises(StashcordError):
        ControlClient(tmp_path / "f").call("status")


def served_by(answer: bytes | None, tmp_path, monkeypatch):
    """A client whose peer answers this and hangs up, or stays silent."""
    ours, theirs = socket.socketpair()
    client = ControlClient(tmp_path / "x", timeout_s=0.01)

    def connect(sock) -> None:
        import os

        os.dup2(ours.fileno(), sock.fileno())

    monkeypatch.setattr(client, "_connect", connect)
    if answer is not None:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
    return client, ours, theirs


def test_a_daemon_that_hangs_up_or_stays_silent_is_said_so(tmp_path, monkeypatch) -> None:
    client, *pair = served_by(b'{"event": {}}\n', tmp_path, monkeypatch)
    with pytest.raises(NotRunning, match="before it had answered"):
        client.call("status")
    client, *more = served_by(None, tmp_path, monkeypatch)
    with pytest.raises(StashcordError, match="did not answer"):
        client.call("status")
    for sock in (*pair, *more):
        sock.close()
