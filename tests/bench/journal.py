"""What the journal's operations cost, in microseconds, without a mount.

    python tests/bench/journal.py

The best of several runs, as other work on the machine only adds. Compare commits on one machine.
"""

from __future__ import annotations

import stat
import sys
import tempfile
import time
from pathlib import Path

from stashcordfs.journal import Journal
from stashcordfs.types import ROOT_INO, ChunkId, ChunkRef, Location, ObjectId

FILES, RUNS = 20_000, 4


def ask(call):
    """Run what never suspends."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("suspended")


class Run:
    def __init__(self, folder: Path) -> None:
        self.journal = Journal.create(
            folder / "journal.sqlite", clock_ns=time.time_ns, uid=0, gid=0
        )
        self.folder = self.create(ROOT_INO, b"folder", stat.S_IFDIR | 0o755)
        self.made: list[int] = []

    def create(self, parent, name, mode=stat.S_IFREG | 0o644):
        call = self.journal.create_node(parent, name, mode=mode, uid=0, gid=0, now_ns=1)
        return ask(call).ino

    def creates(self, n: int) -> None:
        self.made.append(self.create(self.folder, b"file%06d" % n))

    def grows(self, n: int) -> None:
        ask(self.journal.set_attributes(self.made[n], size=4096, synced=4096))

    def uploads(self, n: int) -> None:
        """A block refers to its new chunk; as an upload does it, 128 in a transaction."""
        if n % 128:
            return
        files = self.made[n : n + 128]
        names = [ChunkId(b"%032d" % ino) for ino in files]
        pack = ObjectId(b"%016d" % n)
        refs = [ChunkRef(name, pack, 0, at, 24, 4112, 4096, 0) for at, name in enumerate(names)]
        packs = [(pack, 0, 1 << 20, "pack", refs)]
        intent = ask(self.journal.add_intent(nonce="", channel=0, after_message=0, packs=packs))
        ask(self.journal.confirm_intent_packs(intent, {pack: Location(1, n + 1, 1, "pack", 1)}))
        items = [(ino, 0, name, 4096) for ino, name in zip(files, names, strict=True)]
        ask(self.journal.commit_chunks(items))
        ask(self.journal.close_intent(intent))

    def access_times(self, n: int) -> None:
        ask(self.journal.set_attributes(self.made[n], atime_ns=n + 2))

    def unlinks(self, n: int) -> None:
        left = ask(self.journal.unlink(self.folder, b"file%06d" % n, now_ns=2))
        ask(self.journal.purge(left, local=False))

    def creates_each_committed(self, n: int) -> None:
        self.create(self.folder, b"more%06d" % n)
        self.journal.commit()

    def measure(self) -> dict[str, float]:
        steps = [self.creates, self.grows, self.uploads, self.access_times, self.unlinks]
        found = {}
        for step in [*steps, self.creates_each_committed]:
            count = FILES if step in steps else FILES // 10
            begun = time.perf_counter()
            for n in range(count):
                step(n)
            self.journal.commit()
            found[step.__name__] = (time.perf_counter() - begun) / count * 1e6
        self.journal.close()
        return found


def main() -> int:
    runs = []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(Run(Path(folder)).measure())
    for name in runs[0]:
        print(f"{name:24}{min(run[name] for run in runs):8.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
