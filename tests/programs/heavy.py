"""Programs that take longer: databases, builds, backups, players, watchers."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pwd
import random
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from programs import Checks, Place, again, bytes_of, call, make_tree, program, wait_until
from trees import compared

_MIB = 1 << 20

# ------------------------------------------------------------------ PostgreSQL

_POSTGRES = Path("/usr/lib/postgresql")
_PORT = "54329"


def _postgres(name: str) -> str:
    return str(max(_POSTGRES.iterdir(), key=lambda path: int(path.name)) / "bin" / name)


def _as_postgres(*command: str | Path) -> str:
    return call(*command, user="postgres", cwd=Path("/"))


@contextlib.contextmanager
def _server(place: Place) -> Iterator[None]:
    """Running inside; ended in order after it."""
    options = f"-p {_PORT} -k {place.work} -c listen_addresses=''"
    data, log = place.at / "data", place.work / "log"
    ask = (_postgres("pg_ctl"), "-D", str(data), "-w", "-t", "300")
    _as_postgres(*ask, "-l", str(log), "-o", options, "start")
    try:
        yield
    finally:
        if (data / "postmaster.pid").exists():
            _as_postgres(*ask, "-m", "fast", "stop")


def _query(place: Place, text: str) -> str:
    return _as_postgres(
        "psql", "-h", str(place.work), "-p", _PORT, "-XAtc", text, "postgres"
    ).strip()


def _bench(place: Place, *options: str) -> str:
    where = ("-h", str(place.work), "-p", _PORT)
    return _as_postgres(_postgres("pgbench"), *where, *options, "postgres")


_BALANCES = """select (select sum(abalance) from pgbench_accounts) =
 (select sum(tbalance) from pgbench_tellers) and (select sum(tbalance) from pgbench_tellers) =
 (select sum(bbalance) from pgbench_branches) and (select sum(bbalance) from pgbench_branches) =
 (select coalesce(sum(delta), 0) from pgbench_history)"""


def _kill_postmaster(place: Place) -> None:
    pid = int((place.at / "data/postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)  # its processes notice, and end
    wait_until(lambda: not _runs_in(place.at / "data"), "the end of PostgreSQL's processes")
    for left in (place.at / "data/postmaster.pid", place.work / f".s.PGSQL.{_PORT}.lock"):
        left.unlink(missing_ok=True)  # the number may be a zombie's where nobody reaps


def _runs_in(folder: Path) -> bool:
    for process in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if process.readlink() == folder:
                return True
    return False


@program("PostgreSQL", packages=("postgresql",), version=("psql", "--version"))
def postgresql(place: Place) -> Checks:
    owner = pwd.getpwnam("postgres")
    for folder in (place.at, place.work):
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    _as_postgres(
        _postgres("initdb"), "-D", str(place.at / "data"), "-k", "--no-instructions", "-A", "trust"
    )
    yield "initdb, with checksums"
    seconds = place.many(30)
    with _server(place):
        _bench(place, "-i", "-q", "-s", str(place.many(5)))
        told = _bench(place, "-c", "4", "-j", "2", "-T", str(seconds))
        assert "number of failed transactions: 0" in told, told
        assert _query(place, _BALANCES) == "t"
        yield f"pgbench for {seconds} s with 4 clients, no failed transaction, all balances agree"
        told_before = int(_query(place, "select count(*) from pgbench_history"))
        where = ("-h", str(place.work), "-p", _PORT, "-n", "-c", "4", "-T", "600", "postgres")
        load = subprocess.Popen(
            [_postgres("pgbench"), *where], user="postgres", cwd="/",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(min(5, seconds))
        _kill_postmaster(place)
        load.wait(120)
    with _server(place):
        assert int(_query(place, "select count(*) from pgbench_history")) >= told_before
        assert _query(place, _BALANCES) == "t"
        _as_postgres(
            _postgres("pg_amcheck"), "-h", str(place.work), "-p", _PORT,
            "--install-missing", "--heapallindexed", "postgres",
        )  # fmt: skip
    assert "redo done" in (place.work / "log").read_text()
    yield "killed under load: it recovers, nothing told is lost, all balances agree, pg_amcheck"
    _as_postgres(_postgres("pg_checksums"), "--check", "-D", str(place.at / "data"))
    yield "pg_checksums finds nothing"


@again(postgresql)
def postgresql_again(place: Place) -> Checks:
    _as_postgres(_postgres("pg_checksums"), "--check", "-D", str(place.at / "data"))
    with _server(place):
        assert _query(place, _BALANCES) == "t"
    yield "pg_checksums finds nothing, it starts, all balances agree"


# ------------------------------------------------------------------ builds

_MAKEFILE = """
objects := $(patsubst %.c,%.o,$(wildcard part*.c))
program: main.o libparts.a
	$(CC) -o $@ main.o -L. -lparts
libparts.a: $(objects)
	$(AR) rcs $@ $^
%.o: %.c parts.h
	$(CC) -O1 -Wall -Werror -c -o $@ $<
"""


@program("a C project", packages=("gcc", "make", "libc6-dev"), version=("gcc", "--version"))
def c_project(place: Place) -> Checks:
    at, parts = place.at, place.many(40)
    for number in range(parts):
        text = f'#include "parts.h"\nint part{number}(void) {{ return {number}; }}\n'
        (at / f"part{number}.c").write_text(text)
    (at / "parts.h").write_text("".join(f"int part{n}(void);\n" for n in range(parts)))
    terms = " + ".join(f"part{n}()" for n in range(parts))
    (at / "main.c").write_text(
        f'#include <stdio.h>\n#include "parts.h"\nint main(void) {{ printf("%d\\n", {terms}); }}\n'
    )
    (at / "Makefile").write_text(_MAKEFILE)
    call("make", "-j2", "program", cwd=at)
    assert call(at / "program") == f"{sum(range(parts))}\n"
    yield f"make -j2 of {parts} files and a library; the program, run from the mount, is right"
    assert "up to date" in call("make", "program", cwd=at)
    yield "a second make has nothing to do"
    (at / "part1.c").write_text('#include "parts.h"\nint part1(void) { return 1001; }\n')
    told = call("make", "program", cwd=at)
    assert told.count(" -c ") == 1, told
    assert call(at / "program") == f"{sum(range(parts)) + 1000}\n"
    yield "after a change make compiles that file alone"


@again(c_project)
def c_project_again(place: Place) -> Checks:
    assert "up to date" in call("make", "program", cwd=place.at)
    assert call(place.at / "program") == f"{sum(range(place.many(40))) + 1000}\n"
    yield "make has nothing to do, and the program runs"


_METADATA = {
    "stashwheel-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: stashwheel\nVersion: 1.0\n",
    "stashwheel-1.0.dist-info/WHEEL": (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ),
}


@program("pip", packages=("python3-venv",), version=(sys.executable, "-m", "pip", "--version"))
def pip(place: Place) -> Checks:
    modules = {f"stashwheel/m{n}.py": f"value = {n}\n" for n in range(place.many(200))}
    modules["stashwheel/__init__.py"] = ""
    files = {**modules, **_METADATA}
    record = "".join(f"{name},,\n" for name in [*files, "stashwheel-1.0.dist-info/RECORD"])
    wheel = place.at / "stashwheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, "stashwheel-1.0.dist-info/RECORD": record}.items():
            archive.writestr(name, text)
    call(sys.executable, "-m", "venv", place.at / "venv")
    python = place.at / "venv/bin/python"
    call(python, "-m", "pip", "install", "--no-index", "--no-cache-dir", wheel)
    yield "venv on the mount, a wheel installed into it"
    yield from pip_again(place)


@again(pip)
def pip_again(place: Place) -> Checks:
    python, last = place.at / "venv/bin/python", place.many(200) - 1
    said = call(python, "-c", f"import stashwheel.m{last} as m; print(m.__file__, m.value)")
    assert said == f"{said.split()[0]} {last}\n"
    assert said.startswith(str(place.at))
    call(python, "-m", "pip", "check")
    yield "its modules are imported from the mount, pip check finds nothing"


@program("dpkg-deb", packages=("dpkg",), version=("dpkg-deb", "--version"))
def dpkg_deb(place: Place) -> Checks:
    tree, package = place.at / "tree", place.at / "package.deb"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: parts\nVersion: 1\nArchitecture: all\nMaintainer: a <a@localhost>\n"
        "Description: parts\n"
    )
    make_tree(tree, files=place.many(100))
    (tree / "fifo").unlink()
    for path in tree.rglob("*"):  # a package carries neither
        if path.is_file() and not path.is_symlink():
            for name in os.listxattr(path):
                os.removexattr(path, name)
    call("dpkg-deb", "--build", "--root-owner-group", tree, package)
    yield "built on the mount"
    yield from dpkg_deb_again(place)


@again(dpkg_deb)
def dpkg_deb_again(place: Place) -> Checks:
    out = place.work / "out"
    call("rm", "-rf", out)
    call("dpkg-deb", "-x", place.at / "package.deb", out)
    for path in sorted(out.rglob("*")):
        if path.is_file() and not path.is_symlink():
            assert path.read_bytes() == (place.at / "tree" / path.relative_to(out)).read_bytes()
    assert "parts" in call("dpkg-deb", "--info", place.at / "package.deb")
    yield "unpacked, the package has every file"


# ------------------------------------------------------------------ backups

_SECRET = {"RESTIC_PASSWORD": "made up", "XDG_CACHE_HOME": "/nonexistent"}


def _restic(place: Place, *args: str | Path) -> str:
    return call("restic", "--no-cache", "-r", place.at / "repository", *args, environment=_SECRET)


@program("restic", packages=("restic",), version=("restic", "version"))
def restic(place: Place) -> Checks:
    source = place.work / "source"
    source.mkdir()
    make_tree(source, files=place.many(300))
    (source / "large").write_bytes(bytes_of("large", place.many(64) * _MIB))
    _restic(place, "init")
    for _ in range(3):
        _restic(place, "backup", source)
        with (source / "large").open("r+b") as file:
            file.seek(1000)
            file.write(os.urandom(3 * _MIB))
    yield "a repository on the mount, three backups into it"
    _restic(place, "backup", source)
    _restic(place, "forget", "--keep-last", "2", "--prune")
    yield "forget and prune"
    yield from restic_again(place)


@again(restic)
def restic_again(place: Place) -> Checks:
    assert "no errors were found" in _restic(place, "check", "--read-data")
    call("rm", "-rf", place.work / "restored")
    _restic(place, "restore", "latest", "--target", place.work / "restored")
    restored = place.work / "restored" / (place.work / "source").relative_to("/")
    compared(place.work / "source", restored)
    yield "check --read-data finds no error, and what is restored is the source"


# ------------------------------------------------------------------ players

_FRAME = 64 << 10


def _film(place: Place) -> tuple[Path, int]:
    return place.at / "film", place.many(128)  # MiB


@program("a video player", packages=(), version=(sys.executable, "--version"))
def player(place: Place) -> Checks:
    path, size = _film(place)
    with path.open("wb") as file:
        for number in range(size):
            file.write(bytes_of(f"film {number}", _MIB))
    yield from player_again(place)


@again(player)
def player_again(place: Place) -> Checks:
    """The index at the end first, then play, with seeks to and fro; by reads and by a mapping."""
    path, size = _film(place)
    chance = random.Random(1)
    fd = os.open(path, os.O_RDONLY)
    try:
        _watch(lambda at: os.pread(fd, _FRAME, at), size, chance)
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as film:
            _watch(lambda at: film[at : at + _FRAME], size, chance)
    finally:
        os.close(fd)
    yield f"{size} MiB: the end first, 12 seeks with two seconds of playing after each; mapped too"


def _watch(read, size: int, chance: random.Random) -> None:  # type: ignore[no-untyped-def]
    where = [size * _MIB - _FRAME, 0, *(chance.randrange(size * _MIB) for _ in range(12))]
    for begin in where:
        for at in range(begin // _FRAME * _FRAME, min(begin + 4 * _MIB, size * _MIB), _FRAME):
            number, start = divmod(at, _MIB)
            assert read(at) == bytes_of(f"film {number}", _MIB)[start : start + _FRAME], at


# ------------------------------------------------------------------ editors and watchers


@program("vim", packages=("vim",), version=("vim", "--version"))
def vim(place: Place) -> Checks:
    for copy in ("yes", "no", "auto"):
        path = place.at / f"text-{copy}"
        path.write_text("one\n" * 1000)
        path.chmod(0o640)
        (place.at / f"link-{copy}").hardlink_to(path)
        for number in range(place.many(10)):
            call(
                "vim", "-u", "NONE", "-i", "NONE", "-n", "-es", path,
                "-c", f"set backupskip= backup backupcopy={copy} fsync",
                "-c", f"%s/^.*$/line {number}/", "-c", "wq",
                environment={"TERM": "dumb"},
            )  # fmt: skip
            assert path.read_text() == f"line {number}\n" * 1000
        assert path.stat().st_mode & 0o777 == 0o640
        assert path.with_name(path.name + "~").exists()
        kept = path.stat().st_nlink == 2
        assert kept == (copy != "no"), copy
        yield f"saved with backupcopy={copy}: text, mode and backup are right"


_libc = ctypes.CDLL(None, use_errno=True)
_EVENT = struct.Struct("iIII")
_MASKS = {0x2: "modify", 0x4: "attrib", 0x8: "close_write", 0x40: "moved_from", 0x80: "moved_to",
          0x100: "create", 0x200: "delete"}  # fmt: skip


@contextlib.contextmanager
def _watching(folder: Path) -> Iterator[list[tuple[str, str]]]:
    """Events inside, by name and kind, complete afterwards."""
    fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert _libc.inotify_add_watch(fd, os.fsencode(folder), sum(_MASKS)) > 0
    events: list[tuple[str, str]] = []
    try:
        yield events
        data = os.read(fd, 1 << 16)
        while data:
            _, mask, _, length = _EVENT.unpack_from(data)
            name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode()
            events.append((_MASKS[mask & 0xFFF], name))
            data = data[_EVENT.size + length :]
    finally:
        os.close(fd)


@program("inotify", packages=("inotify-tools",), version=("inotifywait", "--help"))
def inotify(place: Place) -> Checks:
    with _watching(place.at) as events:
        (place.at / "new").write_bytes(b"x")
        (place.at / "new").chmod(0o600)
        (place.at / "new").rename(place.at / "renamed")
        (place.at / "folder").mkdir()
        (place.at / "renamed").unlink()
    expected = [("create", "new"), ("modify", "new"), ("close_write", "new"), ("attrib", "new"),
                ("moved_from", "new"), ("moved_to", "renamed"), ("create", "folder"),
                ("delete", "renamed")]  # fmt: skip
    assert events == expected, events
    yield "create, modify, close_write, attrib, move, mkdir and delete are told, in order"
    log = place.work / "events"
    with (
        log.open("w") as told,
        subprocess.Popen(
            ["inotifywait", "-m", "-r", "-q", "--format", "%e %f", place.at], stdout=told
        ) as watcher,
    ):
        try:
            wait_until(lambda: _sees(place, log), "the first event of inotifywait -r")
            (place.at / "folder/below").write_bytes(b"x")
            wait_until(lambda: "CLOSE_WRITE,CLOSE below" in log.read_text(), "an event below")
        finally:
            watcher.terminate()
    yield "inotifywait -r is told of what happens in a folder below"


def _sees(place: Place, log: Path) -> bool:
    (place.at / "probe").touch()
    return "probe" in log.read_text()
