"""`mount --at`: the volume as it was, read-only, beside whatever else uses it.

The state is rebuilt as `recover --at` does it, in a folder below the volume's own, which is removed
when the mount ends. Nothing is claimed, posted or deleted. Names and sizes are of then; where the
chunks are on Discord is what the newest state says, as repacking moves them.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import trio

from stashcordfs.daemon.mounted import serve_volume
from stashcordfs.daemon.provision import journal_store_on, open_keys, read_record, store_on
from stashcordfs.daemon.recovering import Rebuilding, Wanted
from stashcordfs.daemon.token import Token
from stashcordfs.discord.client import ClientStats, DiscordClient
from stashcordfs.discord.kept import KeptLimits
from stashcordfs.volumes import VolumeBusy, VolumeDir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from stashcordfs.config import Settings

REPORT = "report.json"  # in the past's folder: what was found, for the command


def run_mount_at(
    settings: Settings,
    name: str,
    at_ns: int,
    mountpoint: Path,
    options: Mapping[str, str | bool],
    ready: Callable[[], None],
) -> None:
    """Rebuild, mount and serve until unmounted. Blocks.

    StashcordError when there is no such state, or when that very time is mounted already.
    """
    volume = VolumeDir(settings.state_dir, name)
    volume.read_record()
    past = volume.past(at_ns)
    with past.lock():
        _remove_left(volume, past)
        try:
            trio.run(_rebuild, settings, volume, past, at_ns)
            fixed = {**options, "ro": True, "noatime": True}
            serve_volume(settings, past, mountpoint, fixed, ready)
        finally:
            shutil.rmtree(past.path)


def _remove_left(volume: VolumeDir, own: VolumeDir) -> None:
    """What killed processes have left."""
    for path in own.path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path not in (own.lock_path, own.log_path):
            path.unlink()
    for past in volume.all_past():
        try:
            with past.lock():
                shutil.rmtree(past.path)
        except VolumeBusy:
            continue


async def _rebuild(settings: Settings, volume: VolumeDir, past: VolumeDir, at_ns: int) -> None:
    """Make the folder of the past a volume's, with a journal."""
    place, record = volume.read_record(), read_record(volume)
    keys = await trio.to_thread.run_sync(open_keys, settings, volume)
    async with DiscordClient(
        api_url=place.api_url,
        token=Token(settings),
        stats=ClientStats(),
        kept=KeptLimits(past.limits_path),
    ) as client:
        store, data_store = journal_store_on(client, place), store_on(client, place)
        wanted = Wanted(place.channels, place.journal_channel, at_ns=at_ns)
        task = Rebuilding(wanted, store, data_store, keys, record, past.path, lambda *_: None)
        report = await task.run()
    shutil.copyfile(volume.path / "record", past.path / "record")
    past.write_record(place)
    (past.path / REPORT).write_text(json.dumps(report), encoding="utf-8")
