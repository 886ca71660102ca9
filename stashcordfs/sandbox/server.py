"""The process: where it listens, what it says, how it ends."""

from __future__ import annotations

import json
import signal
import socket
import sys
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from stashcordfs.sandbox.app import Sandbox
from stashcordfs.sandbox.store import Store

if TYPE_CHECKING:
    import asyncio

    from stashcordfs.sandbox.settings import SandboxSettings


def _protocol(sandbox: Sandbox) -> type[H11Protocol]:
    """The HTTP protocol, remembering its connections: a fault may cut one."""

    class Tracked(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.peer = transport.get_extra_info("peername")[:2]
            sandbox.transports[self.peer] = transport

        def connection_lost(self, exc: Exception | None) -> None:
            sandbox.transports.pop(self.peer, None)
            super().connection_lost(exc)

    return Tracked


def _listen(settings: SandboxSettings, last_port: int) -> socket.socket:
    """The port asked for; else the last one, since records hold the URL; else a free one."""
    wanted = [settings.port] if settings.port else [last_port, 0] if last_port else [0]
    for port in wanted:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, port))
            listener.listen(128)
        except OSError:
            listener.close()
            if port == wanted[-1]:
                raise
        else:
            return listener
    raise AssertionError("unreachable")


def run(settings: SandboxSettings) -> None:
    """Serve until SIGTERM or SIGINT; one line of JSON on stdout says where."""
    first = Store(settings.dir)
    with _listen(settings, int(first.state["port"])) as listener:
        port = int(listener.getsockname()[1])
        first.state["port"] = port
        first.save_state()
        first.close()
        sandbox = Sandbox(settings, port=port)
        server = uvicorn.Server(
            uvicorn.Config(
                sandbox.app,
                http=_protocol(sandbox),
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                date_header=False,
                server_header=False,
                timeout_keep_alive=75,  # shorter, and a client's next request meets a reset
                timeout_graceful_shutdown=2,
            )
        )
        state = sandbox.store.state
        said = {
            "api_url": f"{sandbox.view.base_url}/api/v10",
            "token": state["token"],
            "guild_id": str(state["guild_id"]),
            "channel_ids": [str(channel) for channel in state["channel_ids"]],
        }
        sys.stdout.write(json.dumps(said) + "\n")  # the socket listens already
        sys.stdout.flush()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave)  # uvicorn raises the signal again when it has finished
        try:
            server.run(sockets=[listener])
        finally:
            sandbox.store.close()


def _leave(number: int, frame: object) -> None:
    del number, frame
    raise SystemExit(0)
