"""Which segments are the newest state: chains, forks, gaps, checkpoints. No I/O."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.recovery.catalog import Seen
from stashcordfs.recovery.chain import Base, Chain, Fork, Gap, Link, find_chain
from stashcordfs.store.checkpoint import Manifest
from stashcordfs.types import ObjectId

GENESIS = b"genesis"


def link(number, previous, *, epoch=1, name=b"", complete=True, made=None, first=None, last=None):
    digest = b"%d/%d%s" % (epoch, number, name)
    seen = Seen(ObjectId(digest), 2, number)
    first = 10 * number if first is None else first
    return Link(
        seen, digest, previous, number, epoch, 5, (made or number) * 100,
        first, first + 9 if last is None else last, complete, 1000,
    )  # fmt: skip


def line(count, *, start=1, previous=GENESIS, **more):
    made = []
    for number in range(start, start + count):
        made.append(link(number, previous, **more))
        previous = made[-1].digest
    return made


def base(number, head, last_change, *, epoch=1, digest=None):
    manifest = Manifest(
        number, epoch, 5, 1, last_change, head.number if head else 0,
        digest or (head.digest if head else GENESIS), 100, (),
    )  # fmt: skip
    return Base(Seen(ObjectId(b"m%d" % number), 4, number), manifest)


def numbers(chain):
    assert isinstance(chain, Chain)
    return [found.number for found in chain.links]


@given(st.permutations(line(8)))
def test_a_whole_line_is_found_in_any_order(links):
    chain = find_chain(links, [], GENESIS)
    assert numbers(chain) == list(range(1, 9))
    assert (chain.base, chain.beside, chain.before) == (None, [], [])


def test_without_segments_there_is_nothing():
    assert find_chain([], [], GENESIS) is None


@pytest.mark.parametrize("missing", range(1, 8))
def test_a_gap_is_told_with_the_number_that_is_missing(missing):
    links = [found for found in line(8) if found.number != missing]
    gap = find_chain(links, [], GENESIS)
    assert isinstance(gap, Gap)
    assert (gap.missing, gap.newest.number) == (missing, 8)


def test_a_line_of_another_volume_does_not_reach_the_genesis():
    assert isinstance(find_chain(line(3), [], b"another"), Gap)


def test_a_checkpoint_stands_for_what_it_holds():
    links = line(8)
    newest = base(2, links[4], 55)  # within segment 5's changes
    chain = find_chain(links[4:], [base(1, links[0], 19), newest], GENESIS)
    assert chain.base is newest
    assert numbers(chain) == [5, 6, 7, 8]
    later = base(3, links[5], 72)  # up to the middle of segment 7
    chain = find_chain(links[5:], [newest, later], GENESIS)
    assert chain.base is later
    assert numbers(chain) == [7, 8]
    assert [found.number for found in chain.before] == [6]


def test_a_checkpoint_whose_head_is_gone_joins_the_segment_after_it():
    links = line(8)
    held = base(1, links[3], 49)
    chain = find_chain(links[4:], [held], GENESIS)
    assert (chain.base, numbers(chain)) == (held, [5, 6, 7, 8])


def test_a_checkpoint_that_holds_all_still_has_the_last_segment_for_its_blocks():
    links = line(4)
    held = base(1, links[3], 49)
    chain = find_chain(links, [held], GENESIS)
    assert (chain.base, numbers(chain)) == (held, [4])


def test_a_checkpoint_beyond_the_state_is_not_used():
    links = line(4)
    assert find_chain(links, [base(1, links[3], 50)], GENESIS).base is None


def test_the_state_ends_with_a_whole_cut():
    links = line(4)
    cut = [link(5, links[3].digest, complete=False)]
    chain = find_chain([*links, *cut], [], GENESIS)
    assert numbers(chain) == [1, 2, 3, 4]
    assert chain.unfinished == 1


def test_a_state_of_before_is_the_newest_cut_of_then():
    chain = find_chain(line(8), [], GENESIS, at_ns=550)
    assert numbers(chain) == [1, 2, 3, 4, 5]
    assert isinstance(find_chain(line(8), [], GENESIS, at_ns=50), Gap)


def test_a_checkpoint_later_than_the_wanted_time_is_not_used():
    links = line(8)
    early, late = base(1, links[1], 29), base(2, links[6], 79)
    assert find_chain(links, [early, late], GENESIS, at_ns=550).base is early


def test_a_fork_of_one_writer_is_refused():
    links = line(3)
    rival = link(3, links[1].digest, name=b"rival")
    with pytest.raises(Fork, match="number 3"):
        find_chain([*links, rival], [], GENESIS)


def test_a_writer_that_was_replaced_is_left_out():
    old = line(6)
    new = line(2, start=4, previous=old[2].digest, epoch=2)
    chain = find_chain([*old, *new], [], GENESIS)
    assert numbers(chain) == [1, 2, 3, 4, 5]
    assert [found.writer_epoch for found in chain.links] == [1, 1, 1, 2, 2]
    assert sorted(found.number for found in chain.beside) == [4, 5, 6]


def test_a_checkpoint_of_the_writer_that_was_replaced_is_not_used():
    old = line(6)
    new = line(2, start=4, previous=old[2].digest, epoch=2)
    beside = base(1, old[2], 45)  # head is common, but it holds changes of the old segment 4
    both = base(2, old[2], 39)  # holds what both have
    assert find_chain([*old, *new], [beside], GENESIS).base is None
    assert find_chain([*old, *new], [beside, both], GENESIS).base is both
    own = base(3, old[2], 45, epoch=2)
    assert find_chain([*old, *new], [beside, own], GENESIS).base is own
