"""A copy in a folder: names, modes, times, attributes, links and holes as the volume has them.

A file is written under a name of its own, synced, dropped from the page cache and read back, and
then takes its place. Nothing is written through a symbolic link, and nothing is replaced or removed
that no earlier run has made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from hashlib import sha256
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import ObjectCorrupt, UsageError
from stashcordfs.recovery.export.copying import PIECE_BYTES, Outcome, Refused
from stashcordfs.recovery.export.manifest import Copied, Entry, Log, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MANIFEST = "stashcordfs-manifest.jsonl"
_PART = b".stashcordfs-part-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class FolderTarget:
    """The target of `Copy`."""

    def __init__(self, folder: Path, outcome: Outcome) -> None:
        """`folder` need not exist. `outcome` hears what could not be kept."""
        self._path = folder
        self._folder = os.fsencode(folder)
        self._outcome = outcome
        self._log = Log(folder / MANIFEST)
        self._known: dict[bytes, Copied] = {}
        self._is_root = os.geteuid() == 0

    async def load(self, manifest: Manifest) -> None:
        """As `Target` has it. UsageError: the folder holds other things, and no copy."""
        await trio.to_thread.run_sync(self._load, manifest)

    def _load(self, manifest: Manifest) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        try:
            found = self._log.load(manifest)
        except ObjectCorrupt as error:
            raise UsageError(f"{self._path}: {error}") from error
        if not found and any(self._path.iterdir()):
            raise UsageError(f"{self._path} is not empty, and holds no copy to go on with")
        self._log.begin(manifest)
        self._known = manifest.copied

    def _at(self, path: bytes) -> bytes:
        if path == os.fsencode(MANIFEST):
            raise Refused("the name of the copy's own manifest")
        return b"%b/%b" % (self._folder, path)

    async def has(self, copied: Copied) -> bool:
        """As `Target` has it: kind, size and time."""
        return await trio.to_thread.run_sync(self._has, copied)

    def _has(self, copied: Copied) -> bool:
        entry = copied.entry
        try:
            found = os.lstat(self._at(entry.path))
        except OSError:
            return False
        if stat.S_IFMT(found.st_mode) != stat.S_IFMT(entry.mode):
            return False
        if entry.target is not None:
            return os.readlink(self._at(entry.path)) == entry.target
        if not stat.S_ISREG(entry.mode):
            return True
        return (found.st_size, found.st_mtime_ns) == (entry.size, entry.mtime_ns)

    # ------------------------------------------------------------------ making

    async def begin(self, entry: Entry) -> _FileWriter:
        """As `Target` has it."""
        return await trio.to_thread.run_sync(lambda: _FileWriter(self._at(entry.path)))

    async def clear(self, entry: Entry, known: Copied | None) -> None:
        """As `Target` has it. A folder that is there is taken as it is."""
        await trio.to_thread.run_sync(self._clear, entry, known)

    def _clear(self, entry: Entry, known: Copied | None) -> None:
        place = self._at(entry.path)
        try:
            found = os.lstat(place)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode) and stat.S_ISDIR(entry.mode):
            return
        if known is None:
            raise Refused("something that is not of this copy stands in its place")
        if stat.S_ISDIR(found.st_mode) and not stat.S_ISDIR(entry.mode):
            self._remove_tree(place, entry.path)
        elif not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(entry.mode):
            os.unlink(place)  # a regular file is replaced at once

    def _remove_tree(self, place: bytes, path: bytes) -> None:
        """A folder of an earlier run in whose place something else stands now."""
        for folder, _, names in os.walk(place):
            for name in names:
                inside = os.path.relpath(os.path.join(folder, name), place)
                if b"%b/%b" % (path, inside) not in self._known:
                    raise Refused("a folder with things that are not of this copy is in its place")
        shutil.rmtree(place)

    async def make(self, entry: Entry) -> None:
        """As `Target` has it."""
        await trio.to_thread.run_sync(self._make, entry)

    def _make(self, entry: Entry) -> None:
        place = self._at(entry.path)
        if stat.S_ISDIR(entry.mode):
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISDIR(os.lstat(place).st_mode):
                    os.chmod(place, 0o700)  # its own mode comes last
                    return
        try:
            if stat.S_ISDIR(entry.mode):
                os.mkdir(place, 0o700)
            elif entry.target is not None:
                os.symlink(entry.target, place)
            else:
                os.mknod(place, stat.S_IFMT(entry.mode) | 0o600, entry.rdev)
        except PermissionError as error:
            raise Refused("only root can make it here; the manifest tells of it") from error
        except OSError as error:
            raise _judged(error) from error

    async def link(self, entry: Entry, first: Copied) -> Copied:
        """As `Target` has it."""

        def work() -> None:
            place = self._at(entry.path)
            part = _part_of(place)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            try:
                os.link(self._at(first.entry.path), part, follow_symlinks=False)
                os.rename(part, place)
            except OSError as error:
                raise _judged(error) from error
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part)  # also where both were one file already

        await trio.to_thread.run_sync(work)
        return Copied(entry, first.sha256, link=first.entry.path)

    # ------------------------------------------------------------------ attributes

    async def dress(self, copied: Copied) -> None:
        """As `Target` has it."""
        await trio.to_thread.run_sync(self._dress, copied.entry)

    def _dress(self, entry: Entry) -> None:
        place = self._at(entry.path)
        if self._is_root:
            self._try(
                "owners", lambda: os.chown(place, entry.uid, entry.gid, follow_symlinks=False)
            )
        elif entry.uid != os.geteuid():
            self._outcome.not_kept["owners"] += 1
        for name, value in entry.xattrs:
            self._try(
                "extended attributes",
                lambda n=name, v=value: os.setxattr(place, n, v, follow_symlinks=False),  # type: ignore[misc]
            )
        if not stat.S_ISLNK(entry.mode):
            mode = stat.S_IMODE(entry.mode)
            self._try("modes", lambda: os.chmod(place, mode))
        times = (entry.atime_ns, entry.mtime_ns)
        self._try("times", lambda: os.utime(place, ns=times, follow_symlinks=False))

    def _try(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError:
            self._outcome.not_kept[what] += 1

    # ------------------------------------------------------------------ the rest

    async def remove(self, copied: Copied) -> None:
        """As `Target` has it. A folder goes only when it is empty."""

        def work() -> None:
            place = self._at(copied.entry.path)
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISDIR(os.lstat(place).st_mode):
                    os.rmdir(place)
                else:
                    os.unlink(place)

        await trio.to_thread.run_sync(work)

    async def note(self, copied: Copied, *, gone: bool = False) -> None:
        """As `Target` has it."""
        self._log.add(copied, gone=gone)

    async def finish(self, manifest: Manifest) -> None:
        """As `Target` has it."""

        def work() -> None:
            self._log.begin(manifest)
            self._log.close()
            os.sync()  # names and attributes, too

        await trio.to_thread.run_sync(work)


class _FileWriter:
    def __init__(self, place: bytes) -> None:
        self._place = place
        self._part = _part_of(place)
        self._size = 0
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._part)  # of a run that was cut short
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(self._part, flags, 0o600)
        except OSError as error:
            raise _judged(error) from error

    async def write(self, data: bytes) -> None:
        """As `Writer` has it. Zeros become a hole."""
        if data.count(0) != len(data):
            await trio.to_thread.run_sync(self._write, data, self._size)
        self._size += len(data)

    def _write(self, data: bytes, offset: int) -> None:
        left = memoryview(data)
        try:
            while left:
                done = os.pwrite(self._file, left, offset)
                left, offset = left[done:], offset + done
        except OSError as error:
            raise _judged(error) from error

    async def finish(self, digest: bytes) -> str:
        """As `Writer` has it."""
        await trio.to_thread.run_sync(self._finish, digest)
        return ""

    def _finish(self, digest: bytes) -> None:
        try:
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
            found, at = sha256(), 0
            while data := os.pread(self._file, PIECE_BYTES, at):
                found.update(data)
                at += len(data)
        except OSError as error:
            raise _judged(error) from error
        if found.digest() != digest:
            raise Refused("what was written reads back otherwise: is the target's disk healthy?")
        os.rename(self._part, self._place)
        os.close(self._file)
        self._file = -1

    async def abandon(self) -> None:
        """As `Writer` has it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._part)


def _part_of(place: bytes) -> bytes:
    """The same each time, so that a run that was cut short leaves nothing that stays."""
    folder, _, name = place.rpartition(b"/")
    return b"%b/%b%b" % (folder, _PART, sha256(name).hexdigest()[:24].encode())


def _judged(error: OSError) -> Refused | UsageError:
    """A full or read-only disk ends the copy; all else is this entry's."""
    text = error.strerror or str(error)
    return UsageError(f"the target: {text}") if error.errno in _FULL else Refused(text)
