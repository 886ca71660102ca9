from __future__ import annotations

import os
import threading
from contextlib import contextmanager

import pytest
import trio

from stashcordfs.ops.control import serve_control
from stashcordfs.volumes import VolumeDir, VolumeRecord


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """What this machine keeps of a volume, and no setting of the user's."""
    for name in list(os.environ):
        if name.startswith("STASHCORDFS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STASHCORDFS_STATE_DIR", str(tmp_path / "state"))
    volume = VolumeDir(tmp_path / "state", "v")
    volume.write_record(VolumeRecord("uuid-1", (11,), 11, "https://x/api/v10", 1 << 20))
    return volume


@pytest.fixture
def answering():
    """A control socket for a volume that answers a command with events; the requests it got."""

    @contextmanager
    def answer(volume, command, *events):
        ready = threading.Event()
        inside: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []
        got: list[dict[str, object]] = []

        async def handle(request):
            got.append(request)
            for event in events:
                yield event

        async def serve() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_control, volume.control_path, {command: handle})
                inside.append((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
                ready.set()

        thread = threading.Thread(target=trio.run, args=(serve,))
        thread.start()
        assert ready.wait(10)
        try:
            yield got
        finally:
            token, scope = inside[0]
            token.run_sync_soon(scope.cancel)
            thread.join(10)

    return answer
