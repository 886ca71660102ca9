"""Every kind of damage to the journal, and what notices it: the table in docs/fsck.md."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import apsw
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from damage import PAGE, ask, edit, flip, leaf_page, zero_page

from stashcordfs.errors import JournalError, LocalDiskError, StashcordError
from stashcordfs.journal import Journal
from stashcordfs.journal.sqlite import checksums

F1 = "d/f1"
needs_checksums = pytest.mark.skipif(
    not checksums.available(), reason="this apsw has no checksum VFS"
)


def opens(unmounted) -> bool:
    try:
        Journal.open(unmounted.journal, clock_ns=lambda: 7).close()
    except StashcordError:
        return False
    return True


def value_at(path: Path, table: str, needle: bytes) -> int:
    """Where a value's bytes stand in the table's first page of rows."""
    page = leaf_page(path, table)
    at = path.read_bytes()[(page - 1) * PAGE : page * PAGE].index(needle)
    return (page - 1) * PAGE + at


# ---------------------------------------------------------------------- pages


@needs_checksums
def test_a_new_journal_has_checksums(unmounted) -> None:
    connection = apsw.Connection(str(unmounted.journal))
    assert checksums.has_checksums(connection)
    connection.close()


@needs_checksums
@pytest.mark.parametrize("table", ["dirents", "chunk_list", "chunks", "packs", "cached"])
def test_a_flipped_bit_is_noticed_by_fsck_and_mended(unmounted, table) -> None:
    page = leaf_page(unmounted.journal, table)
    flip(unmounted.journal, page * PAGE - 20)
    assert unmounted.check().errors["sqlite"]
    report = unmounted.repair()
    assert set(report.errors) <= {"damaged"}
    assert unmounted.check().errors == report.errors
    assert unmounted.read("unsent") == unmounted.contents["unsent"]


@needs_checksums
def test_a_flipped_bit_of_an_inode_is_noticed_at_the_mount(unmounted) -> None:
    flip(unmounted.journal, leaf_page(unmounted.journal, "inodes") * PAGE - 20)
    assert not opens(unmounted)


@needs_checksums
def test_a_flipped_bit_of_a_name_is_an_error_at_its_first_use(unmounted) -> None:
    flip(unmounted.journal, value_at(unmounted.journal, "dirents", b"second"))

    met: list[int] = []

    async def look(v) -> None:
        try:
            await v.fs.lookup(1, b"second")
        except LocalDiskError as error:
            met.append(error.errno)

    # SQLite takes back the open group after a failed read: nothing more is written until a mount.
    with pytest.raises(LocalDiskError, match="mount anew"):
        unmounted.mounted(look, upload=False)
    assert met == [errno.EIO]
    assert unmounted.repair().clean
    assert unmounted.read("unsent") == unmounted.contents["unsent"]


@pytest.fixture
def unchecked(monkeypatch, request):
    """A volume whose journal was made without checksums, as older ones were."""
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "available", lambda: False)
        return request.getfixturevalue("unmounted")


def test_without_checksums_a_flipped_bit_of_a_name_is_another_name(unchecked) -> None:
    flip(unchecked.journal, value_at(unchecked.journal, "dirents", b"second"))
    report = unchecked.check()
    assert set(report.errors) <= {"sqlite"}  # by the index, which has the name as well
    assert (b"recond",) in ask(unchecked.journal, "SELECT name FROM dirents ORDER BY parent, name")


def test_without_checksums_a_flipped_bit_of_a_chunks_name_is_an_error_when_read(unchecked) -> None:
    [(chunk_id,)] = ask(
        unchecked.journal,
        "SELECT c.chunk_id FROM chunks c JOIN chunk_list l ON l.chunk = c.id"
        f" WHERE l.ino = {unchecked.inos[F1]} AND l.idx = 0",
    )
    edit(unchecked.journal, "DELETE FROM cached")
    flip(unchecked.journal, value_at(unchecked.journal, "chunks", chunk_id) + 5)
    assert unchecked.read(F1) == errno.EIO


@pytest.mark.parametrize("table", ["dirents", "chunk_list", "chunks", "packs", "local"])
def test_a_zeroed_page_is_noticed_by_fsck_and_costs_no_unsent_data(unmounted, table) -> None:
    zero_page(unmounted.journal, leaf_page(unmounted.journal, table))
    assert unmounted.check().errors["sqlite"]
    report = unmounted.repair()
    assert any("a new journal was made" in text for text in report.repaired)
    assert set(report.errors) <= {"damaged"}
    assert unmounted.read("unsent") == unmounted.contents["unsent"]


def test_a_zeroed_page_of_inodes_is_noticed_at_the_mount(unmounted) -> None:
    zero_page(unmounted.journal, leaf_page(unmounted.journal, "inodes"))
    assert not opens(unmounted)
    unmounted.repair()
    assert unmounted.read(F1) == unmounted.contents[F1]


def test_names_are_read_from_their_index_when_their_table_is_gone(unmounted) -> None:
    names = ask(unmounted.journal, "SELECT parent, name, cookie, ino FROM dirents ORDER BY 1, 2")
    zero_page(unmounted.journal, leaf_page(unmounted.journal, "dirents"))
    unmounted.repair()
    assert names == ask(
        unmounted.journal, "SELECT parent, name, cookie, ino FROM dirents ORDER BY 1, 2"
    )


def test_lost_entries_of_a_chunk_list_are_errors_never_zeros(unmounted) -> None:
    edit(unmounted.journal, "DELETE FROM cached")
    zero_page(unmounted.journal, leaf_page(unmounted.journal, "chunk_list"))
    assert unmounted.repair().errors["damaged"] == 11
    assert unmounted.read(F1) == errno.EIO


def test_a_truncated_file_is_noticed_by_fsck_and_mended(unmounted) -> None:
    with unmounted.journal.open("r+b") as file:
        file.truncate(len(unmounted.journal.read_bytes()) // PAGE // 2 * PAGE)
    assert unmounted.check().errors["sqlite"]
    report = unmounted.repair()
    assert set(report.errors) <= {"damaged"}
    assert unmounted.local_file("unsent").read_bytes() == unmounted.contents["unsent"]


@pytest.mark.parametrize("what", ["zeros", "nothing", "missing"])
def test_without_its_first_page_a_journal_is_refused_and_cannot_be_mended(unmounted, what) -> None:
    if what == "zeros":
        zero_page(unmounted.journal, 1)
    elif what == "nothing":
        unmounted.journal.write_bytes(b"")
    else:
        unmounted.journal.unlink()
    assert not opens(unmounted)
    report = unmounted.check() if what == "missing" else unmounted.repair()
    assert report.errors["sqlite"]
    assert unmounted.local_file("unsent").read_bytes() == unmounted.contents["unsent"]


# ---------------------------------------------------------------------- rows, by a faulty program

NOTHING: set[str] = set()
ROWS = {
    # column: change, checks of fsck, what reading f1 gives
    "a name": ("UPDATE dirents SET name = x'7a' WHERE ino = {f1}", NOTHING, "the same"),
    "an owner": ("UPDATE inodes SET uid = 77 WHERE ino = {f1}", NOTHING, "the same"),
    "a time": ("UPDATE inodes SET mtime_ns = 5 WHERE ino = {f1}", NOTHING, "the same"),
    "permissions": ("UPDATE inodes SET mode = mode - 4 WHERE ino = {f1}", NOTHING, "the same"),
    "a size, larger": ("UPDATE inodes SET size = size + 9 WHERE ino = {f1}", NOTHING, "other"),
    "a size, smaller": ("UPDATE inodes SET size = 9 WHERE ino = {f1}", {"size"}, "other"),
    "where a name leads": (
        "UPDATE dirents SET ino = {f2} WHERE ino = {f1}",
        {"orphan", "links"},
        "the same",
    ),
    "a chunk's offset": (
        "UPDATE chunks SET offset = offset + 1 WHERE id = {chunk}",
        {"chunks"},
        "error",
    ),
    "a chunk's number": (
        "UPDATE chunks SET number = number + 50 WHERE id = {chunk}",
        {"chunks"},
        "error",
    ),
    "a chunk's name": (
        "UPDATE chunks SET chunk_id = zeroblob(32) WHERE id = {chunk}",
        NOTHING,
        "error",
    ),
    "a pack's name": ("UPDATE packs SET object_id = zeroblob(16)", NOTHING, "error"),
    "a pack's key": ("UPDATE packs SET epoch = 1", {"packs"}, "error"),
    "a pack's message": ("UPDATE packs SET message = message + 1", NOTHING, "error"),
    "a pack's size, larger": ("UPDATE packs SET size = size + 1", NOTHING, "the same"),
    "which chunk, of another length": (
        "UPDATE chunk_list SET chunk = (SELECT chunk FROM chunk_list l WHERE l.ino = {f1}"  # noqa: ISC004
        " AND l.idx = 2) WHERE ino = {f1} AND idx = 0",
        {"block-length"},
        "other",
    ),
    "which chunk, of the same length": (
        "UPDATE chunk_list SET chunk = (SELECT chunk FROM chunk_list l WHERE l.ino = {f1}"  # noqa: ISC004
        " AND l.idx = 1) WHERE ino = {f1} AND idx = 0",
        NOTHING,
        "other",
    ),
    "how much of a chunk counts": (
        "UPDATE chunk_list SET valid_length = 7 WHERE ino = {f1} AND idx = 0",
        {"stored"},
        "other",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_changed_value_is_noticed_by_what_the_table_says(unmounted, kind) -> None:
    statement, checks, outcome = ROWS[kind]
    numbers = {name.rpartition("/")[2]: ino for name, ino in unmounted.inos.items()}
    [(numbers["chunk"],)] = ask(
        unmounted.journal, f"SELECT chunk FROM chunk_list WHERE ino = {numbers['f1']} AND idx = 0"
    )
    edit(unmounted.journal, "DELETE FROM cached", statement.format(**numbers))
    assert opens(unmounted)
    assert set(unmounted.check().errors) >= checks
    if not checks:
        assert unmounted.check().clean
    got = unmounted.read(F1)
    if outcome == "error":
        assert got == errno.EIO
    else:
        assert (got == unmounted.contents[F1]) == (outcome == "the same")


def test_changed_checksums_of_a_cached_block_cost_a_fetch_only(unmounted) -> None:
    edit(unmounted.journal, "UPDATE cached SET sums = zeroblob(length(sums)) WHERE length > 0")
    assert unmounted.check().errors["cached"]
    assert unmounted.read(F1) == unmounted.contents[F1]


# ---------------------------------------------------------------------- an older journal


def older_journal(unmounted, *, unsent: bool) -> None:
    """Put back the journal as it was before the last files were made, as a restored copy would."""
    kept = unmounted.folder.parent / "older"
    shutil.copyfile(unmounted.journal, kept)

    async def more(v) -> None:
        for number in range(3):
            unmounted.contents[f"new{number}"] = os.urandom(1000 + number)
            unmounted.inos[f"new{number}"] = await v.make(
                b"new%d" % number, unmounted.contents[f"new{number}"]
            )
        if not unsent:
            await v.fs.sync_remote()
        await v.durability.sync()

    unmounted.mounted(more, upload=not unsent)
    shutil.copyfile(kept, unmounted.journal)


def test_an_older_journal_beside_unsent_data_is_refused_and_the_data_kept(unmounted) -> None:
    older_journal(unmounted, unsent=True)
    with pytest.raises(JournalError, match="older than the data beside it"):
        unmounted.mounted(lambda v: None)
    assert unmounted.check().errors["journal-age"]
    assert unmounted.repair().clean

    async def paths(v) -> list[bytes]:
        return [p for n in range(3) for p in await v.journal.paths_of(unmounted.inos[f"new{n}"])]

    assert all(path.startswith(b"lost+found/") for path in unmounted.mounted(paths))
    for number in range(3):
        got = unmounted.read(f"new{number}")
        assert got == unmounted.contents[f"new{number}"]
    assert unmounted.read("unsent") == unmounted.contents["unsent"]


def test_an_older_journal_without_unsent_data_is_noticed_by_cached_files_alone(unmounted) -> None:
    """Names made since are gone. What was uploaded since lies unused on Discord."""

    async def send(v) -> None:
        await v.fs.sync_remote()

    unmounted.mounted(send)
    older_journal(unmounted, unsent=False)
    assert opens(unmounted)
    assert set(unmounted.check().errors) == {"journal-age"}
    shutil.rmtree(unmounted.folder / "blocks")
    assert unmounted.check().clean


def test_a_removed_wal_is_an_older_journal(unmounted) -> None:
    kept = unmounted.folder.parent / "killed"

    async def killed(v) -> None:
        unmounted.inos["late"] = await v.make(b"late", b"x" * 500)
        await v.durability.sync()
        shutil.copytree(unmounted.folder, kept)  # as a SIGKILL here would leave it

    unmounted.mounted(killed, upload=False)
    (kept / "journal.sqlite-wal").unlink()
    unmounted.folder = kept
    assert unmounted.check().errors["journal-age"]
    with pytest.raises(JournalError, match="older than the data beside it"):
        unmounted.mounted(killed)
    assert unmounted.repair().clean
    assert unmounted.read("late") == b"x" * 500


def test_a_half_written_wal_gives_the_state_before(unmounted) -> None:
    kept = unmounted.folder.parent / "killed"

    async def killed(v) -> None:
        await v.make(b"late", b"")
        await v.durability.sync()
        shutil.copytree(unmounted.folder, kept)

    unmounted.mounted(killed, upload=False)
    wal = kept / "journal.sqlite-wal"
    flip(wal, wal.stat().st_size - 100)
    unmounted.folder = kept
    assert opens(unmounted)
    assert unmounted.check().clean


def test_a_new_journals_schema_is_in_the_files_first_pages(tmp_path) -> None:
    path = tmp_path / "journal.sqlite"
    Journal.create(path, clock_ns=lambda: 7, uid=0, gid=0).close()
    pages = ask(path, "SELECT max(pageno) FROM dbstat WHERE name = 'sqlite_schema'")
    first_table = min(root for (root,) in ask(path, "SELECT rootpage FROM sqlite_schema"))
    assert pages[0][0] <= 5
    assert pages[0][0] < first_table or pages == [(1,)]
