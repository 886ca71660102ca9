"""The program's commands, with what a crash test needs put in from outside. Never in production.

    python daemon.py OPTIONS.json COMMAND ARGS...

OPTIONS is a JSON file:

    boot_id           a file in place of /proc/sys/kernel/random/boot_id
    break_fsync       true: nothing is synced, so that the tester can be seen to fail
    sync_every_s, checkpoint_pages, settle_s, cache_bytes      smaller than a user can set them
    checkpoint_segments           so many segments make a checkpoint on Discord
    site              a file that says where to die, read at SIGUSR2: {"name", "count", "after_s"}

Dying inside: SIGKILL to itself at the count-th time that a site of `SITES` is passed, or a little
later, between two steps that a signal from outside would hardly ever meet.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

# name: module, class, method. ".before" is at its call, ".after" when it has returned.
SITES = {
    "write": ("stashcordfs.cache.files", "LocalFiles", "write"),
    "resize": ("stashcordfs.cache.files", "LocalFiles", "resize"),
    "punch": ("stashcordfs.cache.files", "LocalFiles", "punch"),
    "remove": ("stashcordfs.cache.files", "LocalFiles", "remove"),
    "file-sync": ("stashcordfs.cache.files", "LocalFiles", "sync"),
    "claim": ("stashcordfs.cache.marks", "Marks", "claim"),
    "release": ("stashcordfs.cache.marks", "Marks", "release"),
    "commit": ("stashcordfs.journal.sqlite.database", "Database", "commit"),
    "wal-sync": ("stashcordfs.journal.sqlite.database", "Database", "_sync_wal"),
    "wal-copy": ("stashcordfs.journal.sqlite.database", "Database", "_checkpoint"),
    "snapshot": ("stashcordfs.vfs.checkpointing", "Checkpointer", "take"),
    "manifest": ("stashcordfs.vfs.checkpointing", "Checkpointer", "_post"),
    "part": ("stashcordfs.vfs.checkpointing", "Checkpointer", "_add"),
    "superseded": ("stashcordfs.vfs.checkpointing", "Checkpointer", "_drop_superseded"),
    "drain": ("stashcordfs.daemon.control", "Control", "_drain"),
    "put-dirty": ("stashcordfs.journal.journal", "Journal", "put_dirty"),
    "drop-dirty": ("stashcordfs.journal.journal", "Journal", "drop_dirty"),
    "intent": ("stashcordfs.journal.journal", "Journal", "add_intent"),
    "confirm": ("stashcordfs.journal.journal", "Journal", "confirm_intent_packs"),
    "chunks": ("stashcordfs.journal.journal", "Journal", "commit_chunks"),
    "close-intent": ("stashcordfs.journal.journal", "Journal", "close_intent"),
    "abandon": ("stashcordfs.journal.journal", "Journal", "abandon_intent"),
    "truncate": ("stashcordfs.journal.journal", "Journal", "truncate"),
    "purge": ("stashcordfs.journal.journal", "Journal", "purge"),
    "generation": ("stashcordfs.journal.journal", "Journal", "set_local_generation"),
    "post": ("stashcordfs.store.discord_store", "DiscordStore", "put"),
    "uploaded": ("stashcordfs.vfs.blocks", "Blocks", "uploaded"),
    "merge": ("stashcordfs.vfs.blocks", "Blocks", "merge_base"),
    "evict": ("stashcordfs.vfs.blocks", "Blocks", "evict"),
    "reap": ("stashcordfs.vfs.blocks", "Blocks", "reap_now"),
    "cut": ("stashcordfs.vfs.blocks", "Blocks", "truncate"),
}

_left: dict[str, int] = {}  # site with its moment -> passes until it kills
_after_s: dict[str, float] = {}
_told_in = Path()


def _passed(site: str) -> None:
    if site in _left:
        _left[site] -= 1
        if _left[site] == 0 and _after_s[site]:
            threading.Timer(_after_s[site], _die).start()
        elif _left[site] <= 0 and not _after_s[site]:
            _die()


def _die() -> None:
    """Tell when, as whoever watches may see it late."""
    with _told_in.open("w", encoding="ascii") as file:
        file.write(f"{time.monotonic()}")
    os.kill(os.getpid(), signal.SIGKILL)


def _instrumented(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(plain):

        @wraps(plain)
        async def deferred(*args: Any, **more: Any) -> Any:
            _passed(f"{name}.before")
            result = await plain(*args, **more)
            _passed(f"{name}.after")
            return result

        return deferred

    @wraps(plain)
    def direct(*args: Any, **more: Any) -> Any:
        _passed(f"{name}.before")
        result = plain(*args, **more)
        _passed(f"{name}.after")
        return result

    return direct


def _half_write(plain: Callable[..., None]) -> Callable[..., None]:
    """A process killed inside a long pwrite(2) has written a part of it."""

    def write(files: Any, key: Any, offset: int, data: Any) -> None:
        if _left.get("write.half") == 1:
            plain(files, key, offset, memoryview(data)[: len(data) // 8192 * 4096])
        _passed("write.half")
        plain(files, key, offset, data)

    return write


def _only_with_a_long_wal(instrumented: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A short WAL is left alone: nothing to die in."""

    def checkpoint(database: Any) -> Any:
        module = importlib.import_module("stashcordfs.journal.sqlite.database")
        wal = Path(f"{database.path}-wal")
        if wal.exists() and wal.stat().st_size >= module._CHECKPOINT_PAGES * 4096:
            return instrumented(database)
        return 0, 0

    return checkpoint


def _install_sites(order: Path) -> None:
    global _told_in  # noqa: PLW0603  of this process, which dies of it
    _told_in = order.with_suffix(".died")
    for name, (module, owner, method) in SITES.items():
        cls = getattr(importlib.import_module(module), owner)
        if not hasattr(cls, method):
            raise SystemExit(f"tests/crash/daemon.py: {module}.{owner}.{method} is no more")
        setattr(cls, method, _instrumented(name, inspect.getattr_static(cls, method)))
    files = importlib.import_module("stashcordfs.cache.files").LocalFiles
    files.write = _half_write(files.write)
    database = importlib.import_module("stashcordfs.journal.sqlite.database").Database
    database._checkpoint = _only_with_a_long_wal(database._checkpoint)

    def arm(*_: object) -> None:
        told = json.loads(order.read_text(encoding="utf-8"))
        _after_s[told["name"]] = told["after_s"]
        _left[told["name"]] = told["count"]

    signal.signal(signal.SIGUSR2, arm)


def _break_fsync() -> None:
    def nothing(*_: object) -> None:
        return None

    importlib.import_module("stashcordfs.cache.files").LocalFiles.sync = nothing
    importlib.import_module("stashcordfs.journal.sqlite.database").Database._sync_wal = nothing
    os.fdatasync = os.fsync = nothing  # type: ignore[assignment]


def _shrink(options: dict[str, Any]) -> None:
    mounted = importlib.import_module("stashcordfs.daemon.mounted")
    if path := options.get("boot_id"):
        _set(importlib.import_module("stashcordfs.daemon.ground"), "_BOOT_ID", Path(path))
    if pages := options.get("checkpoint_pages"):
        _set(
            importlib.import_module("stashcordfs.journal.sqlite.database"),
            "_CHECKPOINT_PAGES",
            pages,
        )
    if seconds := options.get("settle_s"):
        settling = importlib.import_module("stashcordfs.vfs.settling")
        _set(settling, "_FIRST_DELAY_S", seconds / 10)
        _set(settling, "_RESEND_FOR_S", seconds)
        _set(settling, "_WATCH_FIRST_S", seconds)
    if segments := options.get("checkpoint_segments"):
        provision = importlib.import_module("stashcordfs.daemon.provision")
        plain_settings = getattr(provision, "CheckpointSettings", None)  # `_set` says if not
        often = partial(plain_settings or dict, segments=segments)
        _set(provision, "CheckpointSettings", often)
    if every := options.get("sync_every_s"):
        durability = importlib.import_module("stashcordfs.vfs.durability").Durability
        plain = durability.__init__
        durability.__init__ = lambda self, **more: plain(self, **{**more, "sync_every_s": every})
    if limit := options.get("cache_bytes"):
        limits = mounted.cache_limits
        mounted.cache_limits = lambda settings: replace(
            limits(settings), max_bytes=limit, dirty_bytes=limit * 3 // 4
        )


def _set(module: Any, name: str, value: object) -> None:
    if not hasattr(module, name):  # renamed: say so rather than test something else
        raise SystemExit(f"tests/crash/daemon.py: {module.__name__}.{name} is no more")
    setattr(module, name, value)


def _cheap_slots() -> None:
    """Keys that open at once: what is tested is not Argon2id, which takes half a second."""
    slots = importlib.import_module("stashcordfs.crypto.slots")
    object.__setattr__(slots.DEFAULT_COST, "memory_kib", 64)
    object.__setattr__(slots.DEFAULT_COST, "passes", 1)


def main() -> None:
    options = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.argv = ["stashcordfs", *sys.argv[2:]]
    _cheap_slots()
    if sys.argv[1] == "mount":
        if order := options.get("site"):
            _install_sites(Path(order))
        _shrink(options)
        if options.get("break_fsync"):
            _break_fsync()
    importlib.import_module("stashcordfs.cli.main").main()


if __name__ == "__main__":
    main()
