"""An older journal finds its chunks where the newest one has them."""

from __future__ import annotations

import sys
from pathlib import Path

from stashcordfs.journal import Journal
from stashcordfs.journal.snapshot import relocate

sys.path.insert(0, str(Path(__file__).parent))
from test_journal_garbage import made, packed, refer


async def test_chunks_that_were_moved_are_found_and_others_keep_their_place(journal, tmp_path):
    inos = {}
    for message, name in ((1, b"stays"), (2, b"moved"), (3, b"gone")):
        await packed(journal, message, name)
        inos[name] = await made(journal, name)
        await refer(journal, inos[name], name)
    await journal.wal_sync()
    old = tmp_path / "old.sqlite"
    journal._db._connection.execute("VACUUM INTO ?", (str(old),))
    await packed(journal, 4, b"other", b"moved")
    await packed(journal, 5, b"new")
    for message in (2, 3):  # repacked, or collected
        journal._db.run(
            "DELETE FROM chunks WHERE pack = (SELECT id FROM packs WHERE message=?)", (message,)
        )
        journal._db.run("DELETE FROM packs WHERE message = ?", (message,))
    journal.commit()
    newest = Path(journal._db.path)

    assert relocate(old, newest) == 1  # while the newest is in use

    past = Journal.open(old, clock_ns=lambda: 1)
    found = {name: await past.chunk_at(ino, 0) for name, ino in inos.items()}
    past.close()
    assert {name: entry.location.message for name, entry in found.items()} == {
        b"stays": 1, b"moved": 4, b"gone": 3,
    }  # fmt: skip
    assert found[b"moved"].ref.number == 1
    await refer(journal, inos[b"stays"], b"new")  # nothing holds the newest
    assert not list(tmp_path.glob("old.sqlite.*"))
