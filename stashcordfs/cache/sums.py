"""Checksums of clean blocks: CRC-32 of each 64 KiB, against rot of the local disk.

Not against somebody on this machine, who could change them as well. Pure; 9 us a unit.
"""

from __future__ import annotations

import zlib

UNIT_BYTES = 64 << 10
_SUM_BYTES = 4


def sums_of(data: bytes | memoryview) -> bytes:
    """One sum after the other; the last unit may be short."""
    view = memoryview(data)
    return b"".join(
        zlib.crc32(view[at : at + UNIT_BYTES]).to_bytes(_SUM_BYTES, "little")
        for at in range(0, len(view), UNIT_BYTES)
    )


def units_around(start: int, stop: int, length: int) -> tuple[int, int]:
    """The range of whole units that holds `start` to `stop` of `length` bytes."""
    return start // UNIT_BYTES * UNIT_BYTES, min(-(-stop // UNIT_BYTES) * UNIT_BYTES, length)


def agrees(data: bytes | memoryview, start: int, sums: bytes) -> bool:
    """Whether bytes from `start`, a unit's edge, are those that the sums were made of."""
    first = start // UNIT_BYTES * _SUM_BYTES
    found = sums_of(data)
    return sums[first : first + len(found)] == found
