from __future__ import annotations

import json

import h11
import pytest
import trio

from stashcordfs.errors import UsageError
from stashcordfs.ops.health import HealthSources, serve_health
from stashcordfs.ops.metrics import Metrics


def sources(*, ready: bool = True) -> HealthSources:
    return HealthSources(
        metrics=Metrics().render,
        status=lambda: {"state": "mounted", "dirty_bytes": 5},
        ready=lambda: ready,
    )


async def ask(port: int, data: bytes) -> bytes:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(data)
        answer = b""
        while more := await stream.receive_some(65536):
            answer += more
    return answer


async def get(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    raw = await ask(port, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target=path, headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(raw)
    client.receive_data(b"")
    response = client.next_event()
    data = client.next_event()
    return response.status_code, bytes(data.data) if isinstance(data, h11.Data) else b""


@pytest.mark.parametrize("ready", [True, False])
async def test_the_routes_answer_what_they_are_handed(ready: bool) -> None:
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve_health, 0, sources(ready=ready))
        code = 200 if ready else 503
        status, body = await get(port, "/metrics")
        assert status == 200
        assert b"stashcordfs_dirty_bytes" in body
        assert (await get(port, "/health/live"))[0] == 200
        assert (await get(port, "/health/ready?x=1"))[0] == code
        status, body = await get(port, "/health")
        assert status == code
        assert json.loads(body) == {"ready": ready, "state": "mounted", "dirty_bytes": 5}
        assert (await get(port, "/etc/passwd"))[0] == 404
        assert (await get(port, "/health", method="DELETE"))[0] == 405
        assert (await get(port, "/health/live", method="HEAD")) == (200, b"")
        nursery.cancel_scope.cancel()


async def test_garbage_and_hanging_up_end_one_connection_only() -> None:
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve_health, 0, sources())
        assert await ask(port, b"\x00\x01 nonsense\r\n\r\n") == b""
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.aclose()
        assert (await get(port, "/health/live"))[0] == 200
        nursery.cancel_scope.cancel()


async def test_a_silent_client_is_let_go_after_the_deadline(autojump_clock) -> None:
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve_health, 0, sources())
        assert await ask(port, b"GET / HTTP/1.1\r\n") == b""
        nursery.cancel_scope.cancel()


async def test_a_port_that_is_taken_is_refused_with_what_to_do() -> None:
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve_health, 0, sources())
        with pytest.raises(UsageError, match=rf"metrics_port {port} .* set another"):
            await serve_health(port, sources())
        nursery.cancel_scope.cancel()
