"""What the server keeps under its folder: state.json, messages in SQLite, attachments as files.

Everything runs on the event loop: a query costs microseconds. A killed process loses nothing; a
cut of the power may, and is not what this server is for.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import sqlite3
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stashcordfs.sandbox.ids import Clock, Snowflakes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS messages(
  id INTEGER PRIMARY KEY, channel_id INTEGER NOT NULL, author_id INTEGER NOT NULL,
  author_name TEXT NOT NULL, webhook_id INTEGER, type INTEGER NOT NULL DEFAULT 0,
  content TEXT NOT NULL DEFAULT '', edited REAL, pinned REAL,
  flags INTEGER NOT NULL DEFAULT 0, embeds TEXT NOT NULL DEFAULT '[]');
CREATE INDEX IF NOT EXISTS of_channel ON messages(channel_id, id);
CREATE TABLE IF NOT EXISTS attachments(
  id INTEGER PRIMARY KEY, message_id INTEGER NOT NULL, channel_id INTEGER NOT NULL,
  filename TEXT NOT NULL, title TEXT, description TEXT, size INTEGER NOT NULL,
  content_type TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS of_message ON attachments(message_id);
CREATE TABLE IF NOT EXISTS nonces(
  author_id INTEGER NOT NULL, nonce TEXT NOT NULL, message_id INTEGER NOT NULL, at REAL NOT NULL,
  PRIMARY KEY(author_id, nonce));
CREATE TABLE IF NOT EXISTS webhooks(
  id INTEGER PRIMARY KEY, channel_id INTEGER NOT NULL, token TEXT NOT NULL, name TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file part of a request, on disk under `incoming`."""

    path: Path
    part: str  # the number in files[n], as text
    filename: str
    size: int
    content_type: str


@dataclass(slots=True)
class Draft:
    """A message to be."""

    channel_id: int
    author_id: int
    author_name: str
    webhook_id: int | None = None
    type: int = 0
    content: str = ""
    flags: int = 0
    embeds: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class NewAttachment:
    upload: Upload
    filename: str
    title: str | None
    description: str | None


class Store:
    def __init__(self, folder: Path) -> None:
        self.files = folder / "attachments"
        self.incoming = folder / "incoming"
        for directory in (folder, self.files, self.incoming):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left_over in self.incoming.iterdir():
            left_over.unlink()
        self._state_path = folder / "state.json"
        self.state = self._load_state()
        self.clock = Clock(float(self.state["clock_offset"]))
        self._db = sqlite3.connect(folder / "messages.sqlite3", isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;" + _SCHEMA)
        last = self.value(
            "SELECT max(coalesce((SELECT max(id) FROM messages), 0),"
            " coalesce((SELECT max(id) FROM attachments), 0),"
            " coalesce((SELECT max(message_id) FROM nonces), 0))"
        )
        self.ids = Snowflakes(self.clock, last)

    def close(self) -> None:
        self._db.close()

    # State

    def _load_state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self._state_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            ids = Snowflakes(Clock())
            state = {
                "user_id": ids.next(),
                "guild_id": ids.next(),
                "channel_ids": [ids.next() for _ in range(3)],
                "secret": secrets.token_hex(32),
                "clock_offset": 0.0,
                "port": 0,
            }
            state["token"] = new_token(state["user_id"])
            self.save_state(state)
        return state

    def save_state(self, state: dict[str, Any] | None = None) -> None:
        temporary = self._state_path.with_suffix(".new")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(state or self.state), encoding="utf-8")
        temporary.replace(self._state_path)

    def channel(self, channel_id: int) -> dict[str, Any]:
        """What an edit gave the channel: name, topic."""
        changed: dict[str, Any] = self.state.get("channels", {}).get(str(channel_id), {})
        return changed

    def change_channel(self, channel_id: int, changes: dict[str, Any]) -> None:
        now = {**self.channel(channel_id), **changes}
        self.state.setdefault("channels", {})[str(channel_id)] = now
        self.save_state()

    def bots(self) -> dict[str, int]:
        """Tokens in force, and whose they are."""
        own: dict[str, int] = {self.state["token"]: self.state["user_id"]}
        others: dict[str, int] = self.state.get("other_bots", {})
        return own | others

    def add_bot(self) -> tuple[str, int]:
        user_id = self.ids.next()
        token = new_token(user_id)
        self.state.setdefault("other_bots", {})[token] = user_id
        self.save_state()
        return token, user_id

    # Queries

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        return self._db.execute(sql, values).fetchall()

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        found: sqlite3.Row | None = self._db.execute(sql, values).fetchone()
        return found

    def value(self, sql: str, *values: object) -> int:
        return int(self._db.execute(sql, values).fetchone()[0])

    def run(self, sql: str, *values: object) -> int:
        return self._db.execute(sql, values).rowcount

    def message(self, channel_id: int, message_id: int) -> sqlite3.Row | None:
        if message_id >= 2**63:
            return None
        return self.row(
            "SELECT * FROM messages WHERE id=? AND channel_id=?",
            min(message_id, 2**63 - 1),  # any number may stand in a path; SQLite has 64 bits
            channel_id,
        )

    def attachments(self, message_id: int) -> list[sqlite3.Row]:
        return self.rows("SELECT * FROM attachments WHERE message_id=? ORDER BY id", message_id)

    def page(
        self, channel_id: int, *, before: int | None, after: int | None, limit: int
    ) -> list[sqlite3.Row]:
        """Newest first; with `after`, the messages just after it."""
        if after is not None:
            found = self.rows(
                "SELECT * FROM messages WHERE channel_id=? AND id>? AND id<? ORDER BY id LIMIT ?",
                channel_id,
                min(after, 2**63 - 1),
                2**63 - 1 if before is None else min(before, 2**63 - 1),
                limit,
            )
            return found[::-1]
        return self.rows(
            "SELECT * FROM messages WHERE channel_id=? AND id<? ORDER BY id DESC LIMIT ?",
            channel_id,
            2**63 - 1 if before is None else min(before, 2**63 - 1),
            limit,
        )

    def nonce(self, author_id: int, nonce: str, since: float) -> int | None:
        found = self.row(
            "SELECT message_id FROM nonces WHERE author_id=? AND nonce=? AND at>=?",
            author_id,
            nonce,
            since,
        )
        return None if found is None else int(found[0])

    # Changes

    def add_message(
        self, draft: Draft, attachments: Sequence[NewAttachment], *, nonce: str | None = None
    ) -> int:
        message_id = self.ids.next()
        self._db.execute("BEGIN")
        with self._db:
            self.run(
                "INSERT INTO messages(id, channel_id, author_id, author_name, webhook_id, type,"
                " content, flags, embeds) VALUES(?,?,?,?,?,?,?,?,?)",
                message_id,
                draft.channel_id,
                draft.author_id,
                draft.author_name,
                draft.webhook_id,
                draft.type,
                draft.content,
                draft.flags,
                json.dumps(draft.embeds),
            )
            if nonce is not None:
                self.run(
                    "INSERT OR REPLACE INTO nonces VALUES(?,?,?,?)",
                    draft.author_id,
                    nonce,
                    message_id,
                    self.clock.wall(),
                )
            self.add_attachments(draft.channel_id, message_id, attachments)
        return message_id

    def add_attachments(
        self, channel_id: int, message_id: int, attachments: Iterable[NewAttachment]
    ) -> None:
        for new in attachments:
            attachment_id = self.ids.next()
            new.upload.path.rename(self.files / str(attachment_id))
            self.run(
                "INSERT INTO attachments VALUES(?,?,?,?,?,?,?,?)",
                attachment_id,
                message_id,
                channel_id,
                new.filename,
                new.title,
                new.description,
                new.upload.size,
                new.upload.content_type,
            )

    def delete_messages(self, channel_id: int, ids: Iterable[int]) -> None:
        """Their attachments are dropped by a call of its own."""
        for message_id in ids:
            self.run("DELETE FROM messages WHERE id=? AND channel_id=?", message_id, channel_id)

    def drop_attachments(self, ids: Iterable[int], *, linger_until: float = 0.0) -> None:
        """Forget attachments; until the given time, Unix seconds, the CDN goes on serving them."""
        for attachment_id in ids:
            self.run("DELETE FROM attachments WHERE id=?", attachment_id)
            path = self.files / str(attachment_id)
            if linger_until and path.exists():
                os.utime(path, (linger_until, linger_until))  # survives a restart
            else:
                path.unlink(missing_ok=True)

    def served(self, attachment_id: int) -> Path | None:
        """The file of an attachment that exists, or lingers."""
        path = self.files / str(attachment_id)
        if not path.exists():
            return None
        known = self.row("SELECT 1 FROM attachments WHERE id=?", min(attachment_id, 2**63 - 1))
        if known or path.stat().st_mtime > self.clock.wall():
            return path
        path.unlink()
        return None


def new_token(user_id: int) -> str:
    """A token of the usual shape; its first part is the bot's id."""
    head = base64.urlsafe_b64encode(str(user_id).encode()).decode().rstrip("=")
    return f"{head}.{secrets.token_urlsafe(4)[:6]}.{secrets.token_urlsafe(28)}"
