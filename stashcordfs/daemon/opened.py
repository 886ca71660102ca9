"""A volume that nobody has mounted, opened for a command: assembled as for a mount, but no kernel.

Nothing runs in the background, and Discord is told of nothing: the next mount does both.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from stashcordfs.daemon.assembly import assembled
from stashcordfs.daemon.ground import ended_cleanly, power_was_lost
from stashcordfs.daemon.mounted import assembly_options
from stashcordfs.daemon.provision import open_keys, open_store
from stashcordfs.daemon.token import Token
from stashcordfs.discord.client import ClientStats
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
    settings: Settings, volume: VolumeDir
) -> AsyncIterator[tuple[Assembly, DiscordStore, VolumeKeys]]:
    """The parts of a volume whose lock the caller holds, its store and its keys."""
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
            report=unheard,
        ) as made,
    ):
        yield made, store, keys


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
