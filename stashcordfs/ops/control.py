"""The control socket STATE/NAME/control.sock: commands ask a running daemon.

One request a connection. JSON lines: the request is {"cmd": NAME, ...arguments}; answers are
any number of {"event": {...}} and one {"ok": true, "result": {...}} or {"ok": false, "error": TEXT,
"exit_code": N}. The socket is its owner's alone (0600 in a 0700 directory).

The server runs on the daemon's loop, the client in a command, without trio.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import trio

from stashcordfs.errors import StashcordError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Handler = Callable[[Message], AsyncIterator[Message] | Awaitable[Message]]
_MAX_REQUEST_BYTES = 64 * 1024
_REQUEST_DEADLINE_S = 10.0


class NotRunning(StashcordError):
    """Nobody answers at the control socket."""


@contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """A name of `path` that fits into a socket address (107 bytes), however deep STATE lies."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


async def serve_control(
    path: Path,
    handlers: Mapping[str, Handler],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled. The caller holds the volume's lock, so an old socket is a dead one."""
    sock = _listen(path)
    with sock:
        task_status.started()
        try:
            await trio.serve_listeners(partial(_serve_one, handlers), [trio.SocketListener(sock)])
        finally:
            _remove(path)


def _listen(path: Path) -> trio.socket.SocketType:
    _remove(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short_path(path) as short:
        sock.bind(short)
    path.chmod(0o600)
    sock.listen(16)
    return trio.socket.from_stdlib_socket(sock)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


async def _serve_one(handlers: Mapping[str, Handler], stream: trio.SocketStream) -> None:
    async with stream:
        try:
            with trio.move_on_after(_REQUEST_DEADLINE_S) as deadline:
                line = await _read_line(stream)
            if deadline.cancelled_caught or not line:
                return
            await _answer(handlers, line, stream)
        except trio.BrokenResourceError:
            logger.debug("control: the client went away")


async def _read_line(stream: trio.SocketStream) -> bytes:
    data = b""
    while b"\n" not in data and len(data) < _MAX_REQUEST_BYTES:
        more = await stream.receive_some(4096)
        if not more:
            break
        data += more
    return data.partition(b"\n")[0]


async def _answer(handlers: Mapping[str, Handler], line: bytes, stream: trio.SocketStream) -> None:
    result: Message = {}
    try:
        handler, request = _find(handlers, line)
        outcome = handler(request)
        if inspect.isawaitable(outcome):
            result = await outcome
        else:
            events = cast("AsyncGenerator[Message, None]", outcome)
            async with aclosing(events):
                async for event in events:
                    await _send(stream, {"event": event})
        final: Message = {"ok": True, "result": result}
    except StashcordError as error:
        final = {"ok": False, "error": str(error), "exit_code": error.exit_code}
    except trio.BrokenResourceError:
        raise
    except Exception as error:  # a fault behind one command must not take the mount along
        logger.exception("control: command failed")
        text = f"internal error: {type(error).__name__}; see the log"
        final = {"ok": False, "error": text, "exit_code": 1}
    await _send(stream, final)


def _find(handlers: Mapping[str, Handler], line: bytes) -> tuple[Handler, Message]:
    try:
        request = json.loads(line)
        name = request["cmd"]
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"not a request: {error}") from error
    if name not in handlers:
        raise UsageError(f"the daemon knows no command {name!r}: is it an older version?")
    return handlers[name], request


async def _send(stream: trio.SocketStream, message: Message) -> None:
    await stream.send_all(json.dumps(message, default=str).encode() + b"\n")


class ControlClient:
    """Asks the daemon behind one control socket. Synchronous; one connection a call."""

    def __init__(self, path: Path, *, timeout_s: float | None = None) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def call(self, cmd: str, **args: object) -> Message:
        """Send one command and return its result; events on the way are dropped."""
        result: Message = {}
        for kind, message in self._exchange(cmd, args):
            if kind == "result":
                result = message
        return result

    def stream(self, cmd: str, **args: object) -> Iterator[Message]:
        """Send one command and yield its events until it is done."""
        for kind, message in self._exchange(cmd, args):
            if kind == "event":
                yield message

    def _exchange(self, cmd: str, args: Mapping[str, object]) -> Iterator[tuple[str, Message]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(self._timeout_s)
            self._connect(sock)
            try:
                sock.sendall(json.dumps({**args, "cmd": cmd}).encode() + b"\n")
                with sock.makefile("rb") as lines:
                    for line in lines:
                        message = json.loads(line)
                        if "event" in message:
                            yield "event", message["event"]
                            continue
                        _raise_for(message)
                        yield "result", message["result"]
                        return
            except TimeoutError:
                text = f"the daemon did not answer {cmd!r} in time; see its log"
                raise StashcordError(text) from None
            except OSError as error:
                raise NotRunning(f"the daemon went away: {error.strerror}") from error
            raise NotRunning("the daemon went away before it had answered")

    def _connect(self, sock: socket.socket) -> None:
        try:
            with _short_path(self._path) as short:
                sock.connect(short)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotRunning(f"volume {self._path.parent.name} is not mounted") from error
        except OSError as error:
            raise StashcordError(f"cannot ask at {self._path}: {error.strerror}") from error


def _raise_for(message: Message) -> None:
    if message.get("ok"):
        return
    wrong_use = message.get("exit_code") == UsageError.exit_code
    error_class = UsageError if wrong_use else StashcordError
    raise error_class(str(message.get("error", "no reason given")))
