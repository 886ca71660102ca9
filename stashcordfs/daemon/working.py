"""A long piece of work inside a loop that has the volume's parts, told as a stream of events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from stashcordfs.errors import StashcordError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

_PROGRESS_EVERY_S = 0.2


async def working(
    nursery: trio.Nursery,
    work: Callable[[], Awaitable[dict[str, object]]],
    progress: Callable[[], dict[str, object]],
    *,
    goes_on: bool = False,
) -> AsyncGenerator[dict[str, Any], None]:
    """What `progress` says, again and again, and at the end `outcome`. StashcordError of the work.

    The work runs in `nursery`, as an async generator must not hold one open over a yield. Who stops
    listening ends it, unless it `goes_on`.
    """
    done = trio.Event()
    ended: list[dict[str, object] | StashcordError] = []
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            try:
                ended.append(await work())
            except StashcordError as error:
                ended.append(error)
        done.set()

    nursery.start_soon(run)
    try:
        while not done.is_set():
            yield progress()
            with trio.move_on_after(_PROGRESS_EVERY_S):
                await done.wait()
    finally:
        if not goes_on:
            scope.cancel()
    if isinstance(ended[0], StashcordError):
        raise ended[0]
    yield {"outcome": ended[0]}
