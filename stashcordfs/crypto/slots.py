"""Key slots: ways to the master key, by passphrase or by a printed recovery key.

Each slot wraps the newest epoch's master key; older epochs' keys are wrapped under the next newer
one. A slot authenticates its own parameters, and ceilings keep a hostile record from asking for
all memory. Removing a slot does not take back what was posted before: old records stay readable,
so only a new epoch helps against a leaked passphrase, and only for new data.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import unicodedata
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from stashcordfs.crypto.keys import ID_BYTES, KEY_BYTES, derive
from stashcordfs.errors import CryptoError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

PASSPHRASE = "passphrase"  # noqa: S105  # the name of a kind of slot
RECOVERY = "recovery"
MAX_SLOTS = 16
MAX_EPOCHS = 256
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's: no I, L, O, U
_CHECK_BYTES = 3
_RECOVERY_CHARS = (KEY_BYTES + _CHECK_BYTES) * 8 // 5
_GROUP = 4
_NONCE_BYTES = 12
_WRAPPED_BYTES = KEY_BYTES + 16


@dataclass(frozen=True, slots=True)
class Argon2Cost:
    """What guessing a passphrase costs. `check` holds the ceilings against a hostile slot."""

    memory_kib: int = 256 * 1024
    passes: int = 3
    lanes: int = 4

    def check(self) -> None:
        """CryptoError outside the bounds: below none is sealed, above none is tried."""
        ok = 1 <= self.lanes <= 16 and 1 <= self.passes <= 16
        if not ok or not 8 * self.lanes <= self.memory_kib <= 1024 * 1024:
            raise CryptoError("a key slot asks for unreasonable Argon2id parameters; refused")


DEFAULT_COST = Argon2Cost()


@dataclass(frozen=True, slots=True)
class Slot:
    """One way to the newest master key. `cost` is None for a recovery key."""

    id: str
    kind: str
    salt: bytes
    nonce: bytes
    wrapped: bytes
    cost: Argon2Cost | None


@dataclass(frozen=True, slots=True)
class Older:
    """An older epoch's master key, wrapped under the next newer one."""

    epoch: int
    newer: int
    nonce: bytes
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class SlotSet:
    """All slots of a volume's record."""

    volume: bytes
    epoch: int
    slots: tuple[Slot, ...]
    older: tuple[Older, ...] = ()


# ---------------------------------------------------------------------- making


def create_slots(
    volume: bytes, master: bytes, *, passphrase: str, cost: Argon2Cost = DEFAULT_COST
) -> tuple[SlotSet, str]:
    """A passphrase slot and a recovery slot for a new volume; with the recovery key to print."""
    empty = SlotSet(volume, 0, ())
    slots = add_passphrase(empty, {0: master}, passphrase, cost=cost)
    return add_recovery(slots, {0: master})


def add_passphrase(
    slots: SlotSet,
    masters: Mapping[int, bytes],
    passphrase: str,
    *,
    cost: Argon2Cost = DEFAULT_COST,
) -> SlotSet:
    """Let another passphrase open the volume. Takes a second: Argon2id."""
    if not passphrase:
        raise UsageError("the passphrase is empty; give one of several words")
    return _add(slots, masters, kind=PASSPHRASE, cost=cost, secret=_encoded(passphrase))


def add_recovery(slots: SlotSet, masters: Mapping[int, bytes]) -> tuple[SlotSet, str]:
    """Let a new recovery key open the volume; the key is returned once and kept nowhere."""
    secret = secrets.token_bytes(KEY_BYTES)
    added = _add(slots, masters, kind=RECOVERY, cost=None, secret=secret)
    return added, format_recovery_key(secret)


def change_passphrase(
    slots: SlotSet,
    masters: Mapping[int, bytes],
    *,
    old: str,
    new: str,
    cost: Argon2Cost = DEFAULT_COST,
) -> SlotSet:
    """Replace the slot that `old` opens by one for `new`. CryptoError when `old` opens none."""
    slot, _ = _open_any(slots, PASSPHRASE, _encoded(old))
    left = replace(slots, slots=tuple(s for s in slots.slots if s.id != slot.id))
    return add_passphrase(left, masters, new, cost=cost)


def remove_slot(slots: SlotSet, slot_id: str) -> SlotSet:
    """Take a slot away; never the last one."""
    left = tuple(slot for slot in slots.slots if slot.id != slot_id)
    if len(left) == len(slots.slots):
        raise UsageError(f"no key slot {slot_id}; see: stashcordfs key")
    if not left:
        raise UsageError("this is the last key slot; add another one before removing it")
    return replace(slots, slots=left)


def wrap_older(
    volume: bytes, *, epoch: int, master: bytes, newer: int, newer_master: bytes
) -> Older:
    """Wrap an old epoch's key under the epoch that follows it."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    key = derive(newer_master, salt=volume, info=b"older-epoch")
    wrapped = AESGCM(key).encrypt(nonce, master, _older_aad(volume, epoch, newer))
    return Older(epoch, newer, nonce, wrapped)


# ---------------------------------------------------------------------- opening


def unlock(
    slots: SlotSet, *, passphrase: str | None = None, recovery_key: str | None = None
) -> dict[int, bytes]:
    """Every epoch's master key, by one secret. CryptoError when it opens no slot."""
    if recovery_key is not None:
        secret = parse_recovery_key(recovery_key)
        _, master = _open_any(slots, RECOVERY, secret)
    elif passphrase is not None:
        _, master = _open_any(slots, PASSPHRASE, _encoded(passphrase))
    else:
        raise UsageError("give a passphrase or a recovery key")
    masters = {slots.epoch: master}
    for older in sorted(slots.older, key=lambda o: -o.epoch):
        if older.newer not in masters or older.epoch >= older.newer:
            raise CryptoError("the volume's record has a gap in its older keys")
        key = derive(masters[older.newer], salt=slots.volume, info=b"older-epoch")
        aad = _older_aad(slots.volume, older.epoch, older.newer)
        try:
            masters[older.epoch] = AESGCM(key).decrypt(older.nonce, older.wrapped, aad)
        except InvalidTag:
            raise CryptoError("an older key in the volume's record was changed") from None
    return masters


def check_slots(slots: SlotSet) -> None:
    """CryptoError when a set read from outside is out of bounds."""
    if not 1 <= len(slots.slots) <= MAX_SLOTS or len(slots.older) >= MAX_EPOCHS:
        raise CryptoError("the volume's record has no key slots, or too many")
    for slot in slots.slots:
        sizes = (len(slot.salt), len(slot.nonce), len(slot.wrapped))
        if sizes != (ID_BYTES, _NONCE_BYTES, _WRAPPED_BYTES):
            raise CryptoError("a key slot is of the wrong size")
        if slot.kind not in {PASSPHRASE, RECOVERY} or (slot.kind == PASSPHRASE) != bool(slot.cost):
            raise CryptoError("a key slot is of an unknown kind; is this program too old?")
        if slot.cost:
            slot.cost.check()
    for older in slots.older:
        if (len(older.nonce), len(older.wrapped)) != (_NONCE_BYTES, _WRAPPED_BYTES):
            raise CryptoError("an older key is of the wrong size")


def format_recovery_key(secret: bytes) -> str:
    """56 letters and digits in groups of four; the last ones are a check value."""
    number = int.from_bytes(secret + _check(secret), "big")
    chars = [_ALPHABET[number >> 5 * i & 31] for i in range(_RECOVERY_CHARS)][::-1]
    return "-".join("".join(chars[i : i + _GROUP]) for i in range(0, _RECOVERY_CHARS, _GROUP))


def parse_recovery_key(text: str) -> bytes:
    """Read what a person typed: case, spaces and dashes do not matter, O is 0, I and L are 1."""
    typed = text.upper().translate(str.maketrans("OIL", "011", " -\t\r\n_."))
    if len(typed) != _RECOVERY_CHARS or any(c not in _ALPHABET for c in typed):
        raise CryptoError(
            f"a recovery key has {_RECOVERY_CHARS} letters and digits; check what was typed"
        )
    number = 0
    for char in typed:
        number = number << 5 | _ALPHABET.index(char)
    raw = number.to_bytes(KEY_BYTES + _CHECK_BYTES, "big")
    if _check(raw[:KEY_BYTES]) != raw[KEY_BYTES:]:
        raise CryptoError("the recovery key has a typing error; check it letter by letter")
    return raw[:KEY_BYTES]


# ---------------------------------------------------------------------- within


def _add(
    slots: SlotSet,
    masters: Mapping[int, bytes],
    *,
    kind: str,
    cost: Argon2Cost | None,
    secret: bytes,
) -> SlotSet:
    if len(slots.slots) >= MAX_SLOTS:
        raise UsageError("all key slots are taken; remove one first")
    salt, nonce = secrets.token_bytes(ID_BYTES), secrets.token_bytes(_NONCE_BYTES)
    bare = Slot(secrets.token_hex(4), kind, salt, nonce, b"", cost)
    wrapped = AESGCM(_slot_key(bare, secret)).encrypt(
        nonce, masters[slots.epoch], _slot_aad(slots, bare)
    )
    return replace(slots, slots=(*slots.slots, replace(bare, wrapped=wrapped)))


def _open_any(slots: SlotSet, kind: str, secret: bytes) -> tuple[Slot, bytes]:
    check_slots(slots)
    for slot in slots.slots:
        if slot.kind == kind:
            try:
                key = _slot_key(slot, secret)
                return slot, AESGCM(key).decrypt(slot.nonce, slot.wrapped, _slot_aad(slots, slot))
            except InvalidTag:
                continue
    name = "wrong passphrase" if kind == PASSPHRASE else "wrong recovery key"
    raise CryptoError(f"{name} for this volume (or its key slots were changed); try again")


def _slot_key(slot: Slot, secret: bytes) -> bytes:
    if slot.cost is None:
        return derive(secret, salt=slot.salt, info=b"recovery-slot")
    slot.cost.check()
    return Argon2id(
        salt=slot.salt,
        length=KEY_BYTES,
        iterations=slot.cost.passes,
        lanes=slot.cost.lanes,
        memory_cost=slot.cost.memory_kib,
    ).derive(secret)


def _slot_aad(slots: SlotSet, slot: Slot) -> bytes:
    cost = slot.cost and [slot.cost.memory_kib, slot.cost.passes, slot.cost.lanes]
    fields = ["slot", 1, slots.volume.hex(), slots.epoch, slot.id, slot.kind, slot.salt.hex(), cost]
    return json.dumps(fields, separators=(",", ":")).encode("ascii")


def _older_aad(volume: bytes, epoch: int, newer: int) -> bytes:
    return json.dumps(["older", 1, volume.hex(), epoch, newer], separators=(",", ":")).encode()


def _encoded(passphrase: str) -> bytes:
    return unicodedata.normalize("NFC", passphrase).encode("utf-8", "surrogateescape")


def _check(secret: bytes) -> bytes:
    return hashlib.sha256(b"stashcordfs recovery key" + secret).digest()[:_CHECK_BYTES]
