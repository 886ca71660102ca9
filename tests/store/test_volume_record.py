from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.crypto import slots
from stashcordfs.crypto.keys import VolumeKeys
from stashcordfs.errors import CryptoError, ObjectCorrupt
from stashcordfs.store import record as records
from stashcordfs.store.api import RECORD_PREFIX

VOLUME, MASTER = bytes(range(16)), bytes(32)
KEYS = VolumeKeys(VOLUME, {0: MASTER})
SLOTS, _ = slots.create_slots(
    VOLUME, MASTER, passphrase="p", cost=slots.Argon2Cost(memory_kib=64, passes=1, lanes=1)
)
OLDER = slots.wrap_older(VOLUME, epoch=0, master=MASTER, newer=1, newer_master=MASTER)
RECORD = records.VolumeRecord(VOLUME, 1 << 20, SLOTS, 1_800_000_000, settings={"dedup": True})
DATA = records.encode(RECORD, KEYS)


def test_a_record_comes_back_and_is_verified() -> None:
    read = records.decode(DATA)
    records.verify(read, KEYS)
    assert replace(read, mac=b"") == RECORD
    assert read.filename == f"{RECORD_PREFIX}00010203-0405-0607-0809-0a0b0c0d0e0f-1.json"
    assert slots.unlock(read.slots, passphrase="p") == {0: MASTER}


def test_older_epochs_travel_with_it() -> None:
    keys = VolumeKeys(VOLUME, {0: MASTER, 1: MASTER})
    record = replace(RECORD, slots=replace(SLOTS, epoch=1, older=(OLDER,)))
    read = records.decode(records.encode(record, keys))
    records.verify(read, keys)
    assert read.slots.older == (OLDER,)


def test_no_flipped_bit_of_a_record_passes() -> None:
    for at in range(len(DATA)):
        changed = bytearray(DATA)
        changed[at] ^= 1
        with pytest.raises((ObjectCorrupt, CryptoError)):
            records.verify(records.decode(bytes(changed)), KEYS)


@given(st.binary(max_size=200))
def test_what_is_no_record_is_told(data: bytes) -> None:
    with pytest.raises(ObjectCorrupt):
        records.decode(data)


def test_hostile_and_foreign_records_are_refused() -> None:
    fields = json.loads(DATA)
    for change in (
        {"format": "x"},
        {"version": 2},
        {"volume": "0"},
        {"block_size": 1},
        {"block_size": True},
        {"slots": []},
        {"slots": fields["slots"] * 20},
        {"slots": [{**fields["slots"][0], "argon2id": [1 << 31, 3, 4]}]},
        {"mac": ""},
        {"more": 1},
        {"settings": 3},
    ):
        data = json.dumps({**fields, **change}, sort_keys=True, separators=(",", ":")).encode()
        with pytest.raises((ObjectCorrupt, CryptoError)):
            records.decode(data)
    for data in (DATA + b" ", b" " * 100_000, b"[" * 50_000, b"[]", b"null"):
        with pytest.raises(ObjectCorrupt):
            records.decode(data)
    with pytest.raises(CryptoError, match="another volume"):
        records.verify(records.decode(DATA), VolumeKeys(bytes(16), {0: MASTER}))
    with pytest.raises(CryptoError, match="changed"):
        records.verify(records.decode(DATA), VolumeKeys(VOLUME, {0: bytes(31) + b"x"}))
