"""SIGTERM ends a mount, whatever becomes of the drain."""

from __future__ import annotations

from types import SimpleNamespace

from stashcordfs.daemon.control import Control
from stashcordfs.errors import StashcordError
from stashcordfs.ops.notify import Notifier


async def test_a_drain_that_fails_does_not_keep_the_mount_from_ending(monkeypatch, caplog) -> None:
    stopped = []
    parts = SimpleNamespace(
        stats=SimpleNamespace(bytes_streamed=0, bytes_received=0),
        uploader=SimpleNamespace(state=SimpleNamespace(uploaded_bytes=0)),
        blocks=SimpleNamespace(room=SimpleNamespace(dirty_bytes=7)),
    )
    session = SimpleNamespace(stop=lambda: stopped.append(True))
    control = Control(parts, session, Notifier({}), None)

    async def drain(_request):
        yield {}
        raise StashcordError("another machine has taken over")

    monkeypatch.setattr(control, "_drain", drain)
    await control._drain_and_stop()
    assert stopped == [True]
    assert "stopping: another machine has taken over" in caplog.text
    assert "stopping with 7 bytes unsent" in caplog.text
