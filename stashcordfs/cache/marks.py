"""Marks: which pages of which blocks were written and are not yet on Discord.

One file, mapped, holds a table of slots, one per dirty block. A mark is set before the bytes are
written to the block's local file; as the mapping is shared, it survives a killed process (the
kernel owns the page) and costs neither a system call nor a commit. It does not survive a power
cut: what fsync promises is copied to the journal's `dirty` rows by the vfs.

One table for the volume, not one bitmap file per inode: a small file then costs one local file,
and a start finds everything dirty by reading one file (64 bytes a slot with blocks of 1 MiB).

Layout, little-endian: a header of 4096 bytes (magic, block size), then slots of
`<QQQQ` (inode, generation, index, version) and the page bitmap. Version 0: the slot is free.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stashcordfs.cache.files import sync_path
from stashcordfs.errors import LocalDiskError
from stashcordfs.types import PAGE_BYTES, Ino

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MAGIC = b"STASHCORDMARKS1\0"
_HEADER_BYTES = 4096
_HEAD = struct.Struct("<16sQ")
_SLOT = struct.Struct("<QQQQ")
_GROW_SLOTS = 4096


@dataclass(frozen=True, slots=True)
class Mark:
    """One dirty block as the table holds it. `pages` is a bitmap, bit n for page n."""

    slot: int
    ino: Ino
    generation: int
    index: int
    version: int
    pages: int


class Marks:
    """The mapped table. Not safe for several threads; used on the event loop only."""

    def __init__(self, path: Path, block_bytes: int) -> None:
        """Open or make the table at `path`. Raises LocalDiskError."""
        self._bitmap_bytes = max(8, block_bytes // PAGE_BYTES // 8)
        self._stride = _SLOT.size + self._bitmap_bytes
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            size = os.fstat(self._fd).st_size
            if size < _HEADER_BYTES or not any(os.pread(self._fd, _HEAD.size, 0)):
                # New, or a power cut took what was never synced: then no mark would count anyway.
                os.ftruncate(self._fd, _HEADER_BYTES + _GROW_SLOTS * self._stride)
                os.pwrite(self._fd, _HEAD.pack(_MAGIC, block_bytes), 0)
                os.fsync(self._fd)
                sync_path(path.parent)
            self._map = mmap.mmap(self._fd, 0)
        except OSError as error:
            raise LocalDiskError(error.errno or 0, f"marks: {error.strerror}") from error
        magic, found = _HEAD.unpack_from(self._map, 0)
        if magic != _MAGIC or found != block_bytes:
            raise LocalDiskError(0, f"{path} is not a table of marks for this volume")
        self._free: list[int] = []
        self._scan()

    def _scan(self) -> None:
        count = (len(self._map) - _HEADER_BYTES) // self._stride
        self._free = [s for s in range(count - 1, -1, -1) if not self._head(s)[3]]

    def _at(self, slot: int) -> int:
        return _HEADER_BYTES + slot * self._stride

    def _head(self, slot: int) -> tuple[int, int, int, int]:
        return _SLOT.unpack_from(self._map, self._at(slot))

    def __iter__(self) -> Iterator[Mark]:
        """All slots in use, in no order that means anything."""
        count = (len(self._map) - _HEADER_BYTES) // self._stride
        for slot in range(count):
            ino, generation, index, version = self._head(slot)
            if version:
                yield Mark(slot, Ino(ino), generation, index, version, self.pages(slot))

    def claim(self, ino: Ino, generation: int, index: int, version: int, *, pages: int = 0) -> int:
        """Take a free slot for a block. The version is stored last, as it makes the slot count."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._put_pages(slot, pages)
        _SLOT.pack_into(self._map, self._at(slot), ino, generation, index, version)
        return slot

    def update(self, slot: int, version: int, pages: int) -> None:
        """Record what is about to be written: the pages first, then the version."""
        self._put_pages(slot, pages)
        struct.pack_into("<Q", self._map, self._at(slot) + 24, version)

    def pages(self, slot: int) -> int:
        """The page bitmap of a slot."""
        at = self._at(slot) + _SLOT.size
        return int.from_bytes(self._map[at : at + self._bitmap_bytes], "little")

    def release(self, slot: int) -> None:
        """Free a slot: its block is on Discord and the journal says so, or it is no more."""
        _SLOT.pack_into(self._map, self._at(slot), 0, 0, 0, 0)
        self._free.append(slot)

    def close(self) -> None:
        """Unmap; the table stays on disk."""
        self._map.close()
        os.close(self._fd)

    def _put_pages(self, slot: int, pages: int) -> None:
        at = self._at(slot) + _SLOT.size
        self._map[at : at + self._bitmap_bytes] = pages.to_bytes(self._bitmap_bytes, "little")

    def _grow(self) -> None:
        old = (len(self._map) - _HEADER_BYTES) // self._stride
        new = max(old * 2, _GROW_SLOTS)
        try:
            self._map.resize(_HEADER_BYTES + new * self._stride)
        except OSError as error:
            raise LocalDiskError(error.errno or 0, f"marks: {error.strerror}") from error
        self._free.extend(range(new - 1, old - 1, -1))
