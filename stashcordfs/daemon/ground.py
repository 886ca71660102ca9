"""What unsynced local data stands on, and whether it was pulled away: was there a power cut?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stashcordfs.journal import Journal

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def ground_of(folder: Path) -> str:
    """What local data that was not synced stands on: this boot, and this mount of the disk."""
    descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        told = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii")
    finally:
        os.close(descriptor)
    mount = next(line.split()[1] for line in told.splitlines() if line.startswith("mnt_id:"))
    return f"{_BOOT_ID.read_text(encoding='ascii').strip()} {mount}"


async def power_was_lost(folder: Path, journal: Journal) -> bool:
    """Whether the last run stood on another ground than this one, and did not end cleanly."""
    last = await journal.get_local("ground")
    clean = await journal.get_local("clean_ground")
    return is_another(ground_of(folder), last, clean)


async def stand_here(folder: Path, journal: Journal) -> None:
    """Note what this run stands on, once what the last one left is taken up.

    Not before: a run killed in between would have the next one trust what a power cut has left.
    """
    await journal.set_local("ground", ground_of(folder))
    await journal.set_local("clean_ground", "")


def is_another(ground: str, last: str | None, clean: str | None) -> bool:
    """Whether the last run's ground is gone, with all that was not synced there."""
    return last is not None and last not in (ground, clean)


async def ended_cleanly(folder: Path, journal: Journal) -> None:
    """Note that all is synced and nothing changes any more."""
    await journal.set_local("clean_ground", ground_of(folder))
    await journal.wal_sync()
    await journal.checkpoint()
