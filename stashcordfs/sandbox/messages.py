"""Creating and changing messages: the rules of the API, over the store."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from stashcordfs.sandbox.errors import ApiError, form_error, unknown
from stashcordfs.sandbox.ids import clean_filename, time_of
from stashcordfs.sandbox.store import Draft, NewAttachment

if TYPE_CHECKING:
    import sqlite3

    from stashcordfs.sandbox.faults import Faults
    from stashcordfs.sandbox.forms import Form
    from stashcordfs.sandbox.settings import SandboxSettings
    from stashcordfs.sandbox.store import Store, Upload

_OLD_S = 14 * 86_400.0


class Messages:
    def __init__(self, store: Store, faults: Faults, settings: SandboxSettings) -> None:
        self._store = store
        self._faults = faults
        self.settings = settings
        self.created = 0
        self.acknowledged_bytes = 0

    # Creating

    def create(self, draft: Draft, form: Form, *, route: str = "create_message") -> sqlite3.Row:
        """Store a message, or find the one that the nonce stands for."""
        payload = form.payload
        attachments = self._new_attachments(form, route)
        self._fill(draft, payload)
        if not (draft.content or draft.embeds or attachments):
            raise ApiError(400, 50006, "Cannot send an empty message")
        nonce = None if draft.webhook_id else _nonce(payload)
        if nonce is not None and payload.get("enforce_nonce"):
            made = self._made_before(draft.author_id, nonce)
            if made is not None:
                return made
        if rule := self._faults.take(route, "interleave"):
            kind = int(self._faults.choose(rule["types"]))
            other = self._store.ids.next()
            self._store.add_message(
                Draft(draft.channel_id, other, "somebody", type=kind, content="hello"), []
            )
        message_id = self._store.add_message(draft, attachments, nonce=nonce)
        self.created += 1
        self.acknowledged_bytes += sum(new.upload.size for new in attachments)
        return self.get(draft.channel_id, message_id)

    def _made_before(self, author_id: int, nonce: str) -> sqlite3.Row | None:
        """The message of this nonce, whatever its content or channel: the author counts."""
        since = self._store.clock.wall() - self.settings.nonce_window_s
        before = self._store.nonce(author_id, nonce, since)
        if before is None or self._faults.take("create_message", "forget_nonce"):
            return None
        row = self._store.row("SELECT * FROM messages WHERE id=?", before)
        if row is None:
            raise unknown("Message", 10008)
        return row

    def _fill(self, draft: Draft, payload: dict[str, Any]) -> None:
        content = payload.get("content") or ""
        if not isinstance(content, str) or len(content) > 2000:
            raise form_error("content", "BASE_TYPE_MAX_LENGTH", "Must be 2000 or fewer in length.")
        embeds = payload.get("embeds") or []
        if not isinstance(embeds, list) or len(embeds) > 10:
            raise form_error("embeds", "BASE_TYPE_MAX_LENGTH", "Must be 10 or fewer in length.")
        draft.content, draft.embeds = content, embeds
        flags = payload.get("flags") or 0
        if not isinstance(flags, int) or not 0 <= flags < 2**31:
            raise form_error("flags", "NUMBER_TYPE_COERCE", "Value is not int.")
        draft.flags = flags

    def _new_attachments(self, form: Form, route: str, *, existing: int = 0) -> list[NewAttachment]:
        listed = form.payload.get("attachments") or []
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise form_error("attachments", "LIST_TYPE_CONVERT", "Only iterables may be used")
        if max(len(form.files) + existing, len(listed)) > self.settings.max_attachments:
            raise ApiError(
                400,
                30015,
                f"Maximum number of attachments in a message reached"
                f" ({self.settings.max_attachments})",
            )
        if form.files and not self.settings.attach_files:
            raise ApiError(403, 50013, "Missing Permissions")
        described = {str(one.get("id")): one for one in listed}
        rename = form.files and self._faults.take(route, "rename")
        empty = form.files and self._faults.take(route, "empty_file")
        made = []
        for number, upload in enumerate(form.files):
            if upload.size > self.settings.file_bytes:
                raise ApiError(413, 40005, "Request entity too large")
            filename, title = clean_filename(upload.filename, f"unknown{number or ''}")
            if rename:
                filename, title = f"file{number}", upload.filename
            about = described.get(upload.part, {})
            kept = _emptied(upload) if empty else upload
            made.append(NewAttachment(kept, filename, title, about.get("description")))
        return made

    # Reading

    def get(self, channel_id: int, message_id: int) -> sqlite3.Row:
        row = self._store.message(channel_id, message_id)
        if row is None:
            raise unknown("Message", 10008)
        return row

    # Changing

    def edit(self, row: sqlite3.Row, form: Form, *, author_id: int) -> sqlite3.Row:
        if row["author_id"] != author_id:
            raise ApiError(403, 50005, "Cannot edit a message authored by another user")
        payload, message_id = form.payload, int(row["id"])
        present = {int(one["id"]) for one in self._store.attachments(message_id)}
        keep = self._kept(form, present)
        new = self._new_attachments(form, "edit_message", existing=len(keep))
        draft = Draft(row["channel_id"], author_id, row["author_name"])
        self._fill(draft, payload)
        content = draft.content if "content" in payload else row["content"]
        embeds = draft.embeds if "embeds" in payload else json.loads(row["embeds"])
        if not (content or embeds or keep or new):
            raise ApiError(400, 50006, "Cannot send an empty message")
        self._drop(present - keep, "edit_message")
        self._store.add_attachments(row["channel_id"], message_id, new)
        self._store.run(
            "UPDATE messages SET content=?, embeds=?, edited=? WHERE id=?",
            content,
            json.dumps(embeds),
            self._store.clock.wall(),
            message_id,
        )
        return self.get(row["channel_id"], message_id)

    def _kept(self, form: Form, present: set[int]) -> set[int]:
        """Unlisted ones go; without a list all stay, but for an edit that brings files."""
        if "attachments" not in form.payload:
            return set() if form.files and self.settings.edits_drop else present
        parts = {upload.part for upload in form.files}
        named = {
            str(one.get("id"))
            for one in form.payload["attachments"] or []
            if isinstance(one, dict) and str(one.get("id")) not in parts
        }
        if not all(name.isdecimal() for name in named):
            raise form_error("attachments", "NUMBER_TYPE_COERCE", "Value is not snowflake.")
        return present & {int(name) for name in named}

    def delete(self, channel_id: int, message_id: int) -> None:
        self.get(channel_id, message_id)
        self._delete(channel_id, {message_id}, "delete_message")

    def _delete(self, channel_id: int, ids: set[int], route: str) -> None:
        attachments = {int(row["id"]) for one in ids for row in self._store.attachments(one)}
        self._store.delete_messages(channel_id, ids)
        self._drop(attachments, route)

    def _drop(self, attachments: set[int], route: str) -> None:
        """Forget attachments. By a fault an edge cache goes on serving them for a time."""
        rule = self._faults.take(route, "linger") if attachments else None
        until = self._store.clock.wall() + float(rule["seconds"]) if rule else 0.0
        self._store.drop_attachments(attachments, linger_until=until)

    def bulk_delete(self, channel_id: int, payload: dict[str, Any]) -> None:
        ids = payload.get("messages")
        if not isinstance(ids, list) or not all(str(one).isdecimal() for one in ids):
            raise form_error("messages", "LIST_TYPE_CONVERT", "Only iterables may be used")
        wanted = {int(one) for one in ids}
        if not 2 <= len(wanted) <= 100:
            raise ApiError(
                400,
                50016,
                "Provided too few or too many messages to delete."
                " Must provide at least 2 and fewer than 100 messages to delete",
            )
        oldest = self._store.clock.wall() - _OLD_S
        if any(time_of(one) < oldest for one in wanted):
            raise ApiError(
                400, 50034, "You can only bulk delete messages that are under 14 days old."
            )
        self._delete(channel_id, wanted, "bulk_delete")


def _emptied(upload: Upload) -> Upload:
    upload.path.write_bytes(b"")
    return dataclasses.replace(upload, size=0)


def _nonce(payload: dict[str, Any]) -> str | None:
    nonce = payload.get("nonce")
    if nonce is None:
        return None
    if isinstance(nonce, bool) or not isinstance(nonce, (str, int)) or len(str(nonce)) > 25:
        raise form_error("nonce", "NONCE_TYPE_TOO_LONG", "Must be 25 or fewer in length.")
    return str(nonce)
