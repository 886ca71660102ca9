"""The routes of the API: method, path, the name that limits and faults know, and who answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stashcordfs.sandbox.api import Answer, Api

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    Handler = Callable[[Api, Request], Awaitable[Answer]]

BASE = "/api/v{version:int}"
FILE = "/attachments/{channel:int}/{attachment:int}/{filename}"
_CHANNEL = "/channels/{channel:int}"
_MESSAGE = _CHANNEL + "/messages/{message:int}"
_HOOK = "/webhooks/{webhook:int}/{token}"

ROUTES: list[tuple[str, str, str, Handler]] = [
    ("GET", "/users/@me", "me", Api.me),
    ("GET", "/oauth2/applications/@me", "application", Api.application),
    ("GET", "/gateway/bot", "gateway_bot", Api.gateway_bot),
    ("GET", "/guilds/{guild:int}", "guild", Api.guild),
    ("GET", _CHANNEL, "channel", Api.channel),
    ("PATCH", _CHANNEL, "update_channel", Api.update_channel),
    ("GET", _CHANNEL + "/pins", "get_pins", Api.get_pins_deprecated),
    ("PUT", _CHANNEL + "/pins/{message:int}", "pin", Api.pin),
    ("DELETE", _CHANNEL + "/pins/{message:int}", "unpin", Api.unpin),
    ("GET", _CHANNEL + "/messages/pins", "get_pins", Api.get_pins),
    ("PUT", _CHANNEL + "/messages/pins/{message:int}", "pin", Api.pin),
    ("DELETE", _CHANNEL + "/messages/pins/{message:int}", "unpin", Api.unpin),
    ("POST", _CHANNEL + "/messages/bulk-delete", "bulk_delete", Api.bulk_delete),
    ("POST", _CHANNEL + "/messages", "create_message", Api.create_message),
    ("GET", _CHANNEL + "/messages", "list_messages", Api.list_messages),
    ("GET", _MESSAGE, "get_message", Api.get_message),
    ("PATCH", _MESSAGE, "edit_message", Api.edit_message),
    ("DELETE", _MESSAGE, "delete_message", Api.delete_message),
    ("POST", _CHANNEL + "/webhooks", "create_webhook", Api.create_webhook),
    ("GET", _CHANNEL + "/webhooks", "list_webhooks", Api.list_webhooks),
    ("GET", "/webhooks/{webhook:int}", "get_webhook", Api.get_webhook),
    ("DELETE", "/webhooks/{webhook:int}", "delete_webhook", Api.delete_webhook),
    ("GET", _HOOK, "webhook", Api.get_webhook),
    ("DELETE", _HOOK, "webhook", Api.delete_webhook),
    ("POST", _HOOK, "webhook", Api.execute_webhook),
    ("GET", _HOOK + "/messages/{message:int}", "webhook", Api.get_webhook_message),
    ("PATCH", _HOOK + "/messages/{message:int}", "webhook", Api.edit_webhook_message),
    ("DELETE", _HOOK + "/messages/{message:int}", "webhook", Api.delete_webhook_message),
    ("POST", "/attachments/refresh-urls", "refresh_urls", Api.refresh_urls),
]
NAMES = frozenset(name for _, _, name, _ in ROUTES)
