"""The main job in small: commands, sandbox, mount, bytes to Discord's double and back."""

from __future__ import annotations

import importlib
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
mounted = importlib.import_module("mounted")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(bool(mounted.fuse_missing()), reason=mounted.fuse_missing() or "fuse"),
]
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end-to-end")
    with mounted.DemoVolume.running(folder) as running:
        yield running


def bytes_of(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def test_bytes_survive_a_remount_and_the_loss_of_the_cache(volume):
    contents = {f"file-{n}": bytes_of(n, size) for n, size in enumerate([0, 1, 4096, 3 * MIB + 7])}
    folder = volume.mountpoint / "kept"
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    volume.remount()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    volume.remount(without_cache=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert volume.status()["bytes_received"] > 3 * MIB


def test_a_file_rewritten_at_random_places(volume):
    generator = random.Random(1)
    twin = bytearray(generator.randbytes(3 * MIB))
    path = volume.mountpoint / "rewritten"
    path.write_bytes(twin)
    for _ in range(3):
        with path.open("r+b", buffering=0) as file:
            for _ in range(40):
                at, data = generator.randrange(3 * MIB - 5000), generator.randbytes(5000)
                file.seek(at)
                file.write(data)
                twin[at : at + 5000] = data
        volume.sync()
    assert path.read_bytes() == twin
    volume.remount(without_cache=True)
    assert path.read_bytes() == twin


def test_links_times_and_attributes_survive(volume):
    file = volume.mountpoint / "attributes"
    file.write_bytes(b"x")
    file.chmod(0o604)
    os.setxattr(file, "user.colour", b"blue")
    (volume.mountpoint / "soft").symlink_to("attributes")
    (volume.mountpoint / "hard").hardlink_to(file)
    os.utime(file, ns=(1_111_111_111_111_111_111, 1_222_222_222_222_222_222))
    volume.remount()
    found = file.stat()
    assert (found.st_mode & 0o777, found.st_nlink) == (0o604, 2)
    assert found.st_mtime_ns == 1_222_222_222_222_222_222
    assert os.getxattr(file, "user.colour") == b"blue"
    assert (volume.mountpoint / "soft").read_bytes() == b"x"


def test_sqlite_and_git_work(volume):
    database = sqlite3.connect(volume.mountpoint / "db", isolation_level=None)
    database.execute("create table t (n integer)")
    for number in range(30):
        database.execute("insert into t values (?)", (number,))
    assert database.execute("select sum(n) from t").fetchone() == (435,)
    database.close()
    place = volume.mountpoint / "repository"
    place.mkdir()
    for number in range(20):
        (place / f"{number}.txt").write_text(f"line {number}\n" * number)
    identity = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    for args in (["init", "-q"], ["add", "."], ["commit", "-qm", "All"], ["fsck", "--full"]):
        subprocess.run(["git", *identity, *args], cwd=place, check=True, capture_output=True)


def test_small_files_share_messages_and_both_sides_count_alike(volume):
    volume.sync()
    before, counted = volume.status(), volume.server_stats()
    folder = volume.mountpoint / "small"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}").write_bytes(bytes_of(number, 1 * KIB + 50 * number))
    volume.sync()
    sent = volume.status()["messages_sent"] - before["messages_sent"]
    assert 1 <= sent <= 7
    assert volume.server_stats()["created"] - counted["created"] == sent


def test_a_part_of_a_large_file_downloads_one_chunk(volume):
    path = volume.mountpoint / "large"
    data = bytes_of(5, 24 * MIB)
    path.write_bytes(data)
    volume.remount(without_cache=True)
    before = volume.server_stats()["cdn_bytes"]
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    got = os.pread(descriptor, 4096, 12 * MIB + 4096)
    os.close(descriptor)
    assert got == data[12 * MIB + 4096 : 12 * MIB + 8192]
    assert 0 < volume.server_stats()["cdn_bytes"] - before <= MIB + 4 * KIB


def test_the_server_sees_neither_names_nor_bytes_and_no_log_the_token(volume):
    name, text = "a-telling-name", b"a telling run of plain text, uncommon enough to be sought"
    (volume.mountpoint / name).write_bytes(text)
    volume.sync()
    stored = [p for p in volume.server_folder.rglob("*") if p.is_file()]
    assert stored
    assert not [p for p in stored if name.encode() in p.read_bytes() or text in p.read_bytes()]
    log = (volume.state / mounted.NAME / "log").read_bytes()
    assert volume.token.encode() not in log


def test_no_request_was_refused_for_its_rate(volume):
    assert volume.status()["rate_limited"] == 0
    assert volume.server_stats()["rate_limited"]["provoked"] == 0
