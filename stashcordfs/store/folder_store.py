"""A store in a local folder: a directory per message. For tests, and for a drive as the cloud.

Deterministic: ids count up. A message appears whole or not at all (rename of a directory).
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import (
    LocalDiskError,
    ObjectCorrupt,
    ObjectMissing,
    StashcordError,
    TooLarge,
)
from stashcordfs.store.api import MAX_RECORD_BYTES, RECORD_PREFIX, Page
from stashcordfs.store.limits import LearnedLimits
from stashcordfs.types import Location

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path
    from typing import TypeVar

    from stashcordfs.store.api import Uploadable
    from stashcordfs.types import Limits

    T = TypeVar("T")

_NONCE = ".nonce"
_CHANNEL = 1
_PAGE = 100


class FolderStore:
    """An ObjectStore in `folder`. `accepts` is what this store refuses beyond, if given."""

    def __init__(
        self, folder: Path, *, limits: Limits | None = None, accepts: Limits | None = None
    ) -> None:
        """Open or make the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._learned = LearnedLimits(limits)
        self._accepts = accepts
        self._lock = trio.Lock()

    @property
    def limits(self) -> Limits:
        """What one message may carry now."""
        return self._learned.limits

    async def ping(self) -> None:
        """A folder is always there."""
        await trio.lowlevel.checkpoint()

    async def put(self, packs: Sequence[Uploadable], *, nonce: str) -> list[Location]:
        """Write one message; a nonce that is known answers with the message it made."""
        sizes = [pack.size for pack in packs]
        if self._accepts and (
            max(sizes) > self._accepts.max_attachment_bytes
            or sum(sizes) > self._accepts.max_request_bytes
        ):
            if not self._learned.too_large(sizes):
                raise StashcordError("the store refuses even the smallest message")
            raise TooLarge("the store refuses a message of this size", status=413)
        return await self._post([(p.filename, p.parts) for p in packs], nonce)

    def doubtful(self, nonce: str) -> bool:  # noqa: ARG002 - as the protocol has it
        """Nothing arrives late in a folder."""
        return False

    async def fetch(self, location: Location, start: int, length: int) -> bytes:
        """Exactly these bytes."""
        return await self._run(lambda: self._read(location, start, length))

    async def newest_id(self) -> int:
        """The highest id in use."""
        return await self._run(lambda: max(self._ids(), default=0))

    async def find(self, after: int, names: Collection[str]) -> dict[str, Location]:
        """Those of the named files that stand in messages after this id."""
        return {at.filename: at for at in await self.find_all(after, names)}

    async def find_all(self, after: int, names: Collection[str]) -> list[Location]:
        """Each occurrence of them, oldest first."""

        def scan() -> list[Location]:
            return [
                location
                for number in self._ids()
                if number > after
                for location in self._locations(number)
                if location.filename in names
            ]

        return await self._run(scan)

    async def listed(self, after: int) -> list[Location]:
        """Every file of messages after this id, oldest first."""

        def scan() -> list[Location]:
            late = [number for number in self._ids() if number > after]
            return [location for number in late for location in self._locations(number)]

        return await self._run(scan)

    @property
    def channels(self) -> Sequence[int]:
        """There is one."""
        return (_CHANNEL,)

    def age_s(self, message: int) -> float:  # noqa: ARG002 - as the protocol has it
        """Here nothing becomes too old."""
        return 0.0

    async def page(self, channel: int, after: int, *, own: bool = False) -> Page:  # noqa: ARG002
        """What messages after this id carry."""

        def scan() -> Page:
            ids = [number for number in self._ids() if number > after][:_PAGE]
            found = [location for number in ids for location in self._locations(number)]
            return Page(found, ids[-1] if len(ids) == _PAGE else None)

        return await self._run(scan)

    async def page_back(self, before: int | None) -> Page:
        """What messages before this id carry."""

        def scan() -> Page:
            ids = [number for number in self._ids() if before is None or number < before][-_PAGE:]
            found = [location for number in ids for location in self._locations(number)]
            return Page(found, ids[0] if len(ids) == _PAGE else None)

        return await self._run(scan)

    async def attachments(self, channel: int, message: int) -> list[Location] | None:  # noqa: ARG002
        """What one message carries now; None when there is no such message."""

        def look() -> list[Location] | None:
            return self._locations(message) if message in self._ids() else None

        return await self._run(look)

    async def post_record(self, data: bytes, filename: str) -> Location:
        """Write the volume's record."""
        return (await self._post([(filename, [data])], f"record {filename}"))[0]

    async def find_records(self) -> list[bytes]:
        """What bears a record's name, oldest first."""

        def scan() -> list[bytes]:
            return [
                self._path(location).read_bytes()
                for number in self._ids()
                for location in self._locations(number)
                if location.filename.startswith(RECORD_PREFIX)
                and location.size_bytes <= MAX_RECORD_BYTES
            ]

        return await self._run(scan)

    async def link(self, location: Location) -> str:
        """The file's path."""
        return str(self._path(location))

    async def serves(self, link: str) -> bool:
        """Whether the file is there."""
        return await self._run(lambda: os.access(link, os.F_OK))

    async def delete(self, messages: Sequence[tuple[int, int]]) -> None:
        """Remove messages; one that is gone already is no error."""
        for _, number in messages:
            await self._run(lambda n=number: shutil.rmtree(self._folder / str(n), True))  # type: ignore[misc]

    async def _post(
        self, files: Sequence[tuple[str, Sequence[bytes]]], nonce: str
    ) -> list[Location]:
        async with self._lock:
            return await self._run(lambda: self._write(files, nonce))

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await trio.to_thread.run_sync(work)
        except FileNotFoundError as error:
            raise ObjectMissing(f"not in the store any more: {error.filename}") from error
        except OSError as error:
            raise LocalDiskError(error.errno or 5) from error

    def _write(self, files: Sequence[tuple[str, Sequence[bytes]]], nonce: str) -> list[Location]:
        ids = self._ids()
        for number in reversed(ids):
            if (self._folder / str(number) / _NONCE).read_text() == nonce:
                return self._locations(number)
        number = max(ids, default=0) + 1
        making = self._folder / f".{number}"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        (making / _NONCE).write_text(nonce)
        for at, (name, parts) in enumerate(files):
            with (making / f"{at}.{name}").open("wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
        making.rename(self._folder / str(number))
        return self._locations(number)

    def _ids(self) -> list[int]:
        return sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdigit())

    def _locations(self, number: int) -> list[Location]:
        files = [p for p in (self._folder / str(number)).iterdir() if p.name != _NONCE]
        named = sorted((int(at), name, p) for p in files for at, _, name in [p.name.partition(".")])
        return [Location(_CHANNEL, number, at, name, p.stat().st_size) for at, name, p in named]

    def _path(self, location: Location) -> Path:
        return self._folder / str(location.message) / f"{location.attachment}.{location.filename}"

    def _read(self, location: Location, start: int, length: int) -> bytes:
        with self._path(location).open("rb") as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            raise ObjectCorrupt("an object is shorter than recorded")
        return data
