"""Bodies in pieces, whole or broken off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import Receive, Scope, Send


class Body(Response):
    """When fewer pieces come than were announced, `broken` is called and the server hangs up."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        status: int,
        headers: dict[str, str],
        *,
        broken: Callable[[], None] = lambda: None,
    ) -> None:
        self.pieces = pieces
        self.status_code = status
        self.background = None
        self.body = b""
        self.broken = broken
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        head: dict[str, Any] = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(head)
        left = int(self.headers["content-length"])
        async for piece in self.pieces:
            left -= len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if left == 0:
            await send({"type": "http.response.body", "body": b""})
        else:
            self.broken()


async def half_of(content: bytes) -> AsyncIterator[bytes]:
    yield content[: len(content) // 2]
