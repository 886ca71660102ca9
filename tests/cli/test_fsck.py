"""The command fsck: exit codes, JSON, text, and who may do it when."""

from __future__ import annotations

import json
import os
import time

import pytest
from click.testing import CliRunner

from stashcordfs.cli.main import main
from stashcordfs.journal import Journal


@pytest.fixture
def volume(volume):
    make_journal(volume)
    return volume


def make_journal(volume) -> None:
    Journal.create(volume.journal_path, clock_ns=time.time_ns, uid=0, gid=0).close()


def miscount(volume) -> None:
    journal = Journal.open(volume.journal_path, clock_ns=time.time_ns)
    journal._db.begin()
    journal._db.run("UPDATE inodes SET nlink = 7 WHERE ino = 1")
    journal.close()


def run(*args: str):
    return CliRunner().invoke(main, list(args))


def test_a_sound_volume_ends_with_0(volume):
    done = run("fsck", "v")
    assert done.exit_code == 0
    assert done.output == "v: no errors\n"


def test_an_error_ends_with_1_and_is_told(volume):
    miscount(volume)
    done = run("fsck", "v")
    assert done.exit_code == 1
    assert "error\tfolder-links\t/: has 0 subfolders, its inode counts 5\n" in done.output
    assert done.output.endswith("v: 1 errors\n")


def test_json_is_one_object(volume):
    miscount(volume)
    done = run("fsck", "v", "--json")
    report = json.loads(done.stdout)
    assert (report["clean"], report["errors_by_check"]) == (False, {"folder-links": 1})
    assert report["state"] == "unmounted"
    assert done.exit_code == 1


def test_repair_mends_says_what_it_did_and_ends_with_0(volume):
    miscount(volume)
    done = run("fsck", "v", "--repair")
    assert done.exit_code == 0
    assert "mended: 1 inodes' links counted anew\n" in done.output
    assert "The journal as it was: " in done.output
    assert run("fsck", "v").exit_code == 0


def test_a_volume_in_use_is_read_and_not_mended(volume):
    with volume.lock():
        done = run("fsck", "v", "--json")
        assert done.exit_code == 0
        assert json.loads(done.stdout)["state"] == "mounted"
        refused = run("fsck", "v", "--repair")
    assert refused.exit_code == 1
    assert "in use" in refused.output


def test_a_missing_journal_is_an_error_that_says_what_to_do(volume):
    volume.journal_path.unlink()
    done = run("fsck", "v")
    assert done.exit_code == 1
    assert "recover it from Discord" in done.output


def test_an_unknown_volume_is_wrong_use(volume):
    assert run("fsck", "w").exit_code == 2


def test_it_holds_the_lock_while_it_looks(volume, monkeypatch):
    from stashcordfs.recovery import fsck

    real = fsck.check
    held = []

    def look(*args, **options):
        held.append(volume.holder())
        return real(*args, **options)

    monkeypatch.setattr(fsck, "check", look)
    run("fsck", "v")
    assert held == [os.getpid()]
