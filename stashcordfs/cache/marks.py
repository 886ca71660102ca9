"""Marks: which pages of which blocks were written and are not yet on Discord.

One file, mapped, holds a table of slots, one per dirty block. A mark is set before the bytes are
written to the block's local file; as the mapping is shared, it survives a killed process (the
kernel owns the page) and costs neither a system call nor a commit. It does not survive a power
cut: what fsync promises is copied to the journal's `dirty` rows by the vfs.

One table for the volume, not one bitmap file per inode: a small file then costs one local file,
and a start finds everything dirty by reading one file (64 bytes a slot with blocks of 1 MiB).

A slot is `<QQQQ` (inode, generation, index, version), then the page bitmap. Version 0: it is free.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stashcordfs.cache.mapped import MappedTable
from stashcordfs.types import PAGE_BYTES, Ino

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MAGIC = b"STASHCORDMARKS1\0"
_SLOT = struct.Struct("<QQQQ")
_VERSION_AT = 24  # in a slot


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
        stride = _SLOT.size + self._bitmap_bytes
        self._table = MappedTable(path, magic=_MAGIC, parameter=block_bytes, stride=stride)
        last = len(self._table) - 1
        self._free = [slot for slot in range(last, -1, -1) if not self._head(slot)[3]]

    def _head(self, slot: int) -> tuple[int, int, int, int]:
        return _SLOT.unpack_from(self._table.map, self._table.at(slot))

    def __iter__(self) -> Iterator[Mark]:
        """All slots in use, in no order that means anything."""
        for slot in range(len(self._table)):
            ino, generation, index, version = self._head(slot)
            if version:
                yield Mark(slot, Ino(ino), generation, index, version, self.pages(slot))

    def claim(self, ino: Ino, generation: int, index: int, version: int, *, pages: int = 0) -> int:
        """Take a free slot for a block. The version is stored last, as it makes the slot count."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._put_pages(slot, pages)
        _SLOT.pack_into(self._table.map, self._table.at(slot), ino, generation, index, version)
        return slot

    def update(self, slot: int, version: int, pages: int) -> None:
        """Record what is about to be written: the pages first, then the version."""
        self._put_pages(slot, pages)
        # In one store: `struct.pack_into` writes zeros first, and a kill then frees the slot.
        at = self._table.at(slot) + _VERSION_AT
        self._table.map[at : at + 8] = version.to_bytes(8, "little")

    def pages(self, slot: int) -> int:
        """The page bitmap of a slot."""
        at = self._table.at(slot) + _SLOT.size
        return int.from_bytes(self._table.map[at : at + self._bitmap_bytes], "little")

    def release(self, slot: int) -> None:
        """Free a slot: its block is on Discord and the journal says so, or it is no more."""
        _SLOT.pack_into(self._table.map, self._table.at(slot), 0, 0, 0, 0)
        self._free.append(slot)

    def close(self) -> None:
        """Unmap; the table stays on disk."""
        self._table.close()

    def _put_pages(self, slot: int, pages: int) -> None:
        at = self._table.at(slot) + _SLOT.size
        self._table.map[at : at + self._bitmap_bytes] = pages.to_bytes(self._bitmap_bytes, "little")

    def _grow(self) -> None:
        old = len(self._table)
        self._table.grow()
        self._free.extend(range(len(self._table) - 1, old - 1, -1))
