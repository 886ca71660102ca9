"""Upload bodies: multipart/form-data streamed from buffers that are never joined.

A body can be iterated any number of times, each time from its start: a retry that goes on with an
exhausted stream would store an attachment of zero bytes with status 200. Its length is known
before, so nothing is sent chunked.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

_PIECE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class UploadFile:
    """One attachment: its bytes are the parts, back to back."""

    filename: str
    parts: Sequence[bytes | memoryview]

    @property
    def size_bytes(self) -> int:
        return sum(memoryview(part).nbytes for part in self.parts)


def message_payload(
    files: Sequence[UploadFile], *, nonce: str, payload: Mapping[str, object] | None
) -> dict[str, object]:
    """The JSON of a create: the caller's fields, then those that keep it safe to repeat."""
    return {
        **(payload or {}),
        "nonce": nonce,
        "enforce_nonce": True,
        "allowed_mentions": {"parse": []},
        "attachments": [
            {"id": number, "filename": file.filename} for number, file in enumerate(files)
        ],
    }


class MultipartBody:
    """The body of one create; `whole` tells whether the last iteration was taken to its end."""

    def __init__(self, payload: Mapping[str, object], files: Sequence[UploadFile]) -> None:
        boundary = f"stashcordfs-{secrets.token_hex(16)}"
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self.whole = False
        self.taken: Callable[[int], None] = lambda _: None  # told of each piece's bytes
        self._segments: list[memoryview] = []
        self._text(
            f"--{boundary}\r\n"
            'Content-Disposition: form-data; name="payload_json"\r\n'
            "Content-Type: application/json\r\n\r\n"
            f"{json.dumps(payload)}\r\n"
        )
        for number, file in enumerate(files):
            if not file.filename.isprintable() or '"' in file.filename or "\\" in file.filename:
                raise ValueError("an attachment's name has characters that a header cannot carry")
            self._text(
                f"--{boundary}\r\n"
                f'Content-Disposition: form-data; name="files[{number}]"; '
                f'filename="{file.filename}"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n"
            )
            self._segments += [memoryview(part).cast("B") for part in file.parts if len(part)]
            self._text("\r\n")
        self._text(f"--{boundary}--\r\n")
        self.size_bytes = sum(segment.nbytes for segment in self._segments)

    def _text(self, text: str) -> None:
        self._segments.append(memoryview(text.encode()))

    def _pieces(self) -> Iterator[memoryview]:
        for segment in self._segments:
            for start in range(0, segment.nbytes, _PIECE_BYTES):
                yield segment[start : start + _PIECE_BYTES]

    def __aiter__(self) -> AsyncIterator[bytes]:
        self.whole = False
        return _Walk(self, self._pieces())


class Sending(httpx.AsyncByteStream):
    """One attempt to send a body. The sender takes `body` out when the attempt has ended.

    httpx's requests, answers and streams hold each other in circles: what hangs on one of them
    stays until the garbage collector comes by, and these are 25 MiB.
    """

    def __init__(self, body: MultipartBody) -> None:
        self.body: MultipartBody | None = body

    def __aiter__(self) -> AsyncIterator[bytes]:
        if self.body is None:
            raise httpx.StreamConsumed
        return aiter(self.body)


class _Walk:
    """One iteration. No generator: an upload that breaks off would leave it suspended, to be
    finalised by the garbage collector, which trio cannot do cleanly.
    """

    def __init__(self, body: MultipartBody, pieces: Iterator[memoryview]) -> None:
        self._body = body
        self._pieces = pieces

    def __aiter__(self) -> _Walk:
        return self

    async def __anext__(self) -> bytes:
        for piece in self._pieces:
            self._body.taken(piece.nbytes)
            return piece  # type: ignore[return-value]  # h11 joins any buffer, uncopied
        self._body.whole = True
        raise StopAsyncIteration
