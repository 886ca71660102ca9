"""The mount below other file systems and servers."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from programs import Checks, Place, again, bytes_of, call, make_tree, program, wait_until
from trees import looked

_SMB_PORT = "44545"


@contextlib.contextmanager
def _overlay(place: Place, *options: str) -> Iterator[Path]:
    merged = place.work / "merged"
    merged.mkdir(exist_ok=True)
    call("mount", "-t", "overlay", "overlay", "-o", ",".join(options), merged)
    try:
        yield merged
    finally:
        call("umount", merged)


@program("overlayfs", packages=("mount",), version=("uname", "-r"))
def overlayfs(place: Place) -> Checks:
    lower = place.at / "lower"
    lower.mkdir()
    make_tree(lower, files=place.many(100))
    before = looked(lower)
    layers = [place.work / name for name in ("upper", "scratch")]
    for layer in layers:
        layer.mkdir()
    options = (f"lowerdir={lower}", f"upperdir={layers[0]}", f"workdir={layers[1]}")
    with _overlay(place, *options) as merged:
        for path in sorted(lower.rglob("*")):
            if path.is_file() and not path.is_symlink():
                assert (merged / path.relative_to(lower)).read_bytes() == path.read_bytes()
        (merged / "sparse").write_bytes(b"changed above")
        call("rm", "-rf", merged / "folder 1")
        (merged / "folder 2/new").write_bytes(b"new")
        assert (merged / "sparse").read_bytes() == b"changed above"
        assert not (merged / "folder 1").exists()
    assert looked(lower) == before
    yield "as lower layer: all is read through it, changes go above, nothing below has changed"
    with _overlay(place, *options) as merged:
        assert (merged / "sparse").read_bytes() == b"changed above"
        assert not (merged / "folder 1").exists()
    yield "mounted again, the changes are there"
    below = place.work / "below"
    make_tree(below, files=place.many(100))
    before = looked(below)
    for layer in ("upper", "scratch"):
        (place.at / layer).mkdir()
    with _overlay(place, *_above(place)) as merged:
        (merged / "sparse").write_bytes(b"changed above")
        call("rm", "-rf", merged / "folder 1")
        (merged / "folder 1").mkdir()  # opaque: nothing of what is below
        (merged / "folder 2/new").write_bytes(b"new")
        call("mv", merged / "folder 2", merged / "moved")
        _see_the_changes(merged)
    assert looked(below) == before
    yield "as upper layer: changes, whiteouts and opaque folders are kept in it"


def _above(place: Place) -> tuple[str, ...]:
    """A plain folder below, the mount above."""
    layers = (f"upperdir={place.at / 'upper'}", f"workdir={place.at / 'scratch'}")
    return (f"lowerdir={place.work / 'below'}", *layers)


def _see_the_changes(merged: Path) -> None:
    assert (merged / "sparse").read_bytes() == b"changed above"
    assert list((merged / "folder 1").iterdir()) == []
    assert not (merged / "folder 2").exists()
    assert (merged / "moved/new").read_bytes() == b"new"


@again(overlayfs)
def overlayfs_again(place: Place) -> Checks:
    options = (f"lowerdir={place.at / 'lower'}", f"upperdir={place.work / 'upper'}")
    with _overlay(place, *options, f"workdir={place.work / 'scratch'}") as merged:
        assert (merged / "sparse").read_bytes() == b"changed above"
        assert (merged / "folder 2/new").read_bytes() == b"new"
        for path in sorted((place.at / "lower/folder 3").rglob("*")):
            if path.is_file():
                there = merged / path.relative_to(place.at / "lower")
                assert there.read_bytes() == path.read_bytes()
    with _overlay(place, *_above(place)) as merged:
        _see_the_changes(merged)
    yield "read through the layers, below and above"


_SMB_CONF = """
[global]
 workgroup = A
 server role = standalone server
 map to guest = Bad User
 guest account = root
 pid directory = {work}
 lock directory = {work}
 state directory = {work}
 cache directory = {work}
 private dir = {work}
 ncalrpc dir = {work}/ncalrpc
 log file = {work}/log
 smb ports = {port}
 bind interfaces only = yes
 interfaces = lo
 disable spoolss = yes
 load printers = no
[share]
 path = {at}
 guest ok = yes
 read only = no
 create mask = 0644
"""


@program("Samba", packages=("samba", "smbclient"), version=("smbd", "--version"))
def samba(place: Place) -> Checks:
    share = place.at / "share"
    share.mkdir()
    configuration = place.work / "smb.conf"
    configuration.write_text(_SMB_CONF.format(work=place.work, at=share, port=_SMB_PORT))
    source = place.work / "source"
    source.mkdir()
    make_tree(source, files=place.many(100))
    call("find", source, "(", "-type", "l", "-o", "-type", "p", ")", "-delete")
    (source / "large").write_bytes(bytes_of("samba", place.many(32) << 20))
    command = ["smbd", "--foreground", "--no-process-group", "-s", str(configuration)]
    # in a process group of its own: told to end, it ends all of its group
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
    ) as server:
        try:
            wait_until(lambda: _answers(place), "smbd listens")
            _smb(place, f"lcd {source}; recurse; prompt; mput *")
            _same_files(source, share)
            yield "files put through the share are on the mount"
            (place.work / "back").mkdir()
            _smb(place, f"lcd {place.work / 'back'}; recurse; prompt; mget *")
            _same_files(source, place.work / "back")
            yield "and come back through it"
            _smb(place, "rename large larger; del sparse; mkdir made; rmdir made")
            assert (share / "larger").exists()
            assert not (share / "sparse").exists()
            yield "renamed and deleted through it"
        finally:
            server.terminate()
            server.wait(60)


def _smb(place: Place, commands: str) -> str:
    ask = ("smbclient", "-N", "-p", _SMB_PORT, "-s", place.work / "smb.conf")
    return call(*ask, "//127.0.0.1/share", "-c", commands)


def _answers(place: Place) -> bool:
    time.sleep(0.2)
    with contextlib.suppress(AssertionError):
        return "blocks" in _smb(place, "ls")
    return False


def _same_files(source: Path, copy: Path) -> None:
    names = [p.relative_to(source) for p in source.rglob("*") if p.is_file()]
    assert names
    for name in names:
        assert (copy / name).read_bytes() == (source / name).read_bytes(), name
