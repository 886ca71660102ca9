"""What `mount -o` takes, sorted: for the kernel, for the handlers, for the file system.

Settings (`config`) are not among it: the cli has taken them out before.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stashcordfs.errors import UsageError
from stashcordfs.fuse.operations import Shown
from stashcordfs.volumes import FSNAME_PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping

# Passed on to libfuse, which tells the kernel or fusermount3.
_FLAGS = frozenset(
    {"allow_other", "allow_root", "ro", "noatime", "nodev", "dev", "nosuid", "suid", "noexec",
     "exec", "dirsync", "sync", "auto_unmount"}
)  # fmt: skip
_OURS = ("default_permissions", "gid", "noallow_other", "nodiratime", "relatime", "rw", "uid",
         "umask")  # fmt: skip
# Of mount(8), systemd.mount(5) and desktops: about when and by whom, which is decided by now.
_OTHERS = frozenset(
    {"_netdev", "_rnetdev", "async", "atime", "auto", "defaults", "diratime", "group", "helper",
     "noauto", "nofail", "nogroup", "noowner", "nouser", "nousers", "owner", "uhelper", "user",
     "users"}
)  # fmt: skip
_OTHER_PREFIXES = ("x-", "X-", "comment")
_ID_MAX = (1 << 32) - 2


@dataclass(frozen=True, slots=True)
class MountOptions:
    """`kernel`: as libfuse wants them. `shown`: None where files are shown as they are."""

    kernel: frozenset[str]
    shown: Shown | None
    atime: str
    read_only: bool


def sort_options(
    name: str, options: Mapping[str, str | bool], *, is_root: bool | None = None
) -> MountOptions:
    """Sort them. UsageError for one that is not known, or whose value is wrong.

    Root's mounts are for all users, as those of other file systems are: the kernel checks every
    access by the files' own rights. Another user's are the user's alone unless `allow_other` is
    given, since whoever serves a mount can keep its users waiting.
    """
    root = os.geteuid() == 0 if is_root is None else is_root
    flags = {
        option
        for option in options
        if option not in _OTHERS and not option.startswith(_OTHER_PREFIXES)
    }
    unknown = sorted(flags - _FLAGS - set(_OURS))
    if unknown:
        known = ", ".join(sorted(_FLAGS | set(_OURS)))
        raise UsageError(f"-o {unknown[0]}: unknown mount option; known: {known}, and all settings")
    kernel = {f"fsname={FSNAME_PREFIX}{name}", "subtype=stashcordfs", "default_permissions"}
    kernel |= flags & _FLAGS
    if root and not flags & {"allow_root", "noallow_other"}:
        kernel.add("allow_other")
    read_only = "ro" in flags
    atime = "nodiratime" if "nodiratime" in flags else "relatime"
    if read_only or "noatime" in flags:
        atime = "noatime"
    return MountOptions(frozenset(kernel), _shown(options), atime, read_only)


def _shown(options: Mapping[str, str | bool]) -> Shown | None:
    chosen = Shown(
        uid=_number(options, "uid", base=10, most=_ID_MAX),
        gid=_number(options, "gid", base=10, most=_ID_MAX),
        umask=_number(options, "umask", base=8, most=0o777),
    )
    return None if chosen == Shown() else chosen


def _number(options: Mapping[str, str | bool], name: str, *, base: int, most: int) -> int | None:
    if name not in options:
        return None
    text = options[name]
    digits = "[0-7]+" if base == 8 else "[0-9]+"
    if not isinstance(text, str) or not re.fullmatch(digits, text) or int(text, base) > most:
        example = "022" if base == 8 else "1000"
        raise UsageError(f"-o {name}: write a number, such as {name}={example}")
    return int(text, base)
