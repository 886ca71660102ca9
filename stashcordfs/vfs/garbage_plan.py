"""Which messages are collected, and when: what a request buys. Pure.

A message is the unit of deletion. Young ones go a hundred a request, old ones (Discord: from 14
days on) one a request. So a message's last day as a young one is its *last chance*: what is dead by
then goes, and what is sparse is packed anew, together with others of its kind. What has become old
is left alone while what is needless stays within `slack`. docs/garbage.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stashcordfs.store.api import BULK_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stashcordfs.journal.census import HeldMessage

_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class CollectSettings:
    """When garbage is collected. Seconds, bytes, and shares from 0 to 1.

    `history_s`: how long history keeps what nothing refers to. A `share` of all requests may be
    spent, and `daily` ones however few there are. A census is taken `every_s`; what it finds waits
    up to `patience_s` for a segment that is due anyway. A condemned message is deleted after
    `grace_s`. Below `least_bytes` of garbage, nothing is done at all.
    """

    history_s: float = 7 * _DAY_S
    share: float = 0.15
    daily: float = 8.0
    first_s: float = 600.0
    every_s: float = 6 * 3600.0
    patience_s: float = 6 * 3600.0
    grace_s: float = 3600.0
    last_chance_s: float = 2 * _DAY_S
    slack: float = 0.25
    repack_slack: float = 0.6
    least_bytes: int = 16 << 20
    young_share: float = 0.5
    old_share: float = 0.3
    orphans_every_s: float = 30 * _DAY_S


@dataclass(slots=True)
class Plan:
    """What to do: messages in which nothing is needed, and those to be emptied first."""

    dead: list[HeldMessage] = field(default_factory=list)
    sparse: list[HeldMessage] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.dead or self.sparse)


def make_plan(
    messages: Sequence[HeldMessage],
    *,
    age_s: Callable[[int], float],
    settings: CollectSettings,
    thorough: bool = False,
) -> Plan:
    """What is worth its requests now. `thorough`: whatever frees more than it costs."""
    plan = Plan()
    free = [each for each in messages if not each.pinned]
    needed = sum(each.needed_bytes for each in messages)
    waste = sum(each.size_bytes for each in messages) - needed
    if waste < (1 if thorough else settings.least_bytes):
        return plan
    late_s = BULK_S - settings.every_s - settings.grace_s - 2 * settings.patience_s
    young = [each for each in free if age_s(each.message) < late_s]
    old = [each for each in free if age_s(each.message) >= late_s]
    last = [
        each
        for each in young
        if age_s(each.message) >= late_s - settings.last_chance_s
        and each.share < settings.young_share
    ]
    allowed = 0 if thorough else int(settings.slack * needed)
    urgent = any(age_s(each.message) >= late_s - settings.every_s for each in last)
    if not urgent and waste <= allowed:
        return plan
    plan.dead = [each for each in young if not each.needed_bytes]
    plan.sparse = [each for each in last if each.needed_bytes] if urgent else []
    waste -= sum(_gain(each) for each in (*plan.dead, *plan.sparse))
    taken = {each.address for each in (*plan.dead, *plan.sparse)}
    rest = [(each, each.share) for each in young if each.share < settings.young_share]
    rest += [(each, 1 + each.share) for each in old if each.share < settings.old_share]
    rest = [item for item in rest if item[0].address not in taken]
    # Seldom and many together, else messages go out half empty: so it begins late, and goes on.
    much = thorough or waste > settings.repack_slack * needed
    for each, _ in sorted(rest, key=lambda item: _gain(item[0]) / item[1], reverse=True):
        if waste > allowed and (much or not each.needed_bytes):
            (plan.sparse if each.needed_bytes else plan.dead).append(each)
            waste -= _gain(each)
    return plan


def _gain(message: HeldMessage) -> int:
    return message.size_bytes - message.needed_bytes


def batches(messages: Sequence[HeldMessage], max_bytes: int) -> Iterator[list[HeldMessage]]:
    """Messages that are emptied together, so that what is needed of them fills a message.

    The emptiest come first: they free the most for the least.
    """
    batch: list[HeldMessage] = []
    size = 0
    for each in sorted(messages, key=lambda each: each.share):
        if batch and size + each.needed_bytes > max_bytes:
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += each.needed_bytes
    if batch:
        yield batch
