"""Routes under /_sandbox for tests: counts, clock, faults, switches, damage. No credential."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stashcordfs.sandbox.settings import CHANGEABLE
from stashcordfs.sandbox.store import Draft, NewAttachment, Upload, new_token

if TYPE_CHECKING:
    from starlette.requests import Request

    from stashcordfs.sandbox.app import Sandbox


_OCTETS = "application/octet-stream"


class Admin:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def routes(self) -> list[Route]:
        return [
            Route("/_sandbox/stats", self.stats, methods=["GET"]),
            Route("/_sandbox/clock", self.clock, methods=["POST"]),
            Route("/_sandbox/faults", self.faults, methods=["GET", "POST"]),
            Route("/_sandbox/settings", self.settings, methods=["POST"]),
            Route("/_sandbox/token", self.token, methods=["POST"]),
            Route("/_sandbox/bots", self.bot, methods=["POST"]),
            Route("/_sandbox/messages", self.message, methods=["POST"]),
            Route("/_sandbox/attachments/{attachment:int}", self.attachment, methods=["POST"]),
        ]

    async def stats(self, request: Request) -> Response:
        del request
        return JSONResponse(self._sandbox.stats())

    async def clock(self, request: Request) -> Response:
        """{"advance_s": seconds}: the server's time goes on by that much, and stays so."""
        advance = float((await request.json())["advance_s"])
        if advance < 0:
            return _bad("the clock goes forward only")
        store = self._sandbox.store
        store.clock.offset += advance
        store.state["clock_offset"] = store.clock.offset
        store.save_state()
        return JSONResponse({"now": store.clock.wall()})

    async def faults(self, request: Request) -> Response:
        """POST {"rules": [...], "seed": 0} replaces all rules; see faults.py for the kinds."""
        faults = self._sandbox.faults
        if request.method == "POST":
            try:
                about = await request.json()
                rules = about["rules"]
                for rule in rules:
                    _check_settings(rule.get("set", {}))
                faults.replace(rules, seed=int(about.get("seed", 0)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                return _bad(str(error))
        return JSONResponse({"rules": faults.shown()})

    async def settings(self, request: Request) -> Response:
        changes: dict[str, Any] = await request.json()
        try:
            _check_settings(changes)
        except ValueError as error:
            return _bad(str(error))
        self._sandbox.change_some(changes)
        return JSONResponse(changes)

    async def token(self, request: Request) -> Response:
        """{"token": a given one, or none}: another from now on, the old one is refused."""
        store = self._sandbox.store
        given = (await request.json()).get("token")
        store.state["token"] = given or new_token(store.state["user_id"])
        store.save_state()
        return JSONResponse({"token": store.state["token"]})

    async def bot(self, request: Request) -> Response:
        """One more bot in the guild; by its token it is another author, and another reader."""
        del request
        token, user_id = self._sandbox.store.add_bot()
        return JSONResponse({"token": token, "user_id": str(user_id)})

    async def message(self, request: Request) -> Response:
        """A message of somebody else, or of the system; `filename` and `size` give it a file.

        {"channel_id", "author_id", "type", "content", "filename", "size"}; the first is needed.
        """
        about: dict[str, Any] = await request.json()
        store = self._sandbox.store
        draft = Draft(
            int(about["channel_id"]),
            int(about.get("author_id", store.ids.next())),
            "somebody",
            type=int(about.get("type", 0)),
            content=str(about.get("content", "hello")),
        )
        files = []
        if "filename" in about:
            path, size = store.incoming / secrets.token_hex(12), int(about.get("size", 1000))
            path.write_bytes(secrets.token_bytes(size))
            name = str(about["filename"])
            files.append(NewAttachment(Upload(path, "0", name, size, _OCTETS), name, None, None))
        return JSONResponse({"id": str(store.add_message(draft, files))})

    async def attachment(self, request: Request) -> Response:
        """Damage one: {"action": "corrupt", "offset"} | {"action": "truncate", "size"} | delete."""
        about: dict[str, Any] = await request.json()
        path = self._sandbox.store.files / str(request.path_params["attachment"])
        if not path.exists():
            return JSONResponse({"message": "no such attachment"}, status_code=404)
        match about.get("action"):
            case "delete":
                path.unlink()
            case "truncate":
                with path.open("r+b") as file:
                    file.truncate(int(about.get("size", 0)))
            case "corrupt":
                with path.open("r+b") as file:
                    file.seek(int(about.get("offset", path.stat().st_size // 2)))
                    byte = file.read(1)
                    file.seek(-1, 1)
                    file.write(bytes([byte[0] ^ 0xFF]))
            case _:
                return _bad("action must be corrupt, truncate or delete")
        return JSONResponse({})


def _bad(message: str) -> Response:
    return JSONResponse({"message": message}, status_code=400)


def _check_settings(changes: dict[str, Any]) -> None:
    if strange := changes.keys() - CHANGEABLE:
        raise ValueError(f"not settings that can change: {', '.join(sorted(strange))}")
