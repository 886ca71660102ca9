"""The journal as JSON lines: another program could fetch and open everything by them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.recovery.export.lines import About, journal_records, write_lines
from stashcordfs.recovery.export.names import from_text, from_time, to_text, to_time
from stashcordfs.store.sealing import open_chunk
from stashcordfs.types import ROOT_INO, ChunkId, ChunkRef, Location, ObjectId

sys.path.insert(0, str(Path(__file__).parents[1] / "vfs"))
from harness import BLOCK, KEYS, volume

ABOUT = About("n", "uuid", BLOCK, (1,), 1, 5)


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0.02)


async def test_a_second_program_reads_every_file_by_the_lines_alone(clock, tmp_path) -> None:
    data = os.urandom(2 * BLOCK + 7)
    async with volume(tmp_path) as v:
        folder = await v.fs.mkdir(ROOT_INO, b"caf\xe9", 0o750, 3, 4)
        ino = await v.make(b"f", data, parent=folder.ino)
        await v.fs.link(ino, ROOT_INO, b"other")
        await v.fs.symlink(ROOT_INO, b"l", b"\xff", 0, 0)
        await v.fs.setxattr(ino, b"user.x", b"\0")
        await v.fs.sync_remote()
        v.journal.commit()
        count = write_lines(
            tmp_path / "out",
            journal_records(tmp_path / "journal.sqlite", ABOUT, progress=lambda *_: None),
        )
        records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
        packs = {r["pack"]: r for r in records if r["type"] == "pack"}
        found = bytearray()
        for block in [r for r in records if r["type"] == "block"]:
            pack = packs[block["pack"]]
            at = Location(
                int(pack["channel"]), int(pack["message"]), int(pack["attachment"]),
                pack["filename"], pack["size"],
            )  # fmt: skip
            sealed = await v.store.fetch(at, block["offset"], block["length"])
            ref = ChunkRef(
                ChunkId(bytes.fromhex(block["chunk_id"])),
                ObjectId(bytes.fromhex(pack["object_id"])),
                pack["epoch"], block["number"], block["offset"], block["length"],
                block["plain_length"], block["codec"],
            )  # fmt: skip
            found += open_chunk(KEYS, ref, sealed)[: block["valid"]]

    assert bytes(found) == data
    assert count == len(records)
    assert records[0]["type"] == "volume"
    assert records[-1] == {
        "type": "end",
        "counts": {"volume": 1, "pack": len(packs), "inode": 4, "block": 3},
    }
    by_ino = {r["ino"]: r for r in records if r["type"] == "inode"}
    paths = {from_text(path) for path in by_ino[ino]["paths"]}
    assert paths == {b"caf\xe9/f", b"other"}
    assert by_ino[ino]["xattrs"] == [{"name": "user.x", "base64": "AA=="}]
    assert (by_ino[folder.ino]["uid"], by_ino[folder.ino]["mode"]) == (3, 0o750)
    assert [from_text(r["target"]) for r in by_ino.values() if "target" in r] == [b"\xff"]


@given(st.binary(), st.integers(-(1 << 63), (1 << 63) - 1))
def test_any_bytes_and_any_time_come_back(raw, at_ns) -> None:
    assert from_text(json.loads(json.dumps(to_text(raw)))) == raw
    assert from_time(to_time(at_ns)) == at_ns
