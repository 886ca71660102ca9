"""The routes under /api/v10: what each takes and gives. Auth and limits are app.py's."""

from __future__ import annotations

import math
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from stashcordfs.sandbox.errors import ApiError, TooMany, form_error, unknown
from stashcordfs.sandbox.forms import Form, read_form
from stashcordfs.sandbox.ids import iso
from stashcordfs.sandbox.store import Draft

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from starlette.requests import Request

    from stashcordfs.sandbox.app import Sandbox

Answer = tuple[int, Any]
_PINS = 250
_END = 2**63 - 1  # beyond every id


class Api:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._store = sandbox.store
        self._view = sandbox.view
        self._messages = sandbox.messages

    async def form(self, request: Request) -> Form:
        settings = self._sandbox.settings
        return await read_form(
            request,
            self._store.incoming,
            request_bytes=settings.request_bytes,
            file_bytes=settings.file_bytes,
        )

    def _me(self) -> int:
        return self._view.viewer()

    def _channel(self, request: Request) -> int:
        channel = int(request.path_params["channel"])
        if channel not in self._store.state["channel_ids"]:
            raise unknown("Channel", 10003)
        return channel

    def _message(self, request: Request) -> sqlite3.Row:
        return self._messages.get(self._channel(request), int(request.path_params["message"]))

    # Objects

    async def me(self, request: Request) -> Answer:
        del request
        return 200, self._view.me()

    async def application(self, request: Request) -> Answer:
        del request
        return 200, self._view.application()

    async def gateway_bot(self, request: Request) -> Answer:
        del request
        limit = {"total": 1000, "remaining": 1000, "reset_after": 0, "max_concurrency": 1}
        return 200, {
            "url": "wss://gateway.invalid",
            "shards": 1,
            "session_start_limit": limit,
        }

    async def guild(self, request: Request) -> Answer:
        if int(request.path_params["guild"]) != self._store.state["guild_id"]:
            raise unknown("Guild", 10004)
        return 200, self._view.guild()

    async def channel(self, request: Request) -> Answer:
        return 200, self._view.channel(self._channel(request))

    async def update_channel(self, request: Request) -> Answer:
        """Name and topic; other fields are taken and left alone."""
        payload = (await self.form(request)).payload
        channel = self._channel(request)
        changes: dict[str, Any] = {k: payload[k] for k in ("name", "topic") if k in payload}
        for key, low, high in (("name", 1, 100), ("topic", 0, 1024)):
            value = changes.get(key, "x")
            if value is None and key == "topic":
                continue
            if not isinstance(value, str) or not low <= len(value) <= high:
                text = f"Must be between {low} and {high} in length."
                raise form_error(key, "BASE_TYPE_BAD_LENGTH", text)
        if changes:
            self._hidden(self._sandbox.limits.channel_update, channel, scope="user")
            self._store.change_channel(channel, changes)
        return 200, self._view.channel(channel)

    def _hidden(
        self, limit: Callable[[str, float], float | None], channel: int, *, scope: str
    ) -> None:
        """A limit that no header shows, and that only some calls of a route draw on."""
        if not self._sandbox.settings.rate_limits:
            return
        wait = limit(str(channel), self._store.clock.monotonic())
        if wait is not None:
            raise TooMany(wait, scope)

    # Messages

    async def create_message(self, request: Request) -> Answer:
        form = await self.form(request)
        try:
            channel = self._channel(request)
            if not self._sandbox.settings.send_messages:
                raise ApiError(403, 50013, "Missing Permissions")
            row = self._messages.create(Draft(channel, self._me(), "sandbox"), form)
        finally:
            form.discard()
        shown = self._view.message(row)
        if form.payload.get("nonce") is not None:
            shown["nonce"] = form.payload["nonce"]  # here only, it is not stored
        if self._sandbox.faults.take("create_message", "moderated"):
            self._messages.delete(channel, int(row["id"]))
        return 200, shown

    async def get_message(self, request: Request) -> Answer:
        row = self._message(request)
        horizon = self._horizon("get_message", int(row["channel_id"]), int(row["id"]))
        if row["id"] >= horizon:
            raise unknown("Message", 10008)
        if not self._sandbox.settings.read_history:
            raise ApiError(403, 50013, "Missing Permissions")
        return 200, self._view.message(row, foreign=self._foreign("get_message"))

    async def list_messages(self, request: Request) -> Answer:
        channel = self._channel(request)
        query = request.query_params
        limit = _limit(query.get("limit", "50"), 100)
        at = {
            key: _snowflake(key, query[key])
            for key in ("before", "after", "around")
            if key in query
        }
        if self._blind("list_messages"):
            return 200, []
        end = self._horizon("list_messages", channel)
        if "around" in at:
            half, middle = limit // 2, at["around"]
            rows = self._store.page(channel, before=end, after=middle, limit=half)
            rows += self._store.page(
                channel, before=min(end, middle + 1), after=None, limit=limit - half
            )
        else:
            before = end if "after" in at else min(end, at.get("before", end))
            rows = self._store.page(channel, before=before, after=at.get("after"), limit=limit)
        foreign = self._foreign("list_messages")
        return 200, [self._view.message(row, foreign=foreign) for row in rows]

    def _foreign(self, route: str) -> bool:
        """Whether messages are shown as another bot's, by a fault."""
        return self._sandbox.faults.take(route, "foreign") is not None

    def _blind(self, route: str) -> bool:
        """Whether lists are empty: the right to read the history is missing."""
        if not self._sandbox.settings.read_history:
            return True
        return self._sandbox.faults.take(route, "no_history") is not None

    def _horizon(self, route: str, channel: int, message: int | None = None) -> int:
        """The id from which on messages are not there yet, by a fault that hides some."""

        def first_hidden(fields: dict[str, Any]) -> int:
            if fields["younger_s"] is not None:
                return self._store.ids.at(self._store.clock.wall() - float(fields["younger_s"]))
            newest = self._store.page(channel, before=None, after=None, limit=fields["newest"])
            return int(newest[-1]["id"]) if newest else _END

        def hides(fields: dict[str, Any]) -> bool:
            last = self._store.page(channel, before=None, after=None, limit=1)
            return bool(last) and (message or last[0]["id"]) >= first_hidden(fields)

        rule = self._sandbox.faults.take(route, "hide", applies=hides)
        return _END if rule is None else first_hidden(rule)

    async def edit_message(self, request: Request) -> Answer:
        form = await self.form(request)
        try:
            row = self._messages.edit(self._message(request), form, author_id=self._me())
        finally:
            form.discard()
        return 200, self._view.message(row)

    async def delete_message(self, request: Request) -> Answer:
        self._messages.delete(self._channel(request), int(request.path_params["message"]))
        return 204, None

    async def bulk_delete(self, request: Request) -> Answer:
        form = await self.form(request)
        self._messages.bulk_delete(self._channel(request), form.payload)
        return 204, None

    # Pins

    async def get_pins(self, request: Request) -> Answer:
        channel = self._channel(request)
        query = request.query_params
        limit = _limit(query.get("limit", "50"), 50)
        try:
            before = datetime.fromisoformat(query["before"]).timestamp() if "before" in query else 0
        except ValueError:
            raise form_error("before", "DATE_TIME_TYPE_PARSE", "Not a time.") from None
        rows = self._pins(channel, limit + 1, before=before or None)
        items = [
            {"pinned_at": iso(row["pinned"]), "message": self._view.message(row)}
            for row in rows[:limit]
        ]
        return 200, {"items": items, "has_more": len(rows) > limit}

    async def get_pins_deprecated(self, request: Request) -> Answer:
        rows = self._pins(self._channel(request), 50)
        return 200, [self._view.message(row) for row in rows]

    def _pins(self, channel: int, limit: int, *, before: float | None = None) -> list[sqlite3.Row]:
        if self._blind("get_pins"):
            return []
        return self._store.rows(
            "SELECT * FROM messages WHERE channel_id=? AND pinned < ? ORDER BY pinned DESC LIMIT ?",
            channel,
            math.inf if before is None else before,
            limit,
        )

    async def pin(self, request: Request) -> Answer:
        row = self._message(request)
        if row["pinned"] is not None:
            return 204, None
        channel = int(row["channel_id"])
        pinned = self._store.value(
            "SELECT count(*) FROM messages WHERE channel_id=? AND pinned IS NOT NULL", channel
        )
        if pinned >= _PINS:
            raise ApiError(400, 30003, f"Maximum number of pins reached ({_PINS})")
        self._pinned(row, round(self._store.clock.wall(), 6))  # as fine as it is shown
        self._store.add_message(Draft(channel, self._me(), "sandbox", type=6), [])
        return 204, None

    async def unpin(self, request: Request) -> Answer:
        self._pinned(self._message(request), None)
        return 204, None

    def _pinned(self, row: sqlite3.Row, at: float | None) -> None:
        self._store.run("UPDATE messages SET pinned=? WHERE id=?", at, row["id"])

    # Webhooks

    async def create_webhook(self, request: Request) -> Answer:
        channel = self._channel(request)
        name = (await self.form(request)).payload.get("name")
        if not isinstance(name, str) or not 1 <= len(name) <= 80:
            raise form_error("name", "BASE_TYPE_BAD_LENGTH", "Must be between 1 and 80 in length.")
        if "clyde" in name.lower() or "discord" in name.lower():
            raise form_error("name", "BASE_TYPE_BAD", "The name is not allowed.")
        if self._store.value("SELECT count(*) FROM webhooks WHERE channel_id=?", channel) >= 15:
            raise ApiError(400, 30007, "Maximum number of webhooks reached (15)")
        webhook = self._store.ids.next()
        token = self._view.signature(str(webhook), "webhook", "token")
        self._store.run("INSERT INTO webhooks VALUES(?,?,?,?)", webhook, channel, token, name)
        return 200, self._view.webhook(self.webhook_row(webhook))

    def webhook_row(self, webhook: int, token: str | None = None) -> sqlite3.Row:
        row = self._store.row("SELECT * FROM webhooks WHERE id=?", min(webhook, 2**63 - 1))
        if row is None:
            raise unknown("Webhook", 10015)
        if token is not None and row["token"] != token:
            raise ApiError(401, 50027, "Invalid Webhook Token")
        return row

    def _webhook(self, request: Request) -> sqlite3.Row:
        params = request.path_params
        return self.webhook_row(int(params["webhook"]), params.get("token"))

    async def list_webhooks(self, request: Request) -> Answer:
        rows = self._store.rows("SELECT * FROM webhooks WHERE channel_id=?", self._channel(request))
        return 200, [self._view.webhook(row) for row in rows]

    async def get_webhook(self, request: Request) -> Answer:
        return 200, self._view.webhook(self._webhook(request))

    async def delete_webhook(self, request: Request) -> Answer:
        self._store.run("DELETE FROM webhooks WHERE id=?", self._webhook(request)["id"])
        return 204, None

    async def execute_webhook(self, request: Request) -> Answer:
        form = await self.form(request)
        try:
            hook = self._webhook(request)
            limit = self._sandbox.limits.webhook_channel
            self._hidden(limit, int(hook["channel_id"]), scope="shared")
            name = str(form.payload.get("username") or hook["name"])
            draft = Draft(hook["channel_id"], hook["id"], name, webhook_id=hook["id"])
            row = self._messages.create(draft, form, route="execute_webhook")
        finally:
            form.discard()
        if request.query_params.get("wait", "").lower() not in {"true", "1"}:
            return 204, None
        return 200, self._view.message(row, full=True)

    def _webhook_message(self, request: Request) -> sqlite3.Row:
        hook = self._webhook(request)
        row = self._messages.get(hook["channel_id"], int(request.path_params["message"]))
        if row["webhook_id"] != hook["id"]:
            raise unknown("Message", 10008)
        return row

    async def get_webhook_message(self, request: Request) -> Answer:
        return 200, self._view.message(self._webhook_message(request), full=True)

    async def edit_webhook_message(self, request: Request) -> Answer:
        form = await self.form(request)
        try:
            row = self._webhook_message(request)
            row = self._messages.edit(row, form, author_id=row["author_id"])
        finally:
            form.discard()
        return 200, self._view.message(row, full=True)

    async def delete_webhook_message(self, request: Request) -> Answer:
        row = self._webhook_message(request)
        self._messages.delete(row["channel_id"], row["id"])
        return 204, None

    # Links

    async def refresh_urls(self, request: Request) -> Answer:
        urls = (await self.form(request)).payload.get("attachment_urls")
        if not isinstance(urls, list) or not 1 <= len(urls) <= 50:
            raise form_error(
                "attachment_urls", "BASE_TYPE_BAD_LENGTH", "Must be between 1 and 50 in length."
            )
        lifetime = self._sandbox.settings.link_lifetime_s
        return 200, {
            "refreshed_urls": [
                {
                    "original": str(url),
                    "refreshed": self._view.link(urlsplit(str(url)).path, lifetime),
                }
                for url in urls
            ]
        }


def _limit(text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        message = f"int value should be between 1 and {most}."
        raise form_error("limit", "NUMBER_TYPE_MAX", message)
    return int(text)


def _snowflake(name: str, text: str) -> int:
    if not text.isdecimal():
        raise form_error(name, "NUMBER_TYPE_COERCE", f'Value "{text}" is not snowflake.')
    return int(text)
