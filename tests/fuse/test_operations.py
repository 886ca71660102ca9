"""The handlers one by one, without a kernel: what goes in, what comes out, what a fault does."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import stat
from types import SimpleNamespace

import pyfuse3
import pytest
import trio

from stashcordfs.errors import (
    CryptoError,
    DiscordUnavailable,
    FsError,
    LocalDiskError,
    ObjectMissing,
)
from stashcordfs.fuse.operations import StashcordOperations
from stashcordfs.ops.metrics import Metrics

CTX = SimpleNamespace(uid=7, gid=8, pid=9, umask=0o022)
ATTRIBUTES = SimpleNamespace(
    st_mode=0o600, st_uid=1, st_gid=2, st_size=3, st_atime_ns=4, st_mtime_ns=5, st_ctime_ns=6
)
FIELDS = ("atime", "mtime", "ctime", "mode", "uid", "gid", "size")
ALL_FIELDS = SimpleNamespace(**{f"update_{name}": True for name in FIELDS})
NO_FIELDS = SimpleNamespace(**{f"update_{name}": False for name in FIELDS})

CALLS = {
    "lookup": (1, b"n", CTX),
    "mknod": (1, b"n", stat.S_IFREG | 0o666, 0, CTX),
    "mkdir": (1, b"n", 0o777, CTX),
    "symlink": (1, b"n", b"t", CTX),
    "readlink": (2, CTX),
    "link": (2, 1, b"n", CTX),
    "unlink": (1, b"n", CTX),
    "rmdir": (1, b"n", CTX),
    "rename": (1, b"n", 1, b"m", 0, CTX),
    "getattr": (1, CTX),
    "setattr": (1, ATTRIBUTES, ALL_FIELDS, None, CTX),
    "access": (1, 4, CTX),
    "create": (1, b"n", 0o666, os.O_WRONLY, CTX),
    "open": (2, 0, CTX),
    "read": (3, 0, 10),
    "write": (3, 0, b"x"),
    "fsync": (3, False),
    "release": (3,),
    "opendir": (1, CTX),
    "readdir": (3, 0, None),
    "releasedir": (3,),
    "fsyncdir": (3, False),
    "getxattr": (1, b"user.a", CTX),
    "setxattr": (1, b"user.a", b"v", CTX),
    "listxattr": (1, CTX),
    "removexattr": (1, b"user.a", CTX),
    "statfs": (CTX,),
}
NEVER_FAIL = {"flush", "forget"}


class Raising:
    """A file system of which every method raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def watch_reads(self, watched: object) -> None:
        """Asked for when the operations are made."""

    def __getattr__(self, name: str):
        async def fail(*args: object, **kwargs: object) -> None:
            raise self.error

        return fail


def operations(filesystem: object, *, metrics: Metrics | None = None):
    reports: list[str] = []
    made = StashcordOperations(
        filesystem, attr_timeout_s=60, report=reports.append, metrics=metrics or Metrics()
    )
    return made, reports


@pytest.fixture
def memory(load_support):
    return load_support("memory_fs").MemoryFileSystem()


def test_every_handler_of_ours_is_in_these_tests():
    ours = {
        name
        for name, member in vars(StashcordOperations).items()
        if inspect.iscoroutinefunction(member) or hasattr(member, "__wrapped__")
    }
    assert ours == set(CALLS) | NEVER_FAIL


@pytest.mark.parametrize("name", CALLS)
async def test_a_bug_in_any_handler_is_eio_a_traceback_and_a_metric(name, caplog):
    metrics = Metrics()
    handlers, reports = operations(Raising(KeyError("bug")), metrics=metrics)
    with caplog.at_level(logging.ERROR), pytest.raises(pyfuse3.FUSEError) as refused:
        await getattr(handlers, name)(*CALLS[name])
    assert refused.value.errno == errno.EIO
    assert caplog.records[0].exc_info
    assert f'name="{name}"'.encode() in metrics.render()
    assert "KeyError" in reports[0]


@pytest.mark.parametrize(
    ("error", "expected", "told"),
    [
        (FsError(errno.ENOTEMPTY), errno.ENOTEMPTY, False),
        (LocalDiskError(errno.ENOSPC), errno.ENOSPC, True),
        (ObjectMissing("gone"), errno.EIO, True),
        (DiscordUnavailable("down"), errno.EIO, True),
        (CryptoError("tampered"), errno.EIO, True),
        (pyfuse3.FUSEError(errno.EXDEV), errno.EXDEV, False),
    ],
)
async def test_errors_become_errnos_and_faults_are_told(error, expected, told):
    handlers, reports = operations(Raising(error))
    with pytest.raises(pyfuse3.FUSEError) as refused:
        await handlers.read(1, 0, 1)
    assert (refused.value.errno, bool(reports)) == (expected, told)


async def test_cancellation_passes_the_guard():
    class Stuck:
        def watch_reads(self, watched: object) -> None:
            pass

        async def read(self, *args: object) -> None:
            await trio.sleep_forever()

    handlers, _ = operations(Stuck())
    with trio.CancelScope() as scope:
        scope.cancel()
        await handlers.read(1, 0, 1)
    assert scope.cancelled_caught


async def test_flush_is_enosys_so_that_the_kernel_stops_asking(memory):
    handlers, _ = operations(memory)
    with pytest.raises(pyfuse3.FUSEError) as refused:
        await handlers.flush(1)
    assert refused.value.errno == errno.ENOSYS
    await handlers.forget([(1, 1)])


async def test_a_missing_name_is_an_entry_that_the_kernel_keeps(memory):
    handlers, _ = operations(memory)
    missing = await handlers.lookup(1, b"none", CTX)
    assert (missing.st_ino, missing.entry_timeout) == (0, 60)


async def test_umask_applies_to_what_is_made(memory):
    handlers, _ = operations(memory)
    made = [
        (await handlers.create(1, b"a", 0o666, os.O_WRONLY, CTX))[1],
        await handlers.mkdir(1, b"b", 0o777, CTX),
        await handlers.mknod(1, b"c", stat.S_IFIFO | 0o666, 0, CTX),
    ]
    assert [entry.st_mode for entry in made] == [
        stat.S_IFREG | 0o644,
        stat.S_IFDIR | 0o755,
        stat.S_IFIFO | 0o644,
    ]
    assert {(entry.st_uid, entry.st_gid) for entry in made} == {(7, 8)}


async def test_setattr_passes_the_fields_that_the_kernel_marked(memory):
    handlers, _ = operations(memory)
    _, made = await handlers.create(1, b"a", 0o644, os.O_WRONLY, CTX)
    await handlers.setattr(made.st_ino, ATTRIBUTES, ALL_FIELDS, None, CTX)
    changed = await handlers.setattr(made.st_ino, SimpleNamespace(), NO_FIELDS, None, CTX)
    assert stat.S_IMODE(changed.st_mode) == 0o600
    assert (changed.st_uid, changed.st_gid, changed.st_size) == (1, 2, 3)
    assert (changed.st_atime_ns, changed.st_mtime_ns, changed.st_ctime_ns) == (4, 5, 6)


async def test_attributes_of_what_is_written_are_asked_for_again_soon(memory):
    handlers, _ = operations(memory)
    info, made = await handlers.create(1, b"a", 0o644, os.O_WRONLY, CTX)
    assert (await handlers.getattr(made.st_ino, CTX)).attr_timeout == 1
    assert (await handlers.lookup(1, b"a", CTX)).entry_timeout == 60
    await handlers.release(info.fh)
    assert (await handlers.getattr(made.st_ino, CTX)).attr_timeout == 60


def marked(*names):
    return SimpleNamespace(**{**vars(NO_FIELDS), **{f"update_{name}": True for name in names}})


async def test_times_written_back_after_a_file_is_gone_are_no_error(memory, monkeypatch):
    # The kernel would tell of it at the next syncfs(2) or `sync -f`.
    async def gone(ino, **changes):
        raise FsError(errno.ENOENT)

    monkeypatch.setattr(memory, "setattr", gone)
    handlers, _ = operations(memory)
    told = await handlers.setattr(9, ATTRIBUTES, marked("mtime", "ctime"), None, CTX)
    assert (told.st_ino, told.st_nlink) == (9, 0)
    for asked in (marked("mtime", "atime"), marked("mtime", "size"), marked("mode")):
        with pytest.raises(pyfuse3.FUSEError) as refused:
            await handlers.setattr(9, ATTRIBUTES, asked, None, CTX)
        assert refused.value.errno == errno.ENOENT


async def test_rename_refuses_flags_that_it_does_not_know(memory):
    handlers, _ = operations(memory)
    with pytest.raises(pyfuse3.FUSEError) as refused:
        await handlers.rename(1, b"a", 1, b"b", 8, CTX)
    assert refused.value.errno == errno.EINVAL


async def test_readdir_goes_on_over_pages_and_stops_when_the_buffer_is_full(memory, monkeypatch):
    handlers, _ = operations(memory)
    for number in range(600):
        await memory.mknod(1, b"%d" % number, stat.S_IFREG | 0o644, 0, 0, 0)
    told: list[bytes] = []

    def reply(room: int):
        def keep(token: object, name: bytes, attributes: object, next_id: int) -> bool:
            if len(told) == room:
                return False
            told.append(name)
            return True

        return keep

    fh = await handlers.opendir(1, CTX)
    monkeypatch.setattr(pyfuse3, "readdir_reply", reply(10_000))
    await handlers.readdir(fh, 0, None)
    assert told == [b".", b"..", *(b"%d" % number for number in range(600))]
    told.clear()
    monkeypatch.setattr(pyfuse3, "readdir_reply", reply(300))
    await handlers.readdir(fh, 0, None)
    assert len(told) == 300


async def test_statfs_tells_what_the_vfs_tells(memory):
    handlers, _ = operations(memory)
    told = await handlers.statfs(CTX)
    assert (told.f_frsize, told.f_blocks, told.f_bfree, told.f_bavail) == (4096, 1000, 900, 800)
    assert (told.f_files, told.f_ffree, told.f_namemax) == (70, 60, 255)
