"""Access control lists beside modes, without a kernel."""

from __future__ import annotations

import errno
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.errors import FsError
from stashcordfs.vfs import acl

NOBODY = 0xFFFFFFFF
rights = st.integers(0, 7)
modes = st.integers(0, 0o7777)


def packed(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def extended(user, named, group, mask, other):
    return packed(
        (1, user, NOBODY), (2, named, 1000), (4, group, NOBODY), (16, mask, NOBODY),
        (32, other, NOBODY),
    )  # fmt: skip


@given(user=rights, named=rights, group=rights, mask=rights, other=rights, mode=modes)
def test_the_groups_bits_are_the_mask(user, named, group, mask, other, mode):
    value = extended(user, named, group, mask, other)
    after, kept = acl.with_list(value, stat.S_IFREG | mode)
    assert after == stat.S_IFREG | mode & 0o7000 | user << 6 | mask << 3 | other
    assert kept == value


@given(user=rights, group=rights, other=rights, mode=modes)
def test_a_list_of_three_is_a_mode(user, group, other, mode):
    value = packed((1, user, NOBODY), (4, group, NOBODY), (32, other, NOBODY))
    after, kept = acl.with_list(value, mode)
    assert after == mode & 0o7000 | user << 6 | group << 3 | other
    assert kept is None


@given(value=st.builds(extended, rights, rights, rights, rights, rights), mode=modes)
def test_a_mode_and_its_list_agree(value, mode):
    changed = acl.with_mode(value, mode)
    assert acl.with_list(changed, mode) == (mode, changed)


@given(
    value=st.builds(extended, rights, rights, rights, rights, rights),
    mode=modes,
    folder=st.booleans(),
)
def test_nothing_inherits_more_than_was_asked_for(value, mode, folder):
    asked = mode | (stat.S_IFDIR if folder else stat.S_IFREG)
    made, lists = acl.inherited(value, asked)
    assert made & ~asked == 0
    assert made & ~0o777 == asked & ~0o777
    assert acl.with_list(lists[acl.ACCESS], made)[0] == made
    assert lists.get(acl.DEFAULT) == (value if folder else None)


@pytest.mark.parametrize("value", [b"", b"\x02\0\0\0", b"\x01\0\0\0" + bytes(8), packed()[:3]])
def test_what_is_no_list_is_refused(value):
    with pytest.raises(FsError) as refused:
        acl.with_list(value, 0)
    assert refused.value.errno == errno.EINVAL
