"""`verify` inside a loop that has the volume's parts: a mounted volume's, or a command's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stashcordfs.daemon.provision import read_record
from stashcordfs.daemon.working import working
from stashcordfs.recovery.verify import Verifier
from stashcordfs.recovery.verify_journal import JournalObjects

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    import trio

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.daemon.assembly import Assembly
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.volumes import VolumeDir

_STATE = "verify.json"


def verifier_of(
    assembly: Assembly,
    volume: VolumeDir,
    store: ObjectStore,
    keys: VolumeKeys,
    report: Callable[[str], None],
    *,
    mends: bool = True,
) -> Verifier:
    """The verifier of an assembled volume. `mends`: it may have a checkpoint posted."""
    objects = None
    if mends:
        publisher = assembly.publisher
        objects = JournalObjects(
            journal=assembly.journal,
            store=store,
            keys=keys,
            channel=volume.read_record().journal_channel,
            record=read_record(volume).filename,
            hurry=publisher.hurry if publisher is not None else lambda: None,
        )
    return Verifier(
        journal=assembly.journal,
        blocks=assembly.blocks,
        store=store,
        keys=keys,
        state_path=volume.path / _STATE,
        report=report,
        objects=objects,
    )


def verifying(
    verifier: Verifier,
    nursery: trio.Nursery,
    *,
    data: bool,
    part: tuple[int, int] | None,
) -> AsyncGenerator[dict[str, Any], None]:
    """A run as events: `stage`, `done`, `total`, and at the end `outcome`."""

    async def work() -> dict[str, object]:
        return (await verifier.run(data=data, part=part)).as_json()

    return working(
        nursery,
        work,
        lambda: {"stage": verifier.stage, "done": verifier.done, "total": verifier.total},
    )
