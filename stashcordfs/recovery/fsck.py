"""`fsck`: what must hold of a volume's journal and local state, and mending where it does not.

Offline the caller holds the volume's lock. Beside a mounted volume the journal is read as it was at
its last commit, and what runs ahead of it (local files, marks) is left out. Nothing asks Discord:
that is `verify`'s to do. Blocking; it needs no loop.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stashcordfs.errors import JournalError
from stashcordfs.journal import inspection as journal
from stashcordfs.journal.inspection import Fault, Inspection
from stashcordfs.recovery.local_state import LocalState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    Progress = Callable[[str, int, int], None]  # stage, how much of it is done, of how much

_LISTED = 100  # findings of one kind that are kept in words; all are counted


@dataclass(frozen=True, slots=True)
class Place:
    """The volume that is looked at. `newest_epoch`: of its keys, None when that is not known."""

    folder: Path
    block_bytes: int
    newest_epoch: int | None = None

    @property
    def journal(self) -> Path:
        """The database."""
        return self.folder / "journal.sqlite"


@dataclass(slots=True)
class Report:
    """What was found, and what was done about it."""

    stages: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    findings: list[Fault] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    journal_copy: str = ""

    @property
    def clean(self) -> bool:
        """No error. Notes are what the next mount tidies by itself."""
        return not self.errors

    def add(self, fault: Fault) -> None:
        """Count a finding; keep its words while there are not too many of its kind."""
        counts = self.notes if fault.note else self.errors
        counts[fault.check] += 1
        if counts[fault.check] <= _LISTED:
            self.findings.append(fault)

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "clean": self.clean,
            "errors": self.errors.total(),
            "notes": self.notes.total(),
            "errors_by_check": dict(self.errors),
            "notes_by_check": dict(self.notes),
            "findings": [
                {"check": f.check, "severity": "note" if f.note else "error", "text": f.text}
                for f in self.findings
            ],
            "checked": self.stages,
            "skipped": self.skipped,
            "repaired": self.repaired,
            "journal_copy": self.journal_copy,
        }


@dataclass(frozen=True, slots=True)
class _Stage:
    says: str
    total: int
    run: Callable[[Callable[[int], None]], Iterator[Fault]]


def check(place: Place, *, mounted: bool, power_lost: bool = False, progress: Progress) -> Report:
    """Look at everything, change nothing.

    `power_lost`: the last run ended by a power cut, so that marks and cached blocks mean nothing;
    the next mount drops them, and goes by what was synced.
    """
    report = Report()
    try:
        with journal.inspect(place.journal) as look:
            if look.version != journal.VERSION:
                report.add(_other_version(look.version))
                return report
            stages = _journal_stages(look, place)
            local = LocalState(look, place.folder, place.block_bytes)
            if mounted:
                report.skipped = ["local files and marks: the volume is mounted"]
            elif power_lost:
                report.skipped = ["marks and cached blocks: the last run ended by a power cut"]
                stages += _synced_stages(local)
            else:
                stages += _local_stages(local)
            for stage in stages:
                _run_stage(look, stage, report, progress)
    except JournalError as error:
        report.add(Fault("sqlite", str(error)))
    return report


def _other_version(found: int) -> Fault:
    if found > journal.VERSION:
        text = f"the journal has format {found}, this program knows {journal.VERSION}: update it"
    else:
        text = f"the journal has format {found}; mount it once, so that it is migrated"
    return Fault("version", text)


def _run_stage(look: Inspection, stage: _Stage, report: Report, progress: Progress) -> None:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(stage.says, done, max(done, stage.total))

    tick(0)
    look.tick = tick
    report.stages.append(stage.says)
    try:
        for fault in stage.run(tick):
            report.add(fault)
    except JournalError as error:
        report.add(Fault("sqlite", f"not all could be checked ({stage.says}): {error}"))


def _journal_stages(look: Inspection, place: Place) -> list[_Stage]:
    block_bytes = place.block_bytes

    def rows(table: str) -> int:
        try:
            return look.number(f"SELECT count(*) FROM {table}")  # noqa: S608  constants
        except JournalError:
            return 0

    def integrity(_: Callable[[int], None]) -> Iterator[Fault]:
        yield from (Fault("sqlite", text) for text in look.integrity())

    def of(checked: Iterator[Fault]) -> Callable[[Callable[[int], None]], Iterator[Fault]]:
        return lambda _: checked

    inodes, names = rows("inodes"), rows("dirents")
    return [
        _Stage("SQLite reads every page, its indexes agree", 0, integrity),
        _Stage("inodes, link counts, sizes", 2 * inodes, of(journal.check_inodes(look))),
        _Stage("names and folders", 2 * names, of(journal.check_names(look))),
        _Stage("a path to every folder", inodes, of(journal.check_reach(look))),
        _Stage("trash", rows("trash"), of(journal.check_trash(look))),
        _Stage("chunk lists", rows("chunk_list"), of(journal.check_chunk_lists(look, block_bytes))),
        _Stage("chunks within their packs", rows("chunks"), of(journal.check_chunks(look))),
        _Stage("packs", rows("packs"), of(journal.check_packs(look, place.newest_epoch))),
        _Stage("outbox, watch list, local rows", 0, of(journal.check_local(look, block_bytes))),
        _Stage("what Discord is told", 0, of(journal.check_told(look))),
        _Stage("what may be deleted", 0, of(journal.check_garbage(look))),
    ]


def _local_stages(local: LocalState) -> list[_Stage]:
    return [
        _Stage("whose the local files are", 0, lambda _: local.read_owners()),
        _Stage("marks and unsent data", 0, lambda _: local.check_marks()),
        _Stage("local files", 0, lambda _: local.check_files()),
        _Stage("cached blocks", local.cached_bytes(), local.check_cached),
    ]


def _synced_stages(local: LocalState) -> list[_Stage]:
    return [
        _Stage("whose the local files are", 0, lambda _: local.read_owners()),
        _Stage("synced data", 0, lambda _: local.check_synced()),
    ]


# ---------------------------------------------------------------------- mending


def repair(place: Place, *, power_lost: bool = False, progress: Progress) -> Report:
    """Copy the journal, mend, and look again: the report is of what is left.

    The caller holds the volume's lock. What is only on this machine is never deleted.
    """
    before = check(place, mounted=False, power_lost=power_lost, progress=progress)
    if before.clean or "version" in before.errors:
        return before
    copy = _copy_journal(place.journal)
    done: list[str] = []
    try:
        progress("mending", 0, 0)
        if "sqlite" in before.errors:
            done += _mend_file(place.journal)
        older, lost = (False, []) if power_lost else _unknown_data(place)
        done += journal.mend(place.journal, place.block_bytes, lost)
        done += _mend_synced(place) if power_lost else _mend_local(place, older=older)
    except JournalError as error:
        before.repaired, before.journal_copy = done, str(copy)
        before.add(Fault("sqlite", str(error)))
        return before
    after = check(place, mounted=False, power_lost=power_lost, progress=progress)
    after.repaired, after.journal_copy = done, str(copy)
    return after


def _copy_journal(path: Path) -> Path:
    """The database and its WAL as they are, byte for byte: SQLite may not be able to read them."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    copy = path.with_name(f"{path.name}.before-fsck-{stamp}")
    for suffix in ("-wal", ""):
        source = path.with_name(path.name + suffix)
        if source.exists():
            target = copy.with_name(copy.name + suffix)
            shutil.copyfile(source, target)
            target.chmod(0o600)
            _sync(target)
    _sync(path.parent)
    return copy


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mend_file(path: Path) -> list[str]:
    """Indexes anew from tables where that is enough, else a new file with what can be read."""
    try:
        journal.rebuild_indexes(path)
        with journal.inspect(path) as look:
            if not look.integrity():
                return ["the indexes were made anew"]
    except JournalError:
        pass  # it is worse than that
    new = path.with_name(path.name + ".salvaged")
    found = journal.salvage(path, new)
    for suffix in ("-wal", "-shm"):  # salvage has read them; they do not belong to the new file
        path.with_name(path.name + suffix).unlink(missing_ok=True)
        new.with_name(new.name + suffix).unlink(missing_ok=True)
    _sync(new)
    new.replace(path)
    _sync(path.parent)
    rows = ", ".join(f"{count} {table}" for table, count in found.items() if count)
    return [f"a new journal was made of what could be read of the old one: {rows}"]


def _look_at(*stages: Iterator[Fault]) -> None:
    """Let each stage in turn find what is to be mended; its faults were told before."""
    for stage in stages:
        for _ in stage:
            pass


def _unknown_data(place: Place) -> tuple[bool, list[journal.LostFile]]:
    """Whether the journal is older than what lies beside it, and unsent data it does not know."""
    with journal.inspect(place.journal) as look:
        local = LocalState(look, place.folder, place.block_bytes)
        _look_at(local.read_owners(), local.check_marks(), local.check_files())
        return local.older, local.unknown if local.older else []


def _mend_synced(place: Place) -> list[str]:
    """After a power cut: give up what was synced and is in no local file."""
    with journal.inspect(place.journal) as look:
        local = LocalState(look, place.folder, place.block_bytes)
        _look_at(local.read_owners(), local.check_synced())
        lost = local.lost
    return _give_up(place, lost) if lost else []


def _give_up(place: Place, lost: Mapping[tuple[int, int], int]) -> list[str]:
    count = journal.lose_blocks(place.journal, lost, place.block_bytes)
    text = (
        f"{len(lost)} blocks whose bytes are in no local file given up: {count} of them read as"
        " damaged, the others as Discord has them"
    )
    return [text]


def _mend_local(place: Place, *, older: bool) -> list[str]:
    """Marks for what was synced and lost them; rows of rotten cached blocks go.

    Beside an `older` journal, files of inodes that it does not know go where no mount removes them.
    """
    with journal.inspect(place.journal) as look:
        local = LocalState(look, place.folder, place.block_bytes)
        _look_at(
            local.read_owners(),
            local.check_marks(),
            local.check_files(),
            local.check_cached(lambda _: None),
        )
        marked, rotten, lost = local.mark_anew(), local.rotten, local.lost
        folder = place.folder / "lost-blocks"
        moved = local.save_strays(folder) if older else 0
    done = []
    if moved:
        done.append(f"{moved} local files of unknown inodes moved to {folder}")
    if marked:
        done.append(f"{marked} blocks that are not on Discord marked anew")
    if lost:
        local.unmark_lost()
        done += _give_up(place, lost)
    if rotten:
        journal.forget_cached(place.journal, rotten)
        done.append(f"{len(rotten)} rotten cached blocks forgotten; they are fetched anew")
    return done
