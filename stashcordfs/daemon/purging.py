"""`purge` inside a loop that has the volume's parts: a mounted volume's, or a command's own."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stashcordfs.daemon.working import working
from stashcordfs.errors import StashcordError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import trio

    from stashcordfs.vfs.erasing import Eraser

Answer = dict[str, Any]


def writable(eraser: Eraser | None) -> Eraser:
    """StashcordError when the mount is read-only."""
    if eraser is None:
        raise StashcordError("the volume is mounted read-only: nothing can be purged")
    return eraser


async def plan_purge(eraser: Eraser | None, request: Answer) -> Answer:
    """What a purge of `path` would end."""
    recursive = bool(request.get("recursive"))
    return (await writable(eraser).plan(str(request["path"]), recursive=recursive)).as_json()


def purging(
    eraser: Eraser | None, nursery: trio.Nursery, request: Answer
) -> AsyncGenerator[Answer, None]:
    """A purge of `path` as events: `stage`, and at the end `outcome`. It goes on unheard."""
    able = writable(eraser)

    async def work() -> Answer:
        recursive = bool(request.get("recursive"))
        return asdict(await able.purge(await able.plan(str(request["path"]), recursive=recursive)))

    return working(nursery, work, lambda: {"stage": able.stage or "planning"}, goes_on=True)
