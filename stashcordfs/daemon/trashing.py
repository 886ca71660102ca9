"""`trash` inside a loop that has the volume's parts: a mounted volume's, or a command's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stashcordfs.vfs.trash_can import plain

if TYPE_CHECKING:
    from stashcordfs.vfs.trash_can import TrashCan

Answer = dict[str, Any]


async def list_trash(can: TrashCan, request: Answer) -> Answer:
    """What is in the trash at `path` and below, by path, the oldest version first."""
    items = [item async for item in can.items(plain(str(request.get("path") or "")))]
    items.sort(key=lambda item: (item.path, item.entry.deleted_ns))
    return {"items": [item.as_json() for item in items]}


async def restore_trash(can: TrashCan, request: Answer) -> Answer:
    """Bring back `what` (a number or a path), perhaps as `to`."""
    to = request.get("to")
    done = await can.restore(str(request["what"]), to=None if to is None else str(to))
    return done.as_json()


async def empty_trash(can: TrashCan, request: Answer) -> Answer:
    """Forget what is older than `older_than_s`."""
    return {"files": await can.empty(older_than_s=float(request.get("older_than_s") or 0))}
