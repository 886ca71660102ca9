"""What a command does to a volume: `fsck` here; `verify` and `gc` on Discord.

A mounted volume is verified, and its garbage collected, by its own daemon. Here the volume is
assembled as for a mount, but for the kernel, and what must be sent anew is sent at once.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import trio

from stashcordfs.daemon.assembly import assembled
from stashcordfs.daemon.collecting import collecting
from stashcordfs.daemon.ground import (
    ended_cleanly,
    ground_of,
    is_another,
    power_was_lost,
    stand_here,
)
from stashcordfs.daemon.mounted import assembly_options
from stashcordfs.daemon.provision import (
    open_keys,
    open_store,
    read_record,
    store_on,
    telling,
)
from stashcordfs.daemon.token import Token
from stashcordfs.daemon.verifying import verifier_of, verifying
from stashcordfs.discord.client import ClientStats, DiscordClient
from stashcordfs.discord.kept import KeptLimits
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
    record = volume.read_record()
    keys = await trio.to_thread.run_sync(open_keys, settings, volume)
    outcome: dict[str, object] = {}
    async with (
        open_store(Token(settings), record, ClientStats(), KeptLimits(volume.limits_path)) as store,
        assembled(
            volume.path,
            assembly_options(settings, record.block_size, atime="noatime"),
            store=store,
            keys=keys,
            clock=trio.current_time,
            now_ns=time.time_ns,
            power_lost=partial(power_was_lost, volume.path),
            begun=partial(stand_here, volume.path),
            ended=partial(ended_cleanly, volume.path),
            report=_unheard,
        ) as made,
    ):
        verifier = verifier_of(made, volume, store, keys, _unheard)
        async for event in verifying(verifier, made.nursery, data=data, part=part):
            if "outcome" in event:
                outcome = event["outcome"]
            else:
                progress(verifier.stage, verifier.done, verifier.total)
        if outcome.get("resent_blocks"):
            progress("sending anew", 0, 0)
            made.nursery.start_soon(made.uploader.run)
            await made.filesystem.sync_remote()
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
        return trio.run(partial(_collect_assembled, settings, volume, progress=progress))


async def _collect_assembled(
    settings: Settings, volume: VolumeDir, *, progress: Callable[[str, int, int], None]
) -> dict[str, object]:
    record = volume.read_record()
    keys = await trio.to_thread.run_sync(open_keys, settings, volume)
    stats = ClientStats()
    async with (
        DiscordClient(
            api_url=record.api_url,
            token=Token(settings),
            stats=stats,
            kept=KeptLimits(volume.limits_path),
        ) as client,
        assembled(
            volume.path,
            assembly_options(settings, record.block_size, atime="noatime"),
            store=store_on(client, record),
            keys=keys,
            clock=trio.current_time,
            now_ns=time.time_ns,
            power_lost=partial(power_was_lost, volume.path),
            begun=partial(stand_here, volume.path),
            ended=partial(ended_cleanly, volume.path),
            report=_unheard,
            telling=telling(client, volume, stats, settings),
        ) as made,
    ):
        assert made.collector is not None
        assert made.fence is not None
        assert made.publisher is not None
        await made.fence.settle()
        if made.fence.reason:
            raise StashcordError(made.fence.reason)
        for task in (made.uploader.run, made.publisher.run, made.durability.run_commits):
            made.nursery.start_soon(task)
        async for event in collecting(made.collector, made.nursery):
            if "outcome" in event:
                outcome: dict[str, object] = event["outcome"]
            else:
                progress(str(event["stage"]), 0, 0)
        await made.publisher.finish()
    return outcome


def _unheard(text: str) -> None:
    """The outcome tells all of it."""
