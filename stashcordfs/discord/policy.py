"""Which failures are repeated, how long, and what they are called in the end. No I/O.

    outcome                          is         what happens
    no connection, body not whole    certain    again, with a doubling delay, until the deadline
    503, 521, 522, 523, 525, 526     certain    the same: the request never reached the API
    429                              limited    the limiter was told; again when it grants
    timeout or reset after the body, unclear    repeatable calls (GET, DELETE, PATCH, a create with
    408, other 5xx, no JSON in 2xx              its nonce): again; in the end OutcomeUnknown for a
                                                create, DiscordUnavailable for the rest
    401, 403, 404, 413, other 4xx    refused    its own error at once

A create that was unclear once stays unclear: a later 403 does not prove that nothing was stored.
A refusal of the content itself (400, 413) does, since the first attempt had the same bytes.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stashcordfs.discord.limiter import Route, retry_after_s
from stashcordfs.discord.wire import Answer, Failure, Outcome
from stashcordfs.errors import (
    AccessDenied,
    DiscordError,
    DiscordRefused,
    DiscordUnavailable,
    NotFound,
    OutcomeUnknown,
    TokenRejected,
    TooLarge,
)

if TYPE_CHECKING:
    from stashcordfs.discord.multipart import MultipartBody

UNKNOWN_MESSAGE = 10008
_CERTAIN_STATUSES = frozenset({503, 521, 522, 523, 525, 526})
_TOO_LARGE_CODES = frozenset({40005, 50045})
_TEMPORARY_CODES = frozenset({40004, 40006, 130000})  # a feature switched off, or overload

MAX_FAILURES = 5
MAX_LIMITED = 20
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 8.0
_LONGEST_RETRY_AFTER_S = 300.0
_NEVER_TOO_LARGE_BYTES = 8 * 1024 * 1024  # below every size limit that Discord has had


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, with what the policy must know about it. Holds no token."""

    route: Route
    path: str
    json: object = None
    params: Mapping[str, str] | None = None
    body: MultipartBody | None = None
    background: bool = False
    creates: bool = False  # it makes something: an unclear outcome is not simply a failure
    repeatable: bool = True
    attempts: int = MAX_FAILURES
    doubt: Callable[[], None] = lambda: None  # told of a success after an unclear attempt
    probe: bool = False  # it may try a token that was refused


class Kind(enum.Enum):
    DONE = enum.auto()
    LIMITED = enum.auto()
    CERTAIN = enum.auto()
    UNCLEAR = enum.auto()
    REFUSED = enum.auto()


def classify(outcome: Outcome) -> Kind:
    if isinstance(outcome, Failure):
        return Kind.CERTAIN if outcome.certain else Kind.UNCLEAR
    status = outcome.status
    if 200 <= status < 300:
        return Kind.DONE if outcome.is_json or status == 204 else Kind.UNCLEAR
    if status == 429:
        return Kind.LIMITED
    if status in _CERTAIN_STATUSES or _code(outcome) in _TEMPORARY_CODES:
        return Kind.CERTAIN
    return Kind.UNCLEAR if status >= 500 or status == 408 else Kind.REFUSED


class Chain:
    """The attempts of one call: each outcome is judged, until one is final."""

    def __init__(self, call: Call, *, deadline: float) -> None:
        self._call = call
        self._deadline = deadline
        self._failures = 0
        self._cut_uploads = 0
        self._limited = 0
        self.unclear = False

    def check_repeatable(self, now: float) -> None:
        """Raise OutcomeUnknown when the server may have forgotten the nonce meanwhile.

        A wait for a limit, or a sleep of the machine, can come between an attempt that may have
        been carried out and its repetition; that would make a second message.
        """
        if self.unclear and now > self._deadline:
            raise self.final(DiscordUnavailable(f"{self._name()}: too late to be repeated"))

    def judge(self, outcome: Outcome, now: float, *, jitter: float = 1.0) -> float | None:
        """None: done. A number: try again after so many seconds. Else raises what it came to."""
        kind = classify(outcome)
        if kind is Kind.DONE:
            return None
        if isinstance(outcome, Answer):
            if kind is Kind.REFUSED:
                raise self._refusal(outcome)
            if kind is Kind.LIMITED:
                return self._wait_granted(outcome)
        self._failures += 1
        self._cut_uploads += isinstance(outcome, Failure) and outcome.cut_upload
        self.unclear = self.unclear or (kind is Kind.UNCLEAR and self._call.creates)
        delay = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** (self._failures - 1)) * jitter
        asked = retry_after_s(outcome.headers, outcome.data) if isinstance(outcome, Answer) else 0.0
        delay = max(delay, min(asked or 0.0, _LONGEST_RETRY_AFTER_S))
        hopeless = self._failures >= self._call.attempts or now + delay > self._deadline
        if hopeless or (kind is Kind.UNCLEAR and not self._call.repeatable):
            text = f"{self._name()}: {_describe(outcome)}"
            raise self.final(DiscordUnavailable(text, offline=isinstance(outcome, Failure)))
        return delay

    @property
    def refused_early(self) -> bool:
        """Every attempt broke amid a large body: as if the server had answered and hung up."""
        body = self._call.body
        large = body is not None and body.size_bytes > _NEVER_TOO_LARGE_BYTES
        return large and self._cut_uploads == self._failures >= 3

    def final(self, error: DiscordError) -> DiscordError:
        """The chain ends with `error`, unless an earlier attempt may have been carried out."""
        if not self.unclear or type(error) in (TooLarge, DiscordRefused, OutcomeUnknown):
            return error
        return OutcomeUnknown(f"{self._name()} may have been carried out; then: {error}")

    def _wait_granted(self, answer: Answer) -> float:
        self._limited += 1
        wait = retry_after_s(answer.headers, answer.data)
        if self._limited >= MAX_LIMITED or (wait or 0.0) > _LONGEST_RETRY_AFTER_S:
            text = f"{self._name()}: rate limited"
            raise self.final(DiscordUnavailable(text, retry_after_s=wait))
        return 0.0

    def _refusal(self, answer: Answer) -> DiscordError:
        error = refusal(answer, self._name())
        if self._call.creates and error.code == UNKNOWN_MESSAGE:
            # Discord's answer to a known nonce whose message was deleted: it did exist
            return OutcomeUnknown(f"{self._name()}: made under this nonce before, then deleted")
        return self.final(error)

    def _name(self) -> str:
        return f"{self._call.route.method} {self._call.path}"


_HINTS = {
    401: "the bot token is wrong or was reset; set a valid one",
    403: "a permission is missing; give the bot access to the channel",
    404: "unknown, or not visible to the bot; check the id",
    413: "over the size limit in force",
}


def refusal(answer: Answer, name: str) -> DiscordRefused:
    """The error of a 4xx (or of a redirect, which is never followed)."""
    code = _code(answer)
    hint = _HINTS.get(answer.status, "refused")
    if answer.status < 400:
        hint = "answered with a redirect; check the API URL"
    text = f"{name}: {hint} ({_describe(answer)})"
    kind: type[DiscordRefused] = {
        401: TokenRejected,
        403: AccessDenied,
        404: NotFound,
        413: TooLarge,
    }.get(answer.status, DiscordRefused)
    if code in _TOO_LARGE_CODES:
        kind = TooLarge
    return kind(text, status=answer.status, code=code)


def _code(answer: Answer) -> int:
    code = answer.data.get("code") if isinstance(answer.data, Mapping) else None
    return code if isinstance(code, int) else 0


def _describe(outcome: Outcome) -> str:
    if isinstance(outcome, Failure):
        return outcome.reason
    if not isinstance(outcome.data, Mapping):
        return f"HTTP {outcome.status}"
    text = f"HTTP {outcome.status}, code {_code(outcome)}: {outcome.data.get('message')}"
    errors = outcome.data.get("errors")
    return " ".join((text if errors is None else f"{text} {json.dumps(errors)}")[:300].split())
