"""One HTTP exchange, and the one place where httpx's exceptions are translated.

What a failure means depends on how far the request came: before its last byte was handed over the
server cannot have carried it out. Error texts name the kind of failure only: httpx's own texts may
quote URLs (a link's signature is a secret) or header values (the token is one).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import trio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stashcordfs.discord.multipart import MultipartBody

# httpx logs each request's whole URL at INFO, signature included; httpcore logs headers at DEBUG.
logging.getLogger("httpx").setLevel(logging.WARNING)
logging.getLogger("httpcore").setLevel(logging.WARNING)

_NEVER_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.LocalProtocolError,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
    httpx.ProxyError,
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete HTTP answer. Header names in lower case; `data` is None when it is not JSON."""

    status: int
    headers: Mapping[str, str]
    data: object
    is_json: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """No answer. `certain`: the server cannot have carried the request out."""

    reason: str
    certain: bool
    cut_upload: bool = False  # the connection broke while the body was on its way


Outcome = Answer | Failure

DROPPED = "the connection was dropped, since the machine has slept"


def dropped(body: MultipartBody | None) -> Failure:
    """What came of an exchange whose connection we have closed ourselves."""
    return Failure(DROPPED, certain=body is not None and not body.whole)


def reason_of(error: Exception) -> str:
    """A failure in words that hold no URL, header or body."""
    name = type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return f"timed out ({name})"
    if isinstance(error, httpx.ConnectError):
        return "no connection to the server; check the network and the URL's host and port"
    if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
        return f"the connection broke ({name})"
    return f"the request could not be made ({name})"


def _failure(error: Exception, body: MultipartBody | None) -> Failure:
    cut = body is not None and not body.whole and not isinstance(error, _NEVER_SENT)
    return Failure(
        reason_of(error),
        certain=cut or isinstance(error, _NEVER_SENT),
        cut_upload=cut and isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError),
    )


async def exchange(
    http: httpx.AsyncClient, request: httpx.Request, *, body: MultipartBody | None, limit_s: float
) -> Outcome:
    """Send one request and read the whole answer, within `limit_s` all told."""
    try:
        with trio.move_on_after(limit_s):
            response = await http.send(request)
            return _answer(response)
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        return _failure(error, body)
    return Failure(f"took longer than {limit_s:.0f} s", certain=body is not None and not body.whole)


def _answer(response: httpx.Response) -> Answer:
    headers = {name.lower(): value for name, value in response.headers.items()}
    try:
        data, is_json = json.loads(response.content), True
    except ValueError:
        data, is_json = None, False
    return Answer(response.status_code, headers, data, is_json)
