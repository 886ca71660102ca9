"""Pages that tell what they are: file, page number, version. What is read back accuses itself.

A page is a header and a filling that follows from it and from the run's seed; so one altered bit,
two pages mixed, or a page at another's place is seen without knowing what was written when.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

PAGE_BYTES = 4096
_HEAD = struct.Struct("<8sQQQ")
_MAGIC = b"CRASHPG1"


@dataclass(frozen=True, slots=True)
class Page:
    """What a page's header says."""

    file: int
    number: int
    version: int


class PageMaker:
    def __init__(self, seed: int) -> None:
        self._key = seed.to_bytes(16, "little", signed=True)

    def make(self, file: int, number: int, version: int) -> bytes:
        """The 4096 bytes of a page. Version 0: nothing was ever written there."""
        if not version:
            return bytes(PAGE_BYTES)
        head = _HEAD.pack(_MAGIC, file, number, version)
        digest = hashlib.blake2b(head, key=self._key).digest()
        return (head + digest * (PAGE_BYTES // len(digest)))[:PAGE_BYTES]

    def make_run(self, file: int, first: int, count: int, version: int) -> bytes:
        """Pages one after another, of one version."""
        return b"".join(self.make(file, first + n, version) for n in range(count))

    def read(self, data: bytes) -> Page | None:
        """What a page or its beginning is; None when it is no page, or not whole."""
        if len(data) < _HEAD.size:
            return None
        magic, file, number, version = _HEAD.unpack_from(data)
        if magic != _MAGIC or self.make(file, number, version)[: len(data)] != data:
            return None
        return Page(file, number, version)
