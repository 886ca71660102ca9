"""A volume that nobody has mounted, opened for a command: assembled as for a mount, but no kernel.

Unless it is asked for, nothing runs in the background, and Discord is told of nothing: the next
mount does both.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from stashcordfs.daemon.assembly import assembled
from stashcordfs.daemon.ground import ended_cleanly, power_was_lost, stand_here
from stashcordfs.daemon.mounted import assembly_options
from stashcordfs.daemon.provision import open_keys, store_on, telling
from stashcordfs.daemon.purging import plan_purge, purging
from stashcordfs.daemon.token import Token
from stashcordfs.discord.client import ClientStats, DiscordClient
from stashcordfs.discord.kept import KeptLimits
from stashcordfs.errors import StashcordError
from stashcordfs.volumes import VolumeDir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from stashcordfs.config import Settings
    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.daemon.assembly import Assembly
    from stashcordfs.store.discord_store import DiscordStore
    from stashcordfs.vfs.trash_can import TrashCan

Answer = dict[str, Any]


def unheard(text: str) -> None:
    """The command's outcome tells all of it."""


@asynccontextmanager
async def opened(
    settings: Settings, volume: VolumeDir, *, telling_too: bool = False
) -> AsyncIterator[tuple[Assembly, DiscordStore, VolumeKeys]]:
    """The parts of a volume whose lock the caller holds, its store and its keys.

    With `telling_too` the volume is claimed, as by a mount, and data and names are sent meanwhile.
    """
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
            store=(store := store_on(client, record)),
            keys=keys,
            clock=trio.current_time,
            now_ns=time.time_ns,
            power_lost=partial(power_was_lost, volume.path),
            begun=partial(stand_here, volume.path),
            ended=partial(ended_cleanly, volume.path),
            report=unheard,
            telling=telling(client, volume, stats, settings) if telling_too else None,
        ) as made,
    ):
        if made.publisher is not None and made.fence is not None:
            await made.fence.settle()
            if made.fence.reason:
                raise StashcordError(made.fence.reason)
            for task in (made.uploader.run, made.publisher.run, made.durability.run_commits):
                made.nursery.start_soon(task)
        yield made, store, keys


def purge_volume(
    settings: Settings,
    name: str,
    request: Answer,
    *,
    confirm: Callable[[Answer], bool],
    progress: Callable[[str, int, int], None],
) -> Answer | None:
    """Purge a path of a volume that nobody has mounted, if what that ends is confirmed. Blocks."""
    volume = VolumeDir(settings.state_dir, name)
    volume.read_record()

    async def run() -> Answer | None:
        async with opened(settings, volume, telling_too=True) as (made, _, _):
            if not confirm(await plan_purge(made.eraser, request)):
                return None
            outcome: Answer = {}
            async for event in purging(made.eraser, made.nursery, request):
                if "outcome" in event:
                    outcome = event["outcome"]
                else:
                    progress(event["stage"], 0, 0)
            return outcome

    with volume.lock():
        return trio.run(run)


def trash_volume(
    settings: Settings,
    name: str,
    act: Callable[[TrashCan, Answer], Awaitable[Answer]],
    request: Answer,
) -> Answer:
    """Do something with the trash of a volume that nobody has mounted. VolumeBusy else. Blocks."""
    volume = VolumeDir(settings.state_dir, name)
    volume.read_record()

    async def run() -> Answer:
        async with opened(settings, volume) as (made, _, _):
            return await act(made.trash, request)

    with volume.lock():
        return trio.run(run)
