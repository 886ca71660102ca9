"""What the rules ask of a database: small synchronous primitives inside one transaction.

Another database can stand behind the same calls. No primitive decides anything about POSIX; each
is one statement, indexed, and raises JournalError when the database fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from stashcordfs.types import Attributes, ChunkId, ChunkRef, Ino, Location, ObjectId


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """An entry of a chunk list: the chunk, where it is, and how many of its bytes count."""

    ref: ChunkRef
    location: Location
    valid_length: int

    @property
    def damaged(self) -> bool:
        """Its content is known to be lost: reading it is an error, never zeros."""
        return self.location.message <= 0


@dataclass(frozen=True, slots=True)
class Intent:
    """An upload whose outcome is not in the journal yet: its packs' names and sizes by id.

    `since_ns` is when it was begun, Unix time; `chunk_ids` are those of all its packs.
    """

    id: int
    nonce: str
    after_message: int
    since_ns: int
    packs: dict[ObjectId, tuple[str, int]]
    chunk_ids: frozenset[ChunkId]


class Engine(Protocol):
    """Primitives for `rules`. Names are bytes; `cookie` orders a folder's entries."""

    def inode(self, ino: Ino) -> Attributes | None:
        """The inode, or None."""

    def forget(self) -> None:
        """Inodes were changed past this engine: keep nothing of them in memory."""

    def new_ino(self) -> Ino:
        """A number never used before."""

    def insert_inode(self, attributes: Attributes) -> None:
        """Store a new inode."""

    def update_inode(self, found: Attributes, after: Attributes) -> None:
        """Store an inode anew, but for its stored bytes."""

    def touch_folder(self, ino: Ino, now_ns: int, *, subfolders: int = 0) -> None:
        """A name in the folder changed: mtime and ctime; a link for each subfolder more or less."""

    def set_links(self, ino: Ino, nlink: int, now_ns: int) -> None:
        """Store how many links an inode has, and its ctime."""

    def delete_inode(self, found: Attributes) -> None:
        """Forget the inode with its link target and extended attributes."""

    def entry(self, parent: Ino, name: bytes) -> Attributes | None:
        """The inode that a name leads to."""

    def insert_entry(self, parent: Ino, name: bytes, ino: Ino) -> None:
        """Store a name, after all others of its folder."""

    def delete_entry(self, parent: Ino, name: bytes) -> None:
        """Remove a name."""

    def set_entry(self, parent: Ino, name: bytes, ino: Ino) -> None:
        """Let an existing name lead elsewhere; its place in the folder's order stays."""

    def has_entries(self, parent: Ino) -> bool:
        """Whether a folder holds anything."""

    def folder_of(self, ino: Ino) -> Ino | None:
        """A folder that holds the inode, None without one."""

    def set_target(self, ino: Ino, target: bytes) -> None:
        """Store a symbolic link's target."""
