"""POSIX's rules for names, once, over an engine: no SQL, no I/O, no clock.

Every rule checks first and writes then, so that a refusal has changed nothing. Errors come in the
order that POSIX and Linux give them. Permissions are not checked here: the kernel does, as the
mount has `default_permissions`.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

from stashcordfs.errors import FsError
from stashcordfs.types import ROOT_INO, Attributes, Ino

if TYPE_CHECKING:
    from collections.abc import Callable

    from stashcordfs.journal.engine import Engine

NAME_MAX = 255
Owner = tuple[int, int]  # uid and gid of who makes something
LINK_MAX = 65_000  # of files, ext4's bound; as there, folders may hold any number of folders

_NO_NAMES = frozenset({b"", b".", b".."})


def _folder(engine: Engine, ino: Ino) -> Attributes:
    found = engine.inode(ino)
    if found is None or found.nlink == 0:
        raise FsError(errno.ENOENT)
    if not stat.S_ISDIR(found.mode):
        raise FsError(errno.ENOTDIR)
    return found


def _check_name(name: bytes) -> None:
    if len(name) > NAME_MAX:
        raise FsError(errno.ENAMETOOLONG)
    if name in _NO_NAMES or b"/" in name or b"\0" in name:
        raise FsError(errno.EINVAL)


def _existing(engine: Engine, parent: Ino, name: bytes) -> Attributes:
    if len(name) > NAME_MAX:
        raise FsError(errno.ENAMETOOLONG)
    found = engine.entry(parent, name)
    if found is None:
        raise FsError(errno.ENOENT)
    return found


def _is_folder(attributes: Attributes) -> bool:
    return stat.S_ISDIR(attributes.mode)


def create(
    engine: Engine,
    parent: Ino,
    name: bytes,
    *,
    mode: int,
    uid: int,
    gid: int,
    rdev: int,
    now_ns: int,
    target: bytes | None,
) -> Attributes:
    """Make an inode of any kind. A setgid folder gives its group, and to folders the bit too."""
    folder = _folder(engine, parent)
    _check_name(name)
    if engine.entry(parent, name) is not None:
        raise FsError(errno.EEXIST)
    made_folder = stat.S_ISDIR(mode)
    if folder.mode & stat.S_ISGID:
        gid = folder.gid
        if made_folder:
            mode |= stat.S_ISGID
    size = len(target) if target is not None else 0
    made = Attributes(
        ino=engine.new_ino(),
        mode=mode,
        nlink=2 if made_folder else 1,
        uid=uid,
        gid=gid,
        rdev=rdev,
        size=size,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
    )
    engine.insert_inode(made)
    if target is not None:
        engine.set_target(made.ino, target)
    engine.insert_entry(parent, name, made.ino)
    engine.touch_folder(parent, now_ns, subfolders=int(made_folder))
    return made


def link(engine: Engine, ino: Ino, parent: Ino, name: bytes, *, now_ns: int) -> Attributes:
    """Give an inode one more name. Folders have one only; a file without a name gets none."""
    _folder(engine, parent)
    _check_name(name)
    found = engine.inode(ino)
    if found is None or found.nlink == 0:
        raise FsError(errno.ENOENT)
    if _is_folder(found):
        raise FsError(errno.EPERM)
    if engine.entry(parent, name) is not None:
        raise FsError(errno.EEXIST)
    if found.nlink >= LINK_MAX:
        raise FsError(errno.EMLINK)
    engine.set_links(ino, found.nlink + 1, now_ns)
    engine.insert_entry(parent, name, ino)
    engine.touch_folder(parent, now_ns)
    return found._replace(nlink=found.nlink + 1, ctime_ns=now_ns)


def revive(
    engine: Engine, found: Attributes, parent: Ino, name: bytes, *, now_ns: int
) -> Attributes:
    """Give an inode that has none a name again."""
    _folder(engine, parent)
    _check_name(name)
    if engine.entry(parent, name) is not None:
        raise FsError(errno.EEXIST)
    folder = _is_folder(found)
    nlink = 2 if folder else 1
    engine.set_links(found.ino, nlink, now_ns)
    engine.insert_entry(parent, name, found.ino)
    engine.touch_folder(parent, now_ns, subfolders=int(folder))
    return found._replace(nlink=nlink, ctime_ns=now_ns)


def unlink(
    engine: Engine, parent: Ino, name: bytes, *, now_ns: int, kept: Callable[[Attributes], bool]
) -> Attributes:
    """Remove a name that is not a folder's. Returns what is left of the inode.

    `kept` says whether an inode without a name stays for now; else the caller forgets it.
    """
    _folder(engine, parent)
    found = _existing(engine, parent, name)
    if _is_folder(found):
        raise FsError(errno.EISDIR)
    engine.delete_entry(parent, name)
    engine.touch_folder(parent, now_ns)
    if found.nlink == 1 and not kept(found):
        return found._replace(nlink=0, ctime_ns=now_ns)
    return _lose_name(engine, found, now_ns)


def rmdir(engine: Engine, parent: Ino, name: bytes, *, now_ns: int) -> Attributes:
    """Remove an empty folder. Returns what is left of it: no links."""
    _folder(engine, parent)
    found = _existing(engine, parent, name)
    if not _is_folder(found):
        raise FsError(errno.ENOTDIR)
    if engine.has_entries(found.ino):
        raise FsError(errno.ENOTEMPTY)
    engine.delete_entry(parent, name)
    engine.touch_folder(parent, now_ns, subfolders=-1)
    return _lose_name(engine, found, now_ns)


def _lose_name(engine: Engine, found: Attributes, now_ns: int) -> Attributes:
    nlink = 0 if _is_folder(found) else found.nlink - 1
    engine.set_links(found.ino, nlink, now_ns)
    return found._replace(nlink=nlink, ctime_ns=now_ns)


def rename(
    engine: Engine,
    old_parent: Ino,
    old_name: bytes,
    new_parent: Ino,
    new_name: bytes,
    *,
    noreplace: bool,
    exchange: bool,
    whiteout: Owner | None = None,
    now_ns: int,
) -> Attributes | None:
    """Rename. Returns what is left of a replaced inode, None when nothing was replaced.

    `whiteout` leaves a character device 0:0, made by that user and group, in the old place, as
    overlay file systems want it.
    """
    _folder(engine, old_parent)
    _folder(engine, new_parent)
    moved = _existing(engine, old_parent, old_name)
    _check_name(new_name)
    target = engine.entry(new_parent, new_name)
    if exchange and (noreplace or whiteout is not None):
        raise FsError(errno.EINVAL)
    _check_rename(engine, moved, target, new_parent, noreplace=noreplace, exchange=exchange)
    if exchange:
        assert target is not None
        if _is_folder(target) and is_within(engine, old_parent, target.ino):
            raise FsError(errno.EINVAL)
        _exchange(engine, (old_parent, old_name, moved), (new_parent, new_name, target), now_ns)
        return None
    if target is not None and target.ino == moved.ino:
        return None  # two names of one file: POSIX wants nothing done
    if target is not None:
        _check_replace(engine, moved, target)
        engine.set_entry(new_parent, new_name, moved.ino)
    else:
        engine.insert_entry(new_parent, new_name, moved.ino)
    engine.delete_entry(old_parent, old_name)
    engine.set_links(moved.ino, moved.nlink, now_ns)
    folder = int(_is_folder(moved))
    lost = int(target is not None and _is_folder(target))
    engine.touch_folder(old_parent, now_ns, subfolders=-folder)
    engine.touch_folder(new_parent, now_ns, subfolders=folder - lost)
    if whiteout is not None:
        _leave_whiteout(engine, old_parent, old_name, whiteout, now_ns)
    return None if target is None else _lose_name(engine, target, now_ns)


def _check_rename(
    engine: Engine,
    moved: Attributes,
    target: Attributes | None,
    new_parent: Ino,
    *,
    noreplace: bool,
    exchange: bool,
) -> None:
    if noreplace and target is not None:
        raise FsError(errno.EEXIST)
    if exchange and target is None:
        raise FsError(errno.ENOENT)
    if _is_folder(moved) and is_within(engine, new_parent, moved.ino):
        raise FsError(errno.EINVAL)


def _leave_whiteout(engine: Engine, parent: Ino, name: bytes, by: Owner, now_ns: int) -> None:
    uid, gid = by
    create(
        engine, parent, name, mode=stat.S_IFCHR, uid=uid, gid=gid, rdev=0, now_ns=now_ns,
        target=None,
    )  # fmt: skip


def _check_replace(engine: Engine, moved: Attributes, target: Attributes) -> None:
    if _is_folder(moved) and not _is_folder(target):
        raise FsError(errno.ENOTDIR)
    if _is_folder(target) and not _is_folder(moved):
        raise FsError(errno.EISDIR)
    if _is_folder(target) and engine.has_entries(target.ino):
        raise FsError(errno.ENOTEMPTY)


def is_within(engine: Engine, ino: Ino, ancestor: Ino) -> bool:
    """Whether `ino` is `ancestor` or lies below it."""
    at: Ino | None = ino
    while at is not None:
        if at == ancestor:
            return True
        if at == ROOT_INO:
            return False
        at = engine.folder_of(at)
    return False


Place = tuple[Ino, bytes, Attributes]


def _exchange(engine: Engine, one: Place, other: Place, now_ns: int) -> None:
    (old_parent, old_name, moved), (new_parent, new_name, target) = one, other
    if moved.ino == target.ino:
        return
    engine.set_entry(old_parent, old_name, target.ino)
    engine.set_entry(new_parent, new_name, moved.ino)
    engine.set_links(moved.ino, moved.nlink, now_ns)
    engine.set_links(target.ino, target.nlink, now_ns)
    shift = _is_folder(moved) - _is_folder(target)
    engine.touch_folder(old_parent, now_ns, subfolders=-shift)
    engine.touch_folder(new_parent, now_ns, subfolders=shift)
