"""Volumes as this machine sees them: STATE/NAME, its record, its lock, and where it is mounted.

Local and pure: it knows no journal, no keys and no network. The cli and the daemon both use it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from stashcordfs.errors import StashcordError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FSTYPE = "fuse.stashcordfs"
FSNAME_PREFIX = "discord:"  # of a mount's source: a name and a colon look like a network place
_PAST = "at-"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.05


class VolumeBusy(StashcordError):
    """Another process holds the volume's lock. `pid` is 0 when it is unknown."""

    def __init__(self, message: str, *, pid: int) -> None:
        super().__init__(message)
        self.pid = pid


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """What mkfs and recover keep, so that mounting needs no configuration file."""

    uuid: str
    channels: tuple[int, ...]
    journal_channel: int
    api_url: str
    block_size: int


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount of a volume, from /proc/self/mountinfo."""

    name: str
    mountpoint: Path
    device: str  # "major:minor", as st_dev and /sys/fs/fuse/connections know it


def check_name(name: str) -> str:
    """Return the name, or raise: it becomes a directory, a unit instance and a mount's source."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UsageError(
            f"{name!r} is no volume name: use 1 to 64 letters, digits, dots, dashes, underscores"
        )
    return name


@dataclass(frozen=True, slots=True)
class VolumeDir:
    """STATE/NAME and the names in it."""

    state_dir: Path
    name: str

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def path(self) -> Path:
        return self.state_dir / self.name

    @property
    def mount_name(self) -> str:
        """What its mount is called in the table of mounts."""
        return self.name

    def past(self, at_ns: int) -> PastDir:
        """Where a mount of the volume's state at that time keeps its own."""
        when = (_EPOCH + timedelta(microseconds=at_ns // 1000)).strftime("%Y%m%dT%H%M%S.%fZ")
        return PastDir(self.path, f"{_PAST}{when}")

    def all_past(self) -> list[PastDir]:
        """Such places that are there, in use or left by a killed process."""
        return [PastDir(self.path, path.name) for path in sorted(self.path.glob(f"{_PAST}*Z"))]

    @property
    def record_path(self) -> Path:
        return self.path / "volume.json"

    @property
    def lock_path(self) -> Path:
        return self.path / "lock"

    @property
    def control_path(self) -> Path:
        return self.path / "control.sock"

    @property
    def log_path(self) -> Path:
        return self.path / "log"

    @property
    def journal_path(self) -> Path:
        return self.path / "journal.sqlite"

    @property
    def limits_path(self) -> Path:
        return self.path / "limits.json"

    @property
    def blocks_path(self) -> Path:
        return self.path / "blocks"

    def exists(self) -> bool:
        return self.record_path.is_file()

    def create(self) -> None:
        """Make the directory, its owner's alone. A directory that is there already is no error."""
        self.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)

    def read_record(self) -> VolumeRecord:
        try:
            raw = json.loads(self.record_path.read_text(encoding="utf-8"))
            return VolumeRecord(
                uuid=str(raw["uuid"]),
                channels=tuple(int(channel) for channel in raw["channels"]),
                journal_channel=int(raw["journal_channel"]),
                api_url=str(raw["api_url"]),
                block_size=int(raw["block_size"]),
            )
        except FileNotFoundError:
            raise UsageError(
                f"no volume named {self.name} in {self.state_dir}: "
                "see stashcordfs list, or make one with stashcordfs mkfs"
            ) from None
        except OSError as error:
            why = f"{self.record_path} cannot be read: {error.strerror}"
            raise StashcordError(why) from error
        except (ValueError, KeyError, TypeError) as error:
            raise StashcordError(f"{self.record_path} cannot be read: {error!r}") from error

    def write_record(self, record: VolumeRecord) -> None:
        """Write it whole or not at all."""
        self.create()
        raw = asdict(record)
        raw["channels"] = [str(channel) for channel in record.channels]  # ids exceed 2**53
        raw["journal_channel"] = str(record.journal_channel)
        temporary = self.record_path.with_suffix(".new")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(raw, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.record_path)
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @contextmanager
    def lock(self, *, pause: Callable[[float], None] = time.sleep) -> Iterator[None]:
        """Hold the volume for this process, or raise VolumeBusy. Freed when the process ends."""
        self.create()
        descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            for left in reversed(range(_LOCK_TRIES)):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not left:  # until here it may have been `holder` looking
                        pid = _read_pid(descriptor)
                        raise VolumeBusy(
                            f"volume {self.name} is in use by process {pid or 'unknown'}: "
                            "is it mounted already? See stashcordfs status",
                            pid=pid,
                        ) from None
                    pause(_LOCK_PAUSE_S)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """The pid that holds the lock (0: unknown), None when nobody does."""
        try:
            descriptor = os.open(self.lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_pid(descriptor)
        else:
            return None
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Remove all local state of the volume. The caller holds the lock and has asked."""
        shutil.rmtree(self.path)


@dataclass(frozen=True, slots=True)
class PastDir(VolumeDir):
    """STATE/NAME/at-TIME: what a mount of the past needs, removed when it ends."""

    @property
    def when(self) -> str:
        """The time, as ISO 8601 has it."""
        return self.name.removeprefix(_PAST)

    @property
    def mount_name(self) -> str:
        """The volume's name and the time."""
        return f"{self.state_dir.name}@{self.when}"


def volume_of(state_dir: Path, mount_name: str) -> VolumeDir:
    """The state behind a mount's name."""
    name, is_past, when = mount_name.partition("@")
    volume = VolumeDir(state_dir, name)
    return PastDir(volume.path, f"{_PAST}{when}") if is_past else volume


def _read_pid(descriptor: int) -> int:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else 0


def list_volumes(state_dir: Path) -> list[VolumeDir]:
    """All volumes below `state_dir`, by name."""
    if not state_dir.is_dir():
        return []
    found = [path.parent for path in state_dir.glob("*/volume.json")]
    return [VolumeDir(state_dir, path.name) for path in sorted(found)]


def read_mounts(mountinfo: Path = Path("/proc/self/mountinfo")) -> list[Mount]:
    """Mounts of our volumes, in the order they were made (the last one at a place is on top)."""
    text = mountinfo.read_text(encoding="utf-8", errors="surrogateescape")
    return [mount for line in text.splitlines() if (mount := parse_mount(line))]


def parse_mount(line: str) -> Mount | None:
    """One line of mountinfo, None when it is no mount of ours."""
    left, separator, right = line.partition(" - ")
    if not separator:
        return None
    fields, tail = left.split(" "), right.split(" ")
    if len(fields) < 6 or len(tail) < 2 or tail[0] != FSTYPE:
        return None
    source = unescape(tail[1])
    if not source.startswith(FSNAME_PREFIX):
        return None
    return Mount(source.removeprefix(FSNAME_PREFIX), Path(unescape(fields[4])), fields[2])


def unescape(text: str) -> str:
    r"""A path of mountinfo or maps: the kernel writes blanks and backslashes in it as \\ooo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mount_holding(path: Path, mounts: list[Mount]) -> Mount | None:
    """The innermost mount of ours that `path` (absolute, without links) lies in or is."""
    holding = [mount for mount in mounts if path.is_relative_to(mount.mountpoint)]
    return max(reversed(holding), key=lambda mount: len(mount.mountpoint.parts), default=None)
