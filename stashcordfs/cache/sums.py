"""Checksums of clean blocks: CRC-32 of each page, against rot of the local disk.

Not against somebody on this machine, who could change them as well. Pure.

The unit is the least that a read must read and sum: a page costs 1 us; with 64 KiB a random read of
4 KiB cost 20 us more. A block of 1 MiB has 1 KiB of sums.
"""

from __future__ import annotations

import struct
import zlib

from stashcordfs.types import PAGE_BYTES

UNIT_BYTES = PAGE_BYTES
_SUM_BYTES = 4


def sums_of(data: bytes | memoryview) -> bytes:
    """One sum after the other; the last unit may be short."""
    if len(data) <= UNIT_BYTES:
        return zlib.crc32(data).to_bytes(_SUM_BYTES, "little") if data else b""
    view, sum_of = memoryview(data), zlib.crc32
    sums = [sum_of(view[at : at + UNIT_BYTES]) for at in range(0, len(view), UNIT_BYTES)]
    return struct.pack(f"<{len(sums)}I", *sums)


def units_around(start: int, stop: int, length: int) -> tuple[int, int]:
    """The range of whole units that holds `start` to `stop` of `length` bytes."""
    return start // UNIT_BYTES * UNIT_BYTES, min(-(-stop // UNIT_BYTES) * UNIT_BYTES, length)


def agrees(data: bytes | memoryview, start: int, sums: bytes) -> bool:
    """Whether bytes from `start`, a unit's edge, are those that the sums were made of."""
    first = start // UNIT_BYTES * _SUM_BYTES
    found = sums_of(data)
    return sums[first : first + len(found)] == found
