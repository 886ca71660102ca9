"""One file, every kind of access, checked against memory: in the manner of fsx.

Reads and writes by several handles, mappings (one of them kept for good), O_DIRECT, truncations up
and down, closing and opening, fsync, msync; meanwhile the block cache, far smaller than the file,
evicts, and uploads make blocks clean. Punching holes is not carried by the binding: that it is
refused, and changes nothing, is checked too.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[1] / "support")]
from mounted import DemoVolume
from shrunk import ShrunkVolume

_FILE_BYTES = 12 << 20
_PAGE = mmap.PAGESIZE
_MOST = 256 << 10
_CHECK_EVERY = 200
_REMOUNT_EVERY = 4000
_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE: linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Wrong(AssertionError):
    """The file is not what was written to it."""


@dataclass
class Result:
    seed: int
    operations: Counter[str] = field(default_factory=Counter)
    remounts: int = 0
    messages_sent: int = 0
    bytes_received: int = 0
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Exerciser:
    def __init__(self, path: Path, result: Result) -> None:
        self._path = path
        self._result = result
        self._chance = random.Random(result.seed)
        self._twin = bytearray()
        self._recent: list[str] = []
        path.touch()
        self.open()

    # ------------------------------------------------------------------ handles

    def open(self) -> None:
        self._handles = [os.open(self._path, os.O_RDWR) for _ in range(3)]
        self._direct = os.open(self._path, os.O_RDWR | os.O_DIRECT)
        os.ftruncate(self._handles[0], _FILE_BYTES)
        self._kept = mmap.mmap(self._handles[0], _FILE_BYTES)  # for good: beyond the end untouched
        os.ftruncate(self._handles[0], len(self._twin))

    def close(self) -> None:
        self._kept.close()
        for fd in (*self._handles, self._direct):
            os.close(fd)

    # ------------------------------------------------------------------ running

    def step(self) -> None:
        ways = (
            [self.write] * 4 + [self.read] * 4 + [self.map_write] * 3 + [self.map_read] * 2
            + [self.kept_write] * 2 + [self.kept_read] * 2 + [self.direct_write, self.direct_read]
            + [self.cut, self.grow, self.append, self.fsync, self.flush_map, self.forget]
            + [self.reopen, self.punch]
        )  # fmt: skip
        way = self._chance.choice(ways)
        self._result.operations[way.__name__] += 1
        way()

    def check(self) -> None:
        """All of it, through a handle of its own."""
        data = self._path.read_bytes()
        self._same("check", 0, data, bytes(self._twin))

    def _told(self, what: str) -> None:
        self._recent = [*self._recent[-30:], what]

    def _same(self, way: str, offset: int, got: bytes, expected: bytes) -> None:
        if got == expected:
            return
        pairs = zip(got, expected, strict=False)
        at = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
        where = (
            f"{len(got)} bytes instead of {len(expected)}" if at is None else f"at {offset + at}"
        )
        kind = "zeros" if at is not None and not any(got[at : at + 64]) else "other bytes"
        raise Wrong(f"{way} at {offset}: {kind}, {where}; after " + "; ".join(self._recent))

    def _piece(self, *, within: bool) -> tuple[int, int]:
        end = len(self._twin) if within else _FILE_BYTES
        offset = self._chance.randrange(max(1, end))
        if self._chance.random() < 0.3:
            offset -= offset % self._chance.choice([_PAGE, 64 << 10])
        return offset, min(self._chance.randint(1, _MOST), end - offset)

    def _put(self, way: str, offset: int, data: bytes) -> None:
        if offset > len(self._twin):
            self._twin.extend(bytes(offset - len(self._twin)))
        self._twin[offset : offset + len(data)] = data
        self._told(f"{way} {offset}+{len(data)}")

    # ------------------------------------------------------------------ ways

    def write(self) -> None:
        offset, length = self._piece(within=self._chance.random() < 0.7)
        if length <= 0:
            return
        data = self._chance.randbytes(length)
        assert os.pwrite(self._chance.choice(self._handles), data, offset) == length
        self._put("write", offset, data)

    def append(self) -> None:
        length = min(self._chance.randint(1, _MOST), _FILE_BYTES - len(self._twin))
        if length <= 0:
            return
        data = self._chance.randbytes(length)
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            assert os.write(fd, data) == length
        finally:
            os.close(fd)
        self._put("append", len(self._twin), data)

    def read(self) -> None:
        offset, length = self._piece(within=False)
        got = os.pread(self._chance.choice(self._handles), length, offset)
        self._same("read", offset, got, bytes(self._twin[offset : offset + length]))

    def map_write(self) -> None:
        offset, length = self._piece(within=True)
        if length <= 0:
            return
        data = self._chance.randbytes(length)
        begin = offset // _PAGE * _PAGE
        with mmap.mmap(self._handles[1], offset + length - begin, offset=begin) as mapping:
            mapping[offset - begin : offset - begin + length] = data
            if self._chance.random() < 0.3:
                mapping.flush()
        self._put("map_write", offset, data)

    def map_read(self) -> None:
        offset, length = self._piece(within=True)
        if length <= 0:
            return
        begin = offset // _PAGE * _PAGE
        access = mmap.ACCESS_READ
        fd, size = self._handles[2], offset + length - begin
        with mmap.mmap(fd, size, access=access, offset=begin) as mapping:
            got = mapping[offset - begin : offset - begin + length]
        self._same("map_read", offset, got, bytes(self._twin[offset : offset + length]))

    def kept_write(self) -> None:
        offset, length = self._piece(within=True)
        if length > 0:
            data = self._chance.randbytes(length)
            self._kept[offset : offset + length] = data
            self._put("kept_write", offset, data)

    def kept_read(self) -> None:
        offset, length = self._piece(within=True)
        if length > 0:
            got = self._kept[offset : offset + length]
            self._same("kept_read", offset, got, bytes(self._twin[offset : offset + length]))

    def direct_write(self) -> None:
        pages = self._chance.randint(1, 64)
        page = self._chance.randrange(_FILE_BYTES // _PAGE - pages)
        data = self._chance.randbytes(pages * _PAGE)
        with mmap.mmap(-1, len(data)) as buffer:
            buffer.write(data)
            assert os.pwritev(self._direct, [buffer], page * _PAGE) == len(data)
        self._put("direct_write", page * _PAGE, data)

    def direct_read(self) -> None:
        page, pages = self._chance.randrange(_FILE_BYTES // _PAGE), self._chance.randint(1, 64)
        with mmap.mmap(-1, pages * _PAGE) as buffer:
            got = buffer[: os.preadv(self._direct, [buffer], page * _PAGE)]
        expected = bytes(self._twin[page * _PAGE : (page + pages) * _PAGE])
        self._same("direct_read", page * _PAGE, got, expected)

    def cut(self) -> None:
        size = self._chance.randrange(len(self._twin) + 1)
        size = size if self._chance.random() < 0.1 else max(size, len(self._twin) - _MOST)
        os.ftruncate(self._chance.choice(self._handles), size)
        del self._twin[size:]
        self._told(f"cut {size}")

    def grow(self) -> None:
        size = min(len(self._twin) + self._chance.randint(0, _MOST), _FILE_BYTES)
        os.truncate(self._path, size)
        self._twin.extend(bytes(size - len(self._twin)))
        self._told(f"grow {size}")

    def fsync(self) -> None:
        self._chance.choice([os.fsync, os.fdatasync])(self._chance.choice(self._handles))
        self._told("fsync")

    def flush_map(self) -> None:
        end = len(self._twin) // _PAGE * _PAGE
        if end:
            self._kept.flush(0, end)
        self._told("flush_map")

    def forget(self) -> None:
        """Let the kernel ask the daemon again."""
        os.posix_fadvise(self._handles[0], 0, 0, os.POSIX_FADV_DONTNEED)
        self._told("forget")

    def reopen(self) -> None:
        self.close()
        self.open()
        self._told("reopen")

    def punch(self) -> None:
        offset, length = self._piece(within=True)
        if length > 0:
            assert _libc.fallocate(self._handles[0], _PUNCH, offset, length) < 0
            assert ctypes.get_errno() == errno.EOPNOTSUPP


def soak_fsx(folder: Path, *, minutes: float, seed: int, least: int = 0) -> Result:
    """Until so many minutes have passed and so many operations were done."""
    result = Result(seed)
    end = time.monotonic() + minutes * 60
    settings = {"block_size": str(64 << 10), "min_free_bytes": "0", "upload_delay_s": "0.2"}
    with ShrunkVolume.running(folder, settings=settings, server=("--no-rate-limits",)) as volume:
        exerciser = Exerciser(volume.mountpoint / "file", result)
        try:
            while time.monotonic() < end or result.operations.total() < least:
                exerciser.step()
                done = result.operations.total()
                if done % _CHECK_EVERY == 0:
                    exerciser.check()
                if done % _REMOUNT_EVERY == 0:
                    _remount(volume, exerciser, result)
                    print(json.dumps({"operations": done}), flush=True)
            exerciser.check()
            _remount(volume, exerciser, result)
        except (Wrong, OSError) as error:
            result.problems.append(f"{type(error).__name__}: {error}")
        exerciser.close()
        result.messages_sent += volume.status()["messages_sent"]
    return result


def _remount(volume: DemoVolume, exerciser: Exerciser, result: Result) -> None:
    exerciser.close()
    volume.sync()
    status = volume.status()
    result.messages_sent += status["messages_sent"]
    result.bytes_received += status["bytes_received"]
    volume.remount(without_cache=result.remounts % 2 == 0)
    result.remounts += 1
    exerciser.check()
    exerciser.open()
