"""What a running mount answers on its control socket, to signals, and to health probes."""

from __future__ import annotations

import logging
import signal
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from stashcordfs.daemon.collecting import collecting
from stashcordfs.daemon.purging import plan_purge, purging
from stashcordfs.daemon.trashing import empty_trash, list_trash, restore_trash
from stashcordfs.daemon.verifying import verifying
from stashcordfs.errors import ContentLost, StashcordError
from stashcordfs.ops.control import serve_control
from stashcordfs.ops.health import HealthSources, serve_health
from stashcordfs.types import ROOT_INO, Ino

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from stashcordfs.daemon.mounted import Parts
    from stashcordfs.fuse.session import Session
    from stashcordfs.ops.metrics import Metrics
    from stashcordfs.ops.notify import Notifier

log = logging.getLogger(__name__)

_DRAIN_ON_SIGNAL_S = 3600.0
_STALLED_S = 30.0  # by bytes, so that a slow line is not taken for none
_PROGRESS_EVERY_S = 0.2
_HAND_OVER_S = 30.0


async def _hand_over(mountpoint: Path) -> None:
    """Let the kernel hand over what was written to files that are still open.

    Else it would drop that when the mount is detached. By another process: this one would wait for
    itself.
    """
    try:
        process = await trio.lowlevel.open_process(["sync", "-f", "--", str(mountpoint)])
    except OSError as error:
        log.warning("written data is not asked for: sync: %s", error.strerror)
        return
    try:  # not `run_process`, which waits for the process's end however long that takes
        with trio.move_on_after(_HAND_OVER_S) as scope:
            await process.wait()
        if scope.cancelled_caught:
            log.warning("written data was not handed over within %.0f s", _HAND_OVER_S)
    finally:
        if process.returncode is None:
            process.kill()


class Control:
    """Commands of one mount. Every answer is a dict; long ones are streams of dicts."""

    def __init__(
        self, parts: Parts, session: Session, notifier: Notifier, metrics: Metrics
    ) -> None:
        """Take the mount's parts."""
        self._parts = parts
        self._session = session
        self._notifier = notifier
        self._metrics = metrics
        self._told_to_stop = False
        self._reloading = trio.Lock()

    async def serve(
        self,
        path: Path,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Answer on the socket at `path` until cancelled."""
        await serve_control(
            path,
            {
                "status": self._status,
                "open_for_writing": self._open_for_writing,
                "sync": self._sync,
                "drain": self._drain,
                "verify": self._verify,
                "trash_list": partial(list_trash, self._parts.trash),
                "trash_restore": partial(restore_trash, self._parts.trash),
                "trash_empty": partial(empty_trash, self._parts.trash),
                "purge_plan": partial(plan_purge, self._parts.eraser),
                "purge": self._purge,
                "gc": self._gc,
                "shutdown": self._shutdown,
            },
            task_status=task_status,
        )

    async def _status(self, request: dict[str, Any]) -> dict[str, object]:
        return self._parts.status()

    async def _below(self, request: dict[str, Any]) -> Ino:
        path = str(request.get("path", "")).encode("utf-8", "surrogateescape")
        return await self._parts.filesystem.resolve(path) if path else ROOT_INO

    async def _open_for_writing(self, request: dict[str, Any]) -> dict[str, object]:
        paths = await self._parts.filesystem.open_for_writing(await self._below(request))
        return {"paths": [path.decode("utf-8", "surrogateescape") for path in paths]}

    async def _sync(self, request: dict[str, Any]) -> AsyncIterator[dict[str, object]]:
        async for event in self._flush(await self._below(request)):
            yield event

    async def _drain(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, object], None]:
        # Nothing of ours gets there any more, or nothing was written; what is here stays here.
        if self._parts.fenced or self._parts.publisher is None:
            yield self._progress()
            return
        self._parts.state = "draining"
        try:
            await _hand_over(self._parts.mountpoint)
            async for event in self._flush(ROOT_INO, closing=True):
                self._notifier.status(f"Draining, {event['pending_bytes']} bytes left")
                self._notifier.extend_timeout(30)
                yield event
        finally:
            self._parts.state = "mounted"

    async def _flush(
        self, below: Ino, *, closing: bool = False
    ) -> AsyncIterator[dict[str, object]]:
        """Upload, telling how much is left. Ends when Discord has what was dirty at the call.

        `closing`: the unmount is next. What cannot be sent is told in the last event then, under
        `left`, and is no failure.
        """
        done = trio.Event()
        failed: list[StashcordError] = []
        left = ""
        if self._parts.fenced:
            raise StashcordError(self._parts.fenced)

        async def flush() -> None:
            nonlocal left
            try:
                try:
                    await self._parts.filesystem.sync_remote(below)
                except ContentLost as error:
                    if not closing:
                        raise
                    left = str(error)
                if closing and self._parts.publisher is not None:
                    await self._parts.publisher.finish()
            except StashcordError as error:  # the caller's to hear, not the mount's end
                failed.append(error)
            done.set()

        # The work runs in the mount's own nursery: an async generator must not hold one open
        # over a yield. A client that goes away cancels its flush by the scope.
        scope = trio.CancelScope()

        async def scoped() -> None:
            with scope:
                await flush()

        self._parts.nursery.start_soon(scoped)
        try:
            while not done.is_set():
                yield self._progress()
                with trio.move_on_after(_PROGRESS_EVERY_S):
                    await done.wait()
        finally:
            scope.cancel()
        if failed:
            raise StashcordError(self._parts.fenced or str(failed[0]))
        yield {**self._progress(), "left": left}

    def _progress(self) -> dict[str, object]:
        state = self._parts.uploader.state
        return {
            "pending_bytes": self._parts.blocks.room.dirty_bytes,
            "pending_packs": state.pending_packs,
            "uploaded_bytes": state.uploaded_bytes,
            "last_error": self._parts.report.last_error,
        }

    async def _verify(self, request: dict[str, Any]) -> AsyncIterator[dict[str, object]]:
        part = request.get("part")
        events = verifying(
            self._parts.verifier,
            self._parts.nursery,
            data=bool(request.get("data")),
            part=(int(part[0]), int(part[1])) if part else None,
        )
        async with aclosing(events):
            async for event in events:
                yield event

    async def _purge(self, request: dict[str, Any]) -> AsyncIterator[dict[str, object]]:
        events = purging(self._parts.eraser, self._parts.nursery, request)
        async with aclosing(events):
            async for event in events:
                yield event

    async def _gc(self, request: dict[str, Any]) -> AsyncIterator[dict[str, object]]:
        collector = self._parts.collector
        if collector is None:
            raise StashcordError("this mount is read-only: nothing is collected here")
        events = collecting(collector, self._parts.nursery)
        async with aclosing(events):
            async for event in events:
                yield event

    async def _shutdown(self, request: dict[str, Any]) -> dict[str, object]:
        self._session.stop()
        return {"stopping": True}

    async def watch_signals(self) -> None:
        """SIGTERM and SIGINT drain and unmount (twice: unmount at once); SIGHUP looks again."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            async with trio.open_nursery() as nursery:
                async for number in received:
                    if number == signal.SIGHUP:
                        nursery.start_soon(self._reload)
                    elif self._told_to_stop:
                        log.warning("told twice to stop: unmounting without draining")
                        self._session.stop()
                    else:
                        self._told_to_stop = True
                        nursery.start_soon(self._drain_and_stop)

    async def _drain_and_stop(self) -> None:
        """Drain while anything gets through: without a network a shutdown must not wait for it."""
        try:
            with trio.move_on_after(_DRAIN_ON_SIGNAL_S):
                await self._drain_while_it_moves()
        except StashcordError as error:  # such as another machine's taking over meanwhile
            log.warning("stopping: %s", error)
        if left := self._parts.blocks.room.dirty_bytes:
            log.warning("stopping with %d bytes unsent; the next mount goes on", left)
        self._session.stop()

    async def _drain_while_it_moves(self) -> None:
        moved_s, seen = trio.current_time(), self._gone_through()
        async with aclosing(self._drain({})) as events:
            async for _ in events:
                if (now := self._gone_through()) != seen:
                    moved_s, seen = trio.current_time(), now
                elif trio.current_time() - moved_s >= _STALLED_S:
                    log.warning("stopping: nothing got through for %.0f s", _STALLED_S)
                    break

    def _gone_through(self) -> tuple[int, int, int]:
        stats = self._parts.stats
        return (
            stats.bytes_streamed,
            stats.bytes_received,
            self._parts.uploader.state.uploaded_bytes,
        )

    async def _reload(self) -> None:
        async with self._reloading:
            self._notifier.reloading()
            await self._parts.reload()
            self._notifier.ready(f"Mounted at {self._parts.mountpoint}")

    async def serve_health(
        self, port: int, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer /metrics and /health on loopback. UsageError when the port cannot be had."""
        await serve_health(
            port,
            HealthSources(
                metrics=self._render,
                status=self._parts.status,
                ready=lambda: self._parts.state == "mounted",
            ),
            task_status=task_status,
        )

    def _render(self) -> bytes:
        """The gauges are read when they are asked for: nothing is counted twice."""
        parts, metrics = self._parts, self._metrics
        metrics.cache_bytes.set(parts.blocks.room.used_bytes)
        metrics.dirty_bytes.set(parts.blocks.room.dirty_bytes)
        verified = parts.verifier.state
        metrics.damaged_blocks.set(verified.damaged_blocks)
        metrics.missing_packs.set(verified.missing_packs)
        metrics.missing_objects.set(verified.missing_objects)
        metrics.pending_packs.set(parts.uploader.state.pending_packs)
        metrics.unsettled_uploads.set(parts.settler.unsettled)
        metrics.oldest_unsettled_seconds.set(parts.settler.oldest_unsettled_s())
        metrics.oldest_dirty_seconds.set(parts.uploader.oldest_dirty_s())
        metrics.discord_age_seconds.set(parts.discord_age_s())
        stats, uploads = parts.stats, parts.uploader.state
        metrics.token_rejected.set(parts.client.gate.rejected)
        if (collector := parts.collector) is not None:
            found = collector.total
            metrics.history_bytes.set(found.history_bytes)
            metrics.garbage_bytes.set(found.dead_bytes + found.condemned_bytes)
            metrics.follow(metrics.collected_bytes, found.deleted_bytes)
            metrics.follow(metrics.gc_requests, collector.account.requests)
        for counter, total in (
            (metrics.requests, stats.requests),
            (metrics.rate_limited, stats.rate_limited),
            (metrics.invalid_requests, stats.invalid),
            (metrics.messages, stats.messages_sent),
            (metrics.sent_bytes, stats.bytes_sent),
            (metrics.received_bytes, stats.bytes_received),
            (metrics.uploaded_bytes, uploads.uploaded_bytes),
            (metrics.upload_failures, uploads.failures),
            (metrics.suspends, parts.sleep.suspends),
        ):
            metrics.follow(counter, total)
        return metrics.render()
