"""One server: its parts, and one answer from request to headers."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import socket
import struct
from collections import Counter
from email.utils import formatdate
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stashcordfs.sandbox.admin import Admin
from stashcordfs.sandbox.api import Answer, Api
from stashcordfs.sandbox.ban import Bans
from stashcordfs.sandbox.cdn import Cdn
from stashcordfs.sandbox.errors import ApiError, TooMany
from stashcordfs.sandbox.faults import Faults
from stashcordfs.sandbox.forms import drain
from stashcordfs.sandbox.injection import Injection, cloudflare
from stashcordfs.sandbox.limits import Limits
from stashcordfs.sandbox.messages import Messages
from stashcordfs.sandbox.routes import BASE, FILE, NAMES, ROUTES
from stashcordfs.sandbox.store import Store
from stashcordfs.sandbox.view import View

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from stashcordfs.sandbox.settings import SandboxSettings

    Handler = Callable[[Request], Awaitable[Answer]]

_CLOSE_BY_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, for no time


class Sandbox:
    """All of one server; `app` is its ASGI application."""

    def __init__(self, settings: SandboxSettings, *, port: int) -> None:
        self._plain_settings = self.settings = settings
        self.store = Store(settings.dir)
        self.limits = Limits()
        self.bans = Bans()
        self.faults = Faults(self.store.clock.monotonic, routes=NAMES)
        self.injection = Injection(self)
        self.view = View(self.store, f"http://{settings.host}:{port}")
        self.messages = Messages(self.store, self.faults, settings)
        self.cdn = Cdn(self)
        self.requests: Counter[str] = Counter()
        self.limited: Counter[str] = Counter()
        self.transports: dict[tuple[str, int], asyncio.Transport] = {}
        self.change(settings)
        self.app = Starlette(routes=self._routes())

    def change(self, settings: SandboxSettings) -> None:
        self._plain_settings = settings
        self.look_at_switches()

    def change_some(self, changes: dict[str, Any]) -> None:
        self.change(dataclasses.replace(self._plain_settings, **changes))

    def look_at_switches(self) -> None:
        """Settle what is in force for the request that begins: rules may replace settings."""
        now = dataclasses.replace(self._plain_settings, **self.faults.switched())
        self.settings = self.view.settings = self.messages.settings = now

    def _routes(self) -> list[Route]:
        api, admin = Api(self), Admin(self)
        routes = [
            Route(BASE + path, self._endpoint(name, partial(handler, api)), methods=[method])
            for method, path, name, handler in ROUTES
        ]
        return [
            *routes,
            Route(FILE, self.cdn.get, methods=["GET"]),  # and HEAD
            Route("/media" + FILE, self.cdn.media, methods=["GET"]),
            *admin.routes(),
            Route("/{rest:path}", self._unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        ]

    def _endpoint(self, name: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            self.requests[name] += 1
            self.look_at_switches()
            if self.settings.latency_s:
                await asyncio.sleep(self.settings.latency_s)
            address = request.client.host if request.client else ""
            if self.bans.banned(address, self.store.clock.monotonic()):
                await drain(request)
                return cloudflare()
            response = await self._answer(request, name, handler)
            self._count_refusal(address, response)
            return response

        return endpoint

    async def _unknown(self, request: Request) -> Response:
        await drain(request)
        return self.respond(404, {"message": "404: Not Found", "code": 0}, {})

    # One answer

    async def _answer(self, request: Request, name: str, handler: Handler) -> Response:
        response = await self.injection.before(request, name)
        if response is None:
            request = self.injection.paced(request, name)
            response, done = await self._carry_out(request, name, handler)
            if done:
                response = await self.injection.after(request, name, response)
        if "via" in response.headers:  # the API's own, not one of what stands before it
            self.injection.dress(name, response)
        return response

    async def _carry_out(
        self, request: Request, name: str, handler: Handler
    ) -> tuple[Response, bool]:
        """The answer, and whether the request had its effect."""
        headers: dict[str, str] = {}
        try:
            self._authorise(request, name)
            headers = self._limit(request, name)
            status, body = await handler(request)
        except TooMany as error:
            await drain(request)
            self.limited["provoked"] += 1
            return self.respond(429, error.body, {**headers, **error.headers}), False
        except ApiError as error:
            await drain(request)
            return self.respond(error.status, error.body, headers), False
        return self.respond(status, body, headers), True

    def respond(self, status: int, body: object, headers: dict[str, str]) -> Response:
        always = {"Via": "1.1 google", "Date": formatdate(self.store.clock.wall(), usegmt=True)}
        if body is None:
            return Response(status_code=status, headers={**always, **headers})
        return JSONResponse(body, status_code=status, headers={**always, **headers})

    def _authorise(self, request: Request, name: str) -> None:
        agent = request.headers.get("user-agent", "")
        if not agent or agent.startswith("Mozilla/"):
            raise ApiError(403, 40333, "internal network error")
        if name == "webhook":
            return  # the token in the path is checked where the webhook is looked up
        given = request.headers.get("authorization", "")
        for token, user_id in self.store.bots().items():
            if secrets.compare_digest(given.encode(), f"Bot {token}".encode()):
                self.view.look_as(user_id)
                return
        raise ApiError(401, 0, "401: Unauthorized")

    def _limit(self, request: Request, name: str) -> dict[str, str]:
        if not self.settings.rate_limits:
            return {}
        params = request.path_params
        major = params.get("channel") or params.get("guild") or params.get("webhook") or ""
        clock = self.store.clock
        message = params.get("message")
        if (
            message is not None
            and name == "delete_message"
            and not self.store.row("SELECT 1 FROM messages WHERE id=?", min(message, 2**63 - 1))
        ):
            message = None
        verdict = self.limits.take(
            name, str(major), now=clock.monotonic(), wall=clock.wall(), message_id=message
        )
        if verdict.retry_after is None:
            return verdict.headers
        error = TooMany(verdict.retry_after, verdict.scope, verdict.code)
        error.headers = {**verdict.headers, **error.headers}
        raise error

    def _count_refusal(self, address: str, response: Response) -> None:
        self.bans.count(
            address,
            response.status_code,
            response.headers.get("x-ratelimit-scope", ""),
            now=self.store.clock.monotonic(),
            after=self.settings.ban_after,
            window_s=self.settings.ban_window_s,
            ban_s=self.settings.ban_s,
        )

    # Connections

    def reset_connection(self, peer: tuple[str, int]) -> None:
        """End it by a reset: what is under way in either direction is lost."""
        transport = self.transports.get(peer)
        if transport is not None:
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_BY_RESET)
            transport.abort()

    async def pace(self, size: int) -> None:
        if self.settings.bandwidth:
            await asyncio.sleep(size / self.settings.bandwidth)

    def stats(self) -> dict[str, Any]:
        value = self.store.value
        return {
            "messages": value("SELECT count(*) FROM messages"),
            "attachments": value("SELECT count(*) FROM attachments"),
            "attachment_bytes": value("SELECT coalesce(sum(size), 0) FROM attachments"),
            "created": self.messages.created,
            "acknowledged_bytes": self.messages.acknowledged_bytes,
            "requests": self.requests.total(),
            "requests_by_route": dict(self.requests),
            "rate_limited": {
                "provoked": self.limited["provoked"],
                "injected": self.limited["injected"],
            },
            "invalid": self.bans.invalid,
            "banned_answers": self.bans.banned_answers,
            "cdn_requests": self.cdn.requests,
            "cdn_bytes": self.cdn.sent_bytes,
        }
