"""Ranges from the CDN: the bytes asked for, whole, or an error. Never short, never shifted.

Works with a server that honours Range (206), that ignores it (200 with the whole file: the start
is skipped, the rest not read), and with one that hangs up in the middle (resumed where it broke).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

import httpx

from stashcordfs.errors import DiscordRefused, DiscordUnavailable, LinkExpired

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractAsyncContextManager

_STALLS = 3  # attempts in a row that brought nothing
_ATTEMPTS = 20
_FIRST_DELAY_S = 0.25
_LONGEST_WAIT_S = 10.0
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class RangeSource(Protocol):
    """DiscordClient, as far as it concerns the CDN."""

    def stream_cdn(
        self, url: str, headers: Mapping[str, str]
    ) -> AbstractAsyncContextManager[httpx.Response]: ...

    async def pause(self, seconds: float) -> None: ...


class _Fill:
    """A buffer being filled from its start."""

    def __init__(self, length: int) -> None:
        self.target = bytearray(length)
        self.got = 0

    def full(self) -> bool:
        return self.got >= len(self.target)

    def take(self, piece: bytes, skip: int) -> int:
        """Append what is wanted of a piece; the bytes that are still to be skipped."""
        if skip >= len(piece):
            return skip - len(piece)
        wanted = memoryview(piece)[skip : skip + len(self.target) - self.got]
        self.target[self.got : self.got + len(wanted)] = wanted
        self.got += len(wanted)
        return 0


async def fetch_range(source: RangeSource, url: str, start: int, length: int) -> bytes:
    """`length` bytes from `start`; LinkExpired on 403 and 404, DiscordRefused beyond the end.

    Temporary failures are repeated a few times, then DiscordUnavailable. Whoever waits for it sets
    a deadline of their own (trio's cancel scopes); cancelling closes the connection.
    """
    fill = _Fill(length)
    stalls = 0
    for _ in range(_ATTEMPTS):
        if fill.full():
            return bytes(fill.target)
        before = fill.got
        problem = DiscordUnavailable("CDN: the answer ended early")
        try:
            await _pull(source, url, start, fill)
        except DiscordUnavailable as error:
            problem = error
        if fill.full():
            continue
        stalls = 0 if fill.got > before else stalls + 1
        wait = problem.retry_after_s or _FIRST_DELAY_S * 2**stalls
        if stalls >= _STALLS or wait > _LONGEST_WAIT_S:
            raise problem
        if stalls:
            await source.pause(wait)
    if fill.full():
        return bytes(fill.target)
    raise DiscordUnavailable("CDN: the answer ended early again and again")


async def _pull(source: RangeSource, url: str, start: int, fill: _Fill) -> None:
    first, last = start + fill.got, start + len(fill.target) - 1
    headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
    async with source.stream_cdn(url, headers) as response:
        skip = _admit(response, first, last)
        surplus = response.status_code == 200 and _length(response) > last + 1
        try:
            # The loop never raises or breaks: an abandoned iterator of httpx's would be finalised
            # by the garbage collector, which trio cannot do cleanly.
            async for piece in response.aiter_raw():
                skip = fill.take(piece, skip)
                if fill.full() and surplus and not response.is_closed:
                    await response.aclose()  # the rest of the file is not wanted
        except (httpx.HTTPError, httpx.StreamError):
            if not fill.full():
                raise


def _admit(response: httpx.Response, first: int, last: int) -> int:
    """Check the answer's head; the number of bytes to skip before `first`."""
    status = response.status_code
    if status in (403, 404):
        raise LinkExpired("CDN: the link is not served any more", status=status)
    if status not in (200, 206, 416):
        _refuse(response)
    if response.headers.get("content-encoding", "identity") != "identity":
        raise DiscordUnavailable("CDN: the answer is encoded though it must not be")
    if status == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
        if match is None or int(match[1]) != first:
            raise DiscordUnavailable("CDN: the answer is of another range than asked for")
        end = last + 1 if match[3] == "*" else int(match[3])
    else:
        end = _length(response) if status == 200 else 0
    if end <= last:
        raise DiscordRefused("CDN: the attachment is shorter than recorded", status=416)
    return first if status == 200 else 0


def _refuse(response: httpx.Response) -> None:
    status = response.status_code
    if status == 429 or status >= 500:
        try:
            retry: float | None = float(response.headers["retry-after"])
        except (KeyError, ValueError):
            retry = None
        raise DiscordUnavailable(f"CDN: HTTP {status}", retry_after_s=retry)
    raise DiscordRefused(f"CDN: HTTP {status}", status=status)


def _length(response: httpx.Response) -> int:
    """The announced length; unknown is as good as endless, the body itself will tell."""
    text = response.headers.get("content-length", "")
    return int(text) if text.isdigit() else 1 << 62
