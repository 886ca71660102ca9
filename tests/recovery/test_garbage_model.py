"""Random writing, deleting, deduplication, collecting and killing: nothing that is needed is lost.

Every live file reads back from the store byte for byte, and so does every state that history keeps,
as another machine gets it back from the channels alone.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import trio
import trio.testing

from stashcordfs.daemon.assembly import Telling
from stashcordfs.errors import FsError
from stashcordfs.journal import Journal
from stashcordfs.recovery.fsck import Place, check
from stashcordfs.recovery.recover import Recovery
from stashcordfs.types import ROOT_INO
from stashcordfs.vfs.checkpointing import CheckpointSettings
from stashcordfs.vfs.garbage_plan import CollectSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "vfs"))
from harness import BLOCK, KEYS, FaultyStore, inline, volume

DAY_S = 86_400.0
HISTORY_S = 2 * DAY_S
GENESIS = bytes(range(32))
STEPS = 24
_STEPS_OF_COLLECTING = (  # where a process may be killed
    ("journal", "condemn"), ("journal", "move_blocks"), ("journal", "confirm_intent_packs"),
    ("journal", "clear_condemned"), ("journal", "forget_condemned"), ("journal", "close_intent"),
    ("journal", "wal_sync"), ("store", "put"), ("store", "delete"), ("store", "fetch"),
)  # fmt: skip


class Killed(BaseException):
    """The process is no more."""


class Model:
    def __init__(self, folder: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._folder = folder
        self._state = folder / "state-0"
        self._lives = 0
        self._pool = [self._random.randbytes(self._random.randint(1, 2 * BLOCK)) for _ in range(12)]
        self.files: dict[bytes, bytes] = {}
        self.past: list[tuple[int, dict[bytes, bytes]]] = []
        self.kills = self.condemned = self.repacked = self.deleted = 0

    async def run(self) -> None:
        left = STEPS
        while left > 0:
            channel = FaultyStore(self._folder / "channel")
            store = FaultyStore(self._folder / "store")
            telling = Telling(
                store=channel,
                genesis=GENESIS,
                checkpoints=CheckpointSettings(segments=12, keep_s=HISTORY_S),
                garbage=CollectSettings(
                    history_s=HISTORY_S, least_bytes=1, slack=0.1, patience_s=60.0, grace_s=3600.0
                ),
            )
            try:
                async with volume(self._state, telling=telling, other_store=store) as v:
                    await self._read_all(v)
                    while left > 0:
                        left -= 1
                        await self._step(v, store)
                    await self._read_all(v)
            except* Killed:
                self.kills += 1
            report = check(Place(self._state, BLOCK), mounted=False, progress=lambda *_: None)
            assert report.clean, report.as_json()
        await self._look_back()

    async def _step(self, v, store) -> None:
        for _ in range(self._random.randint(0, 6)):
            await self._change(v)
        await v.fs.sync_remote()
        self.past.append((int((1 + trio.current_time()) * 1e9), dict(self.files)))
        await trio.sleep(self._random.choice([60.0, 4000.0, DAY_S / 2, 2 * DAY_S]))
        if self._random.random() < 0.3:
            self._arm(v, store)
            await self._collect(v)
        elif self._random.random() < 0.7:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._collect, v)
                for _ in range(3):
                    await self._change(v)
                    await trio.lowlevel.checkpoint()
                    v.uploader.wake()
        self._disarm(v, store)
        if self._random.random() < 0.3:
            await self._read_all(v)

    async def _collect(self, v) -> None:
        found = await v.collector.collect(thorough=True)
        self.condemned += found.newly_condemned
        self.repacked += found.repacked_messages
        self.deleted += found.deleted_messages

    async def _change(self, v) -> None:
        name = b"%d" % self._random.randrange(14)
        if name in self.files:
            await v.fs.unlink(ROOT_INO, name)
            del self.files[name]
            if self._random.random() < 0.6:
                return
        self.files[name] = self._random.choice(self._pool)
        await v.make(name, self.files[name])

    def _arm(self, v, store) -> None:
        """Kill the process at some step of the next collecting: what was on its disk stays."""
        room, what = self._random.choice(_STEPS_OF_COLLECTING)
        owner = v.journal if room == "journal" else store
        after = self._random.random() < 0.5
        call = getattr(owner, what)

        async def killing(*args, **more):
            self._disarm(v, store)
            if after:
                await call(*args, **more)
            self._lives += 1
            copy = self._folder / f"state-{self._lives}"
            v.journal.commit()
            shutil.copytree(self._state, copy)
            self._state = copy
            raise Killed

        setattr(owner, what, killing)

    def _disarm(self, v, store) -> None:
        for owner in (v.journal, store):
            for _, what in _STEPS_OF_COLLECTING:
                vars(owner).pop(what, None)

    async def _read_all(self, v) -> None:
        while await v.blocks.evict(1 << 30):
            pass
        assert await contents(v) == self.files
        assert v.reports == []

    async def _look_back(self) -> None:
        """Each state that history must still have, as a new machine gets it."""
        now_ns = int((1 + trio.current_time()) * 1e9)
        kept = [item for item in self.past if item[0] >= now_ns - HISTORY_S * 1e9]
        assert kept
        for number, (at_ns, files) in enumerate(kept):
            new = self._folder / f"past-{number}"
            (new / "work").mkdir(parents=True)
            task = Recovery(
                store=FaultyStore(self._folder / "channel"), keys=KEYS, genesis=GENESIS,
                folder=new / "work", progress=lambda *_: None,
            )  # fmt: skip
            found = await task.find(at_ns=at_ns)
            built = await task.build(found, new / "journal.sqlite")
            journal = Journal.open(new / "journal.sqlite", clock_ns=lambda: now_ns)
            await journal.note_losses(built.dirty, BLOCK)
            journal.close()
            store = FaultyStore(self._folder / "store")
            async with volume(new, other_store=store, upload=False) as v:
                assert await contents(v) == files
            shutil.rmtree(new)


async def contents(v) -> dict[bytes, bytes]:
    fh = await v.fs.opendir(ROOT_INO)
    entries = (await v.fs.readdir(fh, 0, 1000))[2:]
    await v.fs.releasedir(fh)
    found = {}
    for _, name, attributes in entries:
        try:
            found[name] = await v.read(attributes.ino)
        except FsError as error:
            found[name] = str(error).encode()
    return found


@pytest.mark.parametrize("seed", range(2))
def test_nothing_that_is_needed_is_ever_lost(tmp_path, seed) -> None:
    model = Model(tmp_path, seed)
    clock = trio.testing.MockClock(autojump_threshold=0)
    with patch("trio.to_thread.run_sync", inline):
        trio.run(model.run, clock=clock)
    assert model.condemned
    assert model.deleted
