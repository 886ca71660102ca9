"""`verify` inside a loop that has the volume's parts: a mounted volume's, or a command's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from stashcordfs.errors import StashcordError
from stashcordfs.recovery.verify import Verifier

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.daemon.assembly import Assembly
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.volumes import VolumeDir

_PROGRESS_EVERY_S = 0.2
_STATE = "verify.json"


def verifier_of(
    assembly: Assembly,
    volume: VolumeDir,
    store: ObjectStore,
    keys: VolumeKeys,
    report: Callable[[str], None],
) -> Verifier:
    """The verifier of an assembled volume."""
    return Verifier(
        journal=assembly.journal,
        blocks=assembly.blocks,
        store=store,
        keys=keys,
        state_path=volume.path / _STATE,
        report=report,
    )


async def verifying(
    verifier: Verifier,
    nursery: trio.Nursery,
    *,
    data: bool,
    part: tuple[int, int] | None,
) -> AsyncGenerator[dict[str, Any], None]:
    """A run as events: `stage`, `done`, `total`, and at the end `outcome`.

    The work runs in `nursery`, as an async generator must not hold one open over a yield. Who stops
    listening ends the run.
    """
    done = trio.Event()
    ended: list[dict[str, object] | StashcordError] = []
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            try:
                ended.append((await verifier.run(data=data, part=part)).as_json())
            except StashcordError as error:
                ended.append(error)
        done.set()

    nursery.start_soon(run)
    try:
        while not done.is_set():
            yield {"stage": verifier.stage, "done": verifier.done, "total": verifier.total}
            with trio.move_on_after(_PROGRESS_EVERY_S):
                await done.wait()
    finally:
        scope.cancel()
    if isinstance(ended[0], StashcordError):
        raise ended[0]
    yield {"outcome": ended[0]}
