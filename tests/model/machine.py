"""The state machine: hypothesis chooses operations for both sides of a game."""

from __future__ import annotations

import os
import stat
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from twins import BLOCK_BYTES, Game, Rig

_PAGE = 4096
_MOST_BYTES = 6 * BLOCK_BYTES
_SYNC_AFTER, _PRESS_AFTER, _REMOUNT_AFTER = 15, 40, 100  # steps

paths = st.sampled_from(
    [b"a", b"b", b"c", b"d", b"e", b"d/a", b"d/b", b"d/e", b"d/e/a", b"e/a", b"e/d", b"a/b", b"",
     b"\xff\x80 \n", b"n" * 255, b"n" * 256, b"d/../e/b"]
)  # fmt: skip
slots = st.integers(0, 4)
seeds = st.integers(0, 5)
modes = st.sampled_from([0o644, 0o600, 0o755, 0o4755, 0o2775, 0o1777, 0o000, 0o7777])
edges = st.sampled_from(
    [n * BLOCK_BYTES + d for n in range(5) for d in (-_PAGE, -1, 0, 1, _PAGE) if n or d >= 0]
)
offsets = st.one_of(st.integers(0, 3 * _PAGE), edges, st.integers(0, _MOST_BYTES))
lengths = st.one_of(
    st.integers(0, 64), st.integers(1, 3 * _PAGE), st.sampled_from([_PAGE, BLOCK_BYTES]),
    st.integers(1, 2 * BLOCK_BYTES),
)  # fmt: skip
pages = st.integers(0, 5 * BLOCK_BYTES // _PAGE)
accesses = st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR])
_EXTRAS = [0, 0, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_APPEND,
           os.O_CREAT | os.O_TRUNC, os.O_CREAT | os.O_APPEND, os.O_DSYNC, os.O_SYNC | os.O_APPEND,
           os.O_NOFOLLOW, os.O_DIRECTORY]  # fmt: skip
times = st.one_of(
    st.sampled_from(["now", "omit", 0, 1, 999_999_999, 1_234_567_890_123_456_789]),
    st.integers(-(10**18), 4 * 10**18),
)
xattr_names = st.sampled_from(["user.a", "user.bb", "user." + "c" * 100, "user." + "d" * 251])
xattr_values = st.binary(max_size=40)


class Twins(RuleBasedStateMachine):
    rig: ClassVar[Rig]

    def __init__(self) -> None:
        super().__init__()
        self.game: Game = self.rig.game()

    def teardown(self) -> None:
        self.game.close_all()

    def has(self, *wanted: int) -> bool:
        return all(slot in self.game.mount.handles for slot in wanted)

    def _on(self, name: str, slot: int, *args: Any) -> None:
        if slot in self.game.mount.handles:
            self.game.do(name, slot, *args)

    # ------------------------------------------------------------------ handles

    @rule(slot=slots, path=paths, access=accesses, extra=st.sampled_from(_EXTRAS))
    def open(self, slot: int, path: bytes, access: int, extra: int) -> None:
        self.game.do("open", slot, path, access | extra | os.O_NONBLOCK)

    @rule(slot=slots, path=st.sampled_from([b"a", b"b", b"d/a"]))
    def open_new(self, slot: int, path: bytes) -> None:
        self.game.do("open", slot, path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)

    @rule(slot=slots)
    def close(self, slot: int) -> None:
        self._on("close", slot)

    @rule(slot=slots, offset=offsets, length=lengths)
    def pread(self, slot: int, offset: int, length: int) -> None:
        self._on("pread", slot, offset, length)

    @rule(slot=slots, offset=offsets, length=lengths, seed=seeds)
    def pwrite(self, slot: int, offset: int, length: int, seed: int) -> None:
        self._on("pwrite", slot, offset, length, seed)

    @rule(slot=slots, block=st.integers(0, 4), seed=seeds)
    def pwrite_block(self, slot: int, block: int, seed: int) -> None:
        self._on("pwrite", slot, block * BLOCK_BYTES, BLOCK_BYTES, seed)

    @rule(slot=slots, length=lengths)
    def read(self, slot: int, length: int) -> None:
        self._on("read", slot, length)

    @rule(slot=slots, length=lengths, seed=seeds)
    def write(self, slot: int, length: int, seed: int) -> None:
        self._on("write", slot, length, seed)

    @rule(slot=slots, offset=st.one_of(offsets, st.integers(-9, 9)), whence=st.integers(0, 2))
    def seek(self, slot: int, offset: int, whence: int) -> None:
        # a position far beyond the end would let the next write make a file that takes long to read
        self._on("seek", slot, min(offset, _PAGE) if whence else offset, whence)

    @rule(slot=slots, size=offsets)
    def ftruncate(self, slot: int, size: int) -> None:
        self._on("ftruncate", slot, size)

    @rule(slot=slots, data_only=st.booleans())
    def fsync(self, slot: int, data_only: bool) -> None:
        self._on("fdatasync" if data_only else "fsync", slot)

    @rule(slot=slots, mode=modes)
    def fchmod(self, slot: int, mode: int) -> None:
        self._on("fchmod", slot, mode)

    @rule(
        slot=slots,
        page=pages,
        at=st.integers(0, 2 * _PAGE),
        length=st.integers(1, 3 * _PAGE),
        seed=seeds,
        how=st.sampled_from(["flush", "leave"]),
    )
    def mapped_write(self, slot: int, page: int, at: int, length: int, seed: int, how: str) -> None:
        self._on("mapped_write", slot, page, at, length, seed, how)

    @rule(slot=slots, page=pages, at=st.integers(0, _PAGE), length=st.integers(1, 3 * _PAGE))
    def mapped_read(self, slot: int, page: int, at: int, length: int) -> None:
        self._on("mapped_read", slot, page, at, length)

    @rule(slot=slots, offset=offsets, to=slots, at=offsets, length=lengths)
    def copy_range(self, slot: int, offset: int, to: int, at: int, length: int) -> None:
        if self.has(slot, to):
            self.game.do("copy_range", slot, offset, to, at, length)

    @rule(path=paths, page=pages, count=st.integers(1, 20), seed=seeds)
    def direct_write(self, path: bytes, page: int, count: int, seed: int) -> None:
        self.game.do("direct_write", path, page, count, seed)

    @rule(path=paths, page=pages, count=st.integers(1, 20))
    def direct_read(self, path: bytes, page: int, count: int) -> None:
        self.game.do("direct_read", path, page, count)

    # ------------------------------------------------------------------ names

    @rule(path=paths, mode=modes)
    def mkdir(self, path: bytes, mode: int) -> None:
        self.game.do("mkdir", path, mode)

    @rule(path=paths)
    def rmdir(self, path: bytes) -> None:
        if path:  # the game's own folder stays
            self.game.do("rmdir", path)

    @rule(path=paths)
    def unlink(self, path: bytes) -> None:
        self.game.do("unlink", path)

    @rule(old=paths, new=paths, flags=st.sampled_from([0, 0, 0, 1, 2, 2, 3]))
    def rename(self, old: bytes, new: bytes, flags: int) -> None:
        if old and new:
            self.game.do("rename", old, new, flags)

    @rule(old=paths, new=paths)
    def link(self, old: bytes, new: bytes) -> None:
        self.game.do("link", old, new)

    @rule(to=st.sampled_from([b"a", b"d", b"../b", b"none", b"d/e", b"t" * 300]), path=paths)
    def symlink(self, to: bytes, path: bytes) -> None:
        self.game.do("symlink", to, path)

    @rule(path=paths, kind=st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG]), mode=modes)
    def mknod(self, path: bytes, kind: int, mode: int) -> None:
        self.game.do("mknod", path, kind | mode, 0)

    @rule(entries=st.integers(1, 120), step=st.sampled_from([1, 7, 31]))
    def list_changing(self, entries: int, step: int) -> None:
        self.game.do("list_changing", b"changing", entries, step)

    # ------------------------------------------------------------------ attributes

    @rule(path=paths, size=offsets)
    def truncate(self, path: bytes, size: int) -> None:
        self.game.do("truncate", path, size)

    @rule(path=paths, mode=modes)
    def chmod(self, path: bytes, mode: int) -> None:
        if path:
            self.game.do("chmod", path, mode)

    @rule(path=paths, uid=st.sampled_from([-1, 0, 1000]), gid=st.sampled_from([-1, 0, 1001]))
    def chown(self, path: bytes, uid: int, gid: int) -> None:
        self.game.do("chown", path, uid, gid)

    @rule(path=paths, atime=times, mtime=times)
    def utimens(self, path: bytes, atime: int | str, mtime: int | str) -> None:
        self.game.do("utimens", path, atime, mtime)

    @rule(path=paths, name=xattr_names, value=xattr_values, flags=st.integers(0, 2))
    def setxattr(self, path: bytes, name: str, value: bytes, flags: int) -> None:
        self.game.do("setxattr", path, name, value, flags)

    @rule(path=paths, name=xattr_names)
    def removexattr(self, path: bytes, name: str) -> None:
        self.game.do("removexattr", path, name)

    # ------------------------------------------------------------------ what must change nothing

    @rule(wait=st.booleans())
    def forget_pages(self, wait: bool) -> None:
        self.game.forget_pages(wait=wait)

    @precondition(lambda self: self.game.since_sync >= _SYNC_AFTER)
    @rule()
    def sync(self) -> None:
        self.game.sync()

    @precondition(lambda self: self.game.since_press >= _PRESS_AFTER)
    @rule()
    def press(self) -> None:
        self.game.press()

    @precondition(lambda self: self.game.since_remount >= _REMOUNT_AFTER)
    @rule(without_cache=st.booleans())
    def remount(self, without_cache: bool) -> None:
        self.game.remount(without_cache=without_cache)


def machine_for(rig: Rig) -> type[Twins]:
    return type("TwinsOnRig", (Twins,), {"rig": rig})


def playing(*, examples: int, steps: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        phases=[Phase.generate, Phase.shrink],
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
