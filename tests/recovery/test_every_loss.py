"""Every attachment of a small volume lost in turn: told exactly, and all else is whole."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parent))
from test_recover import BLOCK, GENESIS, KEYS, RECORD, recovery, volume

from stashcordfs.crypto.keys import (
    KIND_CHECKPOINT,
    KIND_CLAIM,
    KIND_MANIFEST,
    KIND_PACK,
    KIND_SEGMENT,
    object_id_of,
)
from stashcordfs.daemon.assembly import Telling
from stashcordfs.errors import FsError
from stashcordfs.journal import Journal
from stashcordfs.recovery.presence import note_lost_packs
from stashcordfs.recovery.verify import Verifier
from stashcordfs.recovery.verify_journal import RECORD as THE_RECORD
from stashcordfs.recovery.verify_journal import JournalObjects
from stashcordfs.store.folder_store import FolderStore
from stashcordfs.types import ROOT_INO
from stashcordfs.vfs.checkpointing import CheckpointSettings
from stashcordfs.vfs.journal_channel import JournalChannel
from stashcordfs.vfs.publishing import PublishSettings

SELDOM = PublishSettings(look_every_s=1e9)


class Attachment(NamedTuple):
    kind: int  # 0: the volume's record
    number: int
    name: str
    path: Path


def told(store, segments: int = 10**9) -> Telling:
    checkpoints = CheckpointSettings(segments=segments, least_bytes=10**12)
    return Telling(
        store=store, genesis=GENESIS, record=RECORD, settings=SELDOM, checkpoints=checkpoints
    )


def attachments(store: Path) -> list[Attachment]:
    """All of a folder store's, in the order of messages."""
    found = []
    for path in sorted(store.glob("[0-9]*/[0-9]*"), key=lambda p: (int(p.parent.name), p.name)):
        name = path.name.partition(".")[2]
        object_id = object_id_of(name)
        if name == RECORD.filename:
            found.append(Attachment(0, 0, name, path))
        elif object_id is not None:
            found.append(Attachment(*KEYS.read_object_id(object_id), name, path))
    return found


def verifier(v, store, folder, *, hurry=lambda: None) -> Verifier:
    objects = JournalObjects(
        journal=v.journal, store=store, keys=KEYS, channel=1, record=RECORD.filename, hurry=hurry
    )
    return Verifier(
        journal=v.journal, blocks=v.blocks, store=store, keys=KEYS,
        state_path=folder / "verify.json", report=v.reports.append, objects=objects,
    )  # fmt: skip


async def ranges(v, contents) -> dict[bytes, list[int]]:
    """The blocks of each file that give EIO; all others must be what they were."""
    bad: dict[bytes, list[int]] = {}
    for name, data in contents.items():
        found = await v.fs.lookup(ROOT_INO, name)
        fh = await v.fs.open(found.ino, os.O_RDONLY)
        for at in range(0, len(data), BLOCK):
            with suppress(FsError):
                assert await v.fs.read(fh, at, BLOCK) == data[at : at + BLOCK]
                continue
            bad.setdefault(name, []).append(at // BLOCK)
        await v.fs.release(fh)
    return bad


async def dry_run(store, work, contents):
    """What `recover --dry-run` does: the state, and which packs of it are missing."""
    task = recovery(store, work)
    found = await task.find()
    built = await task.build(found, work / "journal.sqlite")
    journal = Journal.open(work / "journal.sqlite", clock_ns=lambda: 1)
    assert await journal.note_losses(built.dirty, BLOCK) == ([], [])
    for name, data in contents.items():
        assert (await journal.lookup(ROOT_INO, name)).size == len(data)
    lost, blocks = await note_lost_packs(journal, store, lambda *_: None)
    names = {await journal.told_path(ino): count for ino, count in blocks.items()}
    journal.close()
    return [pack.location.filename for pack in lost], names


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(JournalChannel, "part_bytes", 2 << 10)
    return FolderStore(tmp_path / "channel")


async def fill(folder, store) -> dict[bytes, bytes]:
    """Two packs, checkpoints in parts, segments after them. One file lies in both packs."""
    contents = {}
    async with volume(folder, other_store=store, telling=told(store, segments=2)) as v:
        for name in (b"first", b"second"):
            contents[name] = os.urandom(2 * BLOCK + 1)
            await v.make(name, contents[name])
            await v.fs.setxattr(ROOT_INO, b"user." + name, os.urandom(2000))
            await v.fs.sync_remote()
        contents[b"both"] = contents[b"first"][:BLOCK] + contents[b"second"][:BLOCK]
        await v.make(b"both", contents[b"both"])
        await v.fs.sync_remote()
        await v.publisher.finish()
    async with volume(folder, other_store=store, telling=told(store)) as v:
        for n in range(2):  # after the newest checkpoint
            await v.fs.mkdir(ROOT_INO, b"later-%d" % n, 0o755, 0, 0)
            await v.fs.sync_remote()
        await v.blocks.evict(at_least=1 << 30)
    return contents


async def test_every_single_loss_is_told_and_leaves_the_rest_intact(clock, tmp_path, store) -> None:
    contents = await fill(tmp_path / "state", store)
    held = attachments(tmp_path / "channel")
    kinds = Counter(each.kind for each in held)
    newest = max(each.number for each in held if each.kind == KIND_MANIFEST)
    packs = [each.name for each in held if each.kind == KIND_PACK]
    assert kinds[KIND_PACK] == 2
    assert kinds[KIND_CHECKPOINT] > kinds[KIND_MANIFEST] >= 2
    assert min(kinds[0], kinds[KIND_CLAIM]) >= 2
    assert kinds[KIND_SEGMENT] >= 8
    for turn, lost in enumerate(held):
        here = tmp_path / f"turn-{turn}"
        shutil.copytree(tmp_path / "state", here)
        lost.path.rename(tmp_path / "away")
        async with volume(here, other_store=store, upload=False) as v:
            found = await verifier(v, store, here).run()
            bad = await ranges(v, contents)
        missing, damaged = await dry_run(store, tmp_path / f"work-{turn}", contents)
        name = lost.name
        if lost.kind == KIND_PACK:
            mine, part = (b"first", 0) if name == packs[0] else (b"second", 1)
            assert found.missing_packs == missing == [name]
            assert found.damaged == {mine.decode(): 3, "both": 1}
            assert damaged == {mine: 3, b"both": 1}
            assert bad == {mine: [0, 1, 2], b"both": [part]}
            assert found.missing_objects == []
        else:
            copied = any(e.name == name and e.path != lost.path for e in held)
            says = {
                KIND_SEGMENT: [] if copied else [f"segment {lost.number}"],
                KIND_MANIFEST: [f"checkpoint {lost.number}"],
                KIND_CHECKPOINT: [f"part of checkpoint {lost.number}"],
            }.get(lost.kind, [])
            needed = bool(says) and (lost.kind == KIND_SEGMENT or lost.number == newest)
            assert [text.partition(",")[0] for text in found.missing_objects] == says
            assert found.checkpoint_wanted == needed
            assert found.clean == (not says)
            assert (found.missing_packs, missing, damaged, bad) == ([], [], {}, {})
        (tmp_path / "away").rename(lost.path)
        shutil.rmtree(here)


NEEDED = {
    "the newest segment": lambda held, newest: [_last(held, KIND_SEGMENT)],
    "two segments in a row, of which one is the head": lambda held, newest: [
        each for each in held if each.kind == KIND_SEGMENT and each.number >= _head(held) - 1
    ],
    "the newest checkpoint": lambda held, newest: [
        each for each in held if each.kind == KIND_MANIFEST and each.number == newest
    ],
    "a part of the newest checkpoint": lambda held, newest: [
        next(e for e in held if e.kind == KIND_CHECKPOINT and e.number == newest)
    ],
    "all records": lambda held, newest: [each for each in held if each.kind == 0],
    "all checkpoints and segments": lambda held, newest: [
        e for e in held if e.kind in (KIND_SEGMENT, KIND_MANIFEST, KIND_CHECKPOINT, 0)
    ],
}


def _head(held) -> int:
    return max(each.number for each in held if each.kind == KIND_SEGMENT)


def _last(held, kind) -> Attachment:
    return max((each for each in held if each.kind == kind), key=lambda each: each.number)


@pytest.mark.parametrize("what", NEEDED)
async def test_what_recovery_needs_and_is_missing_is_made_needless(
    clock, tmp_path, store, what
) -> None:
    contents = await fill(tmp_path / "state", store)
    held = attachments(tmp_path / "channel")
    newest = max(each.number for each in held if each.kind == KIND_MANIFEST)
    for lost in NEEDED[what](held, newest):
        lost.path.unlink()
    async with volume(tmp_path / "state", other_store=store, telling=told(store)) as v:
        found = await verifier(v, store, tmp_path, hurry=v.publisher.hurry).run()
        assert found.checkpoint_wanted
        assert (THE_RECORD in found.missing_objects) == ("record" in what or what[:3] == "all")
        assert "a new checkpoint takes its place" in v.reports[-1]
        await trio.sleep(5)
        again = await verifier(v, store, tmp_path).run(data=True)
        assert (again.missing_objects, again.checkpoint_wanted) == ([], False)
        assert again.objects
    assert (await dry_run(store, tmp_path / "work", contents)) == ([], {})
    assert RECORD.filename in {each.name for each in attachments(tmp_path / "channel")}


async def test_a_checkpoint_that_cannot_be_opened_is_found_by_opening_and_replaced(
    clock, tmp_path, store
) -> None:
    contents = await fill(tmp_path / "state", store)
    lost = _last(attachments(tmp_path / "channel"), KIND_CHECKPOINT)
    data = bytearray(lost.path.read_bytes())
    data[100] ^= 1
    lost.path.write_bytes(data)
    async with volume(tmp_path / "state", other_store=store, telling=told(store)) as v:
        assert (await verifier(v, store, tmp_path).run()).clean
        found = await verifier(v, store, tmp_path, hurry=v.publisher.hurry).run(data=True)
        assert found.corrupt_objects == [f"part of checkpoint {lost.number}"]
        assert found.checkpoint_wanted
        await trio.sleep(5)
        again = await verifier(v, store, tmp_path).run(data=True)
        assert again.corrupt_objects == [f"part of checkpoint {lost.number}, of history"]
        assert not again.checkpoint_wanted
    assert (await dry_run(store, tmp_path / "work", contents)) == ([], {})


async def test_an_unmounted_volume_posts_the_checkpoint_at_its_next_mount(
    clock, tmp_path, store
) -> None:
    contents = await fill(tmp_path / "state", store)
    _last(attachments(tmp_path / "channel"), KIND_SEGMENT).path.unlink()
    async with volume(tmp_path / "state", other_store=store) as v:
        assert (await verifier(v, store, tmp_path).run()).checkpoint_wanted
    async with volume(tmp_path / "state", other_store=store, telling=told(store)) as v:
        await v.publisher.finish()
        assert (await verifier(v, store, tmp_path).run()).clean
    assert (await dry_run(store, tmp_path / "work", contents)) == ([], {})
