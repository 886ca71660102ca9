"""Durability: group commits, fsync, the five-second sync, and what an fsync waits for beyond.

Order of an fsync, which is the whole point of this module (each step needs the one before):

1. the file's bytes: `fdatasync` of its local file (a new file's folder too), in a thread;
2. which of them count: the page bitmaps and the size, as rows of the journal;
3. the journal: commit of the group, `fdatasync` of the WAL, one for all who wait.

A timer does the same for everything at least every `sync_every_s`; another commits the group
`commit_every_s` after its first change, which bounds what a killed process can lose.

Beyond that `Levels` says where an fsync also waits for Discord, and `Durability.remote` for what.
"""

from __future__ import annotations

import errno
import logging
import stat
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import DiscordUnavailable, FsError, LocalDiskError
from stashcordfs.types import PAGE_BYTES, ROOT_INO

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from collections.abc import Set as AbstractSet

    from stashcordfs.journal import Journal
    from stashcordfs.types import Ino
    from stashcordfs.vfs.blocks import Blocks
    from stashcordfs.vfs.live import Dirty, Live
    from stashcordfs.vfs.uploading import Uploader

log = logging.getLogger(__name__)

LEVEL_XATTR = b"user.stashcordfs.durability"
LOCAL, REMOTE = b"local", b"remote"
_GATHER_S = 0.05  # fsyncs that come together go in one message
_MAX_WAITING = 256  # of the tasks that serve the kernel; see fuse.session


class Levels:
    """Which durability a folder asks for: its own attribute, else the nearest one above, else
    the mount's. The folders that have the attribute are few and kept in memory.
    """

    def __init__(self, journal: Journal, default: str) -> None:
        """`default`: "local" or "remote". `load` must run before anything else."""
        self._journal = journal
        self._marked: dict[Ino, bytes] = {}
        self.default = default

    async def load(self) -> None:
        """Find the folders that have the attribute."""
        self._marked = dict(await self._journal.inodes_with_xattr(LEVEL_XATTR))

    async def check(self, ino: Ino, value: bytes) -> None:
        """Raise EINVAL for a value that means nothing, ENOTDIR for what is no folder."""
        if value not in {LOCAL, REMOTE}:
            raise FsError(errno.EINVAL)
        if not stat.S_ISDIR((await self._journal.getattr(ino)).mode):
            raise FsError(errno.ENOTDIR)

    def note(self, ino: Ino, value: bytes | None) -> None:
        """The folder has this attribute from now on; None: it has it no more, or is gone."""
        if value is None:
            self._marked.pop(ino, None)
        else:
            self._marked[ino] = value

    async def is_remote(self, ino: Ino) -> bool:
        """Whether an fsync of this inode waits for Discord: of several names any can ask for it.

        A file without a name does not: nothing will lead to it.
        """
        if not self._marked:
            return self.default == REMOTE.decode() and await self._has_name(ino)
        if ino == ROOT_INO or ino in self._marked:
            return await self._folder_level(ino) == REMOTE
        folders = {parent for parent, _ in await self._journal.names_of(ino)}
        return any([await self._folder_level(folder) == REMOTE for folder in folders])

    async def _has_name(self, ino: Ino) -> bool:
        return (await self._journal.getattr(ino)).nlink > 0

    async def _folder_level(self, folder: Ino) -> bytes:
        at = folder
        while at not in self._marked:
            if at == ROOT_INO:
                return self.default.encode()
            at = await self._journal.parent_of(at)
        return self._marked[at]


class _Pass:
    """One sync of some inodes."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.succeeded = False


class Durability:
    """Makes writes and names durable here. The two `run_…` loops are supervised by the daemon."""

    def __init__(
        self,
        *,
        blocks: Blocks,
        journal: Journal,
        uploader: Uploader,
        deadline_s: float,
        commit_every_s: float = 0.05,
        sync_every_s: float = 5.0,
    ) -> None:
        """Take the collaborators. Times in seconds; `deadline_s`: of a wait for Discord."""
        self._blocks = blocks
        self._journal = journal
        self._uploader = uploader
        self.deadline_s = deadline_s
        self._waiting = 0
        self.published: Callable[[], Awaitable[None]] | None = None  # names are on Discord too
        self._commit_every_s = commit_every_s
        self._sync_every_s = sync_every_s
        self._resized: set[Live] = set()
        self._under_way: dict[Live, _Pass] = {}
        self._wanted = trio.Event()
        journal.on_first_write(self._want_commit)

    def _want_commit(self) -> None:
        self._wanted.set()

    def resized(self, live: Live) -> None:
        """A write changed the size: the next commit carries it to the journal."""
        self._resized.add(live)
        self._want_commit()

    async def carry_sizes(self) -> None:
        """Write the sizes that changed in memory to the journal's open group."""
        resized, self._resized = self._resized, set()
        for live in resized:
            await self._blocks.carry_size(live)
            self._blocks.leave(live)

    async def commit(self) -> None:
        """Commit the group: safe against a killed process."""
        await self.carry_sizes()
        self._journal.commit()

    async def sync(self, lives: Sequence[Live] | None = None) -> None:
        """Return when these inodes' bytes (all, if None) and every name are on this disk.

        Raises LocalDiskError. A failed sync is never turned into a success by a later one: the
        kernel may have dropped the pages and tells so once (fsync(2), "errors"). The inodes
        concerned fail until Discord has what was dirty then.
        """
        # A sync under way took these inodes off `unsynced`, but has not made them durable yet, and
        # may miss what was written after its beginning. One that has begun since covers it.
        for earlier in set(self._passes(lives).values()):
            await earlier.done.wait()
        others = self._passes(lives)
        unsynced = self._blocks.unsynced
        wanted = [v for v in (unsynced if lives is None else lives) if v in unsynced]
        await self._pass([live for live in wanted if live not in others])
        for other in set(others.values()):
            await other.done.wait()
        if failed := [live for live, other in others.items() if not other.succeeded]:
            await self.sync(failed)
        for live in wanted if lives is None else lives:
            if live.sync_failed is not None:
                raise live.sync_failed

    def _passes(self, lives: Sequence[Live] | None) -> dict[Live, _Pass]:
        """The syncs under way of these inodes (all, if None)."""
        under_way = self._under_way
        return {v: under_way[v] for v in (under_way if lives is None else lives) if v in under_way}

    async def _pass(self, wanted: Sequence[Live]) -> None:
        unsynced = self._blocks.unsynced
        unsynced.difference_update(wanted)
        this = _Pass()
        self._under_way.update(dict.fromkeys(wanted, this))
        try:
            await self._make_durable(wanted)
            this.succeeded = True
        except BaseException:
            unsynced.update(live for live in wanted if not live.gone)
            raise
        finally:
            for live in wanted:
                del self._under_way[live]
            this.done.set()

    async def remote(self, lives: AbstractSet[Live]) -> None:
        """Return when Discord has what these inodes hold now: the one condition of all that waits.

        DiscordUnavailable when it has acknowledged nothing at all for the deadline, or when too
        many wait: the bytes are safe here, but a program that asked for Discord is not told "done".
        """
        if self._waiting >= _MAX_WAITING:
            raise DiscordUnavailable("too many fsyncs wait for Discord")
        self._waiting += 1
        try:
            await trio.sleep(_GATHER_S)
            await self._uploader.flush(lambda live: live in lives, patience_s=self.deadline_s)
            if self.published is not None:
                with trio.move_on_after(self.deadline_s) as scope:
                    await self.published()
                if scope.cancelled_caught:
                    raise DiscordUnavailable("its names are not acknowledged in time")
        finally:
            self._waiting -= 1

    async def _make_durable(self, wanted: Sequence[Live]) -> None:
        blocks = self._blocks
        rows = {live: self._unsynced_rows(live) for live in wanted}
        for live in wanted:
            live.lowest_size = live.size  # now: later bytes may miss this sync
        keys = [live.key for live, some in rows.items() if some and blocks.files.exists(live.key)]
        try:
            if keys:
                await trio.to_thread.run_sync(blocks.files.sync, keys)
        except LocalDiskError as error:
            for live in wanted:
                live.sync_failed = live.sync_failed or error
        await self.carry_sizes()
        for live, some in rows.items():
            # One that was left meanwhile owes nothing; another object may stand for its inode now.
            if live.sync_failed is None and blocks.live.get(live.ino) is live:
                await self._put_dirty(live, some)
                # What has no dirty block is on Discord, or a hole: as long as it is.
                synced = max(live.synced_size, live.lowest_size) if live.dirty else live.size
                live.synced_size = synced
                await self._journal.size_synced(live.ino, synced, whole=synced >= live.size)
        await self._sync_journal()

    @staticmethod
    def _unsynced_rows(live: Live) -> list[tuple[int, int, int, Dirty]]:
        return [(i, d.version, d.pages, d) for i, d in live.dirty.items() if d.synced < d.version]

    async def _put_dirty(self, live: Live, rows: Sequence[tuple[int, int, int, Dirty]]) -> None:
        alive = []
        for index, version, pages, copied in rows:
            dirty = copied
            while dirty.heir is not None:  # cut meanwhile: what is left of its bytes is synced
                dirty = dirty.heir
            # What was uploaded meanwhile has no row any more, and must not get one again.
            if live.dirty.get(index) is dirty and version > dirty.uploaded:
                left = -(-live.lowest_size // PAGE_BYTES)
                left -= index * (self._blocks.block_bytes // PAGE_BYTES)
                kept = (1 << max(0, left)) - 1
                alive.append((index, version, pages & kept, dirty))
        if not alive:
            return
        await self._journal.put_dirty(live.ino, [row[:3] for row in alive])
        for _, version, _, dirty in alive:
            dirty.synced = max(dirty.synced, version)

    async def _sync_journal(self) -> None:
        """Make the journal durable, then destroy what waited for that."""
        reap = self._blocks.take_reap()
        try:
            await self._journal.wal_sync()
        except BaseException:
            self._blocks.reap.files.extend(reap.files)
            self._blocks.reap.slots.extend(reap.slots)
            raise
        self._blocks.reap_now(reap)

    async def run_commits(self) -> None:
        """Commit each group `commit_every_s` after its first change: an idle mount sleeps."""
        while True:
            await self._wanted.wait()
            await trio.sleep(self._commit_every_s)
            self._wanted = trio.Event()
            await self.commit()

    async def run_syncs(self) -> None:
        """Sync everything every `sync_every_s`, then let SQLite copy the WAL back."""
        while True:
            await trio.sleep(self._sync_every_s)
            await self.sync()
            await self._journal.checkpoint()
