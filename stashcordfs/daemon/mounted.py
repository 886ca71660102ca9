"""One mount, from the lock to the last byte drained. Ordered start, ordered stop, one nursery tree.

Start: lock, journal, blocks, then the mount, also without a network; the background tasks under a
supervisor that logs, counts and restarts them with delay. Stop (SIGTERM, `umount`, the control
socket): drain as far as the caller waits, unmount, sync, close. What was not drained stays in the
journal and in the cache, and the next mount goes on with it.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import trio

from stashcordfs.config import format_size, load_settings
from stashcordfs.daemon.assembly import Assembly, Options, assembled
from stashcordfs.daemon.control import Control
from stashcordfs.daemon.ground import ended_cleanly, power_was_lost, stand_here
from stashcordfs.daemon.provision import open_keys, store_on, telling
from stashcordfs.daemon.sleep import SleepWatch, boottime
from stashcordfs.daemon.token import Token, TokenWatch
from stashcordfs.daemon.verifying import verifier_of
from stashcordfs.discord.client import ClientStats, DiscordClient
from stashcordfs.discord.kept import KeptLimits
from stashcordfs.errors import StashcordError
from stashcordfs.fuse.operations import StashcordOperations
from stashcordfs.fuse.options import sort_options
from stashcordfs.fuse.session import Session
from stashcordfs.ops.logging import redact, set_level
from stashcordfs.ops.metrics import Metrics
from stashcordfs.ops.notify import Notifier
from stashcordfs.vfs.room import CacheLimits
from stashcordfs.vfs.uploading import UploadSettings
from stashcordfs.volumes import VolumeDir

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from stashcordfs.config import Settings
    from stashcordfs.fuse.options import MountOptions
    from stashcordfs.recovery.verify import Verifier
    from stashcordfs.vfs.blocks import Blocks
    from stashcordfs.vfs.collecting import Collector
    from stashcordfs.vfs.durability import Durability, Levels
    from stashcordfs.vfs.erasing import Eraser
    from stashcordfs.vfs.fencing import Fence
    from stashcordfs.vfs.filesystem import FileSystem
    from stashcordfs.vfs.publishing import Publisher
    from stashcordfs.vfs.settling import Settler
    from stashcordfs.vfs.trash_can import TrashCan
    from stashcordfs.vfs.uploading import Uploader

log = logging.getLogger(__name__)

_LONGEST_RESTART_S = 60.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


@dataclass(slots=True)
class Report:
    """What went wrong last, for `status`."""

    last_error: str = ""
    last_error_at: float = 0.0

    def __call__(self, why: str) -> None:
        """Keep it, and say it once in the log."""
        self.last_error = why
        self.last_error_at = time.time()
        log.warning("fault: %s", why)


@dataclass(slots=True)
class Parts:
    """Everything of one mount that the control socket and health need to see."""

    name: str
    mountpoint: Path
    settings: Settings
    blocks: Blocks
    uploader: Uploader
    settler: Settler
    durability: Durability
    levels: Levels
    filesystem: FileSystem
    trash: TrashCan
    stats: ClientStats
    client: DiscordClient
    token: Token
    token_watch: TokenWatch
    sleep: SleepWatch
    report: Report
    nursery: trio.Nursery
    verifier: Verifier
    publisher: Publisher | None = None
    fence: Fence | None = None
    collector: Collector | None = None
    eraser: Eraser | None = None
    started_at: float = field(default_factory=time.time)
    state: str = "mounted"
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def fenced(self) -> str:
        """Why this mount has become read-only; empty while it has not."""
        return self.fence.reason if self.fence else ""

    def discord_age_s(self) -> float:
        """Age of the oldest change or byte that Discord does not have; 0 when it has all."""
        told_s = self.publisher.behind_s if self.publisher is not None else 0.0
        return max(told_s, self.uploader.oldest_dirty_s())

    def _told(self) -> dict[str, object]:
        """What Discord knows of the journal."""
        if self.publisher is None:
            return {}
        return {
            "segment": self.publisher.segment,
            "discord_age_s": round(self.discord_age_s(), 1),
        }

    def _garbage(self) -> dict[str, object]:
        """What the last census found, and what was collected since the mount."""
        if self.collector is None:
            return {}
        total = self.collector.total
        return {
            "history_bytes": total.history_bytes,
            "garbage_bytes": total.dead_bytes + total.condemned_bytes,
            "collected_bytes": total.deleted_bytes,
            "gc_requests": self.collector.account.requests,
        }

    def status(self) -> dict[str, object]:
        """The answer of `status --json` while mounted."""
        now = boottime()
        return {
            "name": self.name,
            "state": "read-only" if self.fenced else self.state,
            "pid": os.getpid(),
            "mountpoint": str(self.mountpoint),
            "uptime_s": round(time.time() - self.started_at, 1),
            "dirty_bytes": self.blocks.room.dirty_bytes,
            "dirty_blocks": len(self.blocks.queue),
            "pending_packs": self.uploader.state.pending_packs,
            "unsettled": self.settler.unsettled,
            "unsettled_since": _utc(self.settler.unsettled_since_ns),
            "uploaded_bytes": self.uploader.state.uploaded_bytes,
            "messages_sent": self.stats.messages_sent,
            "requests": self.stats.requests,
            "rate_limited": self.stats.rate_limited,
            "bytes_sent": self.stats.bytes_sent,
            "bytes_received": self.stats.bytes_received,
            "cache_bytes": self.blocks.room.used_bytes,
            "cached_blocks": self.blocks.clean_blocks,
            "upload_failures": self.uploader.state.failures,
            "next_try_s": max(0.0, round(self.uploader.state.paused_until_s - now, 1)),
            **self.token_watch.status(),
            "suspends": self.sleep.suspends,
            "damaged_blocks": self.verifier.state.damaged_blocks,
            "missing_packs": self.verifier.state.missing_packs,
            "missing_objects": self.verifier.state.missing_objects,
            "trash_files": self.trash.usage[0],
            "trash_bytes": self.trash.usage[1],
            "erasing": self.eraser.pending if self.eraser else 0,
            **self._told(),
            **self._garbage(),
            "last_error": self.fenced or self.report.last_error,
        }

    def _read_settings(self) -> tuple[Settings, str]:
        """The settings as they are now, and the token, for which a command may run. Blocks."""
        new = load_settings(volume=self.name.partition("@")[0])
        return new, "" if new.token is None else new.token.reveal()

    async def reload(self) -> None:
        """Take up the settings that may change while mounted (config.RELOADABLE)."""
        try:
            new, token = await trio.to_thread.run_sync(self._read_settings, abandon_on_cancel=True)
        except StashcordError as error:
            self.report(f"settings not reloaded: {error}")
            return
        set_level(new.log_level)
        self.blocks.room.limits = cache_limits(new)
        self.uploader.settings = upload_settings(new)
        self.levels.default = new.durability
        self.durability.deadline_s = new.network_deadline_s
        self.filesystem.limit_reads(new.network_deadline_s)
        self.filesystem.usage.max_bytes = new.max_size
        if token:
            redact(token)
            self.token.replace(token)
        self.uploader.wake()
        if self.publisher is not None:
            self.publisher.retry_now()
        log.info("settings reloaded")


def _utc(at_ns: int) -> str:
    """A time for people and programs, to the second; empty for none."""
    return datetime.fromtimestamp(at_ns // 10**9, UTC).isoformat() if at_ns else ""


def cache_limits(settings: Settings) -> CacheLimits:
    """The block cache's bounds."""
    return CacheLimits(
        settings.cache_bytes,
        settings.min_free_bytes,
        settings.dirty_bytes,
        settings.network_deadline_s,
    )


def upload_settings(settings: Settings) -> UploadSettings:
    """When blocks are sent, and how."""
    return UploadSettings(
        delay_s=settings.upload_delay_s,
        delay_max_s=settings.upload_delay_max_s,
        concurrency=settings.upload_concurrency,
        dedup=settings.dedup,
        compress=settings.compression,
    )


def assembly_options(
    settings: Settings, block_bytes: int, *, atime: str, read_only: bool = False
) -> Options:
    """How the parts are built."""
    return Options(
        block_bytes=block_bytes,
        limits=cache_limits(settings),
        upload=upload_settings(settings),
        read_ahead_bytes=settings.read_ahead_bytes,
        deadline_s=settings.network_deadline_s,
        max_file_bytes=settings.max_file_bytes,
        settle_delay_s=settings.settle_delay_s,
        durability=settings.durability,
        atime=atime,
        max_bytes=settings.max_size,
        read_only=read_only,
        history_s=settings.history_days * 86_400.0,
    )


def run_mount(
    settings: Settings,
    name: str,
    mountpoint: Path,
    options: Mapping[str, str | bool],
    ready: Callable[[], None],
) -> None:
    """Mount and serve until unmounted or told to stop. Blocks. `ready` is called once mounted.

    Raises StashcordError when the mount cannot be made; data is never at stake then.
    """
    volume = VolumeDir(settings.state_dir, name)
    volume.read_record()
    with volume.lock():
        serve_volume(settings, volume, mountpoint, options, ready)


def serve_volume(
    settings: Settings,
    volume: VolumeDir,
    mountpoint: Path,
    options: Mapping[str, str | bool],
    ready: Callable[[], None],
) -> None:
    """The same with a volume whose lock the caller holds."""
    _bound_malloc()
    gc.freeze()  # what is loaded by now stays: the collector need not look at it again
    trio.run(_main, settings, volume, mountpoint, options, ready)


def _bound_malloc() -> None:
    """Give what is larger than a block back to the system as soon as it is freed.

    glibc raises its mmap threshold to the largest buffer freed (mallopt(3)) and keeps an arena a
    thread: with whole packs going through worker threads that keeps tens of MiB for nothing. Blocks
    of 1 MiB stay below the threshold: fresh pages for each of them doubled the time of a copy.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2 << 20)
        mallopt(_M_TRIM_THRESHOLD, 16 << 20)
        mallopt(_M_ARENA_MAX, 2)


def _trim_malloc() -> None:
    """Give the pages of what was freed back, also those between what is still in use.

    Blocks of 1 MiB lie in the heap among objects that stay; without this the heap keeps the most
    that three messages ever took (malloc_trim(3), since glibc 2.8).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


async def _main(
    settings: Settings,
    volume: VolumeDir,
    mountpoint: Path,
    options: Mapping[str, str | bool],
    ready: Callable[[], None],
) -> None:
    record = volume.read_record()
    keys = await trio.to_thread.run_sync(open_keys, settings, volume)
    report = Report()
    stats = ClientStats()
    name = volume.mount_name.partition("@")[0]
    token = Token(settings, again=partial(load_settings, volume=name))
    sorted_options = sort_options(volume.mount_name, options)
    chosen = assembly_options(
        settings,
        record.block_size,
        atime=sorted_options.atime,
        read_only=sorted_options.read_only,
    )
    async with (
        DiscordClient(
            api_url=record.api_url,
            token=token,
            stats=stats,
            clock=boottime,
            kept=KeptLimits(volume.limits_path),
        ) as client,
        assembled(
            volume.path,
            chosen,
            store=(store := store_on(client, record)),
            keys=keys,
            clock=boottime,
            now_ns=time.time_ns,
            power_lost=partial(power_was_lost, volume.path),
            begun=partial(stand_here, volume.path),
            ended=partial(ended_cleanly, volume.path),
            report=report,
            last_error=lambda: report.last_error,
            telling=None if chosen.read_only else telling(client, volume, stats, settings),
        ) as assembly,
    ):
        parts = Parts(
            volume.mount_name,
            mountpoint,
            settings,
            assembly.blocks,
            assembly.uploader,
            assembly.settler,
            assembly.durability,
            assembly.levels,
            assembly.filesystem,
            assembly.trash,
            stats,
            client,
            token,
            TokenWatch(
                client=client,
                token=token,
                report=report,
                accepted=partial(_retry, assembly),
                learned=redact,
            ),
            SleepWatch(
                [
                    client.resumed,
                    partial(_hurry, assembly.uploader),
                    *([assembly.publisher.resumed] if assembly.publisher else []),
                ]
            ),
            report,
            assembly.nursery,
            verifier_of(assembly, volume, store, keys, report, mends=not chosen.read_only),
            assembly.publisher,
            assembly.fence,
            assembly.collector,
            assembly.eraser,
        )
        assembly.uploader.freed = _trim_malloc
        await _serve(parts, volume, sorted_options, ready, assembly.nursery)
    left = parts.blocks.room.dirty_bytes, len(parts.blocks.queue)
    log.info("unmounted volume=%s left_bytes=%d left_blocks=%d", volume.name, *left)
    Notifier().status(_last_words(*left, told=not parts.discord_age_s()))


def _last_words(left_bytes: int, left_blocks: int, *, told: bool) -> str:
    """What `systemctl status` shows of a mount that has ended."""
    if left_bytes:
        left = f"{format_size(left_bytes)} in {left_blocks} blocks are"
    elif told:
        return "Unmounted; Discord has everything"
    else:
        left = "names or attributes are"
    return f"Unmounted; {left} not on Discord yet, the next start goes on"


def _retry(assembly: Assembly) -> None:
    """What waits after failures tries at once: their cause may be gone."""
    assembly.uploader.wake()
    if assembly.publisher is not None:
        assembly.publisher.retry_now()


async def _hurry(uploader: Uploader) -> None:
    """After a sleep of the machine: the network may be another one."""
    uploader.wake()


async def _serve(
    parts: Parts,
    volume: VolumeDir,
    options: MountOptions,
    ready: Callable[[], None],
    nursery: trio.Nursery,
) -> None:
    settings = parts.settings
    metrics = parts.metrics
    notifier = Notifier()
    operations = StashcordOperations(
        parts.filesystem,
        attr_timeout_s=settings.attr_timeout_s,
        report=parts.report,
        metrics=metrics,
        shown=options.shown,
    )
    session = Session(operations, parts.mountpoint, options=options.kernel)
    parts.trash.named = operations.named
    if parts.eraser is not None:
        parts.eraser.unnamed = operations.unnamed
    control = Control(parts, session, notifier, metrics)
    if settings.metrics_port:
        await nursery.start(control.serve_health, settings.metrics_port)
    with session.mounted():
        for task in (
            parts.durability.run_commits,
            parts.durability.run_syncs,
            parts.uploader.run,
            parts.settler.run_watch,
            *([] if options.read_only else [parts.trash.run]),
            *([parts.eraser.run] if parts.eraser else []),
            parts.blocks.run_spares,
            parts.token_watch.run,
            parts.sleep.run,
            operations.interrupts.run,
            *([parts.publisher.run] if parts.publisher else []),
            *([parts.collector.run] if parts.collector and settings.gc_share else []),
        ):
            nursery.start_soon(_supervise, parts, task)
        await nursery.start(control.serve, volume.control_path)
        nursery.start_soon(control.watch_signals)
        log.info("mounted volume=%s at=%s", parts.name, parts.mountpoint)
        notifier.ready(f"Mounted at {parts.mountpoint}")
        ready()
        await session.serve()
        parts.state = "stopping"
        notifier.stopping()


async def _supervise(parts: Parts, task: Callable[[], Awaitable[None]]) -> None:
    """Run a background task for ever: the second and last place that catches everything.

    A fault in the uploader must not take the mount along.
    """
    delay_s = 1.0
    while True:
        started = trio.current_time()
        try:
            await task()
        except StashcordError as error:
            parts.report(f"{task.__qualname__}: {error}")
        except Exception as error:
            log.exception("background task failed task=%s", task.__qualname__)
            parts.report(f"{task.__qualname__} failed: {error!r}")
        parts.metrics.task_failures.labels(task.__qualname__).inc()
        if trio.current_time() - started > _LONGEST_RESTART_S:
            delay_s = 1.0
        await trio.sleep(delay_s)
        delay_s = min(delay_s * 2, _LONGEST_RESTART_S)
