"""fsck: each thing that must hold, broken once; what is reported, and what --repair makes of it."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "vfs"))
from damage import ask, edit, files_of
from harness import BLOCK

from stashcordfs.cache import LocalFiles
from stashcordfs.errors import FsError
from stashcordfs.recovery import fsck

F0, F1 = "d/f0", "d/f1"


def test_a_sound_volume_is_clean_and_nothing_is_changed_by_looking(unmounted) -> None:
    before = files_of(unmounted.folder)
    report = unmounted.check()
    assert report.findings == []
    assert report.clean
    assert len(report.stages) == 15
    assert files_of(unmounted.folder) == before


def test_repairing_a_sound_volume_changes_nothing(unmounted) -> None:
    before = files_of(unmounted.folder)
    assert unmounted.repair().repaired == []
    assert files_of(unmounted.folder) == before


SEGMENT = (
    "INSERT INTO objects VALUES (randomblob(16), 2, {}, 0, 0, 5, zeroblob(32), 9, {}, 7, {}, 0)"
)
# What is done to the journal ({f0} and so on are inode numbers), and the check that notices.
BROKEN = {
    "a name of no inode": ("DELETE FROM inodes WHERE ino = {link}", "name-inode"),
    "a file counts too many links": ("UPDATE inodes SET nlink = 9 WHERE ino = {f1}", "links"),
    "a named file counts no link": ("UPDATE inodes SET nlink = 0 WHERE ino = {f1}", "links"),
    "a folder counts too few": ("UPDATE inodes SET nlink = 2 WHERE ino = {d}", "folder-links"),
    "a file lost its name": ("DELETE FROM dirents WHERE ino = {f1}", "orphan"),
    "a folder lost its name": ("DELETE FROM dirents WHERE ino = {d}", "orphan"),
    "a ring of folders": ("UPDATE dirents SET parent = {e} WHERE ino = {d}", "unreachable"),
    "a folder with two names": (
        "INSERT INTO dirents VALUES (1, x'7878', 1234567, {e})",
        "folder-names",
    ),
    "a name with a slash": (
        "UPDATE dirents SET name = x'612f62' WHERE ino = {f1}",
        "name-valid",
    ),
    "a name in a file": ("UPDATE dirents SET parent = {f0} WHERE ino = {f1}", "name-folder"),
    "a name in a missing folder": ("DELETE FROM inodes WHERE ino = {d}", "name-folder"),
    "two names at one place": (
        "UPDATE dirents SET cookie = (SELECT min(cookie) FROM dirents WHERE parent = {d})",
        "cookies",
    ),
    "a mode that cannot be": ("UPDATE inodes SET mode = 7 WHERE ino = {f1}", "inode-values"),
    "a size that is text": ("UPDATE inodes SET size = 'x' WHERE ino = {f1}", "inode-values"),
    "a size cut short": ("UPDATE inodes SET size = 5 WHERE ino = {f1}", "size"),
    "stored bytes miscounted": ("UPDATE inodes SET stored = 1 WHERE ino = {f1}", "stored"),
    "a link's target gone": ("DELETE FROM symlinks", "link-target"),
    "the root gone": ("DELETE FROM inodes WHERE ino = 1", "root"),
    "a file's inode gone": ("DELETE FROM inodes WHERE ino = {f1}", "blocks-of-nothing"),
    "a chunk gone": (
        "DELETE FROM chunks WHERE id IN (SELECT chunk FROM chunk_list WHERE ino = {f1})",
        "dangling",
    ),
    "all packs gone": ("DELETE FROM packs", "dangling"),
    "a pack that was never confirmed": ("UPDATE packs SET message = 0", "dangling"),
    "a block longer than its chunk": (
        "UPDATE chunk_list SET valid_length = valid_length + 1 WHERE ino = {f1} AND idx = 2",
        "block-length",
    ),
    "a chunk's offset changed": (
        "UPDATE chunks SET offset = offset + 1 WHERE number = 2",
        "chunks",
    ),
    "a chunk's plain length changed": (
        "UPDATE chunks SET plain_length = plain_length - 1 WHERE number = 2",
        "chunks",
    ),
    "a chunk beyond its pack": ("UPDATE packs SET size = 100", "chunks"),
    "a pack's number too short": ("UPDATE packs SET object_id = x'00'", "packs"),
    "a pack of an unknown key": ("UPDATE packs SET epoch = 7", "packs"),
    "a counter gone back": (
        "UPDATE local SET value = 1099511627778 WHERE key = 'next_ino'",
        "counters",
    ),
    "the packs' counter gone back": ("DELETE FROM local WHERE key = 'next_id'", "counters"),
    "an upload of a missing pack": ("INSERT INTO intent_packs VALUES (77, 78)", "outbox"),
    "a watched name that is none": ("INSERT INTO watched VALUES (x'00', 'x', 1)", "watch-list"),
    "an unsent block of no inode": ("DELETE FROM inodes WHERE ino = {unsent}", "leftovers"),
    "an unsent block beyond the end": (
        "UPDATE dirty SET idx = 9 WHERE ino = {unsent}",
        "dirty-rows",
    ),
    "a change lost in the middle": (
        "DELETE FROM changes WHERE id = (SELECT max(id) - 1 FROM changes)",
        "changes",
    ),
    "a change that nobody can read": (
        "UPDATE changes SET changeset = x'0102' WHERE id = (SELECT max(id) FROM changes)",
        "changes",
    ),
    "a change without a time": ("UPDATE changes SET made_ns = 'x'", "changes"),
    "a change that a segment holds as well": (
        (
            "INSERT INTO objects SELECT zeroblob(16), 2, 1, 0, min(id), 5, zeroblob(32), 9,"
            " NULL, 7, 8, 9 FROM changes"
        ),
        "changes",
    ),
    "an unposted segment without its bytes": (SEGMENT.format(1, "NULL", 0), "objects"),
    "an unposted segment with other bytes": (SEGMENT.format(1, "x'00'", 0), "objects"),
    "a segment without a size": (
        SEGMENT.format(1, "NULL", 5) + "; UPDATE objects SET size = 'x'",
        "objects",
    ),
    "two segments of one number": (
        SEGMENT.format(1, "NULL", 5) + "; " + SEGMENT.format(1, "NULL", 6),
        "objects",
    ),
    "a message to be deleted that counts": (
        "INSERT INTO condemned SELECT channel, message, 1, 1 FROM packs LIMIT 1",
        "condemned",
    ),
    "a message to be deleted that files need": (
        (
            "INSERT INTO condemned SELECT channel, message, 1, 1 FROM packs;"
            "UPDATE packs SET message = -message"
        ),
        "condemned",
    ),
    "a message to be deleted at no time": (
        "INSERT INTO condemned VALUES (7, 8, 'x', 1)",
        "condemned",
    ),
    "history's time of what a file refers to": (
        "INSERT INTO unused SELECT chunk, 1 FROM chunk_list LIMIT 1",
        "unused",
    ),
    "history's time that cannot be": (
        "INSERT INTO unused SELECT id, 'x' FROM chunks LIMIT 1",
        "unused",
    ),
    "something in the trash that has a name": (
        "INSERT INTO trash VALUES ({f1}, 1, x'61', 5, 0)",
        "trash",
    ),
    "another format": ("PRAGMA user_version = 99", "version"),
}
UNMENDED = {
    "another format",
    "an unsent block beyond the end",
    "a pack's number too short",
    "a pack of an unknown key",
}
LOST = {"a chunk gone", "all packs gone", "a pack that was never confirmed"}
MISPLACED = {
    "a chunk beyond its pack",
    "a chunk's offset changed",
    "a chunk's plain length changed",
}


def break_it(unmounted, statement: str) -> None:
    numbers = {name.rpartition("/")[2]: ino for name, ino in unmounted.inos.items()}
    edit(unmounted.journal, statement.format(**numbers))


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_named(unmounted, kind) -> None:
    statement, check = BROKEN[kind]
    break_it(unmounted, statement)
    report = unmounted.check()
    assert report.errors[check], report.as_json()
    assert all(finding.text for finding in report.findings)


@pytest.mark.parametrize("kind", sorted(set(BROKEN) - UNMENDED))
def test_what_is_broken_is_mended_and_no_unsent_data_lost(unmounted, kind) -> None:
    break_it(unmounted, BROKEN[kind][0])
    unsent = unmounted.local_file("unsent").read_bytes()
    copy = unmounted.journal.read_bytes()
    report = unmounted.repair()
    left = {"damaged"} if kind in LOST | MISPLACED else set()
    assert set(report.errors) == left, report.as_json()
    assert report.repaired
    assert Path(report.journal_copy).read_bytes() == copy
    assert unmounted.local_file("unsent").read_bytes() == unsent
    assert unmounted.read("unsent") == unmounted.contents["unsent"]


@pytest.mark.parametrize("kind", ["a file lost its name", "a folder lost its name"])
def test_what_lost_its_name_is_under_lost_and_found_with_its_content(unmounted, kind) -> None:
    break_it(unmounted, BROKEN[kind][0])
    unmounted.repair()

    async def paths(v) -> list[bytes]:
        return await v.journal.paths_of(unmounted.inos[F1])

    found = unmounted.mounted(paths)
    number = unmounted.inos[F1 if "file" in kind else "d"]
    tail = b"" if "file" in kind else b"/f1"
    assert found == [b"lost+found/inode-%d" % number + tail]
    assert unmounted.read(F1) == unmounted.contents[F1]


def test_a_ring_is_cut_and_everything_in_it_kept(unmounted) -> None:
    break_it(unmounted, BROKEN["a ring of folders"][0])
    unmounted.repair()
    assert unmounted.read(F1) == unmounted.contents[F1]
    assert unmounted.check().clean


def test_a_missing_inode_is_made_anew_with_its_content(unmounted) -> None:
    break_it(unmounted, BROKEN["a file's inode gone"][0])
    unmounted.repair()
    assert unmounted.read(F1) == unmounted.contents[F1]
    [(mode,)] = ask(unmounted.journal, f"SELECT mode FROM inodes WHERE ino = {unmounted.inos[F1]}")
    assert mode == 0o100600


def test_a_size_cut_short_gets_its_blocks_back(unmounted) -> None:
    break_it(unmounted, BROKEN["a size cut short"][0])
    unmounted.repair()
    assert unmounted.read(F1) == unmounted.contents[F1]


@pytest.mark.parametrize("mended", [False, True])
@pytest.mark.parametrize("kind", sorted(LOST))
def test_a_block_without_its_content_is_an_error_never_zeros(unmounted, kind, mended) -> None:
    break_it(unmounted, BROKEN[kind][0])
    edit(unmounted.journal, "DELETE FROM cached")
    if mended:
        assert unmounted.repair().errors["damaged"]
    assert unmounted.read(F1) == errno.EIO


def test_a_damaged_block_that_is_overwritten_is_whole_again(unmounted) -> None:
    break_it(unmounted, BROKEN["a chunk gone"][0])
    edit(unmounted.journal, "DELETE FROM cached")
    unmounted.repair()
    new = os.urandom(len(unmounted.contents[F1]))

    async def overwrite(v) -> None:
        fh = await v.fs.open(unmounted.inos[F1], os.O_WRONLY)
        await v.write(fh, 0, new)
        await v.fs.release(fh)
        await v.fs.sync_remote()

    unmounted.mounted(overwrite)
    assert unmounted.read(F1) == new
    assert unmounted.check().clean


def test_findings_of_one_kind_are_counted_and_not_all_told(unmounted) -> None:
    rows = ",".join(f"(1, CAST('n{n}' AS BLOB), {n}, 999)" for n in range(1000, 1300))
    edit(unmounted.journal, f"INSERT INTO dirents VALUES {rows}")
    report = unmounted.check()
    assert report.errors["name-inode"] == 300
    assert len([f for f in report.findings if f.check == "name-inode"]) == 100


def test_names_cannot_speak_to_the_terminal(unmounted) -> None:
    edit(unmounted.journal, "INSERT INTO dirents VALUES (1, x'1b5b326a0aff', 1234567, 999)")
    assert r"'\x1b[2j\n\xff' in /" in unmounted.check().findings[0].text


# ---------------------------------------------------------------------- this machine's side


def test_rot_in_a_cached_block_is_found_and_only_its_row_forgotten(unmounted) -> None:
    path = unmounted.local_file(F1)
    data = bytearray(path.read_bytes())
    data[70_000] ^= 4
    path.write_bytes(data)
    assert unmounted.check().errors == {"cached": 1}
    report = unmounted.repair()
    assert report.clean
    assert unmounted.read(F1) == unmounted.contents[F1]


def test_unsent_data_whose_file_is_gone_is_reported(unmounted) -> None:
    unmounted.local_file("unsent").unlink()
    report = unmounted.check()
    assert set(report.errors) == {"unsent-data"}
    assert "/unsent: block 0" in report.findings[0].text


def test_synced_pages_that_became_holes_are_reported(unmounted) -> None:
    path = unmounted.local_file("unsent")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(size)
    report = unmounted.check()
    assert report.errors == {"unsent-data": 1}
    assert "16 pages" in report.findings[0].text


def test_synced_data_that_lost_its_mark_is_marked_anew(unmounted) -> None:
    (unmounted.folder / "marks.map").unlink()
    assert unmounted.check().errors == {"marks": 1}
    assert unmounted.repair().clean
    assert unmounted.read("unsent") == unmounted.contents["unsent"]


def test_a_table_of_marks_that_is_none_is_reported(unmounted) -> None:
    with (unmounted.folder / "marks.map").open("r+b") as file:
        file.write(b"something else")
    assert unmounted.check().errors["marks"]


def test_pages_that_a_truncation_cut_since_they_were_synced_are_no_fault(unmounted) -> None:
    """The row of the edge's block is cut along; what the file gained again is a hole."""

    async def cut(v) -> None:
        await v.fs.setattr(unmounted.inos["unsent"], size=5000)
        await v.fs.setattr(unmounted.inos["unsent"], size=40_000)
        v.journal.commit()
        [(pages,)] = v.journal._db.all("SELECT pages FROM dirty")
        assert int.from_bytes(pages, "little").bit_count() == 2
        shutil.copytree(unmounted.folder, unmounted.folder.parent / "killed")

    unmounted.mounted(cut, upload=False)
    unmounted.folder = unmounted.folder.parent / "killed"
    assert unmounted.check().clean


def test_a_pack_may_be_in_use_and_watched_for(unmounted) -> None:
    """Its message may have been made twice: the other one is what is to go."""
    edit(unmounted.journal, "INSERT INTO watched SELECT filename, 1, 1 FROM packs LIMIT 1")
    assert unmounted.check().clean


def test_stray_files_are_reported_and_left_alone(unmounted) -> None:
    stray = unmounted.folder / "blocks" / "n0000" / "notes.txt"
    stray.write_text("mine")
    assert unmounted.check().errors == {"stray-files": 1}
    unmounted.repair()
    assert stray.read_text() == "mine"


def test_a_local_file_that_no_inode_has_is_a_note(unmounted) -> None:
    files = LocalFiles(unmounted.folder / "blocks")
    files.write((512, 0), 0, b"old")
    files.close()
    report = unmounted.check()
    assert report.clean
    assert report.notes == {"leftovers": 1}


def test_a_table_of_owners_that_is_none_is_reported(unmounted) -> None:
    with (unmounted.folder / "blocks" / "owners").open("r+b") as file:
        file.write(b"something else")
    assert unmounted.check().errors["owners"] == 1


def test_after_a_power_cut_marks_and_cached_blocks_are_not_judged(unmounted) -> None:
    (unmounted.folder / "marks.map").unlink()
    report = fsck.check(unmounted.place, mounted=False, power_lost=True, progress=lambda *_: None)
    assert report.clean
    assert report.skipped


def test_a_mounted_volume_is_read_at_its_last_commit(unmounted) -> None:
    async def look(v) -> fsck.Report:
        await v.make(b"new", b"x" * 100)
        v.journal.commit()
        return fsck.check(unmounted.place, mounted=True, progress=lambda *_: None)

    report = unmounted.mounted(look)
    assert report.clean
    assert report.skipped == ["local files and marks: the volume is mounted"]
    assert unmounted.check().clean


def test_an_open_file_without_a_name_is_no_fault(unmounted) -> None:
    async def look(v) -> fsck.Report:
        fh = await v.fs.open(unmounted.inos[F1], os.O_RDONLY)
        await v.fs.unlink(unmounted.inos["d"], b"f1")
        v.journal.commit()
        report = fsck.check(unmounted.place, mounted=True, progress=lambda *_: None)
        await v.fs.release(fh)
        return report

    assert unmounted.mounted(look).clean


# ---------------------------------------------------------------------- data that is nowhere


async def _overwritten_in_part(v, unmounted) -> None:
    fh = await v.fs.open(unmounted.inos[F1], os.O_WRONLY)
    await v.write(fh, 0, b"n" * 4096)
    await v.fs.release(fh)
    await v.durability.sync()


def test_a_block_that_is_nowhere_is_an_error_after_mending_and_the_rest_is_whole(unmounted) -> None:
    unmounted.local_file("unsent").unlink()
    report = unmounted.repair()
    assert set(report.errors) == {"damaged"}, report.as_json()
    assert "/unsent: block 0" in report.findings[0].text
    assert unmounted.read("unsent") == errno.EIO
    assert unmounted.read(F1) == unmounted.contents[F1]


def test_pages_that_are_nowhere_are_an_error_after_mending_and_the_others_are_read(
    unmounted,
) -> None:
    data = unmounted.contents["unsent"]
    path = unmounted.local_file("unsent")
    with path.open("r+b") as file:
        file.truncate(BLOCK // 2)
        file.truncate(len(data))
    assert "8 pages that were synced" in unmounted.check().findings[0].text
    assert set(unmounted.repair().errors) == {"damaged"}

    async def halves(v) -> list[bytes | int | None]:
        fh = await v.fs.open(unmounted.inos["unsent"], os.O_RDONLY)
        found: list[bytes | int | None] = [await v.fs.read(fh, 0, BLOCK // 2)]
        try:
            found.append(await v.fs.read(fh, BLOCK // 2, BLOCK // 2))
        except FsError as error:
            found.append(error.errno)
        await v.fs.release(fh)
        return found

    assert unmounted.mounted(halves, deadline_s=2, upload=False) == [data[: BLOCK // 2], errno.EIO]


def test_of_a_block_that_is_only_older_on_discord_this_is_told(unmounted) -> None:
    unmounted.mounted(lambda v: _overwritten_in_part(v, unmounted), upload=False)
    unmounted.local_file(F1).unlink()
    report = unmounted.check()
    assert "Discord has what it held before" in report.findings[0].text
    assert unmounted.repair().clean
    assert unmounted.read(F1) == unmounted.contents[F1]


def test_a_block_that_had_grown_since_is_an_error_and_no_zeros_after_mending(unmounted) -> None:
    """Discord has its beginning; the rest was synced, and is nowhere."""

    async def append(v) -> None:
        fh = await v.fs.open(unmounted.inos[F1], os.O_WRONLY)
        await v.write(fh, len(unmounted.contents[F1]), b"n" * 20_000)
        await v.fs.release(fh)
        await v.durability.sync()

    unmounted.mounted(append, upload=False)
    unmounted.local_file(F1).unlink()
    report = unmounted.repair()
    assert set(report.errors) == {"damaged"}, report.as_json()
    assert any("1 of them read as damaged" in text for text in report.repaired)

    async def ends(v) -> list[bytes | int | None]:
        fh = await v.fs.open(unmounted.inos[F1], os.O_RDONLY)
        found: list[bytes | int | None] = [await v.fs.read(fh, 0, 2 * BLOCK)]
        try:
            found.append(await v.fs.read(fh, 2 * BLOCK + 10_000, 10))
        except FsError as error:
            found.append(error.errno)
        await v.fs.release(fh)
        return found

    whole = unmounted.contents[F1][: 2 * BLOCK]
    assert unmounted.mounted(ends, deadline_s=2, upload=False) == [whole, errno.EIO]


def test_after_a_power_cut_too_synced_data_without_its_file_is_told_and_mended(unmounted) -> None:
    unmounted.mounted(lambda v: _overwritten_in_part(v, unmounted), upload=False)
    unmounted.local_file(F1).unlink()
    after_cut = {"power_lost": True, "progress": lambda *_: None}
    report = fsck.check(unmounted.place, mounted=False, **after_cut)
    assert "Discord has what it held before" in report.findings[0].text
    assert fsck.repair(unmounted.place, **after_cut).clean

    async def read(v) -> bytes:
        return await v.read(unmounted.inos[F1])

    found = unmounted.mounted(read, power_lost=True, upload=False)
    assert found == unmounted.contents[F1]


def test_synced_data_without_mark_and_bytes_is_not_marked_as_if_it_were_there(unmounted) -> None:
    (unmounted.folder / "marks.map").unlink()
    path = unmounted.local_file("unsent")
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(BLOCK)
    assert unmounted.check().errors == {"marks": 1, "unsent-data": 1}
    assert set(unmounted.repair().errors) == {"damaged"}
    assert unmounted.read("unsent") == errno.EIO


@pytest.mark.parametrize("ended", ["cleanly", "killed"])
def test_written_pages_that_are_holes_are_a_fault_unless_the_run_was_killed(
    unmounted, ended
) -> None:
    async def write(v) -> None:
        ino = await v.make(b"unsynced", b"x" * BLOCK)
        unmounted.inos["unsynced"] = ino
        v.journal.commit()
        if ended == "killed":
            shutil.copytree(unmounted.folder, unmounted.folder.parent / "killed")

    unmounted.mounted(write, upload=False)
    if ended == "killed":
        unmounted.folder = unmounted.folder.parent / "killed"
    edit(
        unmounted.journal,
        f"INSERT OR REPLACE INTO local VALUES ('clean_ground', '{'x' * (ended == 'cleanly')}')",
        f"DELETE FROM dirty WHERE ino = {unmounted.inos['unsynced']}",
    )
    path = unmounted.local_file("unsynced")
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(BLOCK)
    report = unmounted.check()
    if ended == "killed":
        assert (report.clean, report.notes) == (True, {"leftovers": 1})
    else:
        assert report.errors == {"unsent-data": 1}
        unmounted.repair()
        assert unmounted.read("unsynced") == errno.EIO


@pytest.mark.parametrize("power_lost", [False, True])
@pytest.mark.parametrize("value", ["'text'", "-1", "1000000000000", "1.5", "x''"])
def test_a_row_of_synced_pages_that_cannot_be_is_told(unmounted, power_lost, value) -> None:
    edit(unmounted.journal, f"UPDATE dirty SET pages = {value}")
    after = {"power_lost": power_lost, "progress": lambda *_: None}
    for report in (
        fsck.check(unmounted.place, mounted=False, **after),
        fsck.repair(unmounted.place, **after),
    ):
        assert ("dirty-rows" in report.errors) == (value != "x''")
