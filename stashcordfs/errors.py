"""The one error tree.

    StashcordError            carries `exit_code`; its text is one line that says what to do
    ├── UsageError            wrong use or a bad setting (exit 2)
    ├── FsError               a POSIX outcome: carries `errno`; raised by journal and vfs
    │   └── ContentLost       EIO, and asking again is not likely to help
    ├── JournalError          the database is damaged, newer than this program, or in use
    ├── LocalDiskError        the local disk refused (full, failing); carries `errno`
    ├── CryptoError           wrong passphrase, tampered or unreadable sealed data
    ├── StoreError            a pack or object that cannot be had as it was written
    │   ├── ObjectMissing     it is not there any more
    │   └── ObjectCorrupt     it is there and is not what was stored
    └── DiscordError          a request failed; `temporary` tells whether trying later can help
        ├── DiscordUnavailable    temporary: network, 5xx, limits; nothing happened for certain
        ├── OutcomeUnknown        the request may or may not have been carried out
        ├── DiscordRefused        permanent: 4xx with a Discord code
        │   ├── TokenRejected     401
        │   ├── AccessDenied      403: missing permission or access
        │   ├── NotFound          404: unknown channel, message, ...
        │   │   └── LinkExpired   the CDN's 403 or 404: renew the link once
        │   └── TooLarge          413 / 40005 / 50045
        └── BreakerOpen           we stopped asking, far below Discord's ban threshold

Foreign exceptions (httpx, apsw, OSError) become one of these at the room that first sees them.
"""

from __future__ import annotations

import os


class StashcordError(Exception):
    """Base of all errors of this program. `exit_code` is what a command ends with."""

    exit_code = 1


class UsageError(StashcordError):
    """Wrong use: an option, a setting or an argument that cannot be honoured."""

    exit_code = 2


class FsError(StashcordError):
    """A POSIX outcome, by errno."""

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(message)
        self.errno = errno

    def __str__(self) -> str:
        """Made when asked for: most are answers to a program, and nobody reads their text."""
        return super().__str__() or os.strerror(self.errno)


class ContentLost(FsError):
    """What was stored is missing or damaged; or, of a sync: data that for this cannot be sent."""


class JournalError(StashcordError):
    """The journal is damaged, newer than this program, or held by another process."""


class LocalDiskError(StashcordError):
    """The local disk refused a read or a write."""

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(message or os.strerror(errno))
        self.errno = errno


class CryptoError(StashcordError):
    """Sealed data that cannot be opened: wrong key, or changed since it was sealed."""


class StoreError(StashcordError):
    """An object of the store that cannot be had as it was written."""


class ObjectMissing(StoreError):
    """The object is not on the server any more."""


class ObjectCorrupt(StoreError):
    """The object is there, but is not what was stored."""


class DiscordError(StashcordError):
    """A request to Discord failed."""

    temporary = False


class DiscordUnavailable(DiscordError):
    """Nothing was carried out, and trying later can help. `retry_after_s` if told.

    `offline`: nobody answered; else the server itself is in trouble.
    """

    temporary = True

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, offline: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.offline = offline


class OutcomeUnknown(DiscordError):
    """The request may have been carried out: the answer was lost, late, or a 5xx."""

    temporary = True


class DiscordRefused(DiscordError):
    """Discord refused for good. `status` is HTTP's, `code` is Discord's (0 when absent)."""

    def __init__(self, message: str, *, status: int, code: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class TokenRejected(DiscordRefused):
    """401: the token is wrong or was reset."""


class AccessDenied(DiscordRefused):
    """403: a permission or access is missing."""


class NotFound(DiscordRefused):
    """404: unknown channel, message, guild, or an attachment that is gone."""


class LinkExpired(NotFound):
    """The CDN does not serve this link any more: renew it once, then believe the answer."""


class TooLarge(DiscordRefused):
    """413, or a 400 with 40005 or 50045: over the size limit in force."""


class BreakerOpen(DiscordError):
    """Too many refused requests: we stopped asking, far below the count that bans the host."""

    temporary = True


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of what a nursery's tasks raised, the one that matters: our own error before all else."""
    ours, _ = group.split(StashcordError)
    found: BaseException = ours or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
