from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.crypto import slots
from stashcordfs.crypto.keys import KIND_PACK, VolumeKeys, object_filename, object_id_of
from stashcordfs.errors import CryptoError, UsageError
from stashcordfs.types import ObjectId

VOLUME = bytes(range(16))
MASTER = bytes(range(32, 64))
CHEAP = slots.Argon2Cost(memory_kib=64, passes=1, lanes=1)
KEYS = VolumeKeys(VOLUME, {0: MASTER})


def test_known_answers_of_the_format_document() -> None:
    object_id = ObjectId(bytes(range(160, 176)))
    assert KEYS.chunk_id(b"hello").hex() == (
        "5014b5945e5321acd4070711fdd82db0fe93d8e0034af28ea41b4460dfd41d0e"
    )
    assert KEYS.object_key(0, object_id, b"pack").hex() == (
        "7096e1bf53a1243a849bbf0cbed875641331a0023d2ab8a0b701fc35d93aba14"
    )
    assert object_filename(object_id) == "ucq2fi5euwtkpkfjvkv2zlnov4"
    known = ObjectId(bytes.fromhex("083e5028013870b104de9a6fe51f11e8"))
    assert KEYS.read_object_id(known) == (KIND_PACK, 5)
    assert KEYS.record_key().hex() == (
        "0c789a1745ffeee01e9246c10080b284d39d6b1b0b4507749526f968e9d7d5b9"
    )
    assert slots.format_recovery_key(MASTER) == (
        "40GJ-48S4-4MK2-EA19-58NJ-RB9E-5WR3-2CHK-6GTK-CDSR-74X3-PF1X-7RZS-FEQW"
    )


@given(st.integers(1, 5), st.integers(0, (1 << 48) - 1))
def test_object_ids_tell_kind_and_number_to_the_key_alone(kind: int, number: int) -> None:
    object_id = KEYS.new_object_id(kind, number)
    assert KEYS.read_object_id(object_id) == (kind, number)
    assert KEYS.new_object_id(kind, number) != object_id
    name = object_filename(object_id)
    assert len(name) == 26
    assert name.isalnum()
    assert object_id_of(name) == object_id


@given(st.text(max_size=40))
def test_a_foreign_name_is_no_object_id(name: str) -> None:
    found = object_id_of(name)
    assert found is None or object_filename(found) == name


def test_names_with_stray_bits_or_capitals_are_not_ours() -> None:
    name = object_filename(ObjectId(bytes(16)))
    assert object_id_of(name[:-1] + "b") is None
    assert object_id_of("A" * 26) is None


def test_ids_of_strangers_and_bad_input_are_refused() -> None:
    refused = 0
    for n in range(64):
        try:
            KEYS.read_object_id(ObjectId(n.to_bytes(16, "big")))
        except CryptoError:
            refused += 1
    assert refused >= 62
    with pytest.raises(CryptoError):
        KEYS.read_object_id(ObjectId(b"short"))
    with pytest.raises(ValueError, match="kind"):
        KEYS.new_object_id(9, 0)
    for volume, epochs in ((b"x", {0: MASTER}), (VOLUME, {}), (VOLUME, {0: b"short"})):
        with pytest.raises(CryptoError):
            VolumeKeys(volume, epochs)


def test_epochs_separate_keys_but_not_names() -> None:
    both = VolumeKeys(VOLUME, {0: MASTER, 1: os.urandom(32)})
    assert both.epochs == (0, 1)
    assert both.current_epoch == 1
    assert both.chunk_id(b"x", 0) == KEYS.chunk_id(b"x") != both.chunk_id(b"x")
    assert both.names_chunk(KEYS.chunk_id(b"x"), b"x", epoch=1)
    assert both.read_object_id(KEYS.new_object_id(1, 7)) == (1, 7)
    for broken in (lambda: KEYS.chunk_id(b"", 3), lambda: KEYS.table_key(3, ObjectId(bytes(16)))):
        with pytest.raises(CryptoError, match="epoch 3"):
            broken()
    assert MASTER.hex() not in repr(both)


def test_both_secrets_open_a_new_volume() -> None:
    made, recovery = slots.create_slots(VOLUME, MASTER, passphrase="sésame", cost=CHEAP)
    assert slots.unlock(made, passphrase="se\u0301same") == {0: MASTER}
    assert slots.unlock(made, recovery_key=recovery.lower().replace("-", " ")) == {0: MASTER}
    with pytest.raises(CryptoError, match="wrong passphrase"):
        slots.unlock(made, passphrase="other")
    other, _ = slots.add_recovery(replace(made, slots=()), {0: MASTER})
    with pytest.raises(CryptoError, match="wrong recovery key"):
        slots.unlock(other, recovery_key=recovery)
    for call in (lambda: slots.unlock(made), lambda: slots.add_passphrase(made, {0: MASTER}, "")):
        with pytest.raises(UsageError):
            call()


@given(st.binary(min_size=32, max_size=32))
def test_recovery_keys_survive_typing(secret: bytes) -> None:
    text = slots.format_recovery_key(secret)
    typed = text.lower().replace("0", "o").replace("1", "l").replace("-", " ")
    assert slots.parse_recovery_key(typed) == secret


@given(st.integers(0, 55), st.sampled_from("0123456789ABCDEFGHJKMNPQRSTVWXYZ"))
def test_a_typing_error_is_seen(place: int, wrong: str) -> None:
    chars = list(slots.format_recovery_key(MASTER).replace("-", ""))
    if chars[place] == wrong:
        return
    chars[place] = wrong
    with pytest.raises(CryptoError, match="typing error"):
        slots.parse_recovery_key("".join(chars))


def test_a_recovery_key_of_another_length_is_told() -> None:
    for text in ("", "ABC", "U" * 56):
        with pytest.raises(CryptoError, match="56 letters"):
            slots.parse_recovery_key(text)


def test_slots_change_and_go_but_never_the_last() -> None:
    made, _ = slots.create_slots(VOLUME, MASTER, passphrase="old", cost=CHEAP)
    with pytest.raises(CryptoError):
        slots.change_passphrase(made, {0: MASTER}, old="no", new="new", cost=CHEAP)
    made = slots.change_passphrase(made, {0: MASTER}, old="old", new="new", cost=CHEAP)
    assert slots.unlock(made, passphrase="new") == {0: MASTER}
    with pytest.raises(CryptoError):
        slots.unlock(made, passphrase="old")
    made = slots.remove_slot(made, made.slots[0].id)
    with pytest.raises(UsageError, match="last"):
        slots.remove_slot(made, made.slots[0].id)
    with pytest.raises(UsageError, match="no key slot"):
        slots.remove_slot(made, "nope")
    full = replace(made, slots=made.slots * slots.MAX_SLOTS)
    with pytest.raises(UsageError, match="taken"):
        slots.add_recovery(full, {0: MASTER})


def test_changed_and_hostile_slots_do_not_open() -> None:
    made, _ = slots.create_slots(VOLUME, MASTER, passphrase="p", cost=CHEAP)
    slot = made.slots[0]
    changes = [
        {"cost": slots.Argon2Cost(72, 1, 1)},
        {"id": "00000000"},
        {"salt": bytes(16)},
        {"nonce": bytes(12)},
        {"wrapped": bytes(48)},
        {"cost": slots.Argon2Cost(memory_kib=1 << 30)},
        {"cost": slots.Argon2Cost(passes=10_000)},
        {"cost": slots.Argon2Cost(lanes=1000)},
        {"kind": "magic"},
        {"cost": None},
        {"salt": b""},
    ]
    for change in changes:
        with pytest.raises(CryptoError):
            slots.unlock(replace(made, slots=(replace(slot, **change),)), passphrase="p")
    for whole in (replace(made, epoch=1), replace(made, volume=bytes(16)), replace(made, slots=())):
        with pytest.raises(CryptoError):
            slots.unlock(whole, passphrase="p")


def test_older_epochs_open_through_the_newer() -> None:
    newer = os.urandom(32)
    wrap = slots.wrap_older(VOLUME, epoch=0, master=MASTER, newer=1, newer_master=newer)
    empty = slots.SlotSet(VOLUME, 1, (), (wrap,))
    later = slots.add_passphrase(empty, {1: newer}, "p", cost=CHEAP)
    assert slots.unlock(later, passphrase="p") == {0: MASTER, 1: newer}
    for bad in (replace(wrap, wrapped=bytes(48)), replace(wrap, newer=2), replace(wrap, nonce=b"")):
        with pytest.raises(CryptoError):
            slots.unlock(replace(later, older=(bad,)), passphrase="p")
