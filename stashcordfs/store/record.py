"""The volume's record: format, identity and key slots, as posted to the journal channel.

The one object that is recognisable without the key. JSON, so that a person can read what it is;
authenticated under the master key, which is checked once a slot has opened.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from stashcordfs.crypto.slots import Slot
from stashcordfs.errors import CryptoError

if TYPE_CHECKING:
    from stashcordfs.crypto.keys import VolumeKeys

FORMAT = "stashcordfs volume record"
VERSION = 1
PREFIX = "stashcordfs-volume-"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """What the record says. `serial` grows with each change of the slots."""

    volume: bytes
    block_size: int
    serial: int
    created_s: int
    slots: tuple[Slot, ...]
    mac: bytes = b""


def filename(volume: bytes) -> str:
    """The attachment's name."""
    return f"{PREFIX}{volume.hex()}.json"


def _body(record: Record) -> dict[str, object]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "volume": record.volume.hex(),
        "block_size": record.block_size,
        "serial": record.serial,
        "created_s": record.created_s,
        "slots": [slot.to_json() for slot in record.slots],
    }


def _mac(record: Record, keys: VolumeKeys) -> bytes:
    canonical = json.dumps(_body(record), sort_keys=True, separators=(",", ":")).encode()
    return hmac.digest(keys.record_key(), canonical, sha256)


def encode(record: Record, keys: VolumeKeys) -> bytes:
    """The record's bytes, authenticated."""
    return json.dumps({**_body(record), "mac": _mac(record, keys).hex()}, indent=1).encode()


def decode(data: bytes) -> Record:
    """Read a record; its authenticity is not known before `verify`. CryptoError when it is none."""
    try:
        raw = json.loads(data[:_MAX_BYTES])
        if raw["format"] != FORMAT:
            raise CryptoError("not a volume record of StashcordFS")
        if raw["version"] != VERSION:
            raise CryptoError(f"volume record version {raw['version']}: use a newer program")
        return Record(
            bytes.fromhex(raw["volume"]),
            int(raw["block_size"]),
            int(raw["serial"]),
            int(raw["created_s"]),
            tuple(Slot.from_json(slot) for slot in raw["slots"]),
            bytes.fromhex(raw["mac"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CryptoError(f"the volume record cannot be read: {error!r}") from error


def verify(record: Record, keys: VolumeKeys) -> None:
    """CryptoError unless whoever holds the master key wrote exactly this."""
    if not hmac.compare_digest(_mac(record, keys), record.mac):
        raise CryptoError("the volume record was changed by somebody without the key")
