"""Posting packs: the intent first, durably, then the message, exactly once. And what tables tell.

Used by uploading and by repacking: both send packs that the journal must know before and after.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from stashcordfs.errors import StashcordError
from stashcordfs.store.pack import FileNote
from stashcordfs.types import ROOT_INO

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stashcordfs.journal import Journal
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.store.pack import FinishedPack
    from stashcordfs.types import Ino, Location, ObjectId
    from stashcordfs.vfs.settling import Settler


async def post_packs(
    packs: Sequence[FinishedPack],
    *,
    journal: Journal,
    store: ObjectStore,
    settler: Settler,
    unclear: Callable[[], None] = lambda: None,
) -> tuple[int, Mapping[ObjectId, Location]]:
    """Post one message: its intent's row, still open, and where each pack is.

    `unclear` is called when the outcome is not known and has to be settled first. Any
    StashcordError: it is not there, or watched for.
    """
    nonce = secrets.token_hex(12)
    after = await store.newest_id()
    intent = await journal.add_intent(
        nonce=nonce,
        channel=0,
        after_message=after,
        packs=[(p.object_id, p.epoch, p.size, p.filename, list(p.chunks)) for p in packs],
    )
    await journal.wal_sync()  # durable before a byte leaves
    try:
        return intent, await settler.deliver(packs, nonce=nonce, after=after, unclear=unclear)
    except StashcordError:
        # It is not there, or watched for. A post that is cancelled in its middle may have
        # happened: its intent stays open, and the next start looks for it.
        await journal.abandon_intent(intent)
        raise


async def file_notes(journal: Journal, sizes: Mapping[Ino, int | None]) -> list[FileNote]:
    """What a pack's table tells of inodes and of the folders above them.

    `sizes`: known better than by the journal, which may be behind; None: as the journal has it. An
    inode that is no more is passed over.
    """
    files = []
    wanted = sorted(sizes)
    told = {ROOT_INO, *wanted}
    for ino in wanted:  # grows by the folders above
        for parent, name in await journal.names_of(ino):
            attributes = await journal.getattr(ino)
            size = sizes.get(ino)
            size = attributes.size if size is None else size
            files.append(FileNote(ino, parent, name, size, attributes.mode))
            if parent not in told:
                told.add(parent)
                wanted.append(parent)
    return files
