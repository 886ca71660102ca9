"""A refused token: what is sent, what is told, and how another one is taken up."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from stashcordfs.config import load_settings
from stashcordfs.daemon.token import Token, TokenWatch
from stashcordfs.errors import UsageError
from stashcordfs.store.discord_store import DiscordStore

sys.path += [str(Path(__file__).resolve().parents[1] / name) for name in ("support", "vfs")]
from harness import BLOCK, volume
from in_process import Server


async def at_once(call):
    """The virtual clock does not wait for threads."""
    await trio.lowlevel.checkpoint()
    return call()


class Place:
    """Where the token is kept, as settings name it; and a watch over a server in this process."""

    def __init__(self, folder: Path, reference: str = "") -> None:
        self.file = folder / "token"
        self.environ = {"HOME": str(folder), "STASHCORDFS_TOKEN": reference or f"file:{self.file}"}
        self.server = Server(folder / "server", rate_limits=False)
        self.keep(self.server.token)
        self.reports: list[str] = []
        self.learned: list[str] = []
        self.accepted = trio.Event()
        self.uploader = None

    def keep(self, value: str) -> None:
        self.file.write_text(f"{value}\n")
        self.file.chmod(0o600)

    def token(self) -> Token:
        settings = partial(load_settings, environ=self.environ, is_root=False)
        return Token(settings(), again=settings, environ=self.environ)

    def woken(self) -> None:
        if self.uploader is not None:
            self.uploader.wake()
        self.accepted.set()
        self.accepted = trio.Event()

    @asynccontextmanager
    async def watched(self):
        token = self.token()
        async with self.server.client(token=token) as client, trio.open_nursery() as nursery:
            watch = TokenWatch(
                client=client,
                token=token,
                report=self.reports.append,
                accepted=self.woken,
                learned=self.learned.append,
                in_thread=at_once,
            )
            nursery.start_soon(watch.run)
            yield watch, client
            nursery.cancel_scope.cancel()


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


async def refused(client) -> None:
    with pytest.raises(Exception, match="token"):
        await client.current_user()


async def test_a_token_put_into_the_file_is_taken_up_and_uploads_are_woken(
    place, autojump_clock
) -> None:
    async with place.watched() as (watch, client):
        await client.current_user()
        assert watch.status() == {"token": "accepted", "token_retry_s": 0.0, "token_advice": ""}
        place.server.token = "a.new-token"
        await refused(client)
        told = watch.status()
        assert told["token"] == "rejected"
        assert 0 < told["token_retry_s"] <= 5
        assert str(place.file) in told["token_advice"]
        place.keep("a.new-token")
        begun = trio.current_time()
        await place.accepted.wait()
        assert trio.current_time() - begun <= 5
        assert watch.status()["token"] == "accepted"
        assert place.learned == ["a.new-token"]
        await client.current_user()
    assert "a.new-token" not in str(place.reports) + repr(client.gate)


async def test_the_same_token_valid_again_is_noticed(place, autojump_clock) -> None:
    async with place.watched() as (watch, client):
        old = place.server.token
        place.server.token = "another"
        await refused(client)
        await trio.sleep(200)
        place.server.token = old
        begun = trio.current_time()
        await place.accepted.wait()
        assert trio.current_time() - begun <= 60
        assert watch.status()["token"] == "accepted"


async def test_a_token_refused_for_a_day_costs_one_request_a_minute(place, autojump_clock) -> None:
    async with place.watched() as (_, client):
        place.server.token = "another"
        await refused(client)
        await trio.sleep(86_400)
        assert client.stats.invalid == len(place.server.asked) <= 1445


async def test_a_new_token_that_is_refused_too_is_told_and_the_next_one_taken(
    place, autojump_clock
) -> None:
    async with place.watched() as (watch, client):
        place.server.token = "good"
        await refused(client)
        place.keep("bad")
        await trio.sleep(6)
        assert watch.status()["token"] == "rejected"
        place.keep("good")
        await place.accepted.wait()
        assert watch.status()["token"] == "accepted"


async def test_a_file_that_cannot_be_read_is_told_and_the_token_stays(
    place, autojump_clock
) -> None:
    async with place.watched() as (watch, client):
        place.server.token = "another"
        await refused(client)
        place.file.chmod(0o644)
        await trio.sleep(6)
        assert "chmod 600" in watch.status()["token_advice"]
        place.keep("another")
        await place.accepted.wait()


async def test_without_a_network_nothing_is_believed_refused(place, autojump_clock) -> None:
    async with place.watched() as (watch, client):
        place.server.cut = True
        with pytest.raises(Exception, match="no connection"):
            await client.current_user()
        assert watch.status()["token"] == "untried"
        assert place.reports == []


async def test_a_command_is_run_again_once_a_minute(tmp_path, autojump_clock) -> None:
    runs = tmp_path / "runs"
    script = tmp_path / "print-token"
    script.write_text(f"#!/bin/sh\necho x >> {runs}\ncat {tmp_path}/token\n")
    script.chmod(0o700)
    place = Place(tmp_path, f"cmd:{script}")
    async with place.watched() as (watch, client):
        place.server.token = "another"
        await refused(client)
        assert "command" in watch.status()["token_advice"]
        await trio.sleep(600)
        assert 10 <= len(runs.read_text().split()) <= 12
        place.keep("another")
        await place.accepted.wait()


@pytest.mark.parametrize("reference", ["env:BOT", "plain:old", "old"])
async def test_a_token_of_the_environment_is_said_to_be_fixed(
    tmp_path, reference, autojump_clock
) -> None:
    place = Place(tmp_path, reference)
    place.environ["BOT"] = "old"
    async with place.watched() as (watch, client):
        await refused(client)
        await trio.sleep(60)
        assert "cannot change while mounted" in watch.status()["token_advice"]
        place.server.token = "old"
        await place.accepted.wait()


def test_a_token_in_the_settings_file_can_change(tmp_path) -> None:
    config = tmp_path / "config.toml"
    environ = {"HOME": str(tmp_path), "STASHCORDFS_CONFIG": str(config)}
    settings = partial(load_settings, environ=environ, is_root=False)
    config.touch(0o600)
    with pytest.raises(UsageError, match="not set"):
        Token(settings())
    config.write_text('token = "first.text"')
    token = Token(settings(), again=settings, environ=environ)
    config.write_text('token = "second.text"')
    assert (token(), token.resolve(), token.fixed) == ("first.text", "second.text", False)
    assert "settings file" in token.advice
    assert ".text" not in repr(token) + token.advice


def test_a_service_s_credential_is_changed_by_a_restart(tmp_path) -> None:
    (tmp_path / "token").write_text("text", encoding="utf-8")
    environ = {
        "HOME": str(tmp_path),
        "STASHCORDFS_TOKEN": "credential:token",
        "CREDENTIALS_DIRECTORY": str(tmp_path),
    }
    token = Token(load_settings(environ=environ, is_root=False), environ=environ)
    assert "LoadCredential= names, then restart" in token.advice
    assert "read again" not in token.advice


async def test_the_mount_goes_on_and_what_was_written_is_sent_with_the_new_token(
    place, tmp_path, autojump_clock
) -> None:
    channels = [place.server.channel]
    data = bytes(range(256)) * (BLOCK // 128)
    async with place.watched() as (_, client):
        store = DiscordStore(client, channels=channels, journal_channel=channels[0])
        (tmp_path / "v").mkdir()
        async with volume(tmp_path / "v", other_store=store) as made:
            place.uploader = made.uploader
            place.server.token = "a.new-token"
            ino = await made.make(b"file", data)
            await client.gate.wait_rejected()  # threads: the virtual clock outruns them
            await trio.sleep(3600)
            assert await made.read(ino) == data
            assert made.blocks.room.dirty_bytes
            asked = len(place.server.asked)
            assert asked <= 70
            place.keep("a.new-token")
            await place.accepted.wait()
            await made.uploader.flush()
            assert not made.blocks.room.dirty_bytes
