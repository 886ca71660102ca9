"""Which messages are collected, by age, share, and what is needless altogether."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.journal.census import HeldMessage
from stashcordfs.store.api import BULK_S
from stashcordfs.vfs.garbage_plan import CollectSettings, batches, make_plan

MIB = 1 << 20
DAY_S = 86_400.0
SETTINGS = CollectSettings()
LATE_S = BULK_S - SETTINGS.every_s - SETTINGS.grace_s - 2 * SETTINGS.patience_s


def message(number, share, *, size=20 * MIB, pinned=False):
    return HeldMessage(1, number, [number], size, int(size * share), 0, pinned)


def plan(*messages, ages=None, thorough=False, settings=SETTINGS):
    ages = ages or {}
    found = make_plan(
        messages, age_s=lambda m: ages.get(m, 0.0), settings=settings, thorough=thorough
    )
    return [m.message for m in found.dead], [m.message for m in found.sparse]


FULL = [message(100 + n, 1.0) for n in range(40)]


def test_what_is_needless_within_the_slack_is_left_alone() -> None:
    assert plan(*FULL, message(1, 0.0), message(2, 0.1)) == ([], [])


def test_beyond_the_slack_the_dead_go_first() -> None:
    dead = [message(n, 0.0) for n in range(1, 15)]
    assert plan(*FULL, *dead, message(50, 0.5)) == (list(range(1, 15)), [])


def test_in_its_last_days_as_a_young_one_a_message_is_collected_if_it_is_sparse() -> None:
    late = dict.fromkeys((1, 2, 3), LATE_S - 3600)
    found = plan(*FULL, message(1, 0.0), message(2, 0.4), message(3, 0.6), ages=late)
    assert found == ([1], [2])


def test_an_old_message_is_left_alone_within_the_slack() -> None:
    old = dict.fromkeys((1, 2), 30 * DAY_S)
    assert plan(*FULL, message(1, 0.0), message(2, 0.1), ages=old) == ([], [])
    assert plan(*FULL, message(1, 0.0), message(2, 0.1), ages=old, thorough=True) == ([1], [2])


def test_of_old_ones_no_more_than_is_needed_are_collected_the_emptiest_first() -> None:
    old = [message(n, 0.0) for n in range(1, 20)]
    dead, sparse = plan(*FULL, *old, ages=dict.fromkeys(range(1, 20), 30 * DAY_S))
    assert len(dead) == 9  # 380 MiB of 800 are needless, 200 are allowed
    assert sparse == []


def test_sparse_young_ones_wait_for_their_last_days_unless_it_is_much() -> None:
    sparse = [message(n, 0.2) for n in range(1, 16)]
    assert plan(*FULL, *sparse) == ([], [])
    dead, sparse = plan(*FULL[:10], *sparse)
    assert dead == []
    assert len(sparse) > 10  # many together, down to the slack


def test_a_small_sum_is_not_worth_a_request() -> None:
    assert plan(message(1, 0.0, size=15 * MIB)) == ([], [])
    assert plan(message(1, 0.0, size=15 * MIB), thorough=True) == ([1], [])


def test_what_is_on_its_way_is_left_alone() -> None:
    assert plan(message(1, 0.0, pinned=True), thorough=True) == ([], [])


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 40), st.booleans()), max_size=60),
    st.booleans(),
)
def test_a_plan_takes_each_message_once_and_dead_are_those_that_nothing_needs(
    shares, thorough
) -> None:
    messages = [message(n, share, pinned=p) for n, (share, _, p) in enumerate(shares)]
    ages = {n: days * DAY_S for n, (_, days, _) in enumerate(shares)}
    found = make_plan(
        messages, age_s=ages.__getitem__, settings=replace(SETTINGS, slack=0.1), thorough=thorough
    )
    taken = [each.address for each in (*found.dead, *found.sparse)]
    assert len(taken) == len(set(taken))
    assert all(not each.needed_bytes for each in found.dead)
    assert all(0 < each.share < SETTINGS.young_share for each in found.sparse)
    assert not any(each.pinned for each in (*found.dead, *found.sparse))


@pytest.mark.parametrize("room", [1, 20 * MIB, 50 * MIB])
def test_batches_hold_what_fits_into_a_message(room) -> None:
    messages = [message(n, n / 10) for n in range(1, 10)]
    found = list(batches(messages, room))
    assert sorted(m.message for batch in found for m in batch) == list(range(1, 10))
    assert all(len(b) == 1 or sum(m.needed_bytes for m in b) <= room for b in found)
