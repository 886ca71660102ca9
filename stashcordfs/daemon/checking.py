"""Checking a volume from a command: `fsck` over journal and local state, `verify` over Discord.

A mounted volume is verified by its own daemon (`verifying`). Here the volume is assembled as for a
mount, but for the kernel, and what must be sent anew is sent at once.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from stashcordfs.daemon.assembly import assembled
from stashcordfs.daemon.ground import ended_cleanly, ground_of, is_another, power_was_lost
from stashcordfs.daemon.mounted import assembly_options
from stashcordfs.daemon.provision import open_keys, open_store, read_record
from stashcordfs.daemon.token import Token
from stashcordfs.daemon.verifying import verifier_of, verifying
from stashcordfs.discord.client import ClientStats
from stashcordfs.errors import JournalError, StashcordError
from stashcordfs.journal.inspection import inspect
from stashcordfs.recovery import fsck
from stashcordfs.volumes import VolumeBusy, VolumeDir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from stashcordfs.config import Settings
    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.daemon.assembly import Assembly
    from stashcordfs.store.discord_store import DiscordStore


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
    async with unmounted(settings, volume) as (made, store, keys):
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


@asynccontextmanager
async def unmounted(
    settings: Settings, volume: VolumeDir
) -> AsyncIterator[tuple[Assembly, DiscordStore, VolumeKeys]]:
    """A volume as a mount assembles it, without a kernel. The caller holds its lock."""
    record = volume.read_record()
    keys = await trio.to_thread.run_sync(open_keys, settings, volume)
    async with (
        open_store(Token(settings), record, ClientStats()) as store,
        assembled(
            volume.path,
            assembly_options(settings, record.block_size, noatime=True),
            store=store,
            keys=keys,
            clock=trio.current_time,
            now_ns=time.time_ns,
            power_lost=partial(power_was_lost, volume.path),
            ended=partial(ended_cleanly, volume.path),
            report=_unheard,
        ) as made,
    ):
        yield made, store, keys


def _unheard(text: str) -> None:
    """The outcome tells all of it."""
