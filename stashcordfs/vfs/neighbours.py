"""Small files that are read one after another come out of their packs in long ranges.

Small files lie in a pack in the order of their inodes, so a program that reads a tree asks for one
short range after the next. Each would be a request of its own: a tree of 15,000 files took ten
minutes. When reads of small chunks follow each other in a pack, more is fetched than was asked for,
twice as much each time, and kept in memory as it came, sealed; a read elsewhere fetches what it
needs and nothing else. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachetools import LRUCache

if TYPE_CHECKING:
    from stashcordfs.types import ObjectId

_SMALL_BYTES = 128 << 10  # a longer range is worth a request of its own
_NEAR_BYTES = 1 << 20
_FIRST_BYTES, _MOST_BYTES = 256 << 10, 4 << 20
_PACKS = 4  # so at most 16 MiB are kept


@dataclass(slots=True)
class _Trail:
    """What was asked of a pack last, how far beyond it to fetch, and what is here of it."""

    end: int
    window: int = 0
    start: int = 0
    kept: bytes = b""


class Neighbours:
    """Plans the ranges to fetch from packs and keeps what came beyond. One loop."""

    def __init__(self) -> None:
        self._trails: LRUCache[ObjectId, _Trail] = LRUCache(_PACKS)

    def take(self, pack: ObjectId, start: int, length: int) -> memoryview | None:
        """These bytes of a pack, if they are here."""
        trail = self._trails.get(pack)
        if trail is None or not trail.start <= start <= trail.start + len(trail.kept) - length:
            return None
        trail.end = start + length
        return memoryview(trail.kept)[start - trail.start :][:length]

    def forget(self, pack: ObjectId) -> None:
        """What is here of a pack is damaged."""
        self._trails.pop(pack, None)

    def plan(self, pack: ObjectId, start: int, length: int, *, size: int) -> int:
        """How many bytes to fetch from `start` when `length` are needed of a pack of `size`."""
        trail = self._trails.get(pack)
        if length > _SMALL_BYTES:
            return length
        near = trail is not None and abs(start - trail.end) <= _NEAR_BYTES
        window = min(max(_FIRST_BYTES, 2 * trail.window), _MOST_BYTES) if near and trail else 0
        self._trails[pack] = _Trail(start + length, window)
        return max(length, min(window, size - start))

    def keep(self, pack: ObjectId, start: int, data: bytes) -> None:
        """What has come from `start` on, by a plan."""
        trail = self._trails.get(pack)
        if trail is not None:
            trail.start, trail.kept = start, data
