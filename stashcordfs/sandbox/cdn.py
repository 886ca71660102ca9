"""The CDN: attachments by signed link, whole or one range."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.responses import PlainTextResponse, Response

from stashcordfs.sandbox.bodies import Body
from stashcordfs.sandbox.ids import time_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from starlette.requests import Request

    from stashcordfs.sandbox.app import Sandbox

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
        self._faults = sandbox.faults
        self.requests = 0
        self.sent_bytes = 0

    async def get(self, request: Request) -> Response:
        self.requests += 1
        self._sandbox.look_at_switches()
        early = await self._sandbox.injection.before(request, "cdn")
        if early is not None:
            return early
        attachment = int(request.path_params["attachment"])
        if rule := self._faults.take(
            "cdn", "not_yet", applies=partial(self._too_young, attachment)
        ):
            return PlainTextResponse(_GONE, status_code=int(rule["status"]))
        path = self._sandbox.store.served(attachment)
        query = request.query_params
        expires, issued, signature = (query.get(key, "") for key in ("ex", "is", "hm"))
        lives = self._sandbox.view.link_lives(request.url.path, expires, issued, signature)
        if path is None or not lives:
            return PlainTextResponse(_GONE, status_code=404)
        return self._serve(request, path)

    async def media(self, _request: Request) -> Response:
        """The media proxy, which has images only; we have none."""
        self.requests += 1
        return PlainTextResponse("", status_code=415)

    def _too_young(self, attachment: int, fields: dict[str, Any]) -> bool:
        return self._sandbox.store.clock.wall() - time_of(attachment) < float(fields["younger_s"])

    def _serve(self, request: Request, path: Path) -> Response:
        size = path.stat().st_size
        row = self._sandbox.store.row("SELECT * FROM attachments WHERE id=?", int(path.name))
        kind = row["content_type"] if row else "application/octet-stream"
        headers = {"Accept-Ranges": "bytes", "Content-Type": kind, "Cache-Control": "private"}
        header = request.headers.get("range")
        if self._faults.take("cdn", "ignore_range"):
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
        cut = self._faults.take("cdn", "cut")
        expired = self._faults.take("cdn", "expire") is not None
        if expired:
            self._sandbox.view.expire_links(request.url.path, request.query_params["is"])
        stop = start + (end - start) // 2 if cut or expired else end
        corrupt = self._faults.take("cdn", "corrupt") is not None
        return Body(
            self._pieces(path, start, stop, corrupt=corrupt),
            status,
            headers,
            broken=lambda: (
                self._sandbox.injection.hang_up(request) if cut and cut["reset"] else None
            ),
        )

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
