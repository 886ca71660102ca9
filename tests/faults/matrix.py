"""Runs rows of the fault matrix on one mounted volume, cell by cell, each within a hard limit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
from cells import bytes_of
from mounted import COMMAND, NAME, DemoVolume
from rows import Row

SETTINGS = {"network_deadline_s": "3", "upload_delay_s": "0.2"}
DEADLINE_S = 3.0
LIMIT_S = 20.0  # of a cell; beyond it is a hang
LATE_S = DEADLINE_S + 4.0  # a read that fails must not take longer
WAIT_S = 12.0  # how long sync and umount are let wait before they are interrupted
PURGE_S = 90.0
RECOVER_S = 300.0  # a ban is remembered for a minute; a lost answer is settled by listings
COLD_BYTES, SMALL_BYTES = 3_000_000, 40_000
OPERATIONS = (
    "cold read", "cached read", "write", "fsync", "remote fsync", "sync", "create", "rename",
    "unlink", "purge", "list", "umount", "mount", "read back",
)  # fmt: skip
_EFFECTS: dict[str, tuple[set[str], set[str]]] = {  # on the names in the row's folder
    "write": ({"written"}, set()),
    "fsync": ({"synced"}, set()),
    "create": ({"created"}, set()),
    "rename": ({"new-name"}, {"old-name"}),
    "unlink": (set(), {"doomed"}),
    "purge": (set(), {"purged"}),
}
_MAY_FAIL = {"cold read", "remote fsync", "sync", "umount"}
_BROKEN = {"HANG", "ZEROS", "SHORT", "WRONG", "MISSING", "DEAD"}


@dataclass
class Cell:
    outcome: str
    seconds: float


@dataclass
class Result:
    row: str
    number: int | None
    cells: dict[str, Cell] = field(default_factory=dict)
    struck: list[int] = field(default_factory=list)  # of each rule
    refusals: int = 0
    edits: int = 0
    recovered_s: float | None = None
    after: str = ""  # what was wrong after the fault was lifted
    problems: list[str] = field(default_factory=list)

    def judge(self, row: Row) -> None:
        """Write down every cell that must not be as it is."""
        for name, cell in self.cells.items():
            allowed = row.may_fail and name in _MAY_FAIL and cell.outcome not in _BROKEN
            if name == "remote fsync" and row.rules:  # within the deadline, or an error: no more
                allowed = cell.outcome == "EIO"
            if cell.outcome != "ok" and not allowed:
                self.problems.append(f"{name}: {cell.outcome}")
            if name in {"cold read", "remote fsync"} and cell.seconds > LATE_S:
                self.problems.append(f"{name}: {cell.seconds:.0f} s")
        if self.after and not (row.loses or row.settles_late):
            self.problems.append(self.after)
        if self.edits:
            self.problems.append(f"{self.edits} edits, which nothing here is made for")
        if 0 in self.struck:
            self.problems.append("the fault did not strike")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Result:
        cells = {name: Cell(**cell) for name, cell in told["cells"].items()}
        return cls(**{**told, "cells": cells})


class Matrix:
    def __init__(self, volume: DemoVolume, *, say: Callable[[str], None] = lambda _: None) -> None:
        self._volume = volume
        self._base = str(volume.server["api_url"]).partition("/api/")[0]
        self._say = say

    @classmethod
    @contextlib.contextmanager
    def on(cls, folder: Path, **more: Any) -> Iterator[Matrix]:
        with DemoVolume.running(folder, settings=SETTINGS) as volume:
            matrix = cls(volume, **more)
            matrix.prepare()
            yield matrix

    def prepare(self) -> None:
        for name in ("cold", "later"):
            self._place(name).write_bytes(bytes_of(name, COLD_BYTES))
        self._volume.remount(without_cache=True)

    # One row

    def run(self, row: Row, *, only: Collection[str] = OPERATIONS) -> Result:
        """Every operation while the fault is there, then without it, then from Discord alone."""
        result = Result(row.name, row.number)
        folder = self._place(f"row-{time.monotonic_ns()}")
        self._local_start(folder, row)
        before = self._volume.admin("stats")
        with self._fault(row):
            for name, act in self._cells(folder):
                if name not in only or (name == "purge" and not row.purges):
                    continue
                result.cells[name] = act()
                if result.cells[name].outcome == "ok":
                    added, removed = _EFFECTS.get(name, (set(), set()))
                    self._names = self._names - removed | added
                self._say(f"  {name}: {result.cells[name].outcome}")
                if result.cells[name].outcome == "DEAD":
                    break
            if not row.stall:
                rules = self._volume.admin("faults")["rules"]
                result.struck = [one["struck"] for one in rules if one["kind"] != "switch"]
        self._recover(result)
        stats = self._volume.admin("stats")
        result.refusals = stats["invalid"] - before["invalid"]
        result.edits = stats["requests_by_route"].get("edit_message", 0)
        self._verify(result, folder)
        result.judge(row)
        return result

    def _local_start(self, folder: Path, row: Row) -> None:
        """A folder to work in, and what is to be renamed, removed, and read from the cache.

        Nothing is fetched: a page of messages would bring the links of the cold files along.
        """
        folder.mkdir()
        _remote(folder).mkdir()
        os.setxattr(_remote(folder), "user.stashcordfs.durability", b"remote")
        self._names = {"old-name", "doomed", "cached"} | ({"purged"} if row.purges else set())
        for name in self._names:
            (folder / name).write_bytes(bytes_of(*content(folder, name)))
        self._volume.sync()
        self._remount()

    def _remount(self, *, without_cache: bool = False) -> None:
        """Nothing of a rate is used up then: five listings may come in 5 s, by whichever mount.

        That is longer than the deadline, so that a read that had to wait would rightly fail. What
        the next mount would know of rates is removed: it does not see the server's clock go on.
        """
        self._volume.umount()
        state = self._volume.state / NAME
        if without_cache:
            shutil.rmtree(state / "blocks")
        self._volume.admin("clock", {"advance_s": 6.0})
        (state / "limits.json").unlink()
        self._volume.mount()

    def _cells(self, folder: Path) -> list[tuple[str, Callable[[], Cell]]]:
        written, synced, cached = (folder / name for name in ("written", "synced", "cached"))
        far = _remote(folder) / "far"
        return [
            ("cold read", lambda: self._read(self._place("cold"), "cold", COLD_BYTES)),
            ("cached read", lambda: self._read(cached, *content(folder, "cached"))),
            ("write", lambda: self._act("write", written, *content(folder, "written"))),
            ("fsync", lambda: self._act("fsync", synced, *content(folder, "synced"))),
            ("remote fsync", lambda: self._act("fsync", far, *content(folder, "far"))),
            ("sync", lambda: self._wait_for("sync", str(self._volume.mountpoint))),
            ("create", lambda: self._act("create", folder / "created")),
            ("rename", lambda: self._act("rename", folder / "old-name", folder / "new-name")),
            ("unlink", lambda: self._act("unlink", folder / "doomed")),
            ("purge", lambda: self._purge(folder / "purged")),
            ("list", lambda: self._act("list", folder, *self._names)),
            ("umount", self._umount),
            ("mount", self._mount),
            ("read back", lambda: self._read(written, *content(folder, "written"))),
        ]

    @contextlib.contextmanager
    def _fault(self, row: Row) -> Iterator[None]:
        pid = self._volume._server.pid
        self._volume.admin("faults", {"seed": 1, "rules": row.rules})
        if row.token:
            self._volume.admin("token", {})
        if row.stall:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            if row.stall:
                os.kill(pid, signal.SIGCONT)
            if row.token:
                self._volume.admin("token", {"token": self._volume.token})
            self._volume.admin("faults", {"rules": []})

    def _recover(self, result: Result) -> None:
        """Until everything is on Discord, and a cold file can be read."""
        begun = time.monotonic()
        if not self._volume.is_mounted():
            self._mount()
        while (took := time.monotonic() - begun) < RECOVER_S:
            sync = self._wait_for("sync", str(self._volume.mountpoint), wait_s=RECOVER_S - took)
            read = self._read(self._place("later"), "later", COLD_BYTES)
            if sync.outcome == read.outcome == "ok":
                result.recovered_s = round(time.monotonic() - begun, 1)
                return
            result.after = f"afterwards sync: {sync.outcome}, cold read: {read.outcome}"
            time.sleep(1)

    def _verify(self, result: Result, folder: Path) -> None:
        """What was written, read from Discord alone by a new mount."""
        if result.recovered_s is None:
            self._run_out()
            return
        result.after = ""
        self._remount(without_cache=True)
        places = {name: folder / name for name in sorted(self._names)}
        if "remote fsync" in result.cells:  # also after an error: it was kept here, and sent
            places["far"] = _remote(folder) / "far"
        for name, place in places.items():
            found = self._read(place, *content(folder, name))
            if found.outcome != "ok":
                result.after = f"afterwards {name}: {found.outcome}"
        listed = self._act("list", folder, *self._names)
        if listed.outcome != "ok":
            result.after = f"afterwards list: {listed.outcome}"
        shutil.rmtree(folder)
        shutil.rmtree(_remote(folder))
        self._volume.remount(without_cache=True)

    def _run_out(self) -> None:
        """It did not recover in time: begin again for the next row, as a person would."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self._volume.command("umount", "--no-wait", str(self._volume.mountpoint), timeout_s=60)
        if self._volume.is_mounted():
            subprocess.run(["fusermount3", "-uz", str(self._volume.mountpoint)], check=False)
        self._volume.mount()

    # Cells

    def _place(self, name: str) -> Path:
        return self._volume.mountpoint / name

    def _act(self, operation: str, path: Path, *arguments: object) -> Cell:
        program = [sys.executable, str(Path(__file__).with_name("cells.py"))]
        begun = time.monotonic()
        with subprocess.Popen(
            [*program, operation, str(path), *map(str, arguments)], stdout=subprocess.PIPE
        ) as child:
            try:
                outcome = child.communicate(timeout=LIMIT_S)[0].decode() or "crash"
            except subprocess.TimeoutExpired:
                child.kill()
                outcome = "HANG"
        return Cell(_dead(outcome), round(time.monotonic() - begun, 2))

    def _read(self, path: Path, seed: str, size: int) -> Cell:
        return self._act("read", path, seed, size)

    def _wait_for(self, *command: str, wait_s: float = WAIT_S) -> Cell:
        """A command that may wait for Discord: when it does, it must heed an interrupt."""
        begun = time.monotonic()
        with subprocess.Popen(
            [*COMMAND, *command],
            env=self._volume.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as child:
            try:
                child.communicate(timeout=wait_s)
                outcome = "ok" if child.returncode == 0 else f"exit {child.returncode}"
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGINT)
                try:
                    child.communicate(timeout=10)
                    outcome = "waits"
                except subprocess.TimeoutExpired:
                    child.kill()
                    outcome = "HANG"
        return Cell(outcome, round(time.monotonic() - begun, 2))

    def _purge(self, path: Path) -> Cell:
        """It packs anew, looks, and deletes, within the rates: that takes its time."""
        return self._wait_for("purge", "--yes", str(path), wait_s=PURGE_S)

    def _umount(self) -> Cell:
        """As a person does: wait, then lose patience. It must be unmounted in the end."""
        place = str(self._volume.mountpoint)
        first = self._wait_for("umount", place)
        if first.outcome == "ok":
            return first
        second = self._wait_for("umount", "--no-wait", place, wait_s=LIMIT_S)
        gone = second.outcome == "ok" and not self._volume.is_mounted()
        outcome = first.outcome if gone else "HANG"
        return Cell(outcome, round(first.seconds + second.seconds, 2))

    def _mount(self) -> Cell:
        cell = self._wait_for("mount", NAME, str(self._volume.mountpoint), wait_s=LIMIT_S)
        if cell.outcome != "ok":
            return cell
        alive = self._act("alive", self._volume.mountpoint)
        return Cell("ok" if alive.outcome == "ok" else "DEAD", cell.seconds)


def _remote(folder: Path) -> Path:
    """Beside the row's folder, one whose fsyncs wait for Discord."""
    return folder.with_name(f"{folder.name}-remote")


def content(folder: Path, name: str) -> tuple[str, int]:
    """Seed and size. Other bytes in each row: known ones would not be uploaded again."""
    sizes = {"written": COLD_BYTES, "cached": COLD_BYTES, "created": 0}
    return f"{folder}/{name.replace('new', 'old')}", sizes.get(name, SMALL_BYTES)


def _dead(outcome: str) -> str:
    return "DEAD" if outcome in ("ENOTCONN", "ECONNABORTED") else outcome
