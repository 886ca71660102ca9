"""Discord gone while much is written, and back a day later: all arrives, in order, without haste.

A real mount over a sandbox process that is ended, started again, and told that a day has passed:
every link has expired by then. What arrived is read back by a mount without local data.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import random
import sqlite3
import sys
import time
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[1] / "support")]
from mounted import NAME, DemoVolume

MIB = 1 << 20
_DAY_S = 86_400.0
_MESSAGES_OVERTAKING = 3  # two are on their way at once, and each is filled from a little more
_MESSAGE_BYTES = 25 * MIB
_BLOCK_BYTES = MIB
_RETURN_S = 90.0  # a ping a minute, and its answer


@dataclass
class Result:
    data_bytes: int
    cache_bytes: int
    seed: int
    written_s: float = 0.0  # how long writing took, while the service was away
    offline_s: float = 0.0  # how long it was away
    offline_requests: int = 0  # tried meanwhile
    dirty_bytes: int = 0  # at the service's return
    resumed_s: float | None = None  # from the return to the first message, unasked
    arrived_s: float = 0.0
    messages: int = 0
    rate_limited: int = 0  # by the server's own count
    requests: dict[str, int] = field(default_factory=dict)
    overtaken_blocks: int = 0  # how far a block came before an older one
    bytes_read_back: int = 0
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Offline:
    def __init__(self, volume: DemoVolume, result: Result, *, file_bytes: int) -> None:
        self._volume = volume
        self.result = result
        self._file_bytes = file_bytes
        self._digests: dict[str, bytes] = {}

    def run(self, *, away_s: float, unasked: bool) -> None:
        """The service is away for `away_s` at least; `unasked`: uploading finds out its return."""
        self._write("before", 3 * MIB)
        self._volume.sync()
        self._write_offline(away_s)
        self._arrive(unasked=unasked)
        self._volume.umount()
        self._look_at_order()
        self._volume.admin(
            "clock", {"advance_s": _DAY_S}
        )  # the links that came with the answers, too
        self._volume.mount()
        self._volume.remount(without_cache=True)
        self._read_back()

    def _write(self, name: str, size: int) -> None:
        data = random.Random(f"{self.result.seed} {name}").randbytes(size)
        self._digests[name] = sha256(data).digest()
        with (self._volume.mountpoint / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # so that what is older is known

    def _write_offline(self, away_s: float) -> None:
        result, before = self.result, self._volume.status()
        self._volume.end_server()
        begun = time.monotonic()
        for number in range(result.data_bytes // self._file_bytes):
            self._write(f"file-{number:04}", self._file_bytes)
        result.written_s = round(time.monotonic() - begun, 1)
        time.sleep(max(0.0, away_s - result.written_s))
        result.offline_s = round(time.monotonic() - begun, 1)
        after = self._volume.status()
        result.dirty_bytes = after["dirty_bytes"]
        result.offline_requests = after["requests"] - before["requests"]
        if result.dirty_bytes < result.data_bytes:
            result.problems.append(f"only {result.dirty_bytes} bytes wait for the service")

    def _arrive(self, *, unasked: bool) -> None:
        result, volume = self.result, self._volume
        volume.start_server()
        self._volume.admin("clock", {"advance_s": _DAY_S})
        begun = time.monotonic()
        if unasked:
            result.resumed_s = self._resumed(begun)
            if result.resumed_s is None:
                result.problems.append(f"nothing was sent within {_RETURN_S:.0f} s of the return")
        volume.sync()
        result.arrived_s = round(time.monotonic() - begun, 1)
        stats = volume.server_stats()
        result.messages = stats["created"]
        result.requests = stats["requests_by_route"]
        result.rate_limited = stats["rate_limited"]["provoked"] + volume.status()["rate_limited"]
        if result.rate_limited:
            result.problems.append(f"{result.rate_limited} answers of 429")
        if left := volume.status()["dirty_bytes"]:
            result.problems.append(f"{left} bytes did not arrive")

    def _resumed(self, begun: float) -> float | None:
        while (took := time.monotonic() - begun) < _RETURN_S:
            if self._volume.server_stats()["created"]:
                return round(took, 1)
            time.sleep(0.2)
        return None

    def _look_at_order(self) -> None:
        """Messages in the order of their making, blocks in that of their writing."""
        journal = self._volume.state / NAME / "journal.sqlite"
        with contextlib.closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as database:
            rows = database.execute(
                "SELECT p.message FROM chunk_list l JOIN chunks c ON c.id = l.chunk"
                " JOIN packs p ON p.id = c.pack ORDER BY l.ino, l.idx"
            ).fetchall()
        self.result.overtaken_blocks = overtaken([message for (message,) in rows])
        allowed = _MESSAGES_OVERTAKING * _MESSAGE_BYTES // _BLOCK_BYTES
        if self.result.overtaken_blocks > allowed:
            self.result.problems.append(
                f"a block came before one that is {self.result.overtaken_blocks} blocks older"
            )

    def _read_back(self) -> None:
        for name, digest in self._digests.items():
            data = (self._volume.mountpoint / name).read_bytes()
            self.result.bytes_read_back += len(data)
            if sha256(data).digest() != digest:
                self.result.problems.append(f"{name} reads back wrong")


def overtaken(messages: list[int]) -> int:
    """How many places an older block stands before one that arrived in an earlier message."""
    most = 0
    highest, places = list[int](), list[int]()  # each new highest message, and where it began
    for place, message in enumerate(messages):
        later = bisect.bisect_right(highest, message)
        if later < len(highest):
            most = max(most, place - places[later])
        elif not highest or message > highest[-1]:
            highest.append(message)
            places.append(place)
    return most


def soak_offline(
    folder: Path,
    *,
    data_bytes: int,
    file_bytes: int,
    cache_bytes: int,
    seed: int,
    away_s: float = 0.0,
    unasked: bool = False,
) -> Result:
    """Run it in `folder`, which needs room for the data three times."""
    result = Result(data_bytes, cache_bytes, seed)
    settings = {
        "cache_bytes": str(cache_bytes),
        "dirty_bytes": str(cache_bytes),
        "min_free_bytes": "0",
        "upload_delay_s": "0.5",
    }
    with DemoVolume.running(folder, settings=settings) as volume:
        Offline(volume, result, file_bytes=file_bytes).run(away_s=away_s, unasked=unasked)
    return result
