"""Checking a volume: `fsck` over the journal and what lies beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stashcordfs.daemon.ground import ground_of, is_another
from stashcordfs.daemon.provision import read_record
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
