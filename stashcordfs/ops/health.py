"""/metrics and /health on loopback: a few GETs, answered from injected callables.

    /metrics       Prometheus exposition
    /health        JSON of the mount's state, 200 when ready, else 503
    /health/live   200 as long as the loop turns
    /health/ready  200 when mounted and serving, else 503

One request a connection, each within a deadline. Nothing secret is shown, and loopback only.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import h11
import trio

from stashcordfs.errors import UsageError
from stashcordfs.ops.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_REQUEST_DEADLINE_S = 10.0
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class HealthSources:
    """Where the answers come from. All are called on the loop and must not block."""

    metrics: Callable[[], bytes]
    status: Callable[[], Mapping[str, object]]
    ready: Callable[[], bool]

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status code, content type and body for a GET of `path`."""
        match path.partition("?")[0]:
            case "/metrics":
                return 200, CONTENT_TYPE, self.metrics()
            case "/health/live":
                return 200, _JSON, b'{"live": true}\n'
            case "/health/ready":
                ready = self.ready()
                return 200 if ready else 503, _JSON, _json({"ready": ready})
            case "/health":
                ready = self.ready()
                return 200 if ready else 503, _JSON, _json({"ready": ready, **self.status()})
        return 404, _JSON, _json({"error": "try /metrics, /health, /health/live, /health/ready"})


def _json(value: object) -> bytes:
    return json.dumps(value, default=str).encode() + b"\n"


async def serve_health(
    port: int,
    sources: HealthSources,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; `nursery.start` returns the port (useful with port 0).

    UsageError when the port cannot be had.
    """
    try:
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    except OSError as error:
        raise UsageError(
            f"metrics_port {port} cannot be had ({os.strerror(error.errno or 0)}): set another,"
            " one for each mount, or 0 for none"
        ) from error
    task_status.started(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(partial(_serve_one, sources), listeners)


async def _serve_one(sources: HealthSources, stream: trio.SocketStream) -> None:
    connection = h11.Connection(h11.SERVER)
    with trio.move_on_after(_REQUEST_DEADLINE_S):
        try:
            request = await _read_request(connection, stream)
            if request is None:
                return
            code, kind, body = (
                sources.answer(request.target.decode("ascii", "replace"))
                if request.method in {b"GET", b"HEAD"}
                else (405, _JSON, _json({"error": "only GET"}))
            )
            head = request.method == b"HEAD"
            await _send(connection, stream, code=code, kind=kind, body=body, head=head)
        except h11.RemoteProtocolError:
            return  # not HTTP: close
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the client went away
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()


async def _read_request(
    connection: h11.Connection, stream: trio.SocketStream
) -> h11.Request | None:
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(4096))
        elif isinstance(event, h11.Request):
            return event
        else:
            return None


async def _send(
    connection: h11.Connection,
    stream: trio.SocketStream,
    *,
    code: int,
    kind: str,
    body: bytes,
    head: bool,
) -> None:
    headers = [
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
        ("Cache-Control", "no-store"),
    ]
    data = connection.send(h11.Response(status_code=code, headers=headers)) or b""
    if not head:
        data += connection.send(h11.Data(data=body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    await stream.send_all(data)
