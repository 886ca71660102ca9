"""Request bodies: JSON, or multipart streamed to disk. Never a whole file in memory."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from stashcordfs.sandbox.errors import ApiError, form_error
from stashcordfs.sandbox.store import Upload

if TYPE_CHECKING:
    from pathlib import Path

    from python_multipart.multipart import MultipartCallbacks
    from starlette.requests import Request

_FILE_PART = re.compile(r"(?:files\[(\d)\]|file(\d?))")
_FIELD_BYTES = 1024 * 1024


@dataclass(slots=True)
class Form:
    payload: dict[str, Any] = field(default_factory=dict)
    files: list[Upload] = field(default_factory=list)
    multipart: bool = False

    def discard(self) -> None:
        """Remove what was not taken over by the store."""
        for upload in self.files:
            upload.path.unlink(missing_ok=True)


async def drain(request: Request) -> None:
    """Read what is left of a body, so that the client can finish and read its answer."""
    with contextlib.suppress(RuntimeError, ClientDisconnect):  # read to its end already, or gone
        async for _ in request.stream():
            pass


async def read_form(
    request: Request, incoming: Path, *, request_bytes: int, file_bytes: int
) -> Form:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if int(request.headers.get("content-length") or 0) > request_bytes:
        await drain(request)
        raise ApiError(413, 40005, "Request entity too large")
    if kind == b"multipart/form-data" and options.get(b"boundary"):
        return await _Reader(incoming, options[b"boundary"], request_bytes, file_bytes).read(
            request
        )
    if kind not in (b"application/json", b"application/x-www-form-urlencoded"):
        await drain(request)
        raise form_error("_misc", "CONTENT_TYPE_INVALID", 'Expected "Content-Type" header')
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > request_bytes:
            await drain(request)
            raise ApiError(413, 40005, "Request entity too large")
    if kind == b"application/json":
        return Form(_object(bytes(body)))
    fields: dict[str, Any] = dict(parse_qsl(body.decode("utf-8", "replace")))
    return Form(_object(fields["payload_json"].encode()) if "payload_json" in fields else fields)


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        raise ApiError(400, 50109, "The request body contains invalid JSON.") from None
    if not isinstance(value, dict):
        raise form_error("_misc", "DICT_TYPE_CONVERT", "Only dictionaries may be used")
    return value


class _Reader:
    """One multipart body on its way in."""

    def __init__(
        self, incoming: Path, boundary: bytes, request_bytes: int, file_bytes: int
    ) -> None:
        self._incoming = incoming
        self._request_bytes = request_bytes
        self._file_bytes = file_bytes
        self._form = Form(multipart=True)
        self._headers: dict[str, str] = {}
        self._name = bytearray()
        self._value = bytearray()
        self._text: bytearray | None = None
        self._file: IO[bytes] | None = None
        self._path = incoming
        self._size = 0
        self._too_large = False
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)

    async def read(self, request: Request) -> Form:
        total = 0
        try:
            async for piece in request.stream():
                total += len(piece)
                self._too_large |= total > self._request_bytes
                if not self._too_large:
                    self._parser.write(piece)
            if not self._too_large:
                self._parser.finalize()
        except FormParserError:
            self._abort()
            await drain(request)
            raise ApiError(400, 50006, "Cannot send an empty message") from None
        except BaseException:
            self._abort()
            raise
        if self._too_large:
            self._abort()
            raise ApiError(413, 40005, "Request entity too large")
        return self._form

    def _abort(self) -> None:
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
        self._form.discard()

    def _begin(self) -> None:
        self._headers = {}

    def _header(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = self._value.decode("utf-8", "replace")
        self._name, self._value = bytearray(), bytearray()

    def _options(self) -> dict[bytes, bytes]:
        return parse_options_header(self._headers.get("content-disposition", ""))[1]

    def _open(self) -> None:
        if b"filename" in self._options():
            self._path = self._incoming / secrets.token_hex(12)
            self._file = self._path.open("xb", buffering=0)
            self._size = 0
        else:
            self._text = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._text is not None:
            self._text += data[start:end]
            self._too_large |= len(self._text) > _FIELD_BYTES
        elif self._file is not None and not self._too_large:
            self._size += end - start
            self._too_large |= self._size > self._file_bytes
            self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        options = self._options()
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._text is not None:
            if name == "payload_json":
                self._form.payload = _object(bytes(self._text))
            elif name == "content":
                self._form.payload.setdefault("content", self._text.decode("utf-8", "replace"))
            self._text = None
        elif self._file is not None:
            self._file.close()
            self._file = None
            match = _FILE_PART.fullmatch(name)
            part = (match[1] or match[2] or "0") if match else str(len(self._form.files))
            self._form.files.append(
                Upload(
                    self._path,
                    part,
                    options[b"filename"].decode("utf-8", "replace"),
                    self._size,
                    self._headers.get("content-type", "application/octet-stream"),
                )
            )
