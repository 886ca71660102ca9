"""The faults that strike a request of the API from outside: before it, after it, on its headers."""

from __future__ import annotations

import asyncio
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stashcordfs.sandbox.bodies import Body, half_of
from stashcordfs.sandbox.errors import TooMany
from stashcordfs.sandbox.faults import BEFORE
from stashcordfs.sandbox.forms import drain

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Message

    from stashcordfs.sandbox.app import Sandbox

    Strike = Callable[[Request, str, dict[str, Any]], Awaitable[Response | None]]

_HTML = "<html><body>error</body></html>"
_BLOCKED = "You are being blocked from accessing our API temporarily"
_RATE_PREFIX = "x-ratelimit-"


class Injection:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._faults = sandbox.faults
        self._before: dict[str, Strike] = {
            "delay": self._delay,
            "cut_upload": self._cut_upload,
            "early": self._early,
            "status": self._status,
            "reset": self._reset,
            "refuse": self._refuse,
            "rate_limit": self._rate_limit,
            "cloudflare": self._cloudflare,
        }

    # Before the request is looked at

    async def before(self, request: Request, name: str) -> Response | None:
        """The answer of a fault; None: the request may go on."""
        for kind in BEFORE:
            strike = self._before.get(kind)
            rule = self._faults.take(name, kind) if strike else None
            if strike and rule is not None:
                response = await strike(request, name, rule)
                if response is not None:
                    return response
        return None

    def paced(self, request: Request, name: str) -> Request:
        """The request, its body maybe arriving slowly."""
        rule = self._faults.take(name, "slow_upload")
        if rule is None:
            return request

        async def receive() -> Message:
            message = await request.receive()
            await asyncio.sleep(len(message.get("body", b"")) / float(rule["bytes_per_s"]))
            return message

        return Request(request.scope, receive)

    async def _delay(self, _request: Request, _name: str, rule: dict[str, Any]) -> None:
        await asyncio.sleep(float(rule["seconds"]))

    async def _cut_upload(self, request: Request, _name: str, rule: dict[str, Any]) -> Response:
        length = int(request.headers.get("content-length") or 0)
        stop, got = int(rule["bytes"]) or length // 2, 0
        async for piece in request.stream():
            got += len(piece)
            if got >= stop:
                break
        return self.hung_up(request)

    async def _early(self, _request: Request, _name: str, rule: dict[str, Any]) -> Response:
        status, headers = int(rule["status"]), {"Connection": "close"}
        if status == 429:
            error = TooMany(1.0)
            return self._sandbox.respond(status, error.body, {**error.headers, **headers})
        return self._sandbox.respond(status, {"message": "early", "code": rule["code"]}, headers)

    async def _status(self, request: Request, _name: str, rule: dict[str, Any]) -> Response:
        await drain(request)
        status = int(self._faults.choose(rule["status"]))
        text = "" if rule["empty"] else _HTML
        headers = {"Retry-After": str(rule["retry_after"])} if rule["retry_after"] else {}
        return Response(text, status_code=status, headers=headers, media_type="text/html")

    async def _reset(self, request: Request, _name: str, _rule: dict[str, Any]) -> Response:
        return self.hung_up(request)

    async def _refuse(self, request: Request, _name: str, rule: dict[str, Any]) -> Response:
        await drain(request)
        body = {"message": "refused", "code": int(rule["code"])}
        return self._sandbox.respond(int(rule["status"]), body, {})

    async def _rate_limit(self, request: Request, name: str, rule: dict[str, Any]) -> Response:
        await drain(request)
        self._sandbox.limited["injected"] += 1
        scope, after = str(rule["scope"]), float(rule["retry_after"])
        error = TooMany(after, scope, rule["code"])
        remaining = "3" if scope == "shared" else "0"
        bucket = {"X-RateLimit-Remaining": remaining, "X-RateLimit-Limit": "5"}
        bucket |= {"X-RateLimit-Bucket": name, "X-RateLimit-Reset-After": f"{after:.3f}"}
        bucket["X-RateLimit-Reset"] = f"{self._sandbox.store.clock.wall() + after:.3f}"
        unannounced = scope == "global" or rule["code"] == 30046
        headers = {**({} if unannounced else bucket), **error.headers}
        return self._sandbox.respond(429, error.body, headers)

    async def _cloudflare(self, request: Request, _name: str, rule: dict[str, Any]) -> Response:
        await drain(request)
        self._sandbox.limited["injected"] += 1
        return cloudflare(json=bool(rule["json"]))

    # After it had its effect

    async def after(self, request: Request, name: str, response: Response) -> Response:
        if rule := self._faults.take(name, "lost_answer"):
            await asyncio.sleep(float(rule["seconds"]))
            status = int(self._faults.choose(rule["status"]))
            if status == 0:
                return self.hung_up(request)
            return Response(_HTML, status_code=status, media_type="text/html")
        if rule := self._faults.take(name, "late"):
            await asyncio.sleep(float(rule["seconds"]))
        if rule := self._faults.take(name, "cut"):
            return self._cut(request, response, rule)
        return response

    def _cut(self, request: Request, response: Response, rule: dict[str, Any]) -> Response:
        if not response.body:
            return self.hung_up(request)
        return Body(
            half_of(bytes(response.body)),
            response.status_code,
            dict(response.headers),
            broken=lambda: self.hang_up(request) if rule["reset"] else None,
        )

    # The headers of any answer of the API's

    def dress(self, name: str, response: Response) -> Response:
        """Change the headers. A bucket's new hash shows from the next answer on."""
        headers, wall = response.headers, self._sandbox.store.clock.wall()
        if self._faults.take(name, "new_bucket"):
            self._sandbox.limits.generation += 1
        limited = "x-ratelimit-reset" in headers
        if limited and (rule := self._faults.take(name, "skew")):
            shift = float(rule["seconds"]) + self._faults.around(float(rule["jitter_s"]))
            headers["X-RateLimit-Reset"] = f"{float(headers['x-ratelimit-reset']) + shift:.3f}"
        if rule := self._faults.take(name, "skew_date"):
            headers["Date"] = formatdate(wall + float(rule["seconds"]), usegmt=True)
        if self._faults.take(name, "no_headers"):
            for key in [key for key in headers if key.startswith(_RATE_PREFIX)]:
                del headers[key]
        return response

    # The connection

    def hang_up(self, request: Request) -> None:
        """Reset the connection."""
        if request.client is not None:
            self._sandbox.reset_connection((request.client.host, request.client.port))

    def hung_up(self, request: Request) -> Response:
        """The same; what the server is given for an answer goes nowhere."""
        self.hang_up(request)
        return Response()


def cloudflare(*, json: bool = False) -> Response:
    """A 429 that is not the API's: no `Via`, no rate-limit headers, no `retry_after`."""
    if json:
        return JSONResponse({"message": _BLOCKED, "code": 0}, status_code=429)
    return Response("error code: 1015", status_code=429, media_type="text/html")
