"""One run of a copy: walk the source, copy what the manifest does not have, check what was copied.

What has not changed since the last run (inode, size, times, mode) and is still there is left alone.
All else is read, hashed, written, and read back; only then its line is in the manifest. So a run
that was cut short goes on where it was. What cannot be read is told by path, and the rest goes on.

In what order: folders as they are met, files several at once, then further names of files, then the
folders' own modes and times, which the files would have changed.
"""

from __future__ import annotations

import stat
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol

import trio

from stashcordfs.errors import FsError, StashcordError, UsageError, first_of
from stashcordfs.journal.inspection import readable
from stashcordfs.recovery.export.manifest import Copied, Entry, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from stashcordfs.recovery.export.sources import Source

    Progress = Callable[[str, int, int], None]

PIECE_BYTES = 1 << 20
_AT_ONCE = 4
_TRIES = 3  # of a file that changes while it is read


class Refused(StashcordError):
    """The target cannot take this entry. The others go on."""


class Writer(Protocol):
    """A file's content on its way into a target."""

    async def write(self, data: bytes) -> None:
        """The next bytes. Refused, UsageError."""

    async def finish(self, digest: bytes) -> str:
        """All was written: read it back, compare, put it in its place; its key. Refused."""

    async def abandon(self) -> None:
        """Leave nothing behind; after `finish` nothing is done."""


class Target(Protocol):
    """Where a copy goes to. Refused: this entry alone; UsageError: nothing can go on."""

    async def load(self, manifest: Manifest) -> None:
        """Take up what earlier runs have copied."""

    async def has(self, copied: Copied) -> bool:
        """Whether what the manifest says is still there, as far as a look can tell."""

    async def clear(self, entry: Entry, known: Copied | None) -> None:
        """Let an entry take its place: what an earlier run put there may go, nothing else."""

    async def begin(self, entry: Entry) -> Writer:
        """Begin a regular file."""

    async def make(self, entry: Entry) -> None:
        """Make a folder, a symbolic link, or what else is no regular file."""

    async def link(self, entry: Entry, first: Copied) -> Copied:
        """Give a file that was copied one more name."""

    async def dress(self, copied: Copied) -> None:
        """Set owner, mode, times, attributes, as far as they can be set."""

    async def remove(self, copied: Copied) -> None:
        """Remove what an earlier run has copied."""

    async def note(self, copied: Copied, *, gone: bool = False) -> None:
        """Put it into the manifest."""

    async def finish(self, manifest: Manifest) -> None:
        """Everything was done: the manifest in its final form."""


@dataclass(slots=True)
class Outcome:
    """What a run did, for `--json`."""

    copied_files: int = 0
    copied_bytes: int = 0
    unchanged: int = 0
    removed: int = 0
    entries: Counter[str] = field(default_factory=Counter)  # by kind, all of the volume
    failed: dict[str, str] = field(default_factory=dict)  # path: why
    not_kept: Counter[str] = field(default_factory=Counter)  # owners and the like, by what

    @property
    def clean(self) -> bool:
        """Everything is there."""
        return not self.failed

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "clean": self.clean,
            "copied_files": self.copied_files,
            "copied_bytes": self.copied_bytes,
            "unchanged": self.unchanged,
            "removed": self.removed,
            "entries": dict(self.entries),
            "failed": self.failed,
            "not_kept": dict(self.not_kept),
        }


class Copy:
    """One run. Lives on the source's loop."""

    def __init__(
        self,
        source: Source,
        target: Target,
        manifest: Manifest,
        *,
        total: int,
        progress: Progress,
        outcome: Outcome | None = None,
        delete: bool = False,
    ) -> None:
        """`total`: how many entries there may be, for the progress. `delete`: be a mirror."""
        self._source = source
        self._target = target
        self._manifest = manifest
        self._total = total
        self._progress = progress
        self._delete = delete
        self.outcome = outcome or Outcome()
        self._seen: set[bytes] = set()
        self._first: dict[int, bytes] = {}  # the name under which an inode's content is copied
        self._links: list[Entry] = []
        self._folders: list[Copied] = []
        self._refused: set[bytes] = set()  # folders that could not be made
        self._unread: list[bytes] = []  # folders whose entries are not known

    async def run(self) -> Outcome:
        """Copy. StashcordError when nothing can go on."""
        await self._target.load(self._manifest)
        send, receive = trio.open_memory_channel[Entry](0)
        try:
            async with trio.open_nursery() as nursery, send, receive:
                for _ in range(_AT_ONCE):
                    nursery.start_soon(self._work, receive.clone())
                await self._walk(send)
        except BaseExceptionGroup as group:
            raise first_of(group) from group
        for entry in self._links:
            await self._guarded(entry, self._link)
        if self._delete:
            await self._remove_gone()
        for folder in reversed(self._folders):
            await self._target.dress(folder)
        await self._target.finish(self._manifest)
        return self.outcome

    async def _walk(self, send: trio.MemorySendChannel[Entry]) -> None:
        done = 0
        async with aclosing(self._source.walk()) as entries:
            async for entry in entries:
                done += 1
                self._progress("copying", done, max(done, self._total))
                await self._take(entry, send)

    async def _take(
        self, entry: Entry | tuple[bytes, str], send: trio.MemorySendChannel[Entry]
    ) -> None:
        if isinstance(entry, tuple):
            path, why = entry
            self._unread.append(path)
            self.outcome.failed[readable(path)] = why
            return
        self._seen.add(entry.path)
        self.outcome.entries[_kind(entry)] += 1
        if entry.path.rpartition(b"/")[0] in self._refused:
            self._refuse(entry, "its folder could not be made")
        elif not stat.S_ISREG(entry.mode):
            await self._guarded(entry, self._other)
        elif entry.nlink > 1 and entry.ino in self._first:
            self._links.append(entry)
        else:
            self._first[entry.ino] = entry.path
            await send.send(entry)

    async def _work(self, receive: trio.MemoryReceiveChannel[Entry]) -> None:
        async with receive:
            async for entry in receive:
                await self._guarded(entry, self._file)

    async def _guarded(self, entry: Entry, work: Callable[[Entry], Any]) -> None:
        """Do the work for one entry; what is wrong with it alone is told by its path."""
        try:
            await work(entry)
        except UsageError:
            raise
        except (StashcordError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else ""
            self._refuse(entry, why or str(error))
            known = self._manifest.copied.get(entry.path)
            if known is not None and not known.sha256 and stat.S_ISREG(entry.mode):
                await self._keep(known, gone=True)  # it was begun, and is not there

    def _refuse(self, entry: Entry, why: str) -> None:
        """Tell of it. What is in a folder that is not ours must not be written into it either."""
        self.outcome.failed[readable(entry.path)] = why
        if stat.S_ISDIR(entry.mode):
            self._refused.add(entry.path)

    async def _keep(self, copied: Copied, *, gone: bool = False) -> None:
        if gone:
            self._manifest.copied.pop(copied.entry.path, None)
        else:
            self._manifest.copied[copied.entry.path] = copied
        await self._target.note(copied, gone=gone)

    # ------------------------------------------------------------------ one entry

    async def _other(self, entry: Entry) -> None:
        known = self._manifest.copied.get(entry.path)
        copied = Copied(entry)
        if stat.S_ISDIR(entry.mode):
            await self._target.clear(entry, known)
            await self._keep(copied)
            await self._target.make(entry)
            self._folders.append(copied)
        elif known and known.same_as(entry) and await self._target.has(known):
            self.outcome.unchanged += 1
        else:
            await self._target.clear(entry, known)
            await self._keep(copied)
            await self._target.make(entry)
            await self._target.dress(copied)

    async def _file(self, entry: Entry) -> None:
        known = self._manifest.copied.get(entry.path)
        if (
            known is not None
            and known.sha256
            and known.link is None
            and known.same_as(entry)
            and await self._target.has(known)
        ):
            self.outcome.unchanged += 1
            return
        await self._target.clear(entry, known)
        if known is None:
            await self._keep(Copied(entry))  # without a hash: begun. What is there is ours
        for left in reversed(range(_TRIES)):
            copied = await self._content(entry)
            now = await self._source.look(entry)
            if copied.same_as(now):
                break
            if not left:
                raise Refused("it changed while it was copied")
            entry = now
        await self._target.dress(copied)
        await self._keep(copied)
        self.outcome.copied_files += 1

    async def _content(self, entry: Entry) -> Copied:
        writer = await self._target.begin(entry)
        digest, at = sha256(), 0
        try:
            async with self._source.reading(entry) as read:
                while at < entry.size:
                    data = bytes(await read(at, min(PIECE_BYTES, entry.size - at)))
                    if not data:
                        break
                    digest.update(data)
                    await writer.write(data)
                    at += len(data)
            key = await writer.finish(digest.digest())
        finally:
            with trio.CancelScope(shield=True):
                await writer.abandon()
        self.outcome.copied_bytes += at
        return Copied(replace(entry, size=at), digest.digest(), key)

    async def _link(self, entry: Entry) -> None:
        first = self._manifest.copied.get(self._first[entry.ino])
        if first is None or first.entry.ino != entry.ino:
            raise FsError(5)  # its content could not be copied
        known = self._manifest.copied.get(entry.path)
        if (
            known is not None
            and known.same_as(entry)
            and (known.link, known.sha256) == (first.entry.path, first.sha256)
            and await self._target.has(known)
        ):
            self.outcome.unchanged += 1
            return
        await self._target.clear(entry, known)
        await self._keep(await self._target.link(entry, first))

    async def _remove_gone(self) -> None:
        """What earlier runs have copied and the volume has no more; nothing else."""
        gone = sorted(self._manifest.copied.keys() - self._seen, reverse=True)
        for path in gone:
            if any(path == f or path.startswith(f + b"/") or not f for f in self._unread):
                continue  # it may be there
            copied = self._manifest.copied[path]
            try:
                await self._target.remove(copied)
            except (StashcordError, OSError) as error:
                self.outcome.failed[readable(path)] = str(error)
                continue
            await self._keep(copied, gone=True)
            self.outcome.removed += 1


def _kind(entry: Entry) -> str:
    if stat.S_ISREG(entry.mode):
        return "files"
    return "folders" if stat.S_ISDIR(entry.mode) else "others"
