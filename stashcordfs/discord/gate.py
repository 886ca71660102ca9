"""May the token be sent? One that was refused goes out again only as a probe. No I/O.

Each 401 counts towards the ban of the host (10,000 within 10 minutes), and 401 is Discord's answer
to every call once the token was reset. So after the first one nothing is sent with that token, but
for a probe now and then, which finds out when it is valid again. Another token is sent at once.

Only digests are kept. `now` is the client's clock, in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import TokenRejected

if TYPE_CHECKING:
    from collections.abc import Callable

_FIRST_PROBE_S, _LONGEST_PROBE_S = 5.0, 60.0


@dataclass(frozen=True, slots=True)
class _Refusal:
    digest: bytes
    probe_at: float  # infinite: it cannot be sent at all
    wait_s: float


class TokenGate:
    """What is known of the token that `token` returns now. One loop."""

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token
        self._refusal: _Refusal | None = None
        self._accepted: bytes | None = None
        self._changed = trio.Event()

    def __repr__(self) -> str:
        return f"<TokenGate {self.word}>"

    @property
    def word(self) -> str:
        """For status: `accepted`, `rejected`, or `untried`."""
        digest = _digest(self._token())
        if self._refused(digest) is not None:
            return "rejected"
        return "accepted" if digest == self._accepted else "untried"

    @property
    def rejected(self) -> bool:
        return self.word == "rejected"

    def probe_in_s(self, now: float) -> float:
        """Seconds until a probe may go; 0 when nothing is refused, infinite when none ever may."""
        refusal = self._refused(_digest(self._token()))
        return 0.0 if refusal is None else max(0.0, refusal.probe_at - now)

    async def wait_rejected(self) -> None:
        """Return when the token is a refused one."""
        while not self.rejected:
            await self._changed.wait()

    def usable(self, now: float, *, probe: bool = False) -> str:
        """The token, to be sent once. TokenRejected when it must not be.

        A `probe` may send a refused one when its time has come; the next is due twice as long
        after, at most a minute.
        """
        token = self._token()
        digest = _digest(token)
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            # httpx would quote the header, token and all, in its own error
            self._refuse(digest, math.inf, 0.0)
            raise TokenRejected("the bot token is empty or holds stray characters", status=401)
        refusal = self._refused(digest)
        if refusal is None:
            return token
        if not probe or now < refusal.probe_at:
            self._tell()
            raise TokenRejected("the bot token was rejected; set a valid one", status=401)
        wait_s = min(2 * refusal.wait_s, _LONGEST_PROBE_S)
        self._refuse(digest, now + wait_s, wait_s)
        return token

    def answered(self, token: str, status: int, now: float) -> None:
        """Learn from an answer to what was sent with `token`, which may be replaced by now."""
        digest = _digest(token)
        if status == 401:
            if digest == _digest(self._token()) and self._refused(digest) is None:
                self._refuse(digest, now + _FIRST_PROBE_S, _FIRST_PROBE_S)
        elif 200 <= status < 300:
            self._accepted = digest
            if self._refused(digest) is not None:
                self._refusal = None

    def _refused(self, digest: bytes) -> _Refusal | None:
        refusal = self._refusal
        return refusal if refusal is not None and refusal.digest == digest else None

    def _refuse(self, digest: bytes, probe_at: float, wait_s: float) -> None:
        self._refusal = _Refusal(digest, probe_at, wait_s)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _digest(token: str) -> bytes:
    return sha256(token.encode()).digest()
