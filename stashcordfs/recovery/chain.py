"""Which segments make up the newest state, and what they stand on. Pure.

Segments name their predecessor by its digest, so they form a tree whose root is the volume. The
newest state is the one of the highest (writer epoch, number). Following it back, the chain must
reach a checkpoint that belongs to it, or the root. What stands beside the chain is another
writer's: allowed only where a recovery had taken the volume over from him.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stashcordfs.errors import StashcordError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from stashcordfs.recovery.catalog import Seen
    from stashcordfs.store.checkpoint import Manifest
    from stashcordfs.store.segment import Segment


class Fork(StashcordError):
    """Two writers of one epoch have gone on from one state: nobody can tell which is right."""


@dataclass(frozen=True, slots=True)
class Link:
    """A segment without its changes: what the chain is made of."""

    seen: Seen
    digest: bytes
    previous: bytes
    number: int
    writer_epoch: int
    schema_version: int
    made_ns: int
    first: int  # of its changes; 0 when it has none
    last: int
    complete: bool
    size: int

    @classmethod
    def of(cls, seen: Seen, segment: Segment, digest: bytes, size: int) -> Link:
        """The link of a decoded segment."""
        changes = segment.changes
        return cls(
            seen,
            digest,
            segment.previous,
            segment.number,
            segment.writer_epoch,
            segment.schema_version,
            segment.made_ns,
            changes[0].id if changes else 0,
            changes[-1].id if changes else 0,
            segment.complete,
            size,
        )


@dataclass(frozen=True, slots=True)
class Base:
    """A checkpoint that could be used: its object, and what its manifest says."""

    seen: Seen
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Chain:
    """A state: `base` (None: from nothing), then `links` in order; the last one is complete.

    `before` are older segments of the same history, `beside` those of replaced writers; `gap` is
    the number of a missing segment because of which newer ones cannot be used.
    """

    base: Base | None
    links: Sequence[Link]
    before: Sequence[Link] = ()
    beside: Sequence[Link] = ()
    unfinished: int = 0  # segments at the end whose cut is not there as a whole


@dataclass(frozen=True, slots=True)
class Gap:
    """Why there is no chain: segment `missing` is not there, `newest` is."""

    missing: int
    newest: Link


def find_chain(
    links: Collection[Link],
    bases: Iterable[Base],
    genesis: bytes,
    *,
    at_ns: int | None = None,
) -> Chain | Gap | None:
    """The newest state, or the newest that was cut at `at_ns` or before. None: no segments.

    Raises Fork.
    """
    if not links:
        return None
    by_digest = {link.digest: link for link in links}
    tip = max(by_digest.values(), key=lambda link: (link.writer_epoch, link.number))
    line = [tip]
    while (link := by_digest.get(line[-1].previous)) is not None:
        line.append(link)
    line.reverse()
    beside = _beside(by_digest.values(), line)
    whole = line[0].previous == genesis
    end = next(
        (
            at
            for at in range(len(line) - 1, -1, -1)
            if line[at].complete and (at_ns is None or line[at].made_ns <= at_ns)
        ),
        None,
    )
    if end is None:
        return Gap(line[0].number - 1, tip)
    last_change = max((link.last for link in line[: end + 1]), default=0)
    base = _best_base(bases, line, genesis, last_change)
    if base is None and not whole:
        return Gap(line[0].number - 1, tip)
    held = base.manifest.last_change if base else 0
    used = [link for link in line[: end + 1] if link.last > held]
    if not used:  # the checkpoint holds it all; its blocks are told by the last segment
        used = [line[end]]
    start = line.index(used[0])
    return Chain(
        base, line[start : end + 1], line[:start], beside, len(line) - 1 - end if not at_ns else 0
    )


def _beside(links: Iterable[Link], line: Sequence[Link]) -> list[Link]:
    """What is not of the line. Raises Fork where it is not of an earlier writer."""
    on_line = {link.digest for link in line}
    by_number = {link.number: link for link in line}
    beside = []
    for link in links:
        if link.digest in on_line:
            continue
        rival = by_number.get(link.number)
        if rival is not None and rival.writer_epoch == link.writer_epoch:
            raise Fork(
                f"two different segments have number {link.number} and writer {link.writer_epoch}: "
                "two machines have written to the volume at once. Choose an earlier state with "
                "--at, from before they parted"
            )
        if rival is not None or link.number > line[0].number:
            beside.append(link)
    return beside


def _best_base(
    bases: Iterable[Base], line: Sequence[Link], genesis: bytes, last_change: int
) -> Base | None:
    """The newest checkpoint of this very history that holds nothing beyond the wanted state."""
    ends = {link.digest: link for link in line}
    fitting = []
    for base in bases:
        manifest = base.manifest
        if manifest.last_change > last_change:
            continue
        head = ends.get(manifest.head_digest)
        below = manifest.head_digest in (line[0].previous, genesis)
        if head is None and not below:
            continue
        # What it holds beyond its head must be of this line too, not of a writer beside it.
        holder = next((link for link in line if link.last >= manifest.last_change), None)
        beyond = manifest.last_change > (head.last if head else 0)
        if beyond and (holder is None or holder.writer_epoch != manifest.writer_epoch):
            continue
        fitting.append(base)
    return max(fitting, key=lambda base: base.manifest.last_change, default=None)
