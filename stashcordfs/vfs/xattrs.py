"""Extended attributes by their names: stored ones, access control lists, and what they tell.

* `user.`, `trusted.`, `security.` are stored. The kernel checks who may, but for the names of
  `trusted.`, which are listed to root alone (xattr(7)).
* `system.posix_acl_access` and `_default` are kept in step with the mode (`vfs.acl`).
* `user.stashcordfs.durability` is stored and takes effect (`vfs.durability`).
* `user.stashcordfs.state`, `.pending_bytes` and `.last_error` are made when asked for
  (`vfs.telling`). They are never listed, so that no copy takes them along, and can't be set.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

from stashcordfs.errors import FsError
from stashcordfs.vfs import acl
from stashcordfs.vfs.durability import LEVEL_XATTR

if TYPE_CHECKING:
    from collections.abc import Callable

    from stashcordfs.journal import Journal
    from stashcordfs.types import Attributes, Ino
    from stashcordfs.vfs.blocks import Blocks
    from stashcordfs.vfs.durability import Levels
    from stashcordfs.vfs.telling import Telltale

_STORED = (b"user.", b"trusted.", b"security.")
_OURS = b"user.stashcordfs."


class Xattrs:
    """All of the file system's extended attributes. On the event loop."""

    def __init__(
        self,
        *,
        journal: Journal,
        blocks: Blocks,
        levels: Levels,
        telltale: Telltale,
        now_ns: Callable[[], int],
    ) -> None:
        """Take the collaborators. `load` must run before anything else."""
        self._journal = journal
        self._blocks = blocks
        self._levels = levels
        self._telltale = telltale
        self._now_ns = now_ns
        self._with_default: set[Ino] = set()  # folders that have, or had, a default list

    async def load(self) -> None:
        """Find the folders that have a default list: asking at each creation would cost more."""
        self._with_default = {ino for ino, _ in await self._journal.inodes_with_xattr(acl.DEFAULT)}

    async def get(self, ino: Ino, name: bytes) -> bytes:
        """A value. ENODATA without one, EOPNOTSUPP for a namespace that there is not."""
        if name.startswith(_OURS) and self._telltale.knows(name):
            return await self._telltale.value(ino, name)
        live = self._blocks.live.get(ino)
        if live is not None and live.bare:
            self._check_name(name)
            raise FsError(errno.ENODATA)
        try:
            return await self._journal.get_xattr(ino, name)
        except FsError:
            self._check_name(name)
            raise

    @staticmethod
    def _check_name(name: bytes) -> None:
        if name.startswith(_STORED):
            if name in _STORED:
                raise FsError(errno.EINVAL)
        elif name not in {acl.ACCESS, acl.DEFAULT}:
            raise FsError(errno.EOPNOTSUPP)

    async def set(
        self, ino: Ino, name: bytes, value: bytes, *, in_group: Callable[[int], bool]
    ) -> None:
        """Set one; EPERM for what is only told. `in_group`: whether the caller is in a group."""
        self._check_name(name)
        if self._telltale.knows(name):
            raise FsError(errno.EPERM)
        if name == LEVEL_XATTR:
            await self._levels.check(ino, value)
        live = self._blocks.live.get(ino)
        if live is not None:
            live.bare = False
        if name == acl.ACCESS:
            await self._set_access(ino, value, in_group)
            return
        if name == acl.DEFAULT:
            self._with_default.add(ino)
        await self._journal.set_xattr(ino, name, value, now_ns=self._now_ns())
        if name == LEVEL_XATTR:
            self._levels.note(ino, value)

    async def _set_access(self, ino: Ino, value: bytes, in_group: Callable[[int], bool]) -> None:
        found = await self._journal.getattr(ino)
        mode, kept = acl.with_list(value, found.mode)
        if mode & stat.S_ISGID and not in_group(found.gid):
            mode &= ~stat.S_ISGID
        await self._journal.set_attributes(
            ino, mode=mode, ctime_ns=self._now_ns(), xattrs={acl.ACCESS: kept}
        )

    async def list(self, ino: Ino, *, trusted: bool) -> list[bytes]:
        """Names of what is stored; those of `trusted.` only where they may be seen."""
        names = await self._journal.list_xattrs(ino)
        return names if trusted else [name for name in names if not name.startswith(b"trusted.")]

    async def remove(self, ino: Ino, name: bytes) -> None:
        """Remove one; ENODATA if there is none, though not of an access control list."""
        self._check_name(name)
        try:
            await self._journal.remove_xattr(ino, name, now_ns=self._now_ns())
        except FsError:
            if name not in {acl.ACCESS, acl.DEFAULT}:
                raise
        if name == LEVEL_XATTR:
            self._levels.note(ino, None)

    # ------------------------------------------------------------------ lists and modes

    async def for_new(self, parent: Ino, mode: int) -> tuple[int, dict[bytes, bytes]]:
        """The mode of what is made with `mode` in a folder, and the lists that it inherits."""
        if parent not in self._with_default or stat.S_ISLNK(mode):
            return mode, {}
        try:
            default = await self._journal.get_xattr(parent, acl.DEFAULT)
        except FsError:
            self._with_default.discard(parent)
            return mode, {}
        return acl.inherited(default, mode)

    def has_default(self, folder: Ino) -> bool:
        """Whether what is made in a folder may have inherited a list."""
        return folder in self._with_default

    def made(self, made: Attributes, lists: dict[bytes, bytes]) -> None:
        """Something has been made with these lists."""
        if acl.DEFAULT in lists:
            self._with_default.add(made.ino)

    async def for_mode(self, ino: Ino, mode: int) -> dict[bytes, bytes | None]:
        """The access list that goes with another mode; nothing where there is none."""
        live = self._blocks.live.get(ino)
        if live is not None and live.bare:
            return {}
        try:
            value = await self._journal.get_xattr(ino, acl.ACCESS)
        except FsError:
            return {}
        return {acl.ACCESS: acl.with_mode(value, mode)}
