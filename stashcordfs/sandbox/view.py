"""Objects as the API shows them. Absent fields are left out unless the API says null."""

from __future__ import annotations

import hashlib
import hmac
import json
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from stashcordfs.sandbox.ids import iso, time_of

if TYPE_CHECKING:
    import sqlite3

    from stashcordfs.sandbox.settings import SandboxSettings
    from stashcordfs.sandbox.store import Store

PERMISSIONS = str((1 << 53) - 1)
_GUILD_NULLS = (
    "icon",
    "description",
    "home_header",
    "splash",
    "discovery_splash",
    "banner",
    "application_id",
    "afk_channel_id",
    "system_channel_id",
    "widget_channel_id",
    "rules_channel_id",
    "safety_alerts_channel_id",
    "public_updates_channel_id",
    "vanity_url_code",
    "max_presences",
)
_GUILD_ZEROS = (
    "system_channel_flags",
    "default_message_notifications",
    "mfa_level",
    "verification_level",
    "explicit_content_filter",
    "premium_subscription_count",
    "nsfw_level",
)


class View:
    """Rendering for one server: it knows its address, its secret and who asks."""

    def __init__(self, store: Store, base_url: str) -> None:
        self._store = store
        self.base_url = base_url
        self.settings: SandboxSettings | None = None
        self._dead: dict[str, int] = {}  # path -> links issued until then are not served
        self._viewer: ContextVar[int | None] = ContextVar("viewer", default=None)

    # Who asks: set for the task that answers one request

    def look_as(self, user_id: int) -> None:
        self._viewer.set(user_id)

    def viewer(self) -> int:
        return self._viewer.get() or int(self._store.state["user_id"])

    # Links

    def signature(self, path: str, expires: str, issued: str) -> str:
        key = bytes.fromhex(self._store.state["secret"])
        return hmac.new(key, f"{path}?{expires}&{issued}".encode(), hashlib.sha256).hexdigest()

    def link(self, path: str, lifetime_s: int) -> str:
        now = max(int(self._store.clock.wall()), self._dead.get(path, 0) + 1)
        expires, issued = f"{now + lifetime_s:x}", f"{now:x}"
        signature = self.signature(path, expires, issued)
        return f"{self.base_url}{path}?ex={expires}&is={issued}&hm={signature}&"

    def expire_links(self, path: str, issued: str) -> None:
        """What was issued until then is dead; a new link lives."""
        self._dead[path] = int(issued, 16)

    def link_lives(self, path: str, expires: str, issued: str, signature: str) -> bool:
        right = self.signature(path, expires, issued)
        if not hmac.compare_digest(right.encode(), signature.encode()):
            return False
        if int(issued, 16) <= self._dead.get(path, -1):
            return False
        return int(expires, 16) > self._store.clock.wall()

    # Objects

    def user(self, user_id: int, name: str, *, bot: bool = True) -> dict[str, Any]:
        return {
            "id": str(user_id),
            "username": name,
            "avatar": None,
            "discriminator": "0000",
            "public_flags": 0,
            "flags": 0,
            "bot": bot,
            "global_name": None,
            "primary_guild": None,
        }

    def me(self) -> dict[str, Any]:
        return {
            **self.user(self.viewer(), "sandbox"),
            "mfa_enabled": True,
            "locale": "en-US",
            "verified": True,
            "email": None,
        }

    def application(self) -> dict[str, Any]:
        me = self._store.state["user_id"]
        return {
            "id": str(me),
            "name": "sandbox",
            "icon": None,
            "description": "",
            "summary": "",
            "type": None,
            "bot_public": False,
            "bot_require_code_grant": False,
            "verify_key": "0" * 64,
            "flags": 0,
            "owner": self.user(me, "sandbox"),
            "team": None,
        }

    def channel(self, channel_id: int) -> dict[str, Any]:
        number = self._store.state["channel_ids"].index(channel_id)
        last = self._store.value(
            "SELECT coalesce(max(id), 0) FROM messages WHERE channel_id=?", channel_id
        )
        return {
            "id": str(channel_id),
            "type": 0,
            "guild_id": str(self._store.state["guild_id"]),
            "name": f"stash-{number + 1}",
            "position": number,
            "flags": 0,
            "parent_id": None,
            "topic": None,
            "nsfw": False,
            "rate_limit_per_user": 0,
            "permission_overwrites": [],
            **self._store.channel(channel_id),
            "last_message_id": str(last) if last else None,
        }

    def guild(self) -> dict[str, Any]:
        assert self.settings is not None
        guild = str(self._store.state["guild_id"])
        role = {
            "id": guild,
            "name": "@everyone",
            "description": None,
            "permissions": PERMISSIONS,
            "position": 0,
            "color": 0,
            "colors": {"primary_color": 0, "secondary_color": None, "tertiary_color": None},
            "hoist": False,
            "managed": False,
            "mentionable": False,
            "icon": None,
            "unicode_emoji": None,
            "flags": 0,
        }
        return {
            **dict.fromkeys(_GUILD_NULLS),
            **dict.fromkeys(_GUILD_ZEROS, 0),
            "id": guild,
            "name": "sandbox",
            "owner_id": str(self._store.state["user_id"]),
            "region": "deprecated",
            "preferred_locale": "en-US",
            "premium_tier": self.settings.premium_tier,
            "features": [],
            "roles": [role],
            "emojis": [],
            "stickers": [],
            "afk_timeout": 300,
            "max_members": 500_000,
            "max_video_channel_users": 25,
            "max_stage_video_channel_users": 50,
            "premium_progress_bar_enabled": False,
            "widget_enabled": False,
            "nsfw": False,
            "incidents_data": None,
        }

    def webhook(self, row: sqlite3.Row) -> dict[str, Any]:
        return {
            "id": str(row["id"]),
            "type": 1,
            "name": row["name"],
            "avatar": None,
            "channel_id": str(row["channel_id"]),
            "guild_id": str(self._store.state["guild_id"]),
            "application_id": None,
            "token": row["token"],
            "url": f"{self.base_url}/api/v10/webhooks/{row['id']}/{row['token']}",
            "user": self.user(self._store.state["user_id"], "sandbox"),
        }

    def attachment(self, row: sqlite3.Row) -> dict[str, Any]:
        assert self.settings is not None
        path = f"/attachments/{row['channel_id']}/{row['id']}/{row['filename']}"
        url = self.link(path, self.settings.link_lifetime_s)
        shown = {
            "id": str(row["id"]),
            "filename": row["filename"],
            "size": row["size"],
            "url": url,
            "proxy_url": url.replace("/attachments/", "/media/attachments/", 1),
            "content_type": row["content_type"],
        }
        optional = {key: row[key] for key in ("title", "description") if row[key] is not None}
        return {**shown, **optional}

    def message(
        self, row: sqlite3.Row, *, full: bool = False, foreign: bool = False
    ) -> dict[str, Any]:
        """`full` for whoever may read content without the intent: a webhook's own token.

        `foreign`: as if another bot had sent it, and the intent were missing.
        """
        assert self.settings is not None
        me = self.viewer()
        readable = not foreign and (
            full
            or self.settings.message_content
            or row["author_id"] == me
            or f"<@{me}>" in row["content"]
        )
        author = self.user(row["author_id"], row["author_name"])
        if foreign:
            author = self.user(row["author_id"] - 1, "another")
        shown = {
            "type": row["type"],
            "content": row["content"] if readable else "",
            "mentions": [],
            "mention_roles": [],
            "attachments": (
                [self.attachment(one) for one in self._store.attachments(row["id"])]
                if readable
                else []
            ),
            "embeds": json.loads(row["embeds"]) if readable else [],
            "timestamp": iso(time_of(row["id"])),
            "edited_timestamp": None if row["edited"] is None else iso(row["edited"]),
            "flags": row["flags"],
            "components": [],
            "id": str(row["id"]),
            "channel_id": str(row["channel_id"]),
            "author": author,
            "pinned": row["pinned"] is not None,
            "mention_everyone": False,
            "tts": False,
        }
        if row["webhook_id"] is not None:
            shown["webhook_id"] = str(row["webhook_id"])
        return shown
