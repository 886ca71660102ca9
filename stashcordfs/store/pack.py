"""Pack format v1 (docs/format.md is normative): header, sealed chunks, sealed table, its length.

Every chunk is sealed alone, so that one is read with only its bytes and the journal's row. What
authenticates a chunk binds it to its place: it cannot be moved to another pack, number or volume.
The parser is strict: whatever is not exactly as written is ObjectCorrupt.
"""

from __future__ import annotations

import hmac
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stashcordfs.crypto.keys import KIND_PACK, object_filename
from stashcordfs.errors import CryptoError, ObjectCorrupt
from stashcordfs.types import ChunkId, ChunkRef, Ino, ObjectId

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from stashcordfs.crypto.keys import VolumeKeys

MAGIC = b"STFSPACK"
VERSION = 1
CODEC_RAW, CODEC_ZSTD = 0, 1
TAG_BYTES = 16
HEADER = struct.Struct(">8sBBxxI16s16s")  # magic, version, kind, epoch, volume, object id
_COUNTS = struct.Struct(">III")
_CHUNK = struct.Struct(">32sIIIB")  # chunk id, offset, length, plain length, codec
_REFERENCE = struct.Struct(">QIQ32sI")  # inode, block, sequence, chunk id, valid length
_FILE = struct.Struct(">QQQIH")  # inode, parent, size, mode, length of the name that follows
_TABLE_HEAD = struct.Struct(">IB")  # plain length, codec
_LENGTH = struct.Struct(">I")
_AAD = struct.Struct(">16sBB16sI16sI32sBI")
_MAX_TABLE_BYTES = 64 << 20
_LEVEL = 3
_SAMPLE_BYTES = 64 << 10

FIXED_BYTES = HEADER.size + _TABLE_HEAD.size + _COUNTS.size + TAG_BYTES + _LENGTH.size
CHUNK_ROW_BYTES = _CHUNK.size
REFERENCE_ROW_BYTES = _REFERENCE.size
FILE_ROW_BYTES = _FILE.size + 255  # the longest name


@dataclass(frozen=True, slots=True)
class Reference:
    """Which block of which file a chunk is. `sequence` orders several of one block."""

    ino: Ino
    index: int
    sequence: int
    chunk_id: ChunkId
    valid_length: int


@dataclass(frozen=True, slots=True)
class FileNote:
    """A file's name and place when the pack was made."""

    ino: Ino
    parent: Ino
    name: bytes
    size: int
    mode: int


@dataclass(frozen=True, slots=True)
class Table:
    """What a pack says of itself."""

    object_id: ObjectId
    epoch: int
    chunks: tuple[ChunkRef, ...]
    references: tuple[Reference, ...]
    files: tuple[FileNote, ...]


@dataclass(frozen=True, slots=True)
class FinishedPack:
    """A pack ready to be sent. `parts` are its bytes, in order."""

    object_id: ObjectId
    epoch: int
    filename: str
    parts: tuple[bytes, ...]
    size: int
    chunks: tuple[ChunkRef, ...]


# ---------------------------------------------------------------------- chunks


def compress(data: bytes) -> tuple[bytes, int]:
    """The data as it will be sealed, and its codec. zstd only where it saves a twentieth."""
    if len(data) > 2 * _SAMPLE_BYTES:
        middle = len(data) // 2
        sample = data[middle : middle + _SAMPLE_BYTES]
        if len(zstd.compress(sample, 1)) > len(sample) * 0.97:
            return data, CODEC_RAW
    packed = zstd.compress(data, _LEVEL)
    return (packed, CODEC_ZSTD) if len(packed) <= len(data) * 0.95 else (data, CODEC_RAW)


def _decompress(data: bytes, codec: int, plain_length: int) -> bytes:
    if codec == CODEC_RAW:
        plain = data
    elif codec == CODEC_ZSTD:
        decoder = zstd.ZstdDecompressor()
        try:
            plain = decoder.decompress(data, plain_length + 1)  # bounded: never a bomb
        except zstd.ZstdError as error:
            raise ObjectCorrupt(f"compressed data cannot be read: {error}") from error
    else:
        raise ObjectCorrupt(f"unknown codec {codec}: written by a newer program?")
    if len(plain) != plain_length:
        raise ObjectCorrupt("data has not the length that was sealed with it")
    return plain


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _chunk_aad(keys: VolumeKeys, ref: ChunkRef) -> bytes:
    return _AAD.pack(
        b"stashcordfs chnk", KIND_PACK, VERSION, keys.volume, ref.epoch, ref.pack,
        ref.number, ref.chunk_id, ref.codec, ref.plain_length,
    )  # fmt: skip


def _chunk_cipher(keys: VolumeKeys, epoch: int, pack: ObjectId) -> AESGCM:
    return AESGCM(keys.object_key(epoch, pack, b"pack chunks"))


def seal_chunk(keys: VolumeKeys, ref: ChunkRef, packed: bytes) -> bytes:
    """Seal compressed data for the place that `ref` names."""
    return _chunk_cipher(keys, ref.epoch, ref.pack).encrypt(
        _nonce(ref.number), packed, _chunk_aad(keys, ref)
    )


def open_chunk(keys: VolumeKeys, ref: ChunkRef, sealed: bytes) -> bytes:
    """The chunk's plaintext. ObjectCorrupt on any deviation from what was stored."""
    if len(sealed) != ref.length:
        raise ObjectCorrupt(f"{len(sealed)} bytes where a chunk has {ref.length}")
    try:
        packed = _chunk_cipher(keys, ref.epoch, ref.pack).decrypt(
            _nonce(ref.number), sealed, _chunk_aad(keys, ref)
        )
    except InvalidTag:
        text = f"chunk {ref.number} of pack {object_filename(ref.pack)} is not what was stored"
        raise ObjectCorrupt(text) from None
    plain = _decompress(packed, ref.codec, ref.plain_length)
    if not hmac.compare_digest(keys.chunk_id(plain), ref.chunk_id):
        raise ObjectCorrupt("a chunk opens, but is not the one that its name says")
    return plain


# ---------------------------------------------------------------------- packs


def header(keys: VolumeKeys, epoch: int, object_id: ObjectId) -> bytes:
    """The clear header."""
    return HEADER.pack(MAGIC, VERSION, KIND_PACK, epoch, keys.volume, object_id)


def _table_cipher(keys: VolumeKeys, epoch: int, object_id: ObjectId) -> AESGCM:
    return AESGCM(keys.object_key(epoch, object_id, b"pack table"))


def seal_table(
    keys: VolumeKeys,
    head: bytes,
    chunks: list[ChunkRef],
    references: list[Reference],
    files: list[FileNote],
) -> bytes:
    """The sealed table with its length, for the end of a pack whose chunks end where they do."""
    _, _, _, epoch, _, object_id = HEADER.unpack(head)
    rows = [_COUNTS.pack(len(chunks), len(references), len(files))]
    rows += [_CHUNK.pack(c.chunk_id, c.offset, c.length, c.plain_length, c.codec) for c in chunks]
    rows += [
        _REFERENCE.pack(r.ino, r.index, r.sequence, r.chunk_id, r.valid_length) for r in references
    ]
    for f in files:
        rows += [_FILE.pack(f.ino, f.parent, f.size, f.mode, len(f.name)), f.name]
    plain = b"".join(rows)
    packed, codec = zstd.compress(plain, _LEVEL), CODEC_ZSTD
    if len(packed) >= len(plain):
        packed, codec = plain, CODEC_RAW
    body = _TABLE_HEAD.pack(len(plain), codec) + packed
    end = max((c.offset + c.length for c in chunks), default=HEADER.size)
    size = end + len(body) + TAG_BYTES + _LENGTH.size
    sealed = _table_cipher(keys, epoch, ObjectId(object_id)).encrypt(
        _nonce(0), body, head + size.to_bytes(8, "big")
    )
    return sealed + _LENGTH.pack(len(sealed))


def read_table(keys: VolumeKeys, data: bytes) -> Table:
    """Parse and authenticate a whole pack's header and table. Chunks are not opened."""
    if len(data) < FIXED_BYTES:
        raise ObjectCorrupt("too short for a pack")
    head = data[: HEADER.size]
    magic, version, kind, epoch, volume, object_id = HEADER.unpack(head)
    if magic != MAGIC or kind != KIND_PACK:
        raise ObjectCorrupt("no pack of StashcordFS")
    if version != VERSION:
        raise ObjectCorrupt(f"pack format {version}, this program knows {VERSION}")
    if volume != keys.volume:
        raise ObjectCorrupt("a pack of another volume")
    (length,) = _LENGTH.unpack(data[-_LENGTH.size :])
    start = len(data) - _LENGTH.size - length
    if start < HEADER.size:
        raise ObjectCorrupt("a pack whose table does not fit into it")
    try:
        body = _table_cipher(keys, epoch, ObjectId(object_id)).decrypt(
            _nonce(0), data[start : -_LENGTH.size], head + len(data).to_bytes(8, "big")
        )
    except (InvalidTag, CryptoError):
        raise ObjectCorrupt("a pack's table is not what was stored") from None
    plain_length, codec = _TABLE_HEAD.unpack_from(body)
    if plain_length > _MAX_TABLE_BYTES:
        raise ObjectCorrupt("a pack's table is unreasonably long")
    plain = _decompress(body[_TABLE_HEAD.size :], codec, plain_length)
    return _parse_table(plain, ObjectId(object_id), epoch, end=start)


def _parse_table(plain: bytes, object_id: ObjectId, epoch: int, *, end: int) -> Table:
    try:
        counts = _COUNTS.unpack_from(plain)
        at = _COUNTS.size
        chunks = []
        offset = HEADER.size
        for number in range(counts[0]):
            cid, where, length, plain_length, codec = _CHUNK.unpack_from(plain, at)
            at += _CHUNK.size
            if where != offset or length < TAG_BYTES:
                raise ObjectCorrupt("a pack's chunks do not lie back to back")
            offset += length
            chunks.append(
                ChunkRef(ChunkId(cid), object_id, epoch, number, where, length, plain_length, codec)
            )
        if offset != end:
            raise ObjectCorrupt("a pack's chunks do not end where its table begins")
        references = []
        for _ in range(counts[1]):
            ino, index, sequence, cid, valid = _REFERENCE.unpack_from(plain, at)
            references.append(Reference(Ino(ino), index, sequence, ChunkId(cid), valid))
            at += _REFERENCE.size
        files = []
        for _ in range(counts[2]):
            ino, parent, size, mode, named = _FILE.unpack_from(plain, at)
            at += _FILE.size + named
            name = plain[at - named : at]
            files.append(FileNote(Ino(ino), Ino(parent), name, size, mode))
    except struct.error as error:
        raise ObjectCorrupt("a pack's table is cut short") from error
    if at != len(plain):
        raise ObjectCorrupt("a pack's table has more than it says")
    return Table(object_id, epoch, tuple(chunks), tuple(references), tuple(files))


def verify_pack(keys: VolumeKeys, data: bytes) -> Table:
    """Parse a pack and open every chunk of it, as is done once before it is sent."""
    table = read_table(keys, data)
    for ref in table.chunks:
        open_chunk(keys, ref, data[ref.offset : ref.offset + ref.length])
    return table
