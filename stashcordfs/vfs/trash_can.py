"""The trash as people use it: what is in it, bringing back, emptying, and expiry.

`journal.trash` says how it is kept. Nothing here touches the network, and every step is a small
transaction of its own: a tree that is brought back, or a trash that expires, holds up nobody.
"""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import FsError, UsageError
from stashcordfs.types import ROOT_INO, Ino

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from stashcordfs.journal import Journal, Trashed
    from stashcordfs.vfs.blocks import Blocks
    from stashcordfs.vfs.durability import Levels

_PAGE = 500
_LISTED = 1000  # paths that a report names; all are counted
_EXPIRE_EVERY_S = 6 * 3600.0  # each round that finds something is a segment: two requests


Folders = dict[tuple[Ino, bytes], "Trashed"]


@dataclass(frozen=True, slots=True)
class Item:
    """A file in the trash and its path from the root; of a folder that is lost, beginning "?"."""

    entry: Trashed
    path: bytes

    def as_json(self) -> dict[str, object]:
        """For the control socket and `--json`. Times in seconds, Unix time."""
        found = self.entry.found
        return {
            "id": found.ino,
            "path": shown(self.path),
            "size": found.size,
            "deleted": self.entry.deleted_ns / 1e9,
            "modified": found.mtime_ns / 1e9,
            "mode": found.mode,
            "uid": found.uid,
            "gid": found.gid,
            "incomplete_blocks": self.entry.lost_blocks,
        }


@dataclass(slots=True)
class Restored:
    """What came back, and what did not because something is there in its place."""

    files: int = 0
    paths: list[str] = field(default_factory=list)
    in_the_way: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """For the control socket and `--json`."""
        return {"files": self.files, "paths": self.paths, "in_the_way": self.in_the_way}


def shown(path: bytes) -> str:
    """A path as JSON has it: what is no UTF-8 survives a round trip."""
    return "/" + path.decode("utf-8", "surrogateescape")


def plain(path: str) -> bytes:
    """A path from the root as a person gives it, without slashes around it."""
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise UsageError(f"{path}: give it from the volume's root, without ..")
    return "/".join(parts).encode("utf-8", "surrogateescape")


class TrashCan:
    """One volume's trash. `run` is supervised by the daemon."""

    def __init__(
        self,
        *,
        journal: Journal,
        blocks: Blocks,
        levels: Levels,
        now_ns: Callable[[], int],
        require_writable: Callable[[], None],
        keep_s: float,
    ) -> None:
        """Take the collaborators. `keep_s`: how long what is deleted stays; 0: not at all."""
        self._require_writable = require_writable
        self._journal = journal
        self._blocks = blocks
        self._levels = levels
        self._now_ns = now_ns
        self.named: Callable[[Ino, bytes], None] = lambda *_: None  # the kernel must see it
        self.keep_s = keep_s

    @property
    def keep_s(self) -> float:
        """How long what is deleted stays, in seconds."""
        return self._keep_s

    @keep_s.setter
    def keep_s(self, value: float) -> None:
        self._keep_s = value
        self._journal.keep_trash = value > 0

    # ------------------------------------------------------------------ looking

    @property
    def usage(self) -> tuple[int, int]:
        """How many files and folders are in the trash, and how many bytes."""
        return self._journal.trash_usage

    async def items(self, below: bytes = b"") -> AsyncIterator[Item]:
        """The files in the trash at a path and below it, in no order that means anything."""
        at = 0
        while page := await self._journal.trash_page(at, _PAGE):
            at = page[-1].found.ino
            for entry in page:
                if not entry.is_folder:
                    path = await self._path(entry)
                    if not below or path == below or path.startswith(below + b"/"):
                        yield Item(entry, path)
            await trio.lowlevel.checkpoint()

    async def _path(self, entry: Trashed) -> bytes:
        path = await self._journal.trash_path(entry)
        return b"?/" + entry.name if path is None else path

    # ------------------------------------------------------------------ bringing back

    async def restore(self, what: str, *, to: str | None = None) -> Restored:
        """Bring back a file by its number or path, or all that was below a folder's path.

        Of several versions the newest. What is there is never replaced. Missing folders come back
        as they were where they are in the trash, else they are made like the folder above.
        UsageError when there is nothing of that kind, FsError EEXIST when it is in the way.
        """
        self._require_writable()
        prefix, items = await self._chosen(what)
        folders = await self._folders()
        outcome = Restored()
        for item in sorted(items, key=lambda item: item.path):
            target = item.path
            if to is not None:
                target = plain(to) + item.path[len(prefix) :]
            elif target.startswith(b"?/"):
                raise UsageError(f"{shown(target)}: its folder is lost; say where with --to")
            if await self._bring_back(item.entry, target, folders):
                outcome.files += 1
                outcome.paths += [shown(target)] if len(outcome.paths) < _LISTED else []
            elif len(items) == 1:
                text = f"{shown(target)} exists: move it away, or restore elsewhere with --to"
                raise FsError(errno.EEXIST, text)
            else:
                outcome.in_the_way += [shown(target)] if len(outcome.in_the_way) < _LISTED else []
            await trio.lowlevel.checkpoint()
        await self._levels.load()
        return outcome

    async def _chosen(self, what: str) -> tuple[bytes, list[Item]]:
        """The items that are meant, and the path that was given or is theirs."""
        if what.isdecimal():
            entry = await self._journal.trashed(Ino(int(what)))
            if entry is None or entry.is_folder:
                raise UsageError(f"nothing in the trash has the id {what}")
            item = Item(entry, await self._path(entry))
            return item.path, [item]
        prefix = plain(what)
        newest: dict[bytes, Item] = {}
        async for item in self.items(prefix):
            known = newest.get(item.path)
            if known is None or _age(known) < _age(item):
                newest[item.path] = item
        if not newest:
            raise UsageError(f"nothing in the trash was at {shown(prefix)} or below")
        return prefix, list(newest.values())

    async def _folders(self) -> Folders:
        """The folders in the trash by where they were, the newest of each."""
        found: Folders = {}
        at = 0
        while page := await self._journal.trash_page(at, _PAGE):
            at = page[-1].found.ino
            for entry in page:
                known = found.get((entry.parent, entry.name))
                if entry.is_folder and (known is None or known.deleted_ns <= entry.deleted_ns):
                    found[entry.parent, entry.name] = entry
            await trio.lowlevel.checkpoint()
        return found

    async def _bring_back(self, entry: Trashed, path: bytes, folders: Folders) -> bool:
        """Whether it has its name again; False when the name is taken."""
        folder, _, name = path.rpartition(b"/")
        parent = await self._folder(folder, folders)
        if parent is None:
            return False
        try:
            await self._journal.revive(entry, parent, name, now_ns=self._now_ns())
        except FsError as error:
            if error.errno == errno.EEXIST:
                return False
            raise
        live = self._blocks.live.get(entry.found.ino)
        if live is None:
            await self._blocks.revive(entry.found.ino)
        else:
            live.nameless = False  # it is still open
        self.named(parent, name)
        await self._journal.prune_trash(entry.parent)
        return True

    async def _folder(self, path: bytes, folders: Folders) -> Ino | None:
        """The folder at a path; what is missing of it is brought back, or made. None: no folder."""
        at = ROOT_INO
        for name in path.split(b"/") if path else ():
            found = await self._journal.lookup(at, name)
            if found is None:
                at = await self._missing_folder(at, name, folders)
            elif stat.S_ISDIR(found.mode):
                at = found.ino
            else:
                return None
        return at

    async def _missing_folder(self, parent: Ino, name: bytes, folders: Folders) -> Ino:
        now = self._now_ns()
        entry = folders.pop((parent, name), None)
        if entry is not None and await self._journal.trashed(entry.found.ino) is not None:
            ino = (await self._journal.revive(entry, parent, name, now_ns=now)).ino
        else:
            above = await self._journal.getattr(parent)
            made = await self._journal.create_node(
                parent, name, mode=above.mode, uid=above.uid, gid=above.gid, now_ns=now
            )
            ino = made.ino
        self.named(parent, name)
        return ino

    # ------------------------------------------------------------------ emptying

    async def empty(self, *, older_than_s: float = 0.0) -> int:
        """Forget what was deleted so long ago or longer, for good; how many files that were."""
        self._require_writable()
        before_ns = self._now_ns() - int(older_than_s * 1e9)
        gone, at = 0, 0
        while page := await self._journal.trash_page(at, _PAGE):
            at = page[-1].found.ino
            for entry in page:
                live = self._blocks.live.get(entry.found.ino)
                if entry.is_folder or entry.deleted_ns > before_ns or live is not None:
                    continue  # folders go with the last of what they held
                await self._journal.drop_trashed(entry)
                gone += 1
                await trio.lowlevel.checkpoint()
        return gone

    async def run(self) -> None:
        """Forget what has been there long enough, for ever."""
        while True:
            try:
                await self.empty(older_than_s=self.keep_s)
            except FsError as error:
                if error.errno != errno.EROFS:  # another writer has the volume: his to do
                    raise
            await trio.sleep(_EXPIRE_EVERY_S)


def _age(item: Item) -> tuple[int, int]:
    return item.entry.deleted_ns, item.entry.found.ino
