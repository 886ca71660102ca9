"""The server: one answer from request to headers, the admin routes, and `run`."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import signal
import socket
import sys
from collections import Counter
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from stashcordfs.sandbox.admin import Admin
from stashcordfs.sandbox.api import Answer, Api
from stashcordfs.sandbox.cdn import Cdn
from stashcordfs.sandbox.errors import ApiError
from stashcordfs.sandbox.faults import Faults
from stashcordfs.sandbox.forms import drain
from stashcordfs.sandbox.limits import Limits
from stashcordfs.sandbox.messages import Messages
from stashcordfs.sandbox.store import Store
from stashcordfs.sandbox.view import View

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from stashcordfs.sandbox.settings import SandboxSettings

_BASE = "/api/v{version:int}"
_CHANNEL = "/channels/{channel:int}"
_MESSAGE = _CHANNEL + "/messages/{message:int}"
_HOOK = "/webhooks/{webhook:int}/{token}"


class TooMany(ApiError):
    """A 429 that a limit inside a route calls for."""

    def __init__(self, retry_after: float, scope: str, code: int | None) -> None:
        extra: dict[str, Any] = {"retry_after": round(retry_after, 3), "global": scope == "global"}
        super().__init__(429, code or 0, "You are being rate limited.", extra=extra)
        if code is None:
            del self.body["code"]
        self.headers = {
            "Retry-After": str(max(1, math.ceil(retry_after))),
            "X-RateLimit-Scope": scope,
        }
        if scope == "global":
            self.headers["X-RateLimit-Global"] = "true"


class Sandbox:
    """All of one server; `app` is its ASGI application."""

    too_many = staticmethod(
        lambda retry_after, *, scope="user", code=None: TooMany(retry_after, scope, code)
    )

    def __init__(self, settings: SandboxSettings, *, port: int) -> None:
        self.settings = settings
        self.store = Store(settings.dir)
        self.limits = Limits()
        self.faults = Faults()
        self.view = View(self.store, f"http://{settings.host}:{port}")
        self.messages = Messages(self.store, self.faults, settings)
        self.cdn = Cdn(self)
        self.requests: Counter[str] = Counter()
        self.limited: Counter[str] = Counter()
        self.transports: dict[tuple[str, int], asyncio.Transport] = {}
        self.change(settings)
        self.app = Starlette(routes=self._routes())

    def change(self, settings: SandboxSettings) -> None:
        self.settings = self.view.settings = self.messages.settings = settings

    def _routes(self) -> list[Route]:
        api, admin = Api(self), Admin(self)
        table: list[tuple[str, str, str, Callable[[Request], Awaitable[Answer]]]] = [
            ("GET", "/users/@me", "me", api.me),
            ("GET", "/oauth2/applications/@me", "application", api.application),
            ("GET", "/gateway/bot", "gateway_bot", api.gateway_bot),
            ("GET", "/guilds/{guild:int}", "guild", api.guild),
            ("GET", _CHANNEL, "channel", api.channel),
            ("PATCH", _CHANNEL, "update_channel", api.update_channel),
            ("GET", _CHANNEL + "/pins", "get_pins", api.get_pins_deprecated),
            ("PUT", _CHANNEL + "/pins/{message:int}", "pin", api.pin),
            ("DELETE", _CHANNEL + "/pins/{message:int}", "unpin", api.unpin),
            ("GET", _CHANNEL + "/messages/pins", "get_pins", api.get_pins),
            ("PUT", _CHANNEL + "/messages/pins/{message:int}", "pin", api.pin),
            ("DELETE", _CHANNEL + "/messages/pins/{message:int}", "unpin", api.unpin),
            ("POST", _CHANNEL + "/messages/bulk-delete", "bulk_delete", api.bulk_delete),
            ("POST", _CHANNEL + "/messages", "create_message", api.create_message),
            ("GET", _CHANNEL + "/messages", "list_messages", api.list_messages),
            ("GET", _MESSAGE, "get_message", api.get_message),
            ("PATCH", _MESSAGE, "edit_message", api.edit_message),
            ("DELETE", _MESSAGE, "delete_message", api.delete_message),
            ("POST", _CHANNEL + "/webhooks", "create_webhook", api.create_webhook),
            ("GET", _CHANNEL + "/webhooks", "list_webhooks", api.list_webhooks),
            ("GET", "/webhooks/{webhook:int}", "get_webhook", api.get_webhook),
            ("DELETE", "/webhooks/{webhook:int}", "delete_webhook", api.delete_webhook),
            ("GET", _HOOK, "webhook", api.get_webhook),
            ("DELETE", _HOOK, "webhook", api.delete_webhook),
            ("POST", _HOOK, "webhook", api.execute_webhook),
            ("GET", _HOOK + "/messages/{message:int}", "webhook", api.get_webhook_message),
            ("PATCH", _HOOK + "/messages/{message:int}", "webhook", api.edit_webhook_message),
            ("DELETE", _HOOK + "/messages/{message:int}", "webhook", api.delete_webhook_message),
            ("POST", "/attachments/refresh-urls", "refresh_urls", api.refresh_urls),
        ]
        routes = [
            Route(_BASE + path, self._endpoint(name, handler), methods=[method])
            for method, path, name, handler in table
        ]
        file = "/attachments/{channel:int}/{attachment:int}/{filename}"
        return [
            *routes,
            Route(file, self.cdn.get, methods=["GET"]),  # and HEAD
            Route("/media" + file, self.cdn.media, methods=["GET"]),
            *admin.routes(),
            Route("/{rest:path}", self._unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        ]

    def _endpoint(
        self, name: str, handler: Callable[[Request], Awaitable[Answer]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            self.requests[name] += 1
            if self.settings.latency_s:
                await asyncio.sleep(self.settings.latency_s)
            return await self._answer(request, name, handler)

        return endpoint

    async def _unknown(self, request: Request) -> Response:
        await drain(request)
        return self._respond(404, {"message": "404: Not Found", "code": 0}, {})

    # One answer

    async def _answer(
        self, request: Request, name: str, handler: Callable[[Request], Awaitable[Answer]]
    ) -> Response:
        headers: dict[str, str] = {}
        try:
            early = await self._fault_before(request, name)
            if early is not None:
                return early
            self._authorise(request, name)
            headers = self._limit(request, name)
            status, body = await handler(request)
        except TooMany as error:
            await drain(request)
            self.limited["provoked"] += 1
            return self._respond(429, error.body, {**headers, **error.headers})
        except ApiError as error:
            await drain(request)
            return self._respond(error.status, error.body, headers)
        return await self._fault_after(request, name, self._respond(status, body, headers))

    def _respond(self, status: int, body: object, headers: dict[str, str]) -> Response:
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

    # Faults

    async def _fault_before(self, request: Request, name: str) -> Response | None:
        if rule := self.faults.take(name, "delay"):
            await asyncio.sleep(float(rule.get("seconds", 1.0)))
        if rule := self.faults.take(name, "early"):
            body = {"message": "early", "code": int(rule.get("code", 0))}
            return self._respond(int(rule.get("status", 401)), body, {"Connection": "close"})
        if rule := self.faults.take(name, "status"):
            await drain(request)
            return Response(
                "<html><body>error</body></html>",
                status_code=int(rule.get("status", 502)),
                media_type="text/html",
            )
        if self.faults.take(name, "reset"):
            self.hang_up(request)
            return Response()
        return await self._fault_429(request, name)

    async def _fault_429(self, request: Request, name: str) -> Response | None:
        if rule := self.faults.take(name, "rate_limit"):
            await drain(request)
            self.limited["injected"] += 1
            scope, after = str(rule.get("scope", "user")), float(rule.get("retry_after", 1.0))
            error = TooMany(after, scope, rule.get("code"))
            more = {"X-RateLimit-Remaining": "3", "X-RateLimit-Limit": "5"}
            more |= {"X-RateLimit-Bucket": name, "X-RateLimit-Reset-After": f"{after:.3f}"}
            headers = {**(more if scope == "shared" else {}), **error.headers}
            return self._respond(429, error.body, headers)
        if rule := self.faults.take(name, "cloudflare"):
            await drain(request)
            self.limited["injected"] += 1
            if rule.get("json"):
                text = "You are being blocked from accessing our API temporarily"
                return JSONResponse({"message": text, "code": 0}, status_code=429)
            return Response("error code: 1015", status_code=429, media_type="text/html")
        return None

    async def _fault_after(self, request: Request, name: str, response: Response) -> Response:
        if rule := self.faults.take(name, "lost_answer"):
            status = int(rule.get("status", 504))
            await asyncio.sleep(float(rule.get("seconds", 0)))
            if status == 0:
                self.hang_up(request)
            return Response(status_code=status or 500, media_type="text/html")
        if rule := self.faults.take(name, "late"):
            await asyncio.sleep(float(rule.get("seconds", 1.0)))
        if self.faults.take(name, "new_bucket"):
            self.limits.generation += 1
        if rule := self.faults.take(name, "skew"):
            reset = float(response.headers.get("x-ratelimit-reset", self.store.clock.wall()))
            response.headers["X-RateLimit-Reset"] = f"{reset + float(rule.get('seconds', 40)):.3f}"
        if self.faults.take(name, "no_headers"):
            for key in [key for key in response.headers if key.startswith("x-ratelimit-")]:
                del response.headers[key]
        return response

    def hang_up(self, request: Request) -> None:
        """Reset the connection, as far as the client sees."""
        if request.client is not None:
            transport = self.transports.get((request.client.host, request.client.port))
            if transport is not None:
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
            "cdn_requests": self.cdn.requests,
            "cdn_bytes": self.cdn.sent_bytes,
        }


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
