"""What crosses the rooms: identifiers and small frozen records. No logic, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, NewType

Ino = NewType("Ino", int)  # writer epoch << 40 | n, never reused; the root is 1
ChunkId = NewType("ChunkId", bytes)  # 32 bytes: keyed hash of a block's plaintext
ObjectId = NewType("ObjectId", bytes)  # 16 bytes: a pack, segment or checkpoint

ROOT_INO = Ino(1)
DAMAGED_CHUNK = 0  # in a chunk list: this content is lost, reading it fails; chunks count from 16
PAGE_BYTES = 4096  # grain of dirtiness inside a block


class Attributes(NamedTuple):
    """An inode's attributes. Times in ns since the epoch, `blocks` in units of 512 bytes.

    A tuple, as every operation makes several: a frozen dataclass takes four times as long to make.
    """

    ino: Ino
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one message may carry, in bytes and pieces. Learned, lowered on 413, never assumed."""

    max_attachment_bytes: int = 20 * 1024 * 1024
    max_attachments: int = 10
    max_request_bytes: int = 25 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Location:
    """Where an object is: ids are addresses. A link is a lease and is never stored."""

    channel: int
    message: int
    attachment: int
    filename: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """Where a chunk's sealed bytes lie within a pack, and what is needed to open it."""

    chunk_id: ChunkId
    pack: ObjectId
    epoch: int  # key epoch that sealed the pack
    number: int  # position in the pack; also the nonce
    offset: int  # of the sealed bytes within the pack
    length: int  # sealed, tag included
    plain_length: int
    codec: int
