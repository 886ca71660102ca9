"""The CDN: attachments by signed link, whole or one range."""

from __future__ import annotations

import hmac
import re
from typing import TYPE_CHECKING, Any

import anyio
from starlette.responses import PlainTextResponse, Response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from stashcordfs.sandbox.faults import Faults
    from stashcordfs.sandbox.server import Sandbox

_PIECE = 256 * 1024
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_GONE = "This content is no longer available."


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Start and end (exclusive); None: the whole; ValueError: nothing of it exists.

    Several ranges at once are answered with the whole, which a server may do.
    """
    match = _RANGE.fullmatch((header or "").strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, end = max(0, size - int(match[2])), size
        if match[2] == "0":
            raise ValueError("an empty range")
    else:
        start = int(match[1])
        end = min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= size:
        raise ValueError("beyond the end")
    return start, end


class Cdn:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.requests = 0
        self.sent_bytes = 0

    async def get(self, request: Request) -> Response:
        self.requests += 1
        faults = self._sandbox.faults
        if rule := faults.take("cdn", "delay"):
            await anyio.sleep(float(rule.get("seconds", 1.0)))
        if faults.take("cdn", "reset"):
            self._sandbox.hang_up(request)
            return Response()
        if rule := faults.take("cdn", "status"):
            return PlainTextResponse(_GONE, status_code=int(rule.get("status", 502)))
        path = self._sandbox.store.files / str(request.path_params["attachment"])
        if not self._valid(request) or not path.exists():
            return PlainTextResponse(_GONE, status_code=404)
        return self._serve(request, path, faults)

    async def media(self, _request: Request) -> Response:
        """The media proxy, which has images only; we have none."""
        self.requests += 1
        return PlainTextResponse("", status_code=415)

    def _valid(self, request: Request) -> bool:
        query = request.query_params
        expires, issued, given = (query.get(key, "") for key in ("ex", "is", "hm"))
        right = self._sandbox.view.signature(request.url.path, expires, issued)
        if not hmac.compare_digest(right.encode(), given.encode()):
            return False
        return int(expires, 16) > self._sandbox.store.clock.wall()

    def _serve(self, request: Request, path: Path, faults: Faults) -> Response:
        size = path.stat().st_size
        row = self._sandbox.store.row("SELECT * FROM attachments WHERE id=?", int(path.name))
        kind = row["content_type"] if row else "application/octet-stream"
        headers = {"Accept-Ranges": "bytes", "Content-Type": kind, "Cache-Control": "private"}
        header = request.headers.get("range")
        if faults.take("cdn", "ignore_range"):
            header = None
        try:
            span = parse_range(header, size)
        except ValueError:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        start, end = span or (0, size)
        if span:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        headers["Content-Length"] = str(end - start)
        status = 206 if span else 200
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        stop = start + (end - start) // 2 if faults.take("cdn", "cut") else end
        corrupt = faults.take("cdn", "corrupt") is not None
        return _Body(self._pieces(path, start, stop, corrupt=corrupt), status, headers)

    async def _pieces(
        self, path: Path, start: int, end: int, *, corrupt: bool
    ) -> AsyncIterator[bytes]:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < end and (piece := file.read(min(_PIECE, end - start))):
                if corrupt:
                    piece = bytes([piece[0] ^ 1]) + piece[1:]
                    corrupt = False
                start += len(piece)
                self.sent_bytes += len(piece)
                await self._sandbox.pace(len(piece))
                yield piece


class _Body(Response):
    """A body in pieces. When fewer come than were announced, the server hangs up."""

    def __init__(self, pieces: AsyncIterator[bytes], status: int, headers: dict[str, str]) -> None:
        self.pieces = pieces
        self.status_code = status
        self.background = None
        self.body = b""
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
