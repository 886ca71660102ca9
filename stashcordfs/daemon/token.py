"""The bot token of a mount, and how another one is taken up without a remount.

When the API has refused the token, its reference is resolved again now and then, and the token is
tried again: at once when its text has changed, else when the client's gate lets a probe pass. As
soon as one is accepted, uploads go on.
"""

from __future__ import annotations

import logging
import math
import os
from typing import TYPE_CHECKING, Protocol

import trio

from stashcordfs.config import PREFIX
from stashcordfs.errors import DiscordError, StashcordError, UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from stashcordfs.config import Secret, Settings
    from stashcordfs.discord.gate import TokenGate

log = logging.getLogger(__name__)

_READ_AGAIN_S = 5.0
_RUN_AGAIN_S = 60.0  # a command may ask a person, or a service elsewhere


class Token:
    """The bot token, replaceable while mounted. Never shown."""

    def __init__(
        self,
        settings: Settings,
        *,
        again: Callable[[], Settings] | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Reveal it once; UsageError when it is not set. `again` reads the settings anew."""
        self._environ = environ
        self._again = again
        self._secret = _token_of(settings)
        self._value = self._secret.reveal()

    def __repr__(self) -> str:
        """Hide it."""
        return "<Token>"

    def __call__(self) -> str:
        """Return the token for the Authorization header."""
        return self._value

    def replace(self, value: str) -> None:
        """Use another one from now on."""
        self._value = value

    def resolve(self) -> str:
        """What the settings give now. Blocks: a command may run. UsageError says what is wrong."""
        if self._again is not None:
            self._secret = _token_of(self._again())
        return self._secret.reveal()

    @property
    def fixed(self) -> bool:
        """Whether nothing outside can change it: a process's environment stays as it is."""
        kind = self._secret.kind
        return kind == "env" or (kind == "plain" and PREFIX + "TOKEN" in self._environ)

    @property
    def every_s(self) -> float:
        """How often it is resolved while it is refused; infinite when that is of no use."""
        if self.fixed:
            return math.inf
        return _RUN_AGAIN_S if self._secret.kind == "cmd" else _READ_AGAIN_S

    @property
    def advice(self) -> str:
        """What a person can do about a refused token, in one line that holds no secret."""
        if self.fixed:
            return (
                "Discord rejects the token, and one from the environment cannot change while "
                "mounted: mount again with a valid one, best as token = file:PATH"
            )
        kind = self._secret.kind
        if kind == "credential":  # copied when the service starts (systemd.exec(5))
            return (
                "Discord rejects the token: put a valid one into the file that the service's "
                "LoadCredential= names, then restart the service"
            )
        where = "write a valid one into the settings file"
        if kind == "cmd":
            where = "let its command print a valid one"
        if kind == "file":
            where = f"put a valid one into {self._secret.absolute_reference()[5:]}"
        return f"Discord rejects the token: {where}; it is read again every {self.every_s:.0f} s"


def _token_of(settings: Settings) -> Secret:
    if settings.token is None:
        raise UsageError("token: not set; set STASHCORDFS_TOKEN, or token in the TOML file")
    return settings.token


async def _in_thread(call: Callable[[], str]) -> str:
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


class TokenClient(Protocol):
    """DiscordClient, as far as it concerns the token."""

    gate: TokenGate

    @property
    def clock(self) -> Callable[[], float]: ...

    async def check_token(self) -> None: ...


class TokenWatch:
    """Brings a refused token back into use. `run` is supervised by the daemon."""

    def __init__(
        self,
        *,
        client: TokenClient,
        token: Token,
        report: Callable[[str], None],
        accepted: Callable[[], None],
        learned: Callable[[str], None],
        in_thread: Callable[[Callable[[], str]], Awaitable[str]] = _in_thread,
    ) -> None:
        """`accepted` is called when it is good again, `learned` with each new text."""
        self._client = client
        self._token = token
        self._report = report
        self._accepted = accepted
        self._learned = learned
        self._in_thread = in_thread
        self._problem = ""

    async def run(self) -> None:
        """Sleep until the token is refused, then look for a valid one; for ever."""
        while True:
            await self._client.gate.wait_rejected()
            self._report(self._token.advice)
            read_at = 0.0
            while self._client.gate.rejected:
                read_at = await self._look(read_at)
            self._problem = ""
            log.info("the token is not refused any more")
            self._accepted()

    def status(self) -> dict[str, object]:
        """The token's part of `status`: what is known of it, and what to do."""
        gate = self._client.gate
        if not gate.rejected:
            return {"token": gate.word, "token_retry_s": 0.0, "token_advice": ""}
        wait_s = gate.probe_in_s(self._client.clock())
        advice = f"{self._token.advice} ({self._problem})" if self._problem else self._token.advice
        return {
            "token": gate.word,
            "token_retry_s": None if math.isinf(wait_s) else round(wait_s, 1),
            "token_advice": advice,
        }

    async def _look(self, read_at: float) -> float:
        """Read it again and try it, where it is time for that; then wait. The next reading's time.

        A probe's own wait is the gate's; times are the client's clock.
        """
        clock, gate = self._client.clock, self._client.gate
        changed, least_s = False, 0.0
        if clock() >= read_at:
            changed = await self._changed()
            read_at = clock() + self._token.every_s
        if changed or gate.probe_in_s(clock()) <= 0:
            await self._try()
            least_s = _READ_AGAIN_S  # it may not even have been sent: the breaker is open
        if gate.rejected:
            wait_s = min(read_at - clock(), gate.probe_in_s(clock()), _RUN_AGAIN_S)
            await trio.sleep(max(least_s, wait_s))
        return read_at

    async def _changed(self) -> bool:
        """Take up what the settings give now, where it is another text."""
        try:
            value = await self._in_thread(self._token.resolve)
        except StashcordError as error:
            self._problem = str(error)
            return False
        self._problem = ""
        if value == self._token():
            return False
        self._learned(value)
        self._token.replace(value)
        log.info("another token was found; trying it")
        return True

    async def _try(self) -> None:
        try:
            await self._client.check_token()
        except DiscordError as error:  # refused again, or no network: the gate knows
            log.info("the token was tried: %s", error)
