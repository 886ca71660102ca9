"""`recover`: a volume's local state made anew on a bare machine, from Discord alone.

Record -> passphrase -> newest state -> journal -> claim. STATE/NAME counts as a volume only when
`volume.json` is written, last of all; until then a recovery that was cut short goes on with what it
had fetched into STATE/NAME/recover.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from stashcordfs.crypto.keys import KIND_SEGMENT
from stashcordfs.daemon.provision import explained, journal_store_on, keep_record, store_on, unlock
from stashcordfs.daemon.token import Token
from stashcordfs.discord.client import ClientStats, DiscordClient
from stashcordfs.discord.kept import KeptLimits
from stashcordfs.errors import CryptoError, ObjectCorrupt, StashcordError, StoreError, UsageError
from stashcordfs.journal import Journal
from stashcordfs.recovery.presence import note_lost_packs
from stashcordfs.recovery.rebuild import rebuild_from_packs
from stashcordfs.recovery.recover import Built, Found, NothingFound, Recovery
from stashcordfs.store import record as records
from stashcordfs.store.segment import genesis
from stashcordfs.vfs.fencing import Fence
from stashcordfs.vfs.journal_channel import JournalChannel
from stashcordfs.volumes import VolumeDir, VolumeRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stashcordfs.config import Settings
    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.journal import Trashed
    from stashcordfs.journal.changes import Lost
    from stashcordfs.store.discord_store import DiscordStore
    from stashcordfs.types import Ino
    from stashcordfs.vfs.journal_channel import Foreign

    Progress = Callable[[str, int, int], None]

log = logging.getLogger(__name__)

_WORK = "recover"
_TRASH_PAGE = 1000
_REPORT = "recovered.json"
_CLAIMED = "claimed-"  # and the epoch: a name cannot be torn by a power cut
_MOST_PASSES = 5  # one is enough, unless the list lags or the old machine still writes
_FIRST_LOOK_S, _LISTED_WITHIN_S = 1.0, 120.0  # lists lag for moments; half a minute was seen


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a person asks for. `at_ns` and `expect` None: the newest there is."""

    channels: Sequence[int]
    journal_channel: int
    passphrase: str | None = None
    recovery_key: str | None = None
    at_ns: int | None = None
    expect: int | None = None
    dry_run: bool = False
    from_packs: bool = False


def recover_volume(
    settings: Settings, name: str, wanted: Wanted, *, progress: Progress
) -> dict[str, Any]:
    """Recover the volume as NAME; the report. StashcordError says why it cannot be. Blocks."""
    volume = VolumeDir(settings.state_dir, name)
    if volume.exists():
        raise UsageError(
            f"volume {name} exists on this machine: recover under another name, or destroy it first"
        )
    begun = time.monotonic()
    if wanted.dry_run:
        with tempfile.TemporaryDirectory(prefix="stashcordfs-recover-") as folder:
            report = trio.run(_recover, settings, None, Path(folder), wanted, progress)
    else:
        volume.create()
        with volume.lock():
            work = volume.path / _WORK
            work.mkdir(mode=0o700, exist_ok=True)
            report = trio.run(_recover, settings, volume, work, wanted, progress)
            shutil.rmtree(work)
    report |= {"name": name, "dry_run": wanted.dry_run, "seconds": time.monotonic() - begun}
    return report


def _keep_report(volume: VolumeDir, report: dict[str, Any]) -> None:
    """What is lost must be known later too: a recovery cannot be asked twice."""
    path = volume.path / _REPORT
    path.touch(mode=0o600)
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    report["report"] = str(path)


async def _recover(
    settings: Settings,
    volume: VolumeDir | None,
    work: Path,
    wanted: Wanted,
    progress: Progress,
) -> dict[str, Any]:
    stats = ClientStats()
    async with DiscordClient(
        api_url=settings.api_url,
        token=Token(settings),
        stats=stats,
        kept=None if volume is None else KeptLimits(volume.limits_path),
    ) as client:
        place = VolumeRecord(
            "", tuple(wanted.channels), wanted.journal_channel, settings.api_url, 0
        )
        store = journal_store_on(client, place)
        record, posted, keys = await _open_record(store, wanted, progress)
        task = Rebuilding(wanted, store, store_on(client, place), keys, record, work, progress)
        report = await (task.run() if volume is None else task.take_over())
        report["requests"] = stats.requests
        if volume is not None:
            _keep_report(volume, report)
            _complete(volume, work, posted, record, place)
        return report


async def _open_record(
    store: DiscordStore, wanted: Wanted, progress: Progress
) -> tuple[records.VolumeRecord, bytes, VolumeKeys]:
    """The newest record that the secret opens. CryptoError when it opens none."""
    progress("looking for the volume's record", 0, 0)
    found: dict[bytes, tuple[records.VolumeRecord, bytes]] = {}
    for data in await explained(store.find_records):
        try:
            record = records.decode(data)
        except (ObjectCorrupt, CryptoError):
            continue
        if record.volume not in found or found[record.volume][0].serial <= record.serial:
            found[record.volume] = (record, data)
    if not found:
        raise StashcordError(
            f"channel {wanted.journal_channel} holds no volume's record: is it the journal "
            "channel? Its id stands in volume.json of the lost machine, or is the first --channel"
        )
    fault: CryptoError | None = None
    for record, data in found.values():
        try:
            keys = await trio.to_thread.run_sync(
                lambda r=record: unlock(  # type: ignore[misc]
                    r, passphrase=wanted.passphrase, recovery_key=wanted.recovery_key
                )[1]
            )
        except CryptoError as error:
            fault = error
        else:
            return record, data, keys
    assert fault is not None
    raise fault


class Rebuilding:
    """One recovery, from the keys to a journal in `work`."""

    def __init__(
        self,
        wanted: Wanted,
        store: DiscordStore,
        data_store: DiscordStore,
        keys: VolumeKeys,
        record: records.VolumeRecord,
        work: Path,
        progress: Progress,
    ) -> None:
        self._wanted = wanted
        self._store = store
        self._data_store = data_store
        self._keys = keys
        self._record = record
        self._path = work / "journal.sqlite"
        self._epoch = 0  # claimed by an earlier pass
        self._progress = progress
        self._recovery = Recovery(
            store=store,
            keys=keys,
            genesis=genesis(record),
            folder=work,
            progress=progress,
        )

    async def run(self) -> dict[str, Any]:
        """Make the journal; the report."""
        for left in self._path.parent.glob("journal.sqlite*"):
            left.unlink()
        if self._wanted.from_packs:
            return await self._from_packs()
        try:
            found, built = await self._from_journal()
        except NothingFound:
            if self._wanted.at_ns is not None or self._wanted.expect is not None:
                raise
            return await self._from_packs()
        journal = Journal.open(self._path, clock_ns=time.time_ns)
        try:
            lost, older = await journal.note_losses(built.dirty, self._record.block_size)
            return {
                **self._state(found, built),
                **await _contents(journal),
                **await _losses(journal, lost, older),
                **await self._packs(journal),
            }
        finally:
            journal.close()

    async def _from_journal(self) -> tuple[Found, Built]:
        while True:
            found = await self._recovery.find(at_ns=self._wanted.at_ns, expect=self._wanted.expect)
            try:
                return found, await self._recovery.build(found, self._path)
            except StoreError as error:
                if found.chain.base is None:
                    raise
                self._recovery.exclude(found, f"a checkpoint is damaged: {error}")

    def _state(self, found: Found, built: Built) -> dict[str, Any]:
        head = found.head
        base = found.chain.base
        return {
            "segment": head.number,
            "segment_time_ns": head.made_ns,
            "writer_epoch": found.writer_epoch + 1,
            "checkpoint": base.manifest.number if base else None,
            "changes": built.changes,
            "notes": found.notes,
        }

    async def _from_packs(self) -> dict[str, Any]:
        outcome = await rebuild_from_packs(
            self._data_store,
            self._keys,
            self._path,
            channels=sorted({*self._wanted.channels, self._wanted.journal_channel}),
            block_bytes=self._record.block_size,
            progress=self._progress,
        )
        journal = Journal.open(self._path, clock_ns=time.time_ns)
        try:
            contents = await _contents(journal)
        finally:
            journal.close()
        return {
            "segment": 0,
            "segment_time_ns": 0,
            "writer_epoch": outcome.writer_epoch,
            "checkpoint": None,
            "changes": 0,
            "notes": outcome.notes,
            **contents,
            **_no_losses(),
        }

    async def _packs(self, journal: Journal) -> dict[str, Any]:
        """Before a recovery, which packs are missing, and what of; after it, `verify` tells."""
        if not self._wanted.dry_run:
            return {}
        lost, blocks = await note_lost_packs(journal, self._data_store, self._progress)
        return {
            "missing_packs": [pack.location.filename for pack in lost],
            "damaged": {await _path_of(journal, ino): n for ino, n in sorted(blocks.items())},
        }

    async def take_over(self) -> dict[str, Any]:
        """Make the journal and claim the volume; the report.

        The writer of before may have posted until our claim was there, and a list may lack the
        newest for a while: what turns up then is read as well. StashcordError: why it cannot be.
        """
        for claimed in self._path.parent.glob(f"{_CLAIMED}*"):
            self._recovery.note_epoch(int(claimed.name.removeprefix(_CLAIMED)))
        for _ in range(_MOST_PASSES):
            report = await self.run()
            if not await self._claim() or self._wanted.from_packs:
                return report
            log.info("segments have turned up that stood before the claim: beginning anew")
        raise StashcordError(
            "newer segments are in the channel, and cannot be read: run the same command again "
            "later; it goes on with what it has fetched"
        )

    async def _claim(self) -> bool:
        """The old writer notices and stops. Whether he had posted more than was found."""
        self._progress("claiming the volume", 0, 0)
        journal = Journal.open(self._path, clock_ns=time.time_ns)
        try:
            channel = JournalChannel(
                journal=journal, store=self._store, keys=self._keys, clock=trio.current_time
            )
            fence = Fence(
                journal=journal,
                channel=channel,
                keys=self._keys,
                genesis=genesis(self._record),
                host=socket.gethostname(),
                now_ns=time.time_ns,
                report=lambda _: None,
            )
            replaced: list[Foreign] = []
            fence.on_replaced = replaced.append
            if self._epoch and journal.writer_epoch > self._epoch + 1:
                raise StashcordError("not recovered: another recovery has come between")
            self._epoch = journal.writer_epoch
            # Before it is posted: if we are cut short, what comes next must come after it.
            self._recovery.note_epoch(journal.writer_epoch)
            self._path.with_name(f"{_CLAIMED}{journal.writer_epoch}").touch()
            await fence.settle()
            claimed_at = await _listed_claim(fence, channel)
            if fence.reason:
                raise StashcordError(f"not recovered: {fence.reason}")
            await journal.wal_sync()
            return any(
                posted.kind == KIND_SEGMENT
                and posted.location.message < claimed_at
                and self._recovery.is_newer(posted)
                for posted in replaced
            )
        finally:
            journal.close()


async def _listed_claim(fence: Fence, channel: JournalChannel) -> int:
    """Look until the list shows our claim: then it shows all that stood before. Its message."""
    pause_s, until_s = _FIRST_LOOK_S, trio.current_time() + _LISTED_WITHIN_S
    while True:
        claimed_at = await fence.claimed_at()
        if fence.reason or (claimed_at is not None and await channel.seen() >= claimed_at):
            return claimed_at or 0
        if trio.current_time() >= until_s:
            raise StashcordError(
                f"the channel's list does not show what was posted {_LISTED_WITHIN_S:.0f} seconds "
                "ago, so newer changes may be missing from it too: run the same command again "
                "later; it goes on with what it has fetched"
            )
        await trio.sleep(pause_s)
        pause_s *= 2
        await fence.check()


def _complete(
    volume: VolumeDir,
    work: Path,
    posted: bytes,
    record: records.VolumeRecord,
    place: VolumeRecord,
) -> None:
    """Move the journal to its place and let the volume exist."""
    for left in work.glob("journal.sqlite*"):
        left.replace(volume.path / left.name)
    keep_record(volume, posted)
    volume.write_record(
        VolumeRecord(
            record.uuid,
            place.channels,
            place.journal_channel,
            place.api_url,
            record.block_size,
        )
    )


async def _contents(journal: Journal) -> dict[str, Any]:
    inodes, size = await journal.usage()
    return {"inodes": inodes, "bytes": size}


def _no_losses() -> dict[str, Any]:
    return {"missing": [], "missing_files": 0, "missing_bytes": 0, "older": [], "older_files": 0}


async def _losses(
    journal: Journal, lost: Sequence[Lost], older: Sequence[tuple[Ino, int]]
) -> dict[str, Any]:
    """What did not come back, by path."""
    gone: dict[Ino, list[Lost]] = defaultdict(list)
    for one in lost:
        gone[one.ino].append(one)
    missing = []
    trashed = await _places_in_trash(journal) if gone else {}
    for ino, blocks in gone.items():
        held = [trashed[place] for place in await journal.names_of(ino) if place in trashed]
        missing.append(
            {
                "path": await _path_of(journal, ino),
                "bytes": sum(block.size_bytes for block in blocks),
                "blocks": sum(not block.cut for block in blocks),
                "cut": any(block.cut for block in blocks),
                "in_trash": held[0].found.ino if held else None,
            }
        )
    stale = {ino for ino, _ in older}
    return {
        "missing": missing,
        "missing_files": len(gone),
        "missing_bytes": sum(one.size_bytes for one in lost),
        "older": [await _path_of(journal, ino) for ino in sorted(stale)],
        "older_files": len(stale),
    }


async def _path_of(journal: Journal, ino: Ino) -> str:
    return (await journal.told_path(ino)).decode("utf-8", "surrogateescape")


async def _places_in_trash(journal: Journal) -> dict[tuple[Ino, bytes], Trashed]:
    """The newest content that the trash has of each place."""
    newest: dict[tuple[Ino, bytes], Trashed] = {}
    at = 0
    while page := await journal.trash_page(at, _TRASH_PAGE):
        at = page[-1].found.ino
        for entry in page:
            known = newest.get((entry.parent, entry.name))
            if not entry.is_folder and (known is None or known.deleted_ns <= entry.deleted_ns):
                newest[entry.parent, entry.name] = entry
    return newest
