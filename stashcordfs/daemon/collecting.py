"""`gc` inside a loop that has the volume's parts: a mounted volume's, or a command's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stashcordfs.daemon.working import working

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import trio

    from stashcordfs.vfs.collecting import Collector


def collecting(collector: Collector, nursery: trio.Nursery) -> AsyncGenerator[dict[str, Any], None]:
    """A thorough run as events: `stage`, and at the end `outcome`. It goes on unheard."""

    async def work() -> dict[str, object]:
        return (await collector.collect(thorough=True)).as_json()

    return working(nursery, work, lambda: {"stage": collector.stage}, goes_on=True)
