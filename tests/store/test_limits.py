"""Which sizes are tried: down at each refusal, to what a block needs, and slowly up again."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.crypto.keys import VolumeKeys
from stashcordfs.store.limits import LearnedLimits
from stashcordfs.store.packer import RequestBuilder, least_limits
from stashcordfs.types import Limits

KEYS = VolumeKeys(bytes(16), {0: bytes(32)})
KIB, MIB = 1 << 10, 1 << 20


def full_message(limits: Limits) -> list[int]:
    """The sizes of a message that is as full as it may be."""
    sizes, room = [], limits.max_request_bytes
    while room > 0 and len(sizes) < limits.max_attachments:
        sizes.append(min(room, limits.max_attachment_bytes))
        room -= sizes[-1]
    return sizes


def takes(server: Limits, sizes: list[int]) -> bool:
    return max(sizes) <= server.max_attachment_bytes and sum(sizes) <= server.max_request_bytes


class Uploads:
    """Messages as full as they may be, to a server whose limits may change."""

    def __init__(self, block_bytes: int) -> None:
        self.learned = LearnedLimits(least=least_limits(block_bytes))
        self.refused = self.passed = self.given_up = 0

    def send(self, server: Limits, messages: int) -> None:
        for _ in range(messages):
            sizes = full_message(self.learned.limits)
            if takes(server, sizes):
                self.passed += 1
                self.learned.accepted()
            else:
                self.refused += 1
                self.given_up += not self.learned.too_large(sizes)


def test_limits_follow_the_tier_and_keep_what_was_refused() -> None:
    learned = LearnedLimits()
    assert learned.know_guild(0).max_attachment_bytes == 20 * MIB
    assert learned.know_guild(3).max_attachment_bytes == 25 * MIB
    assert learned.too_large([24 * MIB])
    assert learned.know_guild(3).max_attachment_bytes == 20 * MIB


def test_the_ladder_ends_at_one_mebibyte() -> None:
    learned, steps = LearnedLimits(), []
    while learned.too_large(full_message(learned.limits)):
        now = learned.limits
        steps.append((now.max_attachment_bytes / MIB, now.max_request_bytes / MIB))
    attachments = [10, 8, 4, 2, 1]
    assert steps == [*((n, 25) for n in attachments), (1, 5), (1, 2.5), (1, 1.25), (1, 1)]


@pytest.mark.parametrize("block_bytes", [64 * KIB, MIB, 8 * MIB])
async def test_a_block_fits_at_the_ladders_end_and_into_nothing_less(block_bytes) -> None:
    learned = LearnedLimits(least=least_limits(block_bytes))
    while learned.too_large(full_message(learned.limits)):
        pass
    data = os.urandom(block_bytes)
    builder = RequestBuilder(KEYS, learned.limits)
    assert await builder.add("key", data, KEYS.chunk_id(data))
    (pack,) = await builder.finish([], [])
    assert pack.size <= learned.limits.max_attachment_bytes
    least = least_limits(block_bytes)
    for less in (
        Limits(least.max_attachment_bytes - 1, 10, 25 * MIB),
        Limits(20 * MIB, 10, least.max_request_bytes - 1),
    ):
        assert not await RequestBuilder(KEYS, less).add("key", data, KEYS.chunk_id(data))


@given(
    st.sampled_from([64 * KIB, MIB, 8 * MIB]), st.integers(0, 24 * MIB), st.integers(0, 24 * MIB)
)
def test_whatever_a_server_takes_is_found_with_few_refusals(block_bytes, more, more_in_all) -> None:
    least, uploads = least_limits(block_bytes), Uploads(block_bytes)
    server = Limits(
        max(MIB, least.max_attachment_bytes) + more,
        10,
        max(MIB, least.max_request_bytes) + more + more_in_all,
    )
    uploads.send(server, 20)
    assert uploads.refused <= 12
    assert uploads.given_up == 0
    uploads.send(server, 5000)
    assert uploads.refused <= 12 + 12 * 10
    assert uploads.passed >= 4900


def test_after_a_lost_boost_has_come_back_full_messages_go_again() -> None:
    uploads = Uploads(MIB)
    uploads.send(Limits(2 * MIB, 10, 3 * MIB), 40)
    uploads.send(Limits(), 400)
    assert uploads.learned.limits == Limits()
    refused = uploads.refused
    uploads.send(Limits(), 1000)
    assert uploads.refused == refused


def test_a_limit_that_stays_is_tried_ever_more_rarely() -> None:
    uploads = Uploads(MIB)
    uploads.send(Limits(10 * MIB, 10, 25 * MIB), 100_000)
    assert uploads.refused <= 1 + 20
    assert uploads.learned.limits.max_attachment_bytes in (10 * MIB, 20 * MIB)


def test_a_server_that_takes_nothing_is_given_up_each_time_without_a_walk() -> None:
    uploads = Uploads(MIB)
    uploads.send(Limits(10, 1, 10), 1000)
    assert uploads.given_up >= 1000 - 12
    uploads.send(Limits(), 1000)
    assert uploads.learned.limits == Limits()
