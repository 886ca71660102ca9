"""Where a file's bytes are, told as extended attributes that any script can read.

`user.stashcordfs.state` is

* `local`: some of it is on this machine alone and waits;
* `uploading`: all that is only here is on its way, or the names of it are not told yet;
* `on-discord`: another machine that recovers the volume now has it as it is.

`user.stashcordfs.pending_bytes` are the bytes that are only here, in full pages; of a folder all
below it. `user.stashcordfs.last_error` is the last fault: of the file, else of the mount, or empty.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Protocol

import trio

from stashcordfs.types import ROOT_INO, Attributes, Ino

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stashcordfs.journal import Journal
    from stashcordfs.vfs.blocks import Blocks
    from stashcordfs.vfs.live import Live

STATE = b"user.stashcordfs.state"
PENDING_BYTES = b"user.stashcordfs.pending_bytes"
LAST_ERROR = b"user.stashcordfs.last_error"
LOCAL, UPLOADING, ON_DISCORD = b"local", b"uploading", b"on-discord"

_TOLD = frozenset({STATE, PENDING_BYTES, LAST_ERROR})
_AT_ONCE = 256  # inodes looked at before others get a turn


class Told(Protocol):
    """What the publisher knows."""

    @property
    def behind_s(self) -> float:
        """Age in seconds of the oldest change that Discord does not have; 0 when it has all."""

    def has_told(self, found: Attributes) -> bool:
        """Whether Discord knows an inode and its chunk list as they are."""


class Telltale:
    """Answers for those names. On the event loop; nothing is asked of Discord."""

    def __init__(
        self,
        *,
        journal: Journal,
        blocks: Blocks,
        told: Told | None,
        last_error: Callable[[], str],
    ) -> None:
        """`told` is None where Discord is told nothing of the journal."""
        self._journal = journal
        self._blocks = blocks
        self._told = told
        self._last_error = last_error

    @staticmethod
    def knows(name: bytes) -> bool:
        """Whether this is one of its names."""
        return name in _TOLD

    async def value(self, ino: Ino, name: bytes) -> bytes:
        """What to answer for one of its names. ENOENT."""
        if name == LAST_ERROR:
            return await self._error_of(ino)
        self._journal.commit()  # else a change of this moment would not count
        found = await self._journal.getattr(ino)
        folder = stat.S_ISDIR(found.mode)
        lives = await self._dirty_below(ino) if folder else self._dirty_of(ino)
        if name == PENDING_BYTES:
            return b"%d" % sum(d.charge for live in lives for d in live.dirty.values())
        return self._state(found, lives, folder=folder)

    def _state(self, found: Attributes, lives: Iterable[Live], *, folder: bool) -> bytes:
        pending = [dirty for live in lives for dirty in live.dirty.values()]
        if any(not dirty.sealing for dirty in pending):
            return LOCAL
        if pending or not self._is_told(found, folder=folder):
            return UPLOADING
        return ON_DISCORD

    def _is_told(self, found: Attributes, *, folder: bool) -> bool:
        if self._told is None or not self._told.behind_s:
            return True
        # What lies deeper in a folder does not show in its own row.
        return not folder and self._told.has_told(found)

    async def _error_of(self, ino: Ino) -> bytes:
        live = self._blocks.live.get(ino)
        if live is not None and live.sync_failed is not None:
            return str(live.sync_failed).encode()
        return self._last_error().encode()

    def _dirty_of(self, ino: Ino) -> list[Live]:
        live = self._blocks.live.get(ino)
        return [live] if live is not None and live.dirty else []

    async def _dirty_below(self, folder: Ino) -> list[Live]:
        """Each folder on the way up is looked at once, however many files are below it."""
        dirty = [live for live in list(self._blocks.live.values()) if live.dirty and not live.gone]
        if folder == ROOT_INO:
            return dirty
        within = {folder: True, ROOT_INO: False}
        found = []
        for number, live in enumerate(dirty, start=1):
            if await self._is_within(live.ino, within):
                found.append(live)
            if not number % _AT_ONCE:
                await trio.lowlevel.checkpoint()
        return found

    async def _is_within(self, ino: Ino, within: dict[Ino, bool]) -> bool:
        for parent, _ in await self._journal.names_of(ino):
            if await self._folder_is_within(parent, within):
                return True
        return False

    async def _folder_is_within(self, folder: Ino, within: dict[Ino, bool]) -> bool:
        passed = []
        at = folder
        while at not in within:
            passed.append(at)
            above = await self._journal.names_of(at)
            if not above:  # below a folder without a name
                within[at] = False
                break
            at = above[0][0]
        within.update(dict.fromkeys(passed, within[at]))
        return within[at]
