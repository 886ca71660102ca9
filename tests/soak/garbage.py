"""Writing and deleting over many days: how much Discord holds, and what collecting costs.

The daemon's parts as `assembled` ties them, over the sandbox, in one process and on one virtual
clock. Each day has a few sessions; a session writes a group of files and deletes about as much, in
the way that is tried: whole groups, or files at random. Now and then everything is read back from
Discord. The same is done once more without collecting: what both make in requests differs by
what garbage costs, segments included.
"""

from __future__ import annotations

import random
import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256, shake_128
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trio
import trio.testing

from stashcordfs.crypto.keys import KIND_PACK, VolumeKeys, object_id_of
from stashcordfs.daemon.assembly import Assembly, Options, Telling, assembled
from stashcordfs.discord.client import ClientStats
from stashcordfs.errors import CryptoError
from stashcordfs.journal import Journal
from stashcordfs.store.discord_store import DiscordStore
from stashcordfs.types import ROOT_INO, Limits
from stashcordfs.vfs.checkpointing import CheckpointSettings
from stashcordfs.vfs.garbage_plan import CollectSettings
from stashcordfs.vfs.room import CacheLimits
from stashcordfs.vfs.uploading import UploadSettings

sys.path += [str(Path(__file__).parent)]
sys.path += [str(Path(__file__).resolve().parents[1] / room) for room in ("crash", "vfs")]
from harness import inline
from invariants import check_journal
from served import Server, served, wall

MIB = 1 << 20
DAY_S = 86_400.0
KEYS = VolumeKeys(bytes(16), {0: bytes(range(32))})
GENESIS = bytes(range(32))
_DELETES = ("delete_message", "bulk_delete")
_NOT_API = ("cdn",)


@dataclass
class Result:
    how: str  # "groups": files die with those of their session; "random": each by itself
    seed: int
    days: int
    sessions_a_day: int
    scale: int  # blocks, files and messages are smaller by this
    life_days: float  # of a file: a group's is 0.5 to 1.5 times that, a single one's exponential
    written_bytes: int = 0
    deleted_bytes: int = 0
    files: int = 0
    most_held: float = 0.0  # Discord's bytes by those that files and history need, from day 7 on
    mean_held: float = 0.0
    last_held_bytes: int = 0
    last_needed_bytes: int = 0
    requests: int = 0  # of all kinds, the CDN apart
    without: int = 0  # the same without collecting, the deletion of old segments left out
    garbage_share: float = 0.0
    by_route: dict[str, int] = field(default_factory=dict)
    rate_limited: int = 0
    condemned: int = 0
    repacked: int = 0
    repacked_bytes: int = 0
    collector_requests: int = 0
    bytes_read_back: int = 0
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _File:
    name: bytes
    size: int
    digest: bytes
    dies_s: float


class Soak:
    def __init__(self, folder: Path, result: Result, *, bytes_a_day: int, collect: bool) -> None:
        self.result = result
        self._folder = folder
        self._bytes_a_day = bytes_a_day
        self._collect = collect
        self._block = MIB // result.scale
        self._garbage = replace(
            CollectSettings(), least_bytes=CollectSettings().least_bytes // result.scale
        )
        self._random = random.Random(f"{result.how} {result.seed}")
        self._files: dict[bytes, _File] = {}
        self._ratios: list[float] = []

    async def run(self) -> Result:
        now_ns = lambda: int(wall() * 1e9)  # noqa: E731
        self._folder.mkdir()
        Journal.create(self._folder / "journal.sqlite", clock_ns=now_ns, uid=0, gid=0).close()
        stats = ClientStats()

        async def no(_: Journal) -> bool:
            return False

        async def nothing(_: Journal) -> None: ...

        async with served(self._folder / "server") as server, server.client(stats) as client:
            journal_channel, data = server.channels[0], server.channels[1]
            store = DiscordStore(
                client, channels=[data], journal_channel=journal_channel, clock_wall=wall,
                block_bytes=self._block, limits=self._limits(),
            )  # fmt: skip
            told = DiscordStore(
                client, channels=[journal_channel], journal_channel=journal_channel,
                clock_wall=wall,
            )  # fmt: skip
            async with assembled(
                self._folder, self._options(), store=store, keys=KEYS, clock=trio.current_time,
                now_ns=now_ns, power_lost=no, begun=nothing, ended=nothing,
                report=self.result.problems.append,
                telling=Telling(
                    store=told, genesis=GENESIS, requests=lambda: stats.requests,
                    checkpoints=CheckpointSettings(), garbage=self._garbage,
                ),
            ) as v:  # fmt: skip
                assert v.publisher is not None
                assert v.collector is not None
                tasks = [v.uploader.run, v.durability.run_commits, v.publisher.run]
                for task in [*tasks, *([v.collector.run] if self._collect else [])]:
                    v.nursery.start_soon(task)
                for day in range(self.result.days):
                    await self._day(v, server, day)
                await v.filesystem.sync_remote()
                await self._read_back(v)
                self._tell(v, server, stats)
            path = self._folder / "journal.sqlite"
            self.result.problems += check_journal(path, block_bytes=self._block)
        return self.result

    def _options(self) -> Options:
        return Options(
            block_bytes=self._block,
            limits=CacheLimits(1 << 30, 0, 512 << 20),
            upload=UploadSettings(compress=False),
            read_ahead_bytes=4 * self._block,
            deadline_s=3600.0,
            max_file_bytes=1 << 41,
        )

    def _limits(self) -> Limits | None:
        if self.result.scale == 1:
            return None
        usual, scale = Limits(), self.result.scale
        return Limits(usual.max_attachment_bytes // scale, 10, usual.max_request_bytes // scale)

    async def _day(self, v: Assembly, server: Server, day: int) -> None:
        sessions = self.result.sessions_a_day
        for _ in range(sessions):
            await self._session(v, self._bytes_a_day // sessions)
            await trio.sleep(DAY_S / sessions)
        if self._collect:
            await self._measure(v, server, day)
        if day % 20 == 19:
            await self._read_back(v)

    async def _session(self, v: Assembly, size: int) -> None:
        now = trio.current_time()
        for file in [f for f in self._files.values() if f.dies_s <= now]:
            await v.filesystem.unlink(ROOT_INO, file.name)
            del self._files[file.name]
            self.result.deleted_bytes += file.size
        group_life_s = self.result.life_days * DAY_S * self._random.uniform(0.5, 1.5)
        while size > 0:
            length = min(size, self._random.randint(self._block // 16, 4 * self._block))
            size -= length
            life_s = group_life_s
            if self.result.how == "random":
                life_s = self._random.expovariate(1 / (self.result.life_days * DAY_S))
            await self._write(v, length, now + life_s)
        await v.filesystem.sync_remote()

    async def _write(self, v: Assembly, length: int, dies_s: float) -> None:
        name = b"%06d" % self.result.files
        data = shake_128(b"%d %b" % (self.result.seed, name)).digest(length)
        fh, _ = await v.filesystem.create(ROOT_INO, name, 0o644, 2, 0, 0)
        for at in range(0, length, MIB):
            await v.filesystem.write(fh, at, data[at : at + MIB])
        await v.filesystem.release(fh)
        self._files[name] = _File(name, length, sha256(data).digest(), dies_s)
        self.result.files += 1
        self.result.written_bytes += length

    async def _measure(self, v: Assembly, server: Server, day: int) -> None:
        """What Discord holds, in every channel, by what files and history need."""
        assert v.collector is not None
        async with v.collector.looking() as (census, _):
            needed = census.needed_bytes
        held = server.sandbox.store.value("SELECT coalesce(sum(size), 0) FROM attachments")
        self.result.last_held_bytes, self.result.last_needed_bytes = held, needed
        if day >= 7:
            self._ratios.append(held / max(1, needed))

    async def _read_back(self, v: Assembly) -> None:
        while await v.blocks.evict(1 << 40):
            pass
        for file in self._files.values():
            found = await v.filesystem.lookup(ROOT_INO, file.name)
            assert found is not None
            fh = await v.filesystem.open(found.ino, 0)
            digest, at = sha256(), 0
            while piece := await v.filesystem.read(fh, at, MIB):
                digest.update(piece)
                at += len(piece)
            await v.filesystem.release(fh)
            self.result.bytes_read_back += at
            if digest.digest() != file.digest:
                self.result.problems.append(f"{file.name.decode()} reads back wrong")

    def _tell(self, v: Assembly, server: Server, stats: ClientStats) -> None:
        result, sandbox = self.result, server.sandbox
        assert v.collector is not None
        result.by_route = {k: n for k, n in sandbox.requests.items() if k not in _NOT_API}
        result.requests = stats.requests
        result.rate_limited = stats.rate_limited
        total = v.collector.total
        result.condemned, result.repacked = total.newly_condemned, total.repacked_messages
        result.repacked_bytes = total.repacked_bytes
        result.collector_requests = v.collector.account.requests
        if self._ratios:
            result.most_held = round(max(self._ratios), 3)
            result.mean_held = round(sum(self._ratios) / len(self._ratios), 3)
        if self._collect:
            self._look_for_strangers(v, server)

    def _look_for_strangers(self, v: Assembly, server: Server) -> None:
        """Every pack on the server is known, every known one is there."""
        there = {
            row["filename"]
            for row in server.sandbox.store.rows("SELECT filename FROM attachments")
            if _is_pack(row["filename"])
        }
        known = {row[0] for row in v.journal._db.all("SELECT filename FROM packs WHERE message>0")}
        if known - there:
            self.result.problems.append(f"{len(known - there)} packs are missing")
        waiting = v.journal._db.one("SELECT count(*) FROM condemned")
        if len(there - known) and not waiting[0]:
            self.result.problems.append(f"{len(there - known)} packs are unknown")


def _is_pack(filename: str) -> bool:
    object_id = object_id_of(filename)
    try:
        return object_id is not None and KEYS.read_object_id(object_id)[0] == KIND_PACK
    except CryptoError:
        return False


def soak_garbage(
    folder: Path,
    *,
    how: str,
    seed: int,
    days: int = 60,
    total_bytes: int = 10 << 30,
    sessions_a_day: int = 6,
    life_days: float = 4.0,
    scale: int = 1,
) -> Result:
    """Run it in `folder`, with and without collecting. Needs room for about 20 days of data."""
    found = []
    for collect in (True, False):
        result = Result(how, seed, days, sessions_a_day, scale, life_days)
        place = folder / f"{how}-{collect}"
        soak = Soak(place, result, bytes_a_day=total_bytes // days // scale, collect=collect)
        with patch("trio.to_thread.run_sync", inline):
            trio.run(soak.run, clock=trio.testing.MockClock(autojump_threshold=0))
        shutil.rmtree(place)
        found.append(result)
    result, plain = found
    result.without = plain.requests - sum(plain.by_route.get(route, 0) for route in _DELETES)
    result.garbage_share = round(1 - result.without / result.requests, 4)
    result.problems += plain.problems
    if result.rate_limited:
        result.problems.append(f"{result.rate_limited} answers of 429")
    most_held, most_share = (1.5, 0.10) if how == "groups" else (2.0, 0.25)
    if result.most_held > most_held:
        result.problems.append(f"Discord held {result.most_held} times what was needed")
    if result.garbage_share > most_share:
        result.problems.append(f"{result.garbage_share:.1%} of the requests were for garbage")
    return result
