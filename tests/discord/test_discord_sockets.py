"""What only a real connection shows: early answers, resets, reuse. A few lines of HTTP by hand."""

from __future__ import annotations

import gc
import json
import weakref
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from stashcordfs import errors
from stashcordfs.discord.cdn import fetch_range
from stashcordfs.discord.client import DiscordClient, UploadFile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Handler = Callable[[trio.SocketStream, bytes], Awaitable[bool]]

MESSAGE = json.dumps({"id": "900", "author": {"id": "1"}, "attachments": []}).encode()


def answer(status: int, body: bytes, **headers: str) -> bytes:
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body


class Served:
    def __init__(self, client: DiscordClient, url: str) -> None:
        self.client, self.url, self.connections = client, url, 0


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[Served]:
    """A server that calls `handler(stream, bytes so far)` after each request's head."""

    async def connection(stream: trio.SocketStream) -> None:
        serving.connections += 1
        async with stream:
            try:
                while True:
                    data = b""
                    while b"\r\n\r\n" not in data:
                        piece = await stream.receive_some(65536)
                        if not piece:
                            return
                        data += piece
                    if not await handler(stream, data):
                        return
            except trio.BrokenResourceError:
                return

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, connection, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        client = DiscordClient(api_url=url, token=lambda: "t", timeout_s=10.0)
        serving = Served(client, url)
        async with client:
            yield serving
        nursery.cancel_scope.cancel()


async def whole(stream: trio.SocketStream, data: bytes) -> bytes:
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    while len(body) < length:
        body += await stream.receive_some(1 << 20)
    return body


async def test_an_answer_given_before_the_body_is_read_is_heard() -> None:
    async def early(stream: trio.SocketStream, data: bytes) -> bool:
        await stream.send_all(answer(413, b'{"code": 40005, "message": "big"}'))
        return False

    async with served(early) as serving:
        with pytest.raises(errors.TooLarge):
            await serving.client.create_message(7, [UploadFile("a", [bytes(20 << 20)])], nonce="n")


async def test_a_reset_after_the_body_is_settled_by_the_nonce() -> None:
    bodies: list[bytes] = []

    async def first_time_lost(stream: trio.SocketStream, data: bytes) -> bool:
        bodies.append(await whole(stream, data))
        if len(bodies) == 1:
            return False
        await stream.send_all(answer(200, MESSAGE))
        return True

    async with served(first_time_lost) as serving:
        content = bytes(range(256)) * 10_000
        message = await serving.client.create_message(
            7, [UploadFile("a", [content[:999], memoryview(content)[999:]])], nonce="n"
        )
    assert message.id == 900
    assert bodies[0] == bodies[1]
    assert content in bodies[0]


async def plain(stream: trio.SocketStream, data: bytes) -> bool:
    if data.startswith(b"GET /file"):
        await stream.send_all(answer(206, bytes(50), **{"Content-Range": "bytes 10-59/100"}))
    else:
        await stream.send_all(answer(200, b'{"id": "1", "username": "b"}'))
    return True


async def test_connections_are_used_again() -> None:
    async with served(plain) as serving:
        for _ in range(3):
            await serving.client.current_user()
            assert await fetch_range(serving.client, serving.url + "/file", 10, 50) == bytes(50)
    assert serving.connections == 2


async def test_a_whole_file_that_is_not_wanted_is_not_downloaded() -> None:
    sent = 0

    async def ignores_ranges(stream: trio.SocketStream, data: bytes) -> bool:
        nonlocal sent
        assert b"authorization" not in data.lower()
        await stream.send_all(b"HTTP/1.1 200 X\r\nContent-Length: 268435456\r\n\r\n")
        for _ in range(256):
            await stream.send_all(bytes(1 << 20))
            sent += 1
        return True

    async with served(ignores_ranges) as serving:
        assert await fetch_range(serving.client, serving.url + "/f", 1000, 5000) == bytes(5000)
        await trio.testing.wait_all_tasks_blocked()
    assert sent < 100


async def test_a_cancelled_upload_leaves_the_client_usable() -> None:
    begun = trio.Event()

    async def never_reads(stream: trio.SocketStream, data: bytes) -> bool:
        if data.startswith(b"POST"):
            begun.set()
            await trio.sleep_forever()
        await stream.send_all(answer(200, b'{"id": "1", "username": "b"}'))
        return True

    async with served(never_reads) as serving:
        async with trio.open_nursery() as nursery:
            file = UploadFile("a", [bytes(64 << 20)])
            nursery.start_soon(partial(serving.client.create_message, 7, [file], nonce="n"))
            await begun.wait()
            nursery.cancel_scope.cancel()
        assert (await serving.client.current_user()).id == 1


async def test_after_a_sleep_no_old_connection_is_used() -> None:
    async with served(plain) as serving:
        for _ in range(2):
            await serving.client.current_user()
            assert await fetch_range(serving.client, serving.url + "/file", 10, 50) == bytes(50)
            await serving.client.resumed()
    assert serving.connections == 4


async def test_an_answer_that_will_never_come_is_not_waited_for_after_a_sleep() -> None:
    asked = trio.Event()

    async def deaf_once(stream: trio.SocketStream, data: bytes) -> bool:
        if not asked.is_set():
            asked.set()
            await trio.sleep_forever()
        await stream.send_all(answer(200, b'{"id": "1", "username": "b"}'))
        return True

    async with served(deaf_once) as serving, trio.open_nursery() as nursery:
        nursery.start_soon(serving.client.current_user)
        await asked.wait()
        await serving.client.resumed()
    assert serving.connections == 2


class Part(bytearray):
    """Bytes of an attachment whose end can be seen."""


async def test_what_was_sent_is_given_back_at_once() -> None:
    """httpx's answers and streams hold each other: 25 MiB must not wait for the collector."""

    async def handler(stream: trio.SocketStream, data: bytes) -> bool:
        await whole(stream, data)
        await stream.send_all(answer(200, MESSAGE, **{"Content-Type": "application/json"}))
        return True

    async with served(handler) as serving:
        gc.disable()
        try:
            part = Part(b"x" * 1000)
            sent = weakref.ref(part)
            await serving.client.create_message(7, [UploadFile("a", [part])], nonce="n")
            del part
            assert sent() is None
        finally:
            gc.enable()
