"""Sealed objects of the journal channel: segments, parts of checkpoints, manifests, claims.

One encoding for all four: a pack's header, then one sealed piece. Strict on reading. The bytes are
described in docs/format.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stashcordfs.crypto.keys import (
    KIND_CHECKPOINT,
    KIND_CLAIM,
    KIND_MANIFEST,
    KIND_SEGMENT,
    object_filename,
)
from stashcordfs.errors import CryptoError, ObjectCorrupt
from stashcordfs.store.api import OnePiece
from stashcordfs.store.sealing import TAG_BYTES, VERSION, expand, squeeze

if TYPE_CHECKING:
    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.types import ChunkRef, ObjectId

_HEADER = struct.Struct(">BBHI16s")  # version, kind, zero, epoch, object id: as a pack's
_LENGTHS = struct.Struct(">BxxxI")  # codec, plain length
_NONCE = bytes(12)
_LABELS = {
    KIND_SEGMENT: b"segment",
    KIND_CHECKPOINT: b"checkpoint",
    KIND_MANIFEST: b"manifest",
    KIND_CLAIM: b"claim",
}
DIGEST_BYTES = 32
OVERHEAD_BYTES = _HEADER.size + _LENGTHS.size + TAG_BYTES


@dataclass(frozen=True, slots=True)
class SealedObject(OnePiece):
    """An object ready to be sent: the store takes it as it takes a pack."""

    object_id: ObjectId
    kind: int
    number: int
    data: bytes

    @property
    def filename(self) -> str:
        """The attachment's name."""
        return object_filename(self.object_id)

    @property
    def chunks(self) -> list[ChunkRef]:
        """None: an object of the journal holds no blocks."""
        return []

    @property
    def digest(self) -> bytes:
        """SHA-256 of the bytes: what the next segment is chained to."""
        return sha256(self.data).digest()


def seal_object(
    keys: VolumeKeys, kind: int, number: int, body: bytes, *, compress: bool = True
) -> SealedObject:
    """Seal a body under a fresh id. `number` is readable in the name by the keys' holder."""
    object_id = keys.new_object_id(kind, number)
    squeezed, codec = squeeze(body, compress=compress)
    epoch = keys.current_epoch
    head = _HEADER.pack(VERSION, kind, 0, epoch, object_id) + _LENGTHS.pack(codec, len(body))
    key = AESGCM(keys.object_key(epoch, object_id, _LABELS[kind]))
    sealed = key.encrypt(_NONCE, squeezed, _aad(keys, head))
    made = SealedObject(object_id, kind, number, head + sealed)
    if open_object(keys, kind, object_id, made.data) != body:
        raise ObjectCorrupt("a sealed object is not what was sealed")
    return made


def open_object(keys: VolumeKeys, kind: int, object_id: ObjectId, data: bytes) -> bytes:
    """The body of a whole object. ObjectCorrupt on any deviation."""
    if len(data) < OVERHEAD_BYTES:
        raise ObjectCorrupt("a sealed object is too short to be one")
    head, sealed = data[: OVERHEAD_BYTES - TAG_BYTES], data[OVERHEAD_BYTES - TAG_BYTES :]
    version, stated_kind, zero, epoch, stated_id = _HEADER.unpack_from(head)
    if version != VERSION or zero:
        raise ObjectCorrupt("a sealed object of a newer format; update this program")
    if stated_kind != kind or stated_id != object_id or kind not in _LABELS:
        raise ObjectCorrupt("a sealed object is not what its name says")
    codec, plain_length = _LENGTHS.unpack_from(head, _HEADER.size)
    try:
        key = AESGCM(keys.object_key(epoch, object_id, _LABELS[kind]))
        squeezed = key.decrypt(_NONCE, sealed, _aad(keys, head))
    except (InvalidTag, CryptoError) as error:
        raise ObjectCorrupt("a sealed object was changed since it was stored") from error
    return expand(squeezed, codec, plain_length)


def _aad(keys: VolumeKeys, head: bytes) -> bytes:
    return b"object\0\0" + keys.volume + head
