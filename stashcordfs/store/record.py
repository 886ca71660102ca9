"""The volume's record: what mkfs posts, and what a bare machine starts from.

The one object that is recognised without a key. Canonical JSON: one content has one encoding. Its
MAC, under a key of the newest epoch, is checked as soon as a slot is open; until then nothing in it
is believed beyond the bounds of a key slot.
"""

from __future__ import annotations

import hmac
import json
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stashcordfs.crypto.slots import Argon2Cost, Older, Slot, SlotSet, check_slots
from stashcordfs.errors import CryptoError, ObjectCorrupt
from stashcordfs.store.api import MAX_RECORD_BYTES, RECORD_PREFIX, OnePiece

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stashcordfs.crypto.keys import VolumeKeys

FORMAT = "stashcordfs-volume"
VERSION = 1
_MAC_BYTES = 32
_FIELDS = frozenset(
    [
        "format",
        "version",
        "volume",
        "serial",
        "created",
        "block_size",
        "settings",
        "epoch",
        "slots",
        "older",
        "mac",
    ]
)


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """Format, identity and key slots. Of several records of a volume the highest serial counts."""

    volume: bytes
    block_size: int
    slots: SlotSet
    created: int  # seconds since the epoch
    serial: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    mac: bytes = b""

    @property
    def uuid(self) -> str:
        """The volume's UUID as text."""
        return str(uuid.UUID(bytes=self.volume))

    @property
    def filename(self) -> str:
        """The attachment's name."""
        return f"{RECORD_PREFIX}{self.uuid}-{self.serial}.json"


@dataclass(frozen=True, slots=True)
class PostedRecord(OnePiece):
    """A record's bytes as they were posted, to be posted along with something else."""

    filename: str
    data: bytes


def encode(record: VolumeRecord, keys: VolumeKeys) -> bytes:
    """The record's bytes, with its MAC under the newest epoch's key."""
    body = _body(record)
    return _canonical({**body, "mac": _mac(body, keys).hex()})


def decode(data: bytes) -> VolumeRecord:
    """Read a record; ObjectCorrupt when it is none, CryptoError for hostile slots."""
    if len(data) > MAX_RECORD_BYTES:
        raise ObjectCorrupt("a volume's record is too large to be one")
    try:
        fields = json.loads(data)
        if fields["format"] != FORMAT:
            raise ObjectCorrupt("not the record of a StashcordFS volume")
        if fields["version"] != VERSION:
            raise ObjectCorrupt("the volume is of a newer format; update this program")
        record = _read(fields)
        canonical = _canonical({**_body(record), "mac": record.mac.hex()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ObjectCorrupt("a volume's record is damaged") from error
    if set(fields) != _FIELDS or canonical != data or len(record.mac) != _MAC_BYTES:
        raise ObjectCorrupt("a volume's record is damaged")
    check_slots(record.slots)
    return record


def verify(record: VolumeRecord, keys: VolumeKeys) -> None:
    """CryptoError unless the record is what the holder of these keys wrote."""
    if record.volume != keys.volume or record.slots.epoch != keys.current_epoch:
        raise CryptoError("the record belongs to another volume")
    if not hmac.compare_digest(_mac(_body(record), keys), record.mac):
        raise CryptoError("the volume's record was changed since it was posted")


def _mac(body: dict[str, Any], keys: VolumeKeys) -> bytes:
    return hmac.digest(keys.record_key(), _canonical(body), "sha256")


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _body(record: VolumeRecord) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "volume": record.uuid,
        "serial": record.serial,
        "created": record.created,
        "block_size": record.block_size,
        "settings": dict(record.settings),
        "epoch": record.slots.epoch,
        "slots": [_slot_fields(slot) for slot in record.slots.slots],
        "older": [
            {"epoch": o.epoch, "newer": o.newer, "nonce": o.nonce.hex(), "wrapped": o.wrapped.hex()}
            for o in record.slots.older
        ],
    }


def _slot_fields(slot: Slot) -> dict[str, Any]:
    cost = slot.cost and [slot.cost.memory_kib, slot.cost.passes, slot.cost.lanes]
    return {
        "id": slot.id,
        "kind": slot.kind,
        "salt": slot.salt.hex(),
        "nonce": slot.nonce.hex(),
        "wrapped": slot.wrapped.hex(),
        "argon2id": cost,
    }


def _read(fields: dict[str, Any]) -> VolumeRecord:
    volume = uuid.UUID(fields["volume"]).bytes
    slots = tuple(
        Slot(
            str(s["id"]),
            str(s["kind"]),
            bytes.fromhex(s["salt"]),
            bytes.fromhex(s["nonce"]),
            bytes.fromhex(s["wrapped"]),
            None if s["argon2id"] is None else Argon2Cost(*(_int(n) for n in s["argon2id"])),
        )
        for s in fields["slots"]
    )
    older = tuple(
        Older(
            _int(o["epoch"]),
            _int(o["newer"]),
            bytes.fromhex(o["nonce"]),
            bytes.fromhex(o["wrapped"]),
        )
        for o in fields["older"]
    )
    return VolumeRecord(
        volume,
        _int(fields["block_size"], least=4096, most=1 << 26),
        SlotSet(volume, _int(fields["epoch"]), slots, older),
        _int(fields["created"], most=1 << 62),
        _int(fields["serial"], most=1 << 62),
        dict(fields["settings"]),
        bytes.fromhex(fields["mac"]),
    )


def _int(value: object, *, least: int = 0, most: int = (1 << 32) - 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError("a number is out of bounds")
    return value
