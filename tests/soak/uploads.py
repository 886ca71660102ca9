"""Many uploads over a service that loses answers: each message once, and no orphan.

The daemon's parts as `assembled` ties them, over the sandbox, in one process and on one virtual
clock. A tenth of the creates go wrong, in every way that leaves doubt; at times all do, until the
client's own repeats are used up; the daemon ends now and then in the middle of it all, and starts
again.
"""

from __future__ import annotations

import itertools
import random
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trio
import trio.testing

from stashcordfs.crypto.keys import VolumeKeys
from stashcordfs.daemon.assembly import Assembly, Options, assembled
from stashcordfs.discord.client import ClientStats
from stashcordfs.errors import OutcomeUnknown
from stashcordfs.journal import Journal
from stashcordfs.store.api import RECORD_PREFIX
from stashcordfs.store.discord_store import DiscordStore
from stashcordfs.types import ROOT_INO, Ino
from stashcordfs.vfs.room import CacheLimits
from stashcordfs.vfs.uploading import UploadSettings

sys.path += [str(Path(__file__).parent)]
sys.path += [str(Path(__file__).resolve().parents[1] / room) for room in ("crash", "vfs")]
from harness import inline
from invariants import check_journal, check_server
from served import Server, served, wall

BLOCK = 64 << 10
KEYS = VolumeKeys(bytes(16), {0: bytes(range(32))})
OPTIONS = Options(
    block_bytes=BLOCK,
    limits=CacheLimits(4 << 30, 0, 2 << 30),
    upload=UploadSettings(delay_s=0.5),
    read_ahead_bytes=4 * BLOCK,
    deadline_s=60.0,
    max_file_bytes=1 << 41,
)
_DAY_S = 86_400.0
_ALWAYS = 1 << 30
_SESSION_S = (30.0, 240.0)  # how long a daemon lives
_BURST_EVERY_S, _BURST_S = (10.0, 90.0), (10.0, 60.0)


def _create(kind: str, probability: float, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "route": "create_message", "times": _ALWAYS, "probability": probability,
            **more}  # fmt: skip


KINDS: dict[str, dict[str, Any]] = {  # how a create comes to be in doubt
    "stored, then a reset": {"kind": "lost_answer", "status": 0},
    "stored, then 5xx": {"kind": "lost_answer", "status": [500, 502, 504]},
    "reset, not stored": {"kind": "reset"},
    "5xx, not stored": {"kind": "status", "status": [500, 502, 504]},
    "stored 90 s later": {"kind": "delay", "seconds": 90.0},
    "stored 400 s later, nonce forgotten": {"kind": "delay", "seconds": 400.0},
}
_BACKGROUND = 0.10 / len(KINDS)
_LISTS = [  # what is asked for in doubt does not always get an answer, or the whole truth
    {"kind": "status", "route": "list_messages", "times": _ALWAYS, "probability": 0.1},
    {"kind": "hide", "route": "list_messages", "times": _ALWAYS, "probability": 0.1,
     "younger_s": 10.0},
]  # fmt: skip


@dataclass
class Result:
    seed: int
    uploads: int = 0  # posts that the daemon began, each under a nonce of its own
    starts: int = 0  # of the daemon
    struck: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    unclear: int = 0  # outcomes that the client left unknown
    unclear_most: int = 0  # at a time
    left_open: int = 0  # intents that a daemon left to the next
    made: int = 0  # messages that the server has made
    kept: int = 0  # messages there at the end
    packs: int = 0
    files: int = 0
    bytes_read_back: int = 0
    rate_limited: int = 0  # a request that was stuck counts when it comes loose
    requests: dict[str, int] = field(default_factory=dict)
    virtual_s: int = 0
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Soak:
    def __init__(self, folder: Path, *, uploads: int, seed: int) -> None:
        self._folder = folder
        self._uploads = uploads
        self._random = random.Random(seed)
        self._files: dict[bytes, bytes] = {}  # name -> digest of what it holds
        self._bursts = itertools.cycle(KINDS.values())
        self.result = Result(seed)

    async def run(self) -> Result:
        now_ns = lambda: int(wall() * 1e9)  # noqa: E731
        (self._folder / "state").mkdir()
        journal = self._folder / "state" / "journal.sqlite"
        Journal.create(journal, clock_ns=now_ns, uid=0, gid=0).close()
        async with served(self._folder / "server") as server:
            while not self._enough():
                await self._session(server)
            await self._settle(server)
            await self._read_back(server)
            self._count(server)
        self._check(journal)
        return self.result

    def _enough(self) -> bool:
        """So many uploads, and every kind of doubt among them."""
        return self.result.uploads >= self._uploads and all(self.result.struck.values())

    @asynccontextmanager
    async def _daemon(self, server: Server) -> AsyncIterator[Assembly]:
        async with (
            server.client(ClientStats()) as client,
            assembled(
                self._folder / "state",
                OPTIONS,
                store=self._noticed(
                    DiscordStore(
                        client,
                        channels=server.channels,
                        journal_channel=server.channels[0],
                        clock_wall=wall,
                    )
                ),
                keys=KEYS,
                clock=trio.current_time,
                now_ns=lambda: int(wall() * 1e9),
                power_lost=_same_ground,
                begun=_nothing,
                ended=_nothing,
                report=lambda _: None,
            ) as made,
        ):
            self.result.starts += 1
            self.result.left_open += len(await made.journal.open_intents())
            made.nursery.start_soon(made.uploader.run)
            made.nursery.start_soon(made.settler.run_watch)
            made.nursery.start_soon(made.durability.run_commits)
            made.nursery.start_soon(made.durability.run_syncs)
            yield made

    def _noticed(self, store: DiscordStore) -> DiscordStore:
        """The store, its posts counted."""
        put, nonces = store.put, set[str]()

        async def counted(packs, *, nonce):
            self.result.uploads += nonce not in nonces
            nonces.add(nonce)
            try:
                return await put(packs, nonce=nonce)
            except OutcomeUnknown:
                self.result.unclear += 1
                raise

        store.put = counted
        return store

    # ------------------------------------------------------------------ under faults

    async def _session(self, server: Server) -> None:
        """One life of the daemon. It ends without warning; what it knows is in its journal."""
        async with self._daemon(server) as daemon:
            with trio.move_on_after(self._random.uniform(*_SESSION_S)):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._make_faults, server)
                    await self._write(daemon)
                    nursery.cancel_scope.cancel()
        self._take_struck(server)

    async def _write(self, daemon: Assembly) -> None:
        while not self._enough():
            dice = self._random.random()
            with trio.CancelScope(shield=True):  # what is written is written
                if dice < 0.25 and self._files:
                    await self._change(daemon, self._random.choice(sorted(self._files)))
                elif dice < 0.3 and self._files:
                    name = self._random.choice(sorted(self._files))
                    await daemon.filesystem.unlink(ROOT_INO, name)
                    del self._files[name]
                else:
                    await self._create(daemon, b"f%d" % self._random.getrandbits(60))
            most = max(self.result.unclear_most, daemon.settler.unsettled)
            self.result.unclear_most = most
            await trio.sleep(self._random.uniform(0.2, 1.5))

    async def _create(self, daemon: Assembly, name: bytes) -> None:
        fh, _ = await daemon.filesystem.create(ROOT_INO, name, 0o644, 2, 0, 0)
        await self._fill(daemon, fh, name)

    async def _change(self, daemon: Assembly, name: bytes) -> None:
        ino = (await daemon.filesystem.lookup(ROOT_INO, name)).ino
        await self._fill(daemon, await daemon.filesystem.open(ino, 2), name)

    async def _fill(self, daemon: Assembly, fh: int, name: bytes) -> None:
        data = self._random.randbytes(self._random.randint(3 * BLOCK, 4 * BLOCK))
        await daemon.filesystem.write(fh, 0, data)
        size = (await daemon.filesystem.getattr(await self._ino(daemon, name))).size
        if size > len(data):
            data += await daemon.filesystem.read(fh, len(data), size)
        await daemon.filesystem.release(fh)
        self._files[name] = sha256(data).digest()

    async def _ino(self, daemon: Assembly, name: bytes) -> Ino:
        return (await daemon.filesystem.lookup(ROOT_INO, name)).ino

    async def _make_faults(self, server: Server) -> None:
        """A tenth of the creates; between, for a while, all, in one way."""
        calm = [_create(probability=_BACKGROUND, **kind) for kind in KINDS.values()]
        while True:
            self._set_faults(server, calm + _LISTS)
            await trio.sleep(self._random.uniform(*_BURST_EVERY_S))
            self._set_faults(server, [_create(probability=1.0, **next(self._bursts)), *_LISTS])
            await trio.sleep(self._random.uniform(*_BURST_S))

    def _set_faults(self, server: Server, rules: list[dict[str, Any]]) -> None:
        self._take_struck(server)
        server.sandbox.faults.replace(rules, seed=self._random.getrandbits(32))

    def _take_struck(self, server: Server) -> None:
        for rule in server.sandbox.faults.shown():
            for name, kind in KINDS.items():
                if rule["route"] == "create_message" and kind.items() <= rule.items():
                    self.result.struck[name] += rule["struck"]
        server.sandbox.faults.replace([])

    # ------------------------------------------------------------------ afterwards

    async def _settle(self, server: Server) -> None:
        """Everything is sent; a day passes, in which what is late appears."""
        async with self._daemon(server) as daemon:
            await daemon.filesystem.sync_remote()
            await trio.sleep(_DAY_S + 7 * 3600)
            if left := len(await daemon.journal.open_intents()):
                self.result.problems.append(f"{left} intents are open")
            if watched := len(await daemon.journal.watched()):
                self.result.problems.append(f"{watched} names are watched after a day")

    async def _read_back(self, server: Server) -> None:
        """From Discord alone."""
        shutil.rmtree(self._folder / "state" / "blocks")
        async with self._daemon(server) as daemon:
            for name, digest in self._files.items():
                fh = await daemon.filesystem.open(await self._ino(daemon, name), 0)
                data = b""
                while piece := await daemon.filesystem.read(fh, len(data), 1 << 20):
                    data += piece
                await daemon.filesystem.release(fh)
                self.result.bytes_read_back += len(data)
                if sha256(data).digest() != digest:
                    self.result.problems.append(f"{name!r} reads back wrong")

    def _count(self, server: Server) -> None:
        stats, result = server.sandbox.stats(), self.result
        result.made, result.kept = stats["created"], stats["messages"]
        result.files = len(self._files)
        result.rate_limited = stats["rate_limited"]["provoked"]
        result.requests = stats["requests_by_route"]
        result.virtual_s = round(trio.current_time())

    def _check(self, journal: Path) -> None:
        verdict = check_server(journal, self._folder / "server", record_prefix=RECORD_PREFIX)
        self.result.packs = verdict.packs
        self.result.problems += check_journal(journal, block_bytes=BLOCK)
        for what in ("missing", "twice", "unsettled", "orphans"):
            if found := getattr(verdict, what):
                self.result.problems.append(f"packs {what}: {found[:3]} ({len(found)} in all)")


async def _same_ground(_: Journal) -> bool:
    return False


async def _nothing(_: Journal) -> None:
    """No clean end here either: the next start finds what there is."""


def soak_uploads(folder: Path, *, uploads: int, seed: int) -> Result:
    """Run it in `folder`, on a virtual clock; the same each time for a seed."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    random.seed(seed)  # the client's jitter
    chance = random.Random(seed)  # in what order trio runs its tasks
    with patch("trio.to_thread.run_sync", inline), patch("trio._core._run._r", chance):
        return trio.run(Soak(folder, uploads=uploads, seed=seed).run, clock=clock)
