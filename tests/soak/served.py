"""The sandbox in the test's own process: no sockets, no second clock.

    async with served(folder) as server:
        async with server.client() as client: ...

A request's body is handed over whole before the server is called, and the server goes on when its
client has lost patience: so an answer can be lost, and a message can be made late. One clock,
trio's, rules both sides; under a MockClock hours pass in moments.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote

import httpx
import trio

from stashcordfs.discord.client import ClientStats, DiscordClient
from stashcordfs.sandbox.app import Sandbox
from stashcordfs.sandbox.settings import SandboxSettings

STARTED_AT = 1_800_000_000.0  # Unix time at the virtual clock's 0
_PORT = 4443


def wall() -> float:
    """The one clock as Unix time."""
    return STARTED_AT + trio.current_time()


@dataclass
class _Exchange:
    """One request on the server; also the connection that a fault may reset."""

    scope: dict[str, Any]
    body: list[bytes]
    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    content: bytearray = field(default_factory=bytearray)
    broken: bool = False
    done: trio.Event = field(default_factory=trio.Event)

    async def receive(self) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        piece = self.body.pop(0) if self.body else b""
        return {"type": "http.request", "body": piece, "more_body": bool(self.body)}

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
        else:
            self.content += message.get("body", b"")

    # What the sandbox asks of a transport that it is to reset

    def get_extra_info(self, _name: str) -> Any:
        return SimpleNamespace(setsockopt=lambda *_: None)

    def abort(self) -> None:
        self.broken = True


class InProcess(httpx.AsyncBaseTransport):
    def __init__(self, sandbox: Sandbox, nursery: trio.Nursery) -> None:
        self._sandbox = sandbox
        self._nursery = nursery
        self._ports = itertools.count(1)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        peer = ("127.0.0.1", next(self._ports))
        stream = request.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        exchange = _Exchange(_scope(request, peer), [bytes(piece) async for piece in stream])
        self._nursery.start_soon(self._serve, exchange, peer)
        with trio.move_on_after(request.extensions["timeout"]["read"]):
            await exchange.done.wait()
        if not exchange.done.is_set():
            raise httpx.ReadTimeout("the server is still at it", request=request)
        if exchange.broken:
            raise httpx.ReadError("reset", request=request)
        content = bytes(exchange.content)
        return httpx.Response(
            exchange.status, headers=exchange.headers, stream=httpx.ByteStream(content)
        )

    async def _serve(self, exchange: _Exchange, peer: tuple[str, int]) -> None:
        self._sandbox.transports[peer] = exchange  # type: ignore[assignment]
        try:
            await self._sandbox.app(exchange.scope, exchange.receive, exchange.send)
        finally:
            del self._sandbox.transports[peer]
            exchange.done.set()


def _scope(request: httpx.Request, peer: tuple[str, int]) -> dict[str, Any]:
    path, _, query = request.url.raw_path.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": unquote(path.decode()),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": peer,
        "server": ("127.0.0.1", _PORT),
    }


@dataclass
class Server:
    sandbox: Sandbox
    transport: InProcess

    @property
    def channels(self) -> list[int]:
        return list(self.sandbox.store.state["channel_ids"])

    def client(self, stats: ClientStats | None = None) -> DiscordClient:
        token = str(self.sandbox.store.state["token"])
        return DiscordClient(
            api_url=f"{self.sandbox.view.base_url}/api/v10",
            token=lambda: token,
            transport=self.transport,
            stats=stats,
        )


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Server]:
    """A server inside. What it is still doing at the end is dropped."""
    clock = SimpleNamespace(time=wall, monotonic=trio.current_time)
    with patch("stashcordfs.sandbox.ids.time", clock), patch("asyncio.sleep", trio.sleep):
        sandbox = Sandbox(SandboxSettings(folder), port=_PORT)
        try:
            async with trio.open_nursery() as nursery:
                yield Server(sandbox, InProcess(sandbox, nursery))
                nursery.cancel_scope.cancel()
        finally:
            sandbox.store.close()
