"""POSIX access control lists, as far as they are the file system's to keep: no I/O.

The kernel checks them; here they are kept in step with the mode and given to what is made in a
folder with a default list (acl(5); POSIX 1003.1e draft 17). A list is the kernel's extended
attribute: version 2, then entries of tag, permissions and id (linux/posix_acl_xattr.h).
"""

from __future__ import annotations

import errno
import stat
import struct
from typing import NamedTuple

from stashcordfs.errors import FsError

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_RIGHTS = 0o777


class _Entry(NamedTuple):
    tag: int
    rights: int
    who: int


def _parsed(value: bytes) -> list[_Entry]:
    """The entries. FsError EINVAL for what is no list; its meaning the kernel has checked."""
    body = value[4:]
    if value[:4] != _VERSION or not body or len(body) % _ENTRY.size:
        raise FsError(errno.EINVAL)
    return [_Entry(*fields) for fields in _ENTRY.iter_unpack(body)]


def _packed(entries: list[_Entry]) -> bytes:
    return _VERSION + b"".join(_ENTRY.pack(*entry) for entry in entries)


def _shift(entries: list[_Entry], tag: int) -> int | None:
    """Where an entry's rights stand in a mode: the group's bits are the mask's, if there is one."""
    if tag == _USER_OBJ:
        return 6
    if tag == _OTHER:
        return 0
    masked = any(entry.tag == _MASK for entry in entries)
    return 3 if tag == (_MASK if masked else _GROUP_OBJ) else None


def _is_mode_alone(entries: list[_Entry]) -> bool:
    return all(entry.tag in {_USER_OBJ, _GROUP_OBJ, _OTHER} for entry in entries)


def with_list(value: bytes, mode: int) -> tuple[int, bytes | None]:
    """The mode under this access list, and the list; None when the mode says all of it."""
    entries = _parsed(value)
    mode &= ~_RIGHTS
    for entry in entries:
        shift = _shift(entries, entry.tag)
        if shift is not None:
            mode |= (entry.rights & 7) << shift
    return mode, None if _is_mode_alone(entries) else value


def with_mode(value: bytes, mode: int) -> bytes:
    """The access list after a chmod."""
    entries = _parsed(value)
    changed = []
    for entry in entries:
        shift = _shift(entries, entry.tag)
        rights = entry.rights if shift is None else mode >> shift & 7
        changed.append(entry._replace(rights=rights))
    return _packed(changed)


def inherited(default: bytes, mode: int) -> tuple[int, dict[bytes, bytes]]:
    """The mode and the lists of what is made with `mode` in a folder that has this default list."""
    entries = _parsed(default)
    lists: dict[bytes, bytes] = {}
    allowed = 0
    masked = []
    for entry in entries:
        shift = _shift(entries, entry.tag)
        if shift is None:
            masked.append(entry)
        else:
            rights = entry.rights & mode >> shift & 7
            allowed |= rights << shift
            masked.append(entry._replace(rights=rights))
    if not _is_mode_alone(entries):
        lists[ACCESS] = _packed(masked)
    if stat.S_ISDIR(mode):
        lists[DEFAULT] = default
    return mode & ~_RIGHTS | allowed, lists
