"""One writer: the claim, and how a writer notices that he is none any more.

A mount claims the volume from its head on. Whoever posts with a higher writer epoch (a recovery)
has taken it over; of two claims of one epoch the lower message id wins. A writer that was taken
over turns read-only and keeps what it has: its changes would not fit the other's any more.
"""

from __future__ import annotations

import errno
import logging
import secrets
import time
from typing import TYPE_CHECKING

from stashcordfs.crypto.keys import KIND_CLAIM, KIND_SEGMENT
from stashcordfs.errors import FsError
from stashcordfs.journal.changes import OwnObject
from stashcordfs.store.sealed import seal_object
from stashcordfs.store.segment import Claim, encode_claim

if TYPE_CHECKING:
    from collections.abc import Callable

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Journal
    from stashcordfs.vfs.journal_channel import Foreign, JournalChannel

log = logging.getLogger(__name__)

_FENCED = "fenced"


class Fence:
    """Whether this mount may write. `check` asks Discord; all else answers from memory."""

    def __init__(
        self,
        *,
        journal: Journal,
        channel: JournalChannel,
        keys: VolumeKeys,
        genesis: bytes,
        host: str,
        now_ns: Callable[[], int],
        report: Callable[[str], None],
    ) -> None:
        """Take the collaborators. `load` must run before anything else."""
        self._journal = journal
        self._channel = channel
        self._keys = keys
        self.genesis = genesis
        self._host = host
        self._now_ns = now_ns
        self._report = report
        self._claim: OwnObject | None = None
        self._confirmed = False
        self.reason = ""
        self.on_fenced: Callable[[], None] = lambda: None
        # Told of each look at what a replaced writer has posted, in the last seconds more than once
        self.on_replaced: Callable[[Foreign], None] = lambda _: None

    async def load(self) -> None:
        """Take up the verdict of an earlier run."""
        self.reason = await self._journal.get_local(_FENCED) or ""

    @property
    def claimed(self) -> bool:
        """Whether Discord has this mount's claim."""
        return self._confirmed

    def require_writable(self) -> None:
        """EROFS when another writer has the volume."""
        if self.reason:
            raise FsError(errno.EROFS)

    async def head(self) -> tuple[int, bytes]:
        """Number and digest of the newest segment that was cut here; 0 and the genesis first."""
        newest = await self._journal.newest_object(KIND_SEGMENT, dropped=True)
        return (0, self.genesis) if newest is None else (newest.number, newest.digest)

    async def settle(self) -> None:
        """Claim, and look once more whether another has claimed at the same time. DiscordError."""
        await self.check()
        if not self.reason:
            await self.check()

    async def check(self) -> None:
        """Look for another writer; claim the volume if that was not done yet. DiscordError.

        Two requests at first, one later.
        """
        for foreign in await self._channel.look():
            await self._judge(foreign)
        if not self.reason and not self._confirmed:
            await self._post_claim()

    @property
    def unseen_s(self) -> float:
        """Seconds since the journal channel was looked at for another writer."""
        return self._channel.unseen_s

    async def check_lately(self, within_s: float) -> None:
        """The same, unless it was done within so many seconds. DiscordError."""
        if not self._confirmed or self.unseen_s > within_s:
            await self.check()

    async def _judge(self, foreign: Foreign) -> None:
        own = self._journal.writer_epoch
        late = foreign.claim is not None and await self._is_later(foreign.location.message)
        if foreign.writer_epoch < own or (foreign.writer_epoch == own and late):
            log.warning(
                "another writer posted to the volume after it was taken over epoch=%d message=%d",
                foreign.writer_epoch,
                foreign.location.message,
            )
            self.on_replaced(foreign)
            return
        who = f" ({foreign.claim.host})" if foreign.claim and foreign.claim.host else ""
        when = ""
        if foreign.claim is not None:
            at = time.gmtime(foreign.claim.made_ns // 10**9)
            when = time.strftime(" on %Y-%m-%d at %H:%M UTC", at)
        await self._shut(
            f"another machine{who} has taken the volume over{when}: read-only here; what this "
            "machine has is kept. To write here again, recover the volume here under another name"
        )

    async def _is_later(self, message: int) -> bool:
        """Whether a claim of our epoch came after ours."""
        at = await self.claimed_at()
        return at is not None and at < message

    async def claimed_at(self) -> int | None:
        """The message of this mount's claim; None while Discord is not known to have it."""
        if self._claim is None or not self._confirmed:
            return None
        found = await self._journal.own_objects(KIND_CLAIM)
        at = next((o.location for o in found if o.object_id == self._claim.object_id), None)
        return None if at is None else at.message

    async def _shut(self, reason: str) -> None:
        if self.reason:
            return
        self.reason = reason
        await self._journal.set_local(_FENCED, reason)
        self._report(reason)
        self.on_fenced()

    async def _post_claim(self) -> None:
        number, digest = await self.head()
        now = self._now_ns()
        writer = secrets.token_bytes(16)
        claim = Claim(writer, self._journal.writer_epoch, number, digest, now, self._host)
        made = seal_object(self._keys, KIND_CLAIM, number, encode_claim(claim))
        self._claim = OwnObject(
            made.object_id, KIND_CLAIM, number, 0, 0, now, made.digest, made.size
        )
        await self._journal.add_object(self._claim)
        await self._journal.wal_sync()  # ours must be known as ours, whatever happens
        await self._channel.post(made)
        self._confirmed = True
