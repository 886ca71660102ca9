"""An independent client, discord.py, works against the sandbox as against Discord."""

from __future__ import annotations

import asyncio
import io
import warnings
from typing import TYPE_CHECKING, Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # discord.py's own imports of modules that are to go
    discord = pytest.importorskip("discord")
    from discord import http as discord_http

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def talk(sandbox, monkeypatch, conversation: Callable[[Any, Any], Awaitable[None]]) -> None:
    monkeypatch.setattr(discord_http.Route, "BASE", sandbox.api_url)

    async def run() -> None:
        async with discord.Client(intents=discord.Intents.none()) as client:
            await client.login(sandbox.token)
            channel = await client.fetch_channel(int(sandbox.channel_ids[0]))
            await conversation(client, channel)

    asyncio.run(run())


def test_upload_read_edit_list_delete(sandbox, monkeypatch):
    async def conversation(client, channel):
        data = bytes(range(256)) * 1000
        files = [discord.File(io.BytesIO(data), f"{n}.bin") for n in range(3)]
        sent = await channel.send(files=files, nonce="one")
        assert sent.author.id == client.user.id
        assert await sent.attachments[1].read() == data
        edited = await sent.edit(attachments=[sent.attachments[2]])
        assert [one.filename for one in edited.attachments] == ["2.bin"]
        more = [await channel.send(str(n)) for n in range(3)]
        listed = [one.id async for one in channel.history(limit=10, oldest_first=True)]
        assert listed == [sent.id, *(one.id for one in more)]
        after = [one.id async for one in channel.history(after=sent)]
        assert after == [one.id for one in more]
        await sent.delete()
        await channel.delete_messages(more[:2])
        assert [one.id async for one in channel.history()] == [more[2].id]
        with pytest.raises(discord.NotFound) as gone:
            await channel.fetch_message(sent.id)
        assert gone.value.code == 10008

    talk(sandbox, monkeypatch, conversation)
    assert sandbox.stats()["rate_limited"]["provoked"] == 0


def test_a_429_is_waited_for(sandbox, monkeypatch):
    async def conversation(_client, channel):
        sandbox.faults(
            {"route": "create_message", "kind": "rate_limit", "retry_after": 0.01},
            {"route": "create_message", "kind": "rate_limit", "scope": "global", "retry_after": 0},
        )
        assert (await channel.send("x")).content == "x"

    talk(sandbox, monkeypatch, conversation)
    assert sandbox.stats()["rate_limited"] == {"provoked": 0, "injected": 2}
    assert sandbox.stats()["messages"] == 1


def test_more_creates_than_a_window_holds(sandbox, monkeypatch):
    async def conversation(_client, channel):
        await asyncio.gather(*(channel.send(str(n)) for n in range(6)))

    talk(sandbox, monkeypatch, conversation)
    assert sandbox.stats()["messages"] == 6


def test_a_wrong_token_is_told(sandbox, monkeypatch):
    sandbox.token = "wrong"
    with pytest.raises(discord.LoginFailure):
        talk(sandbox, monkeypatch, None)
