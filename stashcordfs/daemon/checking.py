"""What a command does to a volume: `fsck` here; `verify` and `gc` on Discord.

A mounted volume is verified, and its garbage collected, by its own daemon. Here the volume is
assembled as for a mount, but for the kernel, and what must be sent anew is sent at once.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from stashcordfs.daemon.collecting import collecting
from stashcordfs.daemon.ground import ground_of, is_another
from stashcordfs.daemon.opened import opened, unheard
from stashcordfs.daemon.provision import read_record
from stashcordfs.daemon.verifying import verifier_of, verifying
from stashcordfs.errors import JournalError, StashcordError
from stashcordfs.journal.inspection import inspect
from stashcordfs.recovery import fsck
from stashcordfs.volumes import VolumeBusy, VolumeDir

if TYPE_CHECKING:
    from collections.abc import Callable

    from stashcordfs.config import Settings


def fsck_volume(
    settings: Settings,
    name: str,
    *,
    repair: bool,
    progress: Callable[[str, int, int], None],
) -> dict[str, object]:
    """Check, or mend, under the volume's lock; a mounted volume is read at its last commit.

    VolumeBusy when a mounted volume should be mended. Blocks.
    """
    volume = VolumeDir(settings.state_dir, name)
    local = volume.read_record()
    try:
        epoch = read_record(volume).slots.epoch
    except (
        StashcordError
    ):  # opening the volume will say so; its journal can be checked all the same
        epoch = None
    place = fsck.Place(volume.path, local.block_size, epoch)
    try:
        with volume.lock():
            lost = _power_was_lost(volume)
            if repair:
                report = fsck.repair(place, power_lost=lost, progress=progress)
            else:
                report = fsck.check(place, mounted=False, power_lost=lost, progress=progress)
            mounted = False
    except VolumeBusy:
        if repair:
            raise
        report, mounted = fsck.check(place, mounted=True, progress=progress), True
    return {"name": name, "state": "mounted" if mounted else "unmounted", **report.as_json()}


def _power_was_lost(volume: VolumeDir) -> bool:
    """The next mount's verdict, without taking note of it."""
    try:
        with inspect(volume.journal_path) as look:
            ground = ground_of(volume.path)
            return is_another(ground, look.text("ground"), look.text("clean_ground"))
    except JournalError:
        return False  # fsck itself will say what is wrong


def verify_volume(
    settings: Settings,
    name: str,
    *,
    data: bool,
    part: tuple[int, int] | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, object]:
    """Verify a volume that nobody has mounted. VolumeBusy when somebody has. Blocks."""
    volume = VolumeDir(settings.state_dir, name)
    volume.read_record()
    with volume.lock():
        return trio.run(
            partial(
                _verify_assembled, settings, volume, data=data, part=part, progress=progress
            )
        )  # fmt: skip


async def _verify_assembled(
    settings: Settings,
    volume: VolumeDir,
    *,
    data: bool,
    part: tuple[int, int] | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, object]:
    outcome: dict[str, object] = {}
    async with opened(settings, volume) as (made, store, keys):
        verifier = verifier_of(made, volume, store, keys, unheard)
        async for event in verifying(verifier, made.nursery, data=data, part=part):
            if "outcome" in event:
                outcome = event["outcome"]
            else:
                progress(verifier.stage, verifier.done, verifier.total)
        if outcome.get("resent_blocks"):
            progress("sending anew", 0, 0)
            made.nursery.start_soon(made.uploader.run)
            await made.filesystem.sync_remote()
    if outcome.get("checkpoint_wanted"):
        progress("posting a checkpoint", 0, 0)
        async with opened(settings, volume, telling_too=True) as (made, _, _):
            assert made.publisher is not None
            await made.publisher.finish()
    return outcome


def collect_volume(
    settings: Settings, name: str, *, progress: Callable[[str, int, int], None]
) -> dict[str, object]:
    """Collect the garbage of a volume that nobody has mounted. VolumeBusy when somebody has.

    It claims the volume, as a mount does. Blocks.
    """
    volume = VolumeDir(settings.state_dir, name)
    volume.read_record()
    with volume.lock():
        return trio.run(partial(_collect_opened, settings, volume, progress=progress))


async def _collect_opened(
    settings: Settings, volume: VolumeDir, *, progress: Callable[[str, int, int], None]
) -> dict[str, object]:
    outcome: dict[str, object] = {}
    async with opened(settings, volume, telling_too=True) as (made, _, _):
        assert made.collector is not None
        assert made.publisher is not None
        async for event in collecting(made.collector, made.nursery):
            if "outcome" in event:
                outcome = event["outcome"]
            else:
                progress(str(event["stage"]), 0, 0)
        await made.publisher.finish()
    return outcome
