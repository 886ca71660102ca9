"""A volume's keys: one random master key per epoch, and everything derived from it.

Derivations are HKDF-SHA-256 with a label of their own, so no two uses share a key. Object ids are
one AES block over kind, number and 64 random bits: whoever holds the keys reads kind and order
from a plain listing, nobody else anything. The bytes are described in docs/format.md.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from stashcordfs.errors import CryptoError
from stashcordfs.types import ChunkId, ObjectId

if TYPE_CHECKING:
    from collections.abc import Mapping

KIND_PACK, KIND_SEGMENT, KIND_CHECKPOINT, KIND_MANIFEST, KIND_CLAIM = range(1, 6)
KEY_BYTES = 32
ID_BYTES = 16
NUMBER_BITS = 48
_KINDS = range(KIND_PACK, KIND_CLAIM + 1)
_LABEL = b"stashcordfs 1 "
_NAME_CHARS = 26


def derive(master: bytes, *, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA-256 to 32 bytes; `info` follows the program's and the format's name."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=_LABEL + info).derive(master)


class VolumeKeys:
    """The keys of one volume, for every epoch that it ever had. Never shown in a repr."""

    def __init__(self, volume: bytes, epochs: Mapping[int, bytes]) -> None:
        """`volume` is the UUID's 16 bytes, `epochs` the master key of each epoch."""
        if len(volume) != ID_BYTES or not epochs:
            raise CryptoError("a volume has a UUID of 16 bytes and at least one key")
        if any(len(key) != KEY_BYTES or not 0 <= n < 1 << 32 for n, key in epochs.items()):
            raise CryptoError("a master key has 32 bytes and an epoch below 2^32")
        self.volume = bytes(volume)
        self._masters = dict(epochs)
        self.current_epoch = max(epochs)
        self._chunk_keys = {
            n: derive(key, salt=volume, info=b"chunk-id") for n, key in epochs.items()
        }
        # Names stay readable over all epochs, so their key is the first epoch's.
        names = derive(epochs[min(epochs)], salt=volume, info=b"object-id")
        self._names = Cipher(algorithms.AES(names), modes.ECB())  # noqa: S305  # one block only

    def __repr__(self) -> str:
        """Tell the volume, never a key."""
        return f"<VolumeKeys {self.volume.hex()} epochs={sorted(self._masters)}>"

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs whose keys are known, oldest first."""
        return tuple(sorted(self._masters))

    def object_key(self, epoch: int, object_id: ObjectId, kind: bytes) -> bytes:
        """The key of one object of a kind (b"pack", b"table", b"segment", ...)."""
        return derive(self._master(epoch), salt=object_id, info=kind)

    def table_key(self, epoch: int, object_id: ObjectId) -> bytes:
        """The key of a pack's table."""
        return self.object_key(epoch, object_id, b"table")

    def record_key(self, epoch: int | None = None) -> bytes:
        """The key of the volume record's MAC."""
        master = self._master(self.current_epoch if epoch is None else epoch)
        return derive(master, salt=self.volume, info=b"record")

    def chunk_id(self, data: bytes | memoryview, epoch: int | None = None) -> ChunkId:
        """The keyed hash that names a plaintext."""
        number = self.current_epoch if epoch is None else epoch
        if number not in self._chunk_keys:
            raise CryptoError(f"no key for epoch {number}")
        return ChunkId(hmac.digest(self._chunk_keys[number], data, "sha256"))

    def names_chunk(self, chunk_id: ChunkId, data: bytes, *, epoch: int) -> bool:
        """Whether this is the plaintext's id: of `epoch`, or, after a repack, of another."""
        order = sorted(self._masters, key=lambda n: n != epoch)
        return any(hmac.compare_digest(self.chunk_id(data, n), chunk_id) for n in order)

    def new_object_id(self, kind: int, number: int) -> ObjectId:
        """A fresh id; never used for two contents."""
        if kind not in _KINDS or not 0 <= number < 1 << NUMBER_BITS:
            raise ValueError("unknown kind, or a number of more than 48 bits")
        clear = bytes((kind, 0)) + number.to_bytes(6, "big") + secrets.token_bytes(8)
        block = self._names.encryptor()
        return ObjectId(block.update(clear) + block.finalize())

    def read_object_id(self, object_id: ObjectId) -> tuple[int, int]:
        """Kind and number. CryptoError for an id that was not made with these keys."""
        if len(object_id) != ID_BYTES:
            raise CryptoError("an object id has 16 bytes")
        block = self._names.decryptor()
        clear = block.update(object_id) + block.finalize()
        if clear[0] not in _KINDS or clear[1]:
            raise CryptoError("not an object of this volume")
        return clear[0], int.from_bytes(clear[2:8], "big")

    def _master(self, epoch: int) -> bytes:
        try:
            return self._masters[epoch]
        except KeyError:
            raise CryptoError(f"no key for epoch {epoch}: is this another volume?") from None


def object_filename(object_id: ObjectId) -> str:
    """The attachment's name: 26 small letters and digits."""
    return base64.b32encode(object_id).decode("ascii").rstrip("=").lower()


def object_id_of(filename: str) -> ObjectId | None:
    """The id that a name stands for; None when it is no such name."""
    if len(filename) != _NAME_CHARS or not filename.isascii():
        return None
    try:
        object_id = ObjectId(base64.b32decode(filename.upper() + "======"))
    except ValueError:
        return None
    return object_id if object_filename(object_id) == filename else None
