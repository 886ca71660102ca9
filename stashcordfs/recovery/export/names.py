"""Names and values of any bytes in JSON, and times of any size: one way for all of `export`."""

from __future__ import annotations

import base64
import stat

from stashcordfs.errors import ObjectCorrupt

Text = str | dict[str, str]
_NS = 10**9
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def kind_of(mode: int) -> str:
    """What an inode is, in words of the schema."""
    return _KINDS.get(stat.S_IFMT(mode), "unknown")


def to_text(raw: bytes) -> Text:
    """A string where the bytes are UTF-8, else an object that holds them in base64."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


def from_text(value: object) -> bytes:
    """Undo `to_text`. ObjectCorrupt when it is neither."""
    try:
        if isinstance(value, str):
            return value.encode("utf-8")
        if isinstance(value, dict):
            return base64.b64decode(value["base64"], validate=True)
    except (KeyError, ValueError, TypeError) as error:
        raise ObjectCorrupt("an export's line has a name that cannot be read") from error
    raise ObjectCorrupt("an export's line has a name that is none")


def to_time(at_ns: int) -> str:
    """Seconds since 1970 with nine decimals, as text: a float would not hold them."""
    sign, left = ("-", -at_ns) if at_ns < 0 else ("", at_ns)
    return f"{sign}{left // _NS}.{left % _NS:09}"


def from_time(text: str) -> int:
    """Undo `to_time`: ns."""
    whole, _, part = text.removeprefix("-").partition(".")
    at_ns = int(whole) * _NS + int(part or 0)
    return -at_ns if text.startswith("-") else at_ns
