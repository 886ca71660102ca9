"""The composition root: the only place that builds the parts and ties them together.

`provision` makes volumes and changes their keys; `mounted` runs one mount, from the lock to the
last byte drained; `checking` looks whether all is well and takes garbage off Discord, `recovering`
gets a volume back, and `exporting` takes it elsewhere. The commands call these functions and have
no logic of their own.
"""

from __future__ import annotations

from stashcordfs.daemon.checking import collect_volume, fsck_volume, verify_volume
from stashcordfs.daemon.exporting import export_data, export_journal
from stashcordfs.daemon.looking_back import run_mount_at
from stashcordfs.daemon.mounted import run_mount
from stashcordfs.daemon.provision import MkfsResult, change_keys, mkfs
from stashcordfs.daemon.recovering import Wanted, recover_volume

__all__ = [
    "MkfsResult",
    "Wanted",
    "change_keys",
    "collect_volume",
    "export_data",
    "export_journal",
    "fsck_volume",
    "mkfs",
    "recover_volume",
    "run_mount",
    "run_mount_at",
    "verify_volume",
]
