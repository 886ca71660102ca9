"""Key slots: each wraps the master keys under a passphrase or under a printed recovery key.

Argon2id (RFC 9106) slows guessing; its parameters are authenticated with the slot, and have
ceilings, so that a hostile record can't make us spend hours or gigabytes. A changed passphrase
rewrites a slot, not the data. Old slots stay where they were posted: whoever has an old record and
the old passphrase has the key still. Only a new epoch helps, for new data.
"""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from stashcordfs.crypto.keys import KEY_BYTES, derive
from stashcordfs.errors import CryptoError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PASSPHRASE = "passphrase"  # noqa: S105  a kind of slot
RECOVERY = "recovery"
_MAX_MEMORY_KIB, _MAX_ITERATIONS, _MAX_LANES = 2 << 20, 20, 16
_CHECK_CHARS = 4
_RECOVERY_GROUPS = 5


@dataclass(frozen=True, slots=True)
class Cost:
    """Argon2id's parameters: memory in KiB, passes, lanes."""

    memory_kib: int = 256 * 1024
    iterations: int = 3
    lanes: int = 4

    def check(self) -> None:
        """Refuse what no honest volume has."""
        if not (
            8 * self.lanes <= self.memory_kib <= _MAX_MEMORY_KIB
            and 1 <= self.iterations <= _MAX_ITERATIONS
            and 1 <= self.lanes <= _MAX_LANES
        ):
            raise CryptoError("a key slot asks for an unreasonable amount of work; not opened")


@dataclass(frozen=True, slots=True)
class Slot:
    """One way to the master keys. All of it is public."""

    id: int
    kind: str
    salt: bytes
    cost: Cost
    nonce: bytes
    wrapped: bytes

    def associated(self, volume: bytes) -> bytes:
        """What is authenticated with the wrapped keys: everything but they."""
        fields = [
            self.id, self.kind, self.salt.hex(), self.cost.memory_kib,
            self.cost.iterations, self.cost.lanes,
        ]  # fmt: skip
        return b"stashcordfs slot 1" + volume + json.dumps(fields).encode()

    def to_json(self) -> dict[str, object]:
        """As the volume's record has it."""
        return {
            "id": self.id,
            "kind": self.kind,
            "salt": self.salt.hex(),
            "memory_kib": self.cost.memory_kib,
            "iterations": self.cost.iterations,
            "lanes": self.cost.lanes,
            "nonce": self.nonce.hex(),
            "wrapped": self.wrapped.hex(),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> Slot:
        """Read it back; CryptoError when it is no slot."""
        try:
            cost = Cost(*(int(str(raw[k])) for k in ("memory_kib", "iterations", "lanes")))
            return cls(
                int(str(raw["id"])),
                str(raw["kind"]),
                bytes.fromhex(str(raw["salt"])),
                cost,
                bytes.fromhex(str(raw["nonce"])),
                bytes.fromhex(str(raw["wrapped"])),
            )
        except (KeyError, ValueError) as error:
            raise CryptoError(f"a key slot cannot be read: {error!r}") from error


def _wrapping_key(slot: Slot, secret: bytes) -> bytes:
    if slot.kind == RECOVERY:  # 200 random bits need no slow hash
        return derive(secret, salt=slot.salt, info=b"recovery slot")
    slot.cost.check()
    return Argon2id(
        salt=slot.salt,
        length=KEY_BYTES,
        iterations=slot.cost.iterations,
        lanes=slot.cost.lanes,
        memory_cost=slot.cost.memory_kib,
    ).derive(secret)


def seal_slot(
    volume: bytes,
    masters: Mapping[int, bytes],
    *,
    slot_id: int,
    kind: str,
    secret: bytes,
    cost: Cost,
) -> Slot:
    """Wrap the master keys of all epochs."""
    slot = Slot(slot_id, kind, secrets.token_bytes(16), cost, secrets.token_bytes(12), b"")
    plain = b"".join(e.to_bytes(4, "big") + key for e, key in sorted(masters.items()))
    sealed = AESGCM(_wrapping_key(slot, secret)).encrypt(slot.nonce, plain, slot.associated(volume))
    return replace(slot, wrapped=sealed)


def _open_slot(volume: bytes, slot: Slot, secret: bytes) -> dict[int, bytes] | None:
    try:
        plain = AESGCM(_wrapping_key(slot, secret)).decrypt(
            slot.nonce, slot.wrapped, slot.associated(volume)
        )
    except InvalidTag:
        return None
    step = 4 + KEY_BYTES
    if not plain or len(plain) % step:
        raise CryptoError("a key slot holds no keys")
    pieces = [plain[at : at + step] for at in range(0, len(plain), step)]
    return {int.from_bytes(piece[:4], "big"): piece[4:] for piece in pieces}


def passphrase_bytes(passphrase: str) -> bytes:
    """A passphrase as it is hashed. Empty ones are refused."""
    if not passphrase:
        raise UsageError("passphrase: empty; choose one that nobody guesses")
    return passphrase.encode("utf-8", "surrogateescape")


def unlock(
    volume: bytes,
    slots: Sequence[Slot],
    *,
    passphrase: str | None = None,
    recovery_key: str | None = None,
) -> dict[int, bytes]:
    """The master keys by epoch. CryptoError when no slot opens."""
    if recovery_key:
        kind, secret, what = RECOVERY, parse_recovery_key(recovery_key), "recovery key"
    else:
        kind, secret, what = PASSPHRASE, passphrase_bytes(passphrase or ""), "passphrase"
    for slot in slots:
        if slot.kind == kind:
            masters = _open_slot(volume, slot, secret)
            if masters is not None:
                return masters
    raise CryptoError(f"wrong {what}: no key slot of this volume opens with it")


def new_recovery_key() -> str:
    """200 random bits in groups of eight letters and digits, then a check value."""
    text = base64.b32encode(secrets.token_bytes(25)).decode("ascii")
    groups = [text[at : at + 8] for at in range(0, len(text), 8)]
    return "-".join([*groups, _check(text)])


def _check(text: str) -> str:
    return base64.b32encode(sha256(text.encode()).digest()).decode("ascii")[:_CHECK_CHARS]


def parse_recovery_key(text: str) -> bytes:
    """Read one that a person typed: case, spaces and dashes do not count, nor 0 for O, 1 for I."""
    plain = "".join(text.upper().split()).replace("-", "")
    plain = plain.replace("0", "O").replace("1", "I").replace("8", "B")
    key, check = plain[:-_CHECK_CHARS], plain[-_CHECK_CHARS:]
    if len(key) != 8 * _RECOVERY_GROUPS or _check(key) != check:
        raise UsageError("recovery key: mistyped; compare it with the print-out, group by group")
    return base64.b32decode(key)
