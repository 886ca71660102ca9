"""The volume's keys, and what is derived from them (docs/format.md, "Keys" and "Ids").

A random 256-bit master key an epoch. Every object has a key of its own, so that a nonce that is a
chunk's number is never used twice under one key.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from stashcordfs.errors import CryptoError
from stashcordfs.types import ChunkId, ObjectId

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY_BYTES = 32
KIND_PACK = 1
_NAME_CHARS = 26  # 128 bits in base32 without padding


def derive(master: bytes, *, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA-256 (RFC 5869), 32 bytes."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(master)


class VolumeKeys:
    """All epochs' master keys of one volume. Never changed, so safe in several threads."""

    def __init__(self, volume: bytes, masters: Mapping[int, bytes]) -> None:
        """`volume` is the volume's UUID in 16 bytes; `masters` maps key epoch to master key."""
        if not masters or any(len(key) != KEY_BYTES for key in masters.values()):
            raise CryptoError("a master key must have 32 bytes")
        self.volume = volume
        self.current_epoch = max(masters)
        self._masters = dict(masters)
        self._chunk_key = derive(self._master(self.current_epoch), salt=volume, info=b"chunk id")
        first = self._master(min(masters))
        self._id_cipher = Cipher(
            algorithms.AES(derive(first, salt=volume, info=b"object id")),
            modes.ECB(),  # noqa: S305  one block, a permutation of ids: nothing repeats
        )
        self._object_key = lru_cache(maxsize=256)(self._derive_object_key)

    def __repr__(self) -> str:
        """Show no key."""
        return f"<VolumeKeys epochs={sorted(self._masters)}>"

    def _master(self, epoch: int) -> bytes:
        try:
            return self._masters[epoch]
        except KeyError:
            raise CryptoError(
                f"sealed under key epoch {epoch}, which this key does not hold"
            ) from None

    def _derive_object_key(self, epoch: int, object_id: ObjectId, info: bytes) -> bytes:
        return derive(self._master(epoch), salt=object_id, info=info)

    def object_key(self, epoch: int, object_id: ObjectId, info: bytes) -> bytes:
        """The key of one object for one purpose (`info`)."""
        return self._object_key(epoch, object_id, info)

    def record_key(self) -> bytes:
        """The key that authenticates the volume's record."""
        return derive(self._master(self.current_epoch), salt=self.volume, info=b"volume record")

    def chunk_id(self, data: bytes) -> ChunkId:
        """The keyed hash that names a chunk: equal plaintext, equal name, to us alone."""
        return ChunkId(hmac.digest(self._chunk_key, data, sha256))

    def new_object_id(self, kind: int, number: int) -> ObjectId:
        """A fresh id: one AES block over kind, number and 80 random bits."""
        if not 0 <= number < 1 << 40:
            raise CryptoError("an object's number must fit into 40 bits")
        block = bytes([kind]) + number.to_bytes(5, "big") + secrets.token_bytes(10)
        encryptor = self._id_cipher.encryptor()
        return ObjectId(encryptor.update(block) + encryptor.finalize())

    def read_object_id(self, object_id: ObjectId) -> tuple[int, int]:
        """Kind and number, which only the key's holder can read. Nonsense for a foreign id."""
        decryptor = self._id_cipher.decryptor()
        block = decryptor.update(object_id) + decryptor.finalize()
        return block[0], int.from_bytes(block[1:6], "big")


def object_filename(object_id: ObjectId) -> str:
    """The attachment's name: base32 in lower case, which Discord leaves as it is."""
    return base64.b32encode(object_id).decode("ascii").rstrip("=").lower()


def object_id_of(filename: str) -> ObjectId | None:
    """The id in a name of ours, None for any other name."""
    if len(filename) != _NAME_CHARS or not filename.isascii() or filename != filename.lower():
        return None
    try:
        return ObjectId(base64.b32decode(filename.upper() + "======"))
    except ValueError:
        return None
