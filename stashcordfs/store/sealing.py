"""Sealing one chunk, and opening it again. Pure functions; the bytes are in docs/format.md.

Compression is kept only where it saves 5 %, and large blocks are tried on a sample first. What is
opened is believed only when everything about it matches: key, position, length, and its own id.
"""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING, TypeVar

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stashcordfs.errors import CryptoError, ObjectCorrupt

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.types import ChunkId, ChunkRef, ObjectId

CODEC_PLAIN, CODEC_ZSTD = 0, 1
TAG_BYTES = 16
VERSION = 1
MAX_PLAIN_BYTES = 64 << 20  # of one chunk; a hostile length asks for no more memory than this
INLINE_BYTES = 64 << 10  # below this a thread hop costs more than the work
_LEVEL = 3
_SAMPLE_BYTES = 16 << 10
Item = TypeVar("Item")
Result = TypeVar("Result")
_AAD = struct.Struct(">8sB16sI16sI32sBI")
_threads: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("sealing threads")


def squeeze(data: bytes, *, compress: bool = True) -> tuple[bytes, int]:
    """The bytes to encrypt, and their codec: zstd where it saves 5 %, else as they are."""
    if not compress or len(data) < 64:
        return data, CODEC_PLAIN
    if len(data) > 4 * _SAMPLE_BYTES:
        middle = len(data) // 2
        half = _SAMPLE_BYTES // 2
        sample = data[:half] + data[middle : middle + half]
        if len(zstd.compress(sample, 1)) > len(sample) * 0.95:
            return data, CODEC_PLAIN
    small = zstd.compress(data, _LEVEL)
    return (small, CODEC_ZSTD) if len(small) <= len(data) * 0.95 else (data, CODEC_PLAIN)


def expand(data: bytes, codec: int, plain_length: int) -> bytes:
    """Undo `squeeze`, never making more than `plain_length` bytes. ObjectCorrupt otherwise."""
    if not 0 <= plain_length <= MAX_PLAIN_BYTES:
        raise ObjectCorrupt("a sealed piece claims an impossible length")
    if codec == CODEC_PLAIN:
        plain = data
    elif codec == CODEC_ZSTD:
        try:
            unpacker = zstd.ZstdDecompressor()
            plain = unpacker.decompress(data, plain_length + 1)
        except zstd.ZstdError as error:
            raise ObjectCorrupt("a sealed piece does not decompress") from error
        if not unpacker.eof or unpacker.unused_data:
            raise ObjectCorrupt("a sealed piece is longer than it says")
    else:
        raise ObjectCorrupt(f"a sealed piece has the unknown codec {codec}; update this program")
    if len(plain) != plain_length:
        raise ObjectCorrupt("a sealed piece is not of the length that it says")
    return plain


def new_compressor() -> zstd.ZstdCompressor:
    """For one frame of what is too long to be held whole."""
    return zstd.ZstdCompressor(_LEVEL)


def new_decompressor() -> zstd.ZstdDecompressor:
    """For one such frame; `expand_some` takes out what it holds."""
    return zstd.ZstdDecompressor()


def expand_some(unpacker: zstd.ZstdDecompressor, data: bytes, most_bytes: int) -> bytes:
    """Feed `data`, and take at most so many bytes out. ObjectCorrupt when it is no such frame."""
    try:
        return unpacker.decompress(data, most_bytes)
    except zstd.ZstdError as error:
        raise ObjectCorrupt("a sealed stream does not decompress") from error


def encrypt_chunk(
    keys: VolumeKeys,
    object_id: ObjectId,
    number: int,
    squeezed: bytes,
    *,
    codec: int,
    plain_length: int,
    chunk_id: ChunkId,
    epoch: int | None = None,
) -> bytes:
    """Encrypt what `squeeze` gave, bound to its place in one pack."""
    in_epoch = keys.current_epoch if epoch is None else epoch
    key = AESGCM(keys.object_key(in_epoch, object_id, b"pack"))
    aad = _aad(keys, in_epoch, object_id, number, chunk_id, codec, plain_length)
    return key.encrypt(number.to_bytes(12, "big"), squeezed, aad)


def seal_chunk(
    keys: VolumeKeys, object_id: ObjectId, number: int, data: bytes, *, compress: bool = True
) -> tuple[bytes, int]:
    """Compress and encrypt one block for place `number` of a pack: sealed bytes and codec."""
    squeezed, codec = squeeze(data, compress=compress)
    sealed = encrypt_chunk(
        keys,
        object_id,
        number,
        squeezed,
        codec=codec,
        plain_length=len(data),
        chunk_id=keys.chunk_id(data),
    )
    return sealed, codec


def open_chunk(keys: VolumeKeys, ref: ChunkRef, sealed: bytes | memoryview) -> bytes:
    """The plaintext of one chunk. ObjectCorrupt on any deviation from `ref`."""
    if len(sealed) != ref.length or not 0 <= ref.number < 1 << 32 or ref.length < TAG_BYTES:
        raise ObjectCorrupt("a chunk is not of its recorded length")
    if not 0 <= ref.plain_length <= MAX_PLAIN_BYTES or not 0 <= ref.codec < 256:
        raise ObjectCorrupt("a chunk claims an impossible length or codec")
    try:
        key = AESGCM(keys.object_key(ref.epoch, ref.pack, b"pack"))
        aad = _aad(keys, ref.epoch, ref.pack, ref.number, ref.chunk_id, ref.codec, ref.plain_length)
        squeezed = key.decrypt(ref.number.to_bytes(12, "big"), sealed, aad)
    except (InvalidTag, CryptoError, struct.error) as error:
        raise ObjectCorrupt("a chunk was changed since it was stored") from error
    plain = expand(squeezed, ref.codec, ref.plain_length)
    if not keys.names_chunk(ref.chunk_id, plain, epoch=ref.epoch):
        raise ObjectCorrupt("a chunk is not the content that its id names")
    return plain


async def seal_many(
    keys: VolumeKeys,
    object_id: ObjectId,
    blocks: Sequence[bytes],
    *,
    first: int = 0,
    compress: bool = True,
) -> list[tuple[bytes, int]]:
    """Seal blocks for consecutive places, in worker threads."""

    def one(item: tuple[int, bytes]) -> tuple[bytes, int]:
        return seal_chunk(keys, object_id, first + item[0], item[1], compress=compress)

    return await _in_threads(one, list(enumerate(blocks)))


async def open_many(
    keys: VolumeKeys, items: Sequence[tuple[ChunkRef, bytes | memoryview]]
) -> list[bytes]:
    """Open chunks in worker threads; the first fault is raised."""
    return await _in_threads(lambda item: open_chunk(keys, *item), items)


async def _in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Do the work for all items; their results in order, or the first fault as itself."""
    done: dict[int, Result] = {}
    faults: list[ObjectCorrupt] = []

    async def run(at: int) -> None:
        try:
            done[at] = await trio.to_thread.run_sync(work, items[at], limiter=threads())
        except ObjectCorrupt as error:
            faults.append(error)

    async with trio.open_nursery() as nursery:
        for at in range(len(items)):
            nursery.start_soon(run, at)
    if faults:
        raise faults[0]
    return [done[at] for at in range(len(items))]


def threads() -> trio.CapacityLimiter:
    """The two threads that sealing may use, so that reading and the kernel get the rest."""
    try:
        return _threads.get()
    except LookupError:
        limiter = trio.CapacityLimiter(2)
        _threads.set(limiter)
        return limiter


def _aad(
    keys: VolumeKeys,
    epoch: int,
    object_id: ObjectId,
    number: int,
    chunk_id: ChunkId,
    codec: int,
    plain_length: int,
) -> bytes:
    fields = (keys.volume, epoch, object_id, number, chunk_id, codec, plain_length)
    return _AAD.pack(b"chunk\0\0\0", VERSION, *fields)
