"""The local half of a volume against its journal: blocks/, the marks, and the cached blocks.

Only while nobody has the volume mounted: files and marks run ahead of the journal's last commit.
Nothing is changed here.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from stashcordfs.cache import Marks, agrees, folder_name, read_owners
from stashcordfs.errors import LocalDiskError
from stashcordfs.journal.inspection import Fault, LostFile
from stashcordfs.types import PAGE_BYTES, Ino

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stashcordfs.cache import Mark
    from stashcordfs.journal.inspection import Inspection

_NUMBER = re.compile(r"[0-9a-f]{1,15}")
_FOLDER = re.compile(r"n[0-9a-f]{4,}")
_OWNERS = "owners"

_GENERATION = "SELECT generation FROM generations WHERE ino = ?"
_SIZE = "SELECT size FROM inodes WHERE ino = ?"


class LocalKey(NamedTuple):
    """Whose a local file is."""

    ino: int
    generation: int


class LocalState:
    """Marks and local files of one volume."""

    def __init__(self, look: Inspection, folder: Path, block_bytes: int) -> None:
        """`folder` is STATE/NAME."""
        self._look = look
        self._blocks = folder / "blocks"
        self._marks_path = folder / "marks.map"
        self._block_bytes = block_bytes
        self._marked: dict[tuple[int, int], Mark] = {}
        self.unknown: list[LostFile] = []  # marked files that the journal does not know
        self.strays: list[
            tuple[LocalKey, Path]
        ] = []  # local files of inodes that the journal does not know
        self.older = False  # the journal is older than what lies beside it
        self.unmarked: list[tuple[int, int, int]] = []  # inode, block, pages: synced, not marked
        self.lost: dict[tuple[int, int], int] = {}  # unsent blocks, and their pages that are here
        self.rotten: list[tuple[int, int]] = []  # cached blocks that are not what they should be

    def read_owners(self) -> Iterator[Fault]:
        """Whose the local files are. Must run first; kept in SQLite, as there may be a million."""
        run = self._look.run
        run("DROP TABLE IF EXISTS temp.local_files")
        run(
            "CREATE TEMP TABLE local_files (ino INTEGER NOT NULL, generation INTEGER NOT NULL,"
            " number INTEGER NOT NULL, PRIMARY KEY (ino, generation)) WITHOUT ROWID"
        )
        try:
            for number, (ino, generation) in read_owners(self._blocks):
                try:
                    run(
                        "INSERT OR IGNORE INTO temp.local_files VALUES (?,?,?)",
                        (ino, generation, number),
                    )
                except OverflowError:
                    yield Fault("owners", f"local file {number:x} is of no inode that can be")
        except LocalDiskError as error:
            yield Fault("owners", f"whose the local files are cannot be read: {error}")

    def _file(self, ino: int, generation: int) -> Path | None:
        """The local file of an inode's generation, None when there is none."""
        found = next(
            self._look.rows(
                "SELECT number FROM temp.local_files WHERE ino = ? AND generation = ?",
                (ino, generation),
            ),
            None,
        )
        if found is None:
            return None
        path = self._path(found[0])
        return path if path.exists() else None

    def _path(self, number: int) -> Path:
        return self._blocks / folder_name(number) / f"{number:x}"

    def _own(self, ino: int) -> Path | None:
        return self._file(ino, self._look.number(_GENERATION, (ino,)))

    # ------------------------------------------------------------------ marks and dirty rows

    def check_marks(self) -> Iterator[Fault]:
        """Marked blocks have their local file; what was synced of them is still in it."""
        if self._marks_path.exists():
            try:
                marks = Marks(self._marks_path, self._block_bytes)
            except LocalDiskError as error:
                yield Fault("marks", f"the table of marks cannot be read: {error}")
                return
            try:
                for mark in marks:
                    yield from self._check_mark(mark)
            finally:
                marks.close()
        yield from self._check_dirty()
        yield from self._check_written()

    def _check_mark(self, mark: Mark) -> Iterator[Fault]:
        given = self._look.local("next_version")
        newer = mark.version > max(given, 1)
        if newer:
            self.older = True
            yield Fault(
                "journal-age",
                f"a block was marked with version {mark.version}, the journal has given {given}: "
                "it is older than this machine's data; a copy was put in its place, or its WAL "
                "is missing",
            )
        size = next(self._look.rows(_SIZE, (mark.ino,)), None)
        generation = self._look.number(_GENERATION, (mark.ino,))
        file = self._file(mark.ino, mark.generation)
        if file is not None and (newer or size is None):
            self.unknown.append(
                LostFile(mark.ino, mark.generation, file.stat().st_size, mark.version)
            )
        if size is None or generation != mark.generation:
            yield Fault("leftovers", f"a mark of inode {mark.ino}, which is no more", note=True)
            return
        if mark.index * self._block_bytes >= size[0]:
            yield Fault("leftovers", f"a mark beyond the end of inode {mark.ino}", note=True)
            return
        known = self._marked.get((mark.ino, mark.index))
        if known is None or known.version < mark.version:
            self._marked[mark.ino, mark.index] = mark
        if file is None:
            self.lost[mark.ino, mark.index] = 0
            what = f"{self._look.path(mark.ino)}: block {mark.index}"
            text = f"{what}: not on Discord, and its local file is missing"
            yield Fault("unsent-data", text + self._instead(mark.ino, mark.index))

    def _instead(self, ino: int, index: int) -> str:
        """What is there in a lost block's place."""
        older = self._look.number(
            "SELECT chunk > 0 FROM chunk_list WHERE ino = ? AND idx = ?", (ino, index)
        )
        return "; Discord has what it held before" if older else ""

    def _check_written(self) -> Iterator[Fault]:
        """Marked pages have their bytes, when the last run ended by itself."""
        clean = bool(self._look.text("clean_ground"))
        for (ino, index), mark in self._marked.items():
            path = self._file(ino, mark.generation)
            if path is None or (ino, index) in self.lost:
                continue
            here = self._pages_there(path, index)
            if not (gone := mark.pages & ~here):
                continue
            what = f"{self._look.path(ino)}: block {index}"
            if clean:
                self.lost[ino, index] = mark.pages & here
                text = f"{what}: {gone.bit_count()} pages are not on Discord, and are holes here"
                yield Fault("unsent-data", text + self._instead(ino, index))
            else:  # a mark comes before its bytes
                text = f"{what}: {gone.bit_count()} pages that a killed run was about to write"
                yield Fault("leftovers", text, note=True)

    def check_synced(self) -> Iterator[Fault]:
        """What was synced has its local file. After a power cut: marks and holes tell nothing."""
        for ino, index, _, path in self._dirty_rows():
            if path is None:
                yield self._without_file(ino, index)

    def _dirty_rows(self) -> Iterator[tuple[int, int, int, Path | None]]:
        """Inode, block, pages and local file of all that was synced and is not on Discord."""
        rows = self._look.rows(
            "SELECT d.ino, d.idx, d.pages FROM dirty d JOIN inodes i ON i.ino = d.ino"
            " WHERE typeof(d.idx) = 'integer' AND d.idx BETWEEN 0 AND (i.size - 1) / ?"
            " AND typeof(d.pages) = 'blob'",  # what else there is, the journal's own check tells
            (self._block_bytes,),
        )
        for ino, index, pages in rows:
            if bitmap := int.from_bytes(bytes(pages), "little"):  # else it was cut away since
                yield ino, index, bitmap, self._own(ino)

    def _without_file(self, ino: int, index: int) -> Fault:
        self.lost[ino, index] = 0
        text = f"{self._look.path(ino)}: block {index}: was synced, and its local file is missing"
        return Fault("unsent-data", text + self._instead(ino, index))

    def _check_dirty(self) -> Iterator[Fault]:
        for ino, index, pages, path in self._dirty_rows():
            what = f"{self._look.path(ino)}: block {index}"
            if path is None:
                yield self._without_file(ino, index)
                continue
            here = self._pages_there(path, index)
            mark = self._marked.get((ino, index))
            wanted = pages
            if mark is None:
                self.unmarked.append((ino, index, pages & here))
                yield Fault("marks", f"{what}: was synced, and is not marked any more")
            else:  # the row keeps bits of what a truncation has cut since; the mark does not
                wanted &= mark.pages
            if lost := (wanted & ~here).bit_count():
                self.lost[ino, index] = (mark.pages if mark else wanted) & here
                yield Fault("unsent-data", f"{what}: {lost} pages that were synced are holes now")

    def _pages_there(self, path: Path, index: int) -> int:
        """Pages of a block for which the local file has bytes, not holes."""
        first = index * self._block_bytes
        start, stop, pages = first, first + self._block_bytes, 0
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while start < stop:
                begin = os.lseek(descriptor, start, os.SEEK_DATA)
                start = os.lseek(descriptor, begin, os.SEEK_HOLE)
                for page in range(begin // PAGE_BYTES, -(-min(start, stop) // PAGE_BYTES)):
                    pages |= 1 << (page - first // PAGE_BYTES)
        except OSError:  # no data beyond
            pass
        finally:
            os.close(descriptor)
        return pages

    def mark_anew(self) -> int:
        """Mark what was synced and lost its mark, so that the next mount takes it up."""
        if not self.unmarked:
            return 0
        marks = Marks(self._marks_path, self._block_bytes)
        try:
            for ino, index, pages in self.unmarked:
                generation = self._look.number(_GENERATION, (ino,))
                version = self._look.number(
                    "SELECT version FROM dirty WHERE ino = ? AND idx = ?", (ino, index)
                )
                marks.claim(Ino(ino), generation, index, max(1, version), pages=pages)
        finally:
            marks.close()
        return len(self.unmarked)

    def unmark_lost(self) -> None:
        """Let marks tell only of pages that are here."""
        if not self.lost:
            return
        marks = Marks(self._marks_path, self._block_bytes)
        try:
            for mark in marks:
                pages = self.lost.get((mark.ino, mark.index))
                if pages == 0:
                    marks.release(mark.slot)
                elif pages is not None:
                    marks.update(mark.slot, mark.version, mark.pages & pages)
        finally:
            marks.close()

    # ------------------------------------------------------------------ cached blocks, stray files

    def check_cached(self, tick: Callable[[int], None]) -> Iterator[Fault]:
        """Clean blocks are what their checksums say. `tick` hears of each byte read."""
        rows = self._look.rows(
            "SELECT c.ino, c.idx, c.length, c.sums, l.valid_length FROM cached c"
            " JOIN inodes i ON i.ino = c.ino"
            " LEFT JOIN chunk_list l ON l.ino = c.ino AND l.idx = c.idx WHERE c.length > 0"
        )
        for ino, index, length, sums, valid in rows:
            if (ino, index) in self._marked:
                continue  # it was written to since: the checksums are of what it was before
            what = f"{self._look.path(ino)}: cached block {index}"
            if valid != length:
                yield Fault("leftovers", f"{what}: a row of what it was before", note=True)
                continue
            path = self._own(ino)
            data = _read(path, index * self._block_bytes, length) if path else None
            tick(length)
            if data is None:
                yield Fault("leftovers", f"{what}: not here any more", note=True)
            elif not agrees(data, 0, bytes(sums)):
                self.rotten.append((ino, index))
                yield Fault("cached", f"{what}: has rotted on this disk; Discord has it")

    def cached_bytes(self) -> int:
        """How much `check_cached` will read at most."""
        return self._look.number("SELECT sum(length) FROM cached")

    def check_files(self) -> Iterator[Fault]:
        """Files under blocks/ that no inode has. The next mount empties those that are its own."""
        for folder in sorted(self._blocks.iterdir()) if self._blocks.is_dir() else ():
            if folder.name == _OWNERS:
                continue
            if not folder.is_dir() or not _FOLDER.fullmatch(folder.name):
                yield Fault("stray-files", f"{folder}: nothing of this program")
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not _NUMBER.fullmatch(entry.name) or not entry.is_file(
                        follow_symlinks=False
                    ):
                        yield Fault("stray-files", f"{entry.path}: nothing of this program")
        given = self._look.local("next_ino")
        unknown = (
            "SELECT f.ino, f.generation, f.number, i.ino FROM temp.local_files f"
            " LEFT JOIN inodes i ON i.ino = f.ino LEFT JOIN generations g ON g.ino = f.ino"
            " WHERE i.ino IS NULL OR f.generation != coalesce(g.generation, 0)"
        )
        for ino, generation, number, known in self._look.rows(unknown):
            if known is None:
                self.strays.append((LocalKey(ino, generation), self._path(number)))
            if ino >= max(given, 2):
                self.older = True
                yield Fault(
                    "journal-age",
                    f"a local file is of inode {ino}, which the journal has never given: it is "
                    "older than this machine's data",
                )
            else:
                yield Fault("leftovers", f"a local file of inode {ino}, which is no more", True)

    def save_strays(self, folder: Path) -> int:
        """Move unmarked files of unknown inodes away, where the next mount does not empty them."""
        marked = {LocalKey(file.ino, file.generation) for file in self.unknown}
        saved = 0
        for key, path in self.strays:
            if key not in marked and path.exists() and path.stat().st_size:
                folder.mkdir(mode=0o700, exist_ok=True)
                path.rename(folder / f"{key.ino:x}.{key.generation:x}")
                saved += 1
        return saved


def _read(path: Path, offset: int, length: int) -> bytes | None:
    """Exactly these bytes; None when the file is not there or too short."""
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), length, offset)
    except FileNotFoundError:
        return None
    except OSError:
        return b""  # a failing disk: not what the checksums say
    return data if len(data) == length else None
