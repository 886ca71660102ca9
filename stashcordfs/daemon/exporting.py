"""`export`: the journal as JSON lines, and a copy of all data in a folder or a bucket.

A mounted volume's journal is read by a second connection, as of its last commit; its data through
the mount. A volume that nobody has mounted is assembled, and read without a kernel.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from stashcordfs.daemon.opened import opened
from stashcordfs.errors import StashcordError
from stashcordfs.journal.inspection import inspect
from stashcordfs.ops.control import ControlClient
from stashcordfs.recovery.export.bucket import open_bucket
from stashcordfs.recovery.export.copying import Copy, Outcome
from stashcordfs.recovery.export.folder import FolderTarget
from stashcordfs.recovery.export.lines import About, journal_records, write_lines
from stashcordfs.recovery.export.manifest import Manifest
from stashcordfs.recovery.export.sources import MountSource, VolumeSource
from stashcordfs.volumes import VolumeBusy, VolumeDir

if TYPE_CHECKING:
    from collections.abc import Callable

    from stashcordfs.config import Settings
    from stashcordfs.recovery.export.copying import Target

    Progress = Callable[[str, int, int], None]

_ANSWER_S = 10.0
_NOTES = "export"


def export_journal(settings: Settings, name: str, to: Path | None, *, progress: Progress) -> int:
    """Write the journal to a file, or to stdout (None); how many records. Blocks."""
    volume = VolumeDir(settings.state_dir, name)
    local = volume.read_record()
    about = About(
        name, local.uuid, local.block_size, local.channels, local.journal_channel, time.time_ns()
    )
    return write_lines(to, journal_records(volume.journal_path, about, progress=progress))


def export_data(
    settings: Settings,
    name: str,
    to: str,
    *,
    endpoint_url: str | None,
    delete: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Copy everything to a folder or to s3://BUCKET/PREFIX; what was done. Blocks.

    UsageError when the target cannot be used or ends it; what cannot be read is in the outcome.
    """
    volume = VolumeDir(settings.state_dir, name)
    manifest = Manifest(volume.read_record().uuid)
    outcome = Outcome()
    target = _target(volume, to, endpoint_url, outcome)
    with inspect(volume.journal_path) as look:
        total = look.number("SELECT count(*) FROM dirents")

    def copy(source: MountSource | VolumeSource) -> Copy:
        return Copy(
            source, target, manifest, total=total, progress=progress, outcome=outcome, delete=delete
        )

    async def from_volume() -> None:
        async with opened(settings, volume) as (made, _, _):
            await copy(VolumeSource(made.filesystem)).run()

    try:
        with volume.lock():
            trio.run(from_volume)
    except VolumeBusy:
        trio.run(copy(MountSource(_mountpoint(volume))).run)
    return outcome.as_json()


def _target(volume: VolumeDir, to: str, endpoint_url: str | None, outcome: Outcome) -> Target:
    if not to.startswith("s3://"):
        return FolderTarget(Path(to).absolute(), outcome)
    notes = volume.path / _NOTES
    notes.mkdir(mode=0o700, exist_ok=True)
    place = hashlib.sha256(f"{endpoint_url or ''} {to.rstrip('/')}".encode()).hexdigest()[:24]
    return open_bucket(to, endpoint_url=endpoint_url, log=notes / f"{place}.jsonl")


def _mountpoint(volume: VolumeDir) -> bytes:
    """Where a mounted volume is; what was written there is handed over first."""
    state = ControlClient(volume.control_path, timeout_s=_ANSWER_S).call("status")
    where = os.fsencode(str(state["mountpoint"]))
    if not os.path.ismount(where):
        raise StashcordError(f"{os.fsdecode(where)} is not mounted here: is it a container's?")
    return where
