"""The sandbox within the test's own loop: no socket, so that a virtual clock drives both sides."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx

from stashcordfs.discord.client import DiscordClient
from stashcordfs.sandbox.app import Sandbox
from stashcordfs.sandbox.settings import SandboxSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from typing import Any


class Server:
    """A server in this process. `cut` is a network that is not there."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.sandbox = Sandbox(SandboxSettings(dir=folder, **settings), port=1)
        self.api_url = f"{self.sandbox.view.base_url}/api/v10"
        self.channel = int(self.sandbox.store.state["channel_ids"][0])
        self.cut = False
        self.asked: list[str] = []
        self._app = httpx.ASGITransport(self.sandbox.app)

    @property
    def token(self) -> str:
        return str(self.sandbox.store.state["token"])

    @token.setter
    def token(self, value: str) -> None:
        self.sandbox.store.state["token"] = value

    def faults(self, *rules: dict[str, Any]) -> None:
        self.sandbox.faults.replace(list(rules), seed=1)

    async def _serve(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(f"{request.method} {request.url.path}")
        if self.cut:
            raise httpx.ConnectError("no network")
        return await self._app.handle_async_request(request)

    @asynccontextmanager
    async def client(self, **more: Any) -> AsyncIterator[DiscordClient]:
        transport = httpx.MockTransport(self._serve)
        options = {"token": lambda: self.token, **more}
        async with DiscordClient(api_url=self.api_url, transport=transport, **options) as client:
            yield client
