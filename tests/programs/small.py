"""Programs whose runs are short enough for the suite."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

from programs import Checks, Place, again, bytes_of, call, make_tree, program
from trees import compared

_IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@localhost")


def _git(*args: str | Path, cwd: Path) -> str:
    return call("git", *_IDENTITY, "-c", "safe.directory=*", *args, cwd=cwd)


@program("git", packages=("git",), version=("git", "--version"), quick=True)
def git(place: Place) -> Checks:
    first, commits = place.at / "first", place.many(20)
    first.mkdir()
    _git("init", "-q", "-b", "main", cwd=first)
    for number in range(commits):
        for file in range(20):
            path = first / f"folder-{file % 4}" / f"{file}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"line {number} of {file}\n" * (number + 1))
        (first / "binary").write_bytes(bytes_of(number, 100_000))
        _git("add", "-A", cwd=first)
        _git("commit", "-q", "-m", f"Commit {number}", cwd=first)
    assert _git("status", "--porcelain", cwd=first) == ""
    assert len(_git("log", "--oneline", cwd=first).splitlines()) == commits
    yield f"{commits} commits, a clean status after each"
    for name, how in (("linked", "--local"), ("copied", "--no-local")):
        _git("clone", "-q", how, first, place.at / name, cwd=place.at)
        assert _git("rev-parse", "HEAD", cwd=place.at / name) == _git(
            "rev-parse", "HEAD", cwd=first
        )
        assert (place.at / name / "binary").read_bytes() == (first / "binary").read_bytes()
    yield "clones by links and by copying have the same head and files"
    _git("checkout", "-q", "-b", "side", "HEAD~1", cwd=first)
    (first / "binary").write_bytes(b"side")
    _git("commit", "-q", "-a", "-m", "Side", cwd=first)
    _git("checkout", "-q", "main", cwd=first)
    _git("merge", "-q", "-s", "ours", "-m", "Merge", "side", cwd=first)
    yield "branch, checkout and merge"
    _git("gc", "-q", "--prune=now", cwd=first)
    assert list((first / ".git/objects/pack").glob("*.pack"))
    yield from git_again(place)


@again(git)
def git_again(place: Place) -> Checks:
    for name in ("first", "linked", "copied"):
        told = _git("fsck", "--full", "--strict", cwd=place.at / name)
        assert "error" not in told, told
        assert _git("status", "--porcelain", cwd=place.at / name) == ""
    yield "fsck of all three repositories, clean status"


_ROWS_AND_SUM = "select count(*), sum(n) from t"
_WRITER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for n in range(int(sys.argv[2])):
    db.execute("begin immediate")
    db.execute("insert into t values (?, randomblob(500))", (n,))
    db.execute("commit")
"""


_VERSION = (sys.executable, "-c", "import sqlite3; print(sqlite3.sqlite_version)")


@program("SQLite", packages=(), version=_VERSION, quick=True)
def sqlite(place: Place) -> Checks:
    rows = place.many(200)
    for mode in ("delete", "truncate", "wal"):
        path = place.at / f"{mode}.db"
        database = sqlite3.connect(path, isolation_level=None)
        assert database.execute(f"pragma journal_mode={mode}").fetchone() == (mode,)
        database.execute("create table t (n integer, b blob)")
        writers = [
            subprocess.Popen([sys.executable, "-c", _WRITER, path, str(rows)]) for _ in range(2)
        ]
        assert [writer.wait(300) for writer in writers] == [0, 0]
        found = database.execute(_ROWS_AND_SUM).fetchone()
        assert found == (2 * rows, rows * (rows - 1)), found
        database.execute("begin")
        database.execute("delete from t")
        database.execute("rollback")
        assert database.execute(_ROWS_AND_SUM).fetchone() == found
        if mode != "wal":
            database.execute("vacuum")
        database.close()
        yield f"{mode} journal: two processes wrote {rows} rows each, a rollback, all there"
    yield from sqlite_again(place)


@again(sqlite)
def sqlite_again(place: Place) -> Checks:
    for path in sorted(place.at.glob("*.db")):
        database = sqlite3.connect(path)
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
        count, total = database.execute(_ROWS_AND_SUM).fetchone()
        assert total == count // 2 * (count // 2 - 1)
        database.close()
    yield "integrity_check is ok, all rows are there"


def _source(place: Place) -> Path:
    source = place.work / "source"
    if not source.exists():
        source.mkdir()
        make_tree(source, files=place.many(300))
    return source


@program("tar", packages=("tar",), version=("tar", "--version"), quick=True)
def tar(place: Place) -> Checks:
    source, archive = _source(place), place.at / "archive.tar"
    options = ("--xattrs", "--xattrs-include=*", "--numeric-owner", "-p")
    call("tar", *options, "-cSf", archive, "-C", source, ".")
    call("tar", "-df", archive, "-C", source)
    (place.at / "out").mkdir()
    call("tar", *options, "-xSf", archive, "-C", place.at / "out")
    compared(source, place.at / "out")
    yield "packed and unpacked on the mount: contents, modes, owners, times, links, attributes"
    call("tar", *options, "-cSf", place.work / "back.tar", "-C", place.at / "out", ".")
    call("tar", "-df", place.work / "back.tar", "-C", source)
    yield "packed from the mount, it agrees with the source"


@again(tar)
def tar_again(place: Place) -> Checks:
    call("tar", "-df", place.at / "archive.tar", "-C", place.at / "out")
    yield "the archive agrees with what was unpacked"


@program("cp", packages=("coreutils",), version=("cp", "--version"), quick=True)
def cp(place: Place) -> Checks:
    source = _source(place)
    call("cp", "-a", source, place.at / "one")
    compared(source, place.at / "one")
    call("cp", "-a", place.at / "one", place.at / "two")
    compared(source, place.at / "two")
    call("cp", "-a", place.at / "two", place.work / "three")
    compared(source, place.work / "three")
    yield "cp -a onto the mount, within it and back: nothing is lost"
    call("cp", "--sparse=always", source / "sparse", place.at / "sparse")
    assert (place.at / "sparse").stat().st_blocks * 512 < 1 << 20
    yield "a sparse file stays sparse"


@program("rsync", packages=("rsync",), version=("rsync", "--version"), quick=True)
def rsync(place: Place) -> Checks:
    source, there = _source(place), place.at / "there"
    call("rsync", "-aHAX", "--numeric-ids", f"{source}/", f"{there}/")
    compared(source, there)
    yield "rsync -aHAX onto the mount: nothing is lost"
    assert call("rsync", "-aHAXin", "--numeric-ids", f"{source}/", f"{there}/") == ""
    yield "a second run finds nothing to do"
    call("rsync", "-aHAX", "--numeric-ids", f"{there}/", f"{place.work}/back/")
    compared(source, place.work / "back")
    yield "and back"
    changed = place.work / "changed"
    call("cp", "-a", source, changed)
    (changed / "folder 1" / "new").write_bytes(b"new")
    shutil.rmtree(changed / "folder 2")
    with (changed / "sparse").open("r+b") as file:
        file.write(b"other")
    # rsync takes times of the same second for equal
    for path in (changed / "sparse", changed / "folder 1", changed):
        os.utime(path, ns=(0, 10**18 + 123_456_789))
    call("rsync", "-aHAX", "--delete", "--inplace", "--numeric-ids", f"{changed}/", f"{there}/")
    compared(changed, there)
    yield "--delete and --inplace follow the changes of the source"


@again(rsync)
def rsync_again(place: Place) -> Checks:
    changed, there = place.work / "changed", place.at / "there"
    assert call("rsync", "-aHAXinc", "--numeric-ids", f"{changed}/", f"{there}/") == ""
    yield "a run that reads everything finds nothing to do"


@program("an editor's save", packages=(), version=(sys.executable, "--version"), quick=True)
def save(place: Place) -> Checks:
    path = place.at / "text"
    path.write_text("version 0\n")
    path.chmod(0o640)
    inode = path.stat().st_ino
    for number in range(1, place.many(50)):
        new = place.at / f".text.{number}.tmp"
        with new.open("w") as file:
            file.write(f"version {number}\n" * number)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, new)
        new.rename(path)
        folder = os.open(place.at, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        assert path.read_text() == f"version {number}\n" * number
    assert path.stat().st_ino != inode
    assert path.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in place.at.iterdir()] == ["text"]
    yield "write, fsync, rename, fsync of the folder: always the new text, nothing left behind"
