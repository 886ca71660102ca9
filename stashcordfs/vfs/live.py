"""Live inodes: what the file system holds in memory about a file that is open or has dirty blocks.

A live inode's `size` may run ahead of the journal's by one group commit (50 ms): a write changes
it here, `Durability` carries it over. Everything else about an inode is the journal's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Protocol

    from stashcordfs.errors import LocalDiskError
    from stashcordfs.types import Ino

    class Spawn(Protocol):
        """Start a task beside this one, whose faults are reported and end nothing else."""

        def __call__(self, task: Callable[..., Awaitable[None]], *args: object) -> None: ...


_LONGEST_REST_S = 300.0


@dataclass(slots=True, eq=False)
class Dirty:
    """A block with bytes that its chunk does not have. Identity counts: a truncation replaces it.

    `pages` is a bitmap of what was written; `whole` says that every byte of the block is in the
    local file, else the rest comes from the base chunk, of which `base_valid` bytes count.
    `synced` is the version that the journal's dirty row has, 0 without a row; `uploaded` the one on
    Discord, `asked` the one that somebody waits for. `heir` is what a truncation inside the block
    has put in its place: fewer of the same bytes. `stuck` says why it cannot be sent, for now as
    it seems; it rests until `rests_to_s`, unless asked for. Times are the injected clock's.
    """

    slot: int
    version: int
    pages: int
    whole: bool
    base_valid: int
    since_s: float
    changed_s: float
    charge: int = 0
    synced: int = 0
    uploaded: int = 0
    asked: int = 0
    sealing: bool = False
    heir: Dirty | None = None
    stuck: str = ""
    failures: int = 0
    rests_to_s: float = 0.0

    @property
    def is_asked(self) -> bool:
        """Whether somebody waits until Discord has it."""
        return self.uploaded < self.asked

    def ask(self) -> int:
        """Somebody waits: it is tried at once, whatever came before. Returns the version."""
        self.stuck = ""
        self.rests_to_s = 0.0
        self.asked = self.version
        return self.version

    def failed(self, now_s: float, *, first_s: float, why: str) -> None:
        """It could not be sent: the next try comes ever later. `why`: no try is likely to help."""
        self.rests_to_s = now_s + min(first_s * 2**self.failures, _LONGEST_REST_S)
        self.failures = min(self.failures + 1, 30)
        self.stuck = why
        self.asked = 0


@dataclass(slots=True, eq=False)
class Live:
    """An inode in memory. Kept while it has handles, dirty blocks, or unwritten attributes."""

    ino: Ino
    size: int
    generation: int
    synced_size: int = 0  # how far its bytes are durable, where the journal's size is ahead
    lowest_size: int = 0  # since the sync under way began, which does not cover what is beyond
    handles: int = 0
    writers: int = 0
    nameless: bool = False
    gone: bool = False
    size_changed: bool = False
    bare: bool = False  # it has no extended attributes: the kernel asks at every write(2)
    sync_failed: LocalDiskError | None = None  # until Discord has all that was dirty then
    dirty: dict[int, Dirty] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Ino, int]:
        """The local file's key."""
        return (self.ino, self.generation)

    def has_page(self, page: int, pages_a_block: int) -> bool:
        """Whether a page of the file was written and is not on Discord."""
        index, bit = divmod(page, pages_a_block)
        return index in self.dirty and bool(self.dirty[index].pages >> bit & 1)


@dataclass(slots=True, eq=False)
class Handle:
    """An open file or folder: what its file handle number leads to."""

    fh: int
    live: Live
    flags: int
    next_offset: int = 0
    window_bytes: int = 0
    ahead_to: int = 0

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing (O_WRONLY or O_RDWR)."""
        return bool(self.flags & 3)
