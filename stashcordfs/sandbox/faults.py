"""Faults on request: which there are, and the rules that ask for them. No I/O.

A rule is {"kind", "route", "times", "for_s", "probability", ...}. `route` is a route's name, "cdn",
or "*" (all that the kind can strike); `times` is how often it strikes (1, or without end when
`for_s` is given); `for_s` how long it is in force, by the server's clock; `probability` (1.0) how
likely it strikes at each chance, by a generator that each new set of rules starts from its seed.
The further fields belong to the kind: see `TABLE`.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

_COMMON = {"kind", "route", "times", "for_s", "probability"}


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind. `rows` are numbers in behaviours.py; `fields` its own, with their defaults."""

    about: str
    rows: tuple[int, ...]
    where: tuple[str, ...] = ("api",)  # "api" stands for all routes of the API
    fields: Mapping[str, Any] = field(default_factory=dict)

    def strikes(self, route: str) -> bool:
        return route in self.where or ("api" in self.where and route != "cdn")


_BOTH = ("api", "cdn")
_CDN = ("cdn",)
_CREATES = ("create_message", "execute_webhook", "edit_message")
_DELETES = ("delete_message", "bulk_delete", "edit_message")

# Before the request is looked at; it has no effect. In this order.
BEFORE = {
    "delay": Fault("wait `seconds`, then go on", (15,), _BOTH, {"seconds": 1.0}),
    "slow_upload": Fault("read the body at `bytes_per_s`", (15,), fields={"bytes_per_s": 65536}),
    "cut_upload": Fault(
        "reset the connection after `bytes` of the body (0: half of it)", (1,), fields={"bytes": 0}
    ),
    "early": Fault(
        "answer `status` and `code` as JSON before the body is read, and close",
        (4,),
        fields={"status": 401, "code": 0},
    ),
    "status": Fault(
        "answer `status` (a list: one of them) with HTML, or with nothing when `empty`",
        (5, 6, 16),
        _BOTH,
        {"status": 502, "empty": False, "retry_after": 0},
    ),
    "reset": Fault("reset the connection, no answer", (1,), _BOTH),
    "refuse": Fault(
        "answer `status` and `code` as JSON", (25, 26), fields={"status": 401, "code": 0}
    ),
    "rate_limit": Fault(
        "answer 429 with `scope` (user, global, shared), `retry_after`, `code`",
        (7, 8, 9, 10),
        fields={"scope": "user", "retry_after": 1.0, "code": None},
    ),
    "cloudflare": Fault(
        "answer 429 as Cloudflare does: error 1015, in its JSON form when `json`",
        (11,),
        fields={"json": False},
    ),
}
# After it had its effect.
AFTER = {
    "lost_answer": Fault(
        "answer `status` all the same, or reset when it is 0, after `seconds`",
        (1, 6),
        fields={"status": 504, "seconds": 0},
    ),
    "late": Fault("answer rightly, but only after `seconds` more", (15,), fields={"seconds": 1.0}),
    "cut": Fault(
        "end in the middle of the answer's body, with a reset when `reset`",
        (1,),
        _BOTH,
        {"reset": False},
    ),
}
# The headers of an answer, whatever it is.
HEADERS = {
    "new_bucket": Fault("another bucket hash from here on", (12,)),
    "skew": Fault(
        "shift `X-RateLimit-Reset` by `seconds`, give or take `jitter_s`",
        (14,),
        fields={"seconds": 40.0, "jitter_s": 0.0},
    ),
    "skew_date": Fault("shift `Date` by `seconds`", (14,), fields={"seconds": 40.0}),
    "no_headers": Fault("leave out the rate-limit headers", (13,)),
}
# Within what the request does.
INSIDE = {
    "forget_nonce": Fault("do not know the nonce any more: a duplicate", (2,), ("create_message",)),
    "moderated": Fault(
        "somebody deletes the message as soon as it is made", (3,), ("create_message",)
    ),
    "interleave": Fault(
        "post a message of somebody else, of one of `types`, just before",
        (22,),
        ("create_message",),
        {"types": [0, 6, 7, 18]},
    ),
    "rename": Fault("give the attachments other names, theirs as title", (21,), _CREATES),
    "empty_file": Fault("store the attachments with 0 bytes, and answer 200", (27,), _CREATES),
    "hide": Fault(
        "the `newest` of the channel, or all `younger_s` and less old, are not there yet",
        (19,),
        ("get_message", "list_messages"),
        {"newest": 1, "younger_s": None},
    ),
    "foreign": Fault(
        "show messages as another author's, without the intent: no content, no attachments",
        (23,),
        ("get_message", "list_messages"),
    ),
    "no_history": Fault("a list is empty", (24,), ("list_messages", "get_pins")),
    "linger": Fault(
        "the CDN serves what this removes for `seconds` more", (18,), _DELETES, {"seconds": 3600}
    ),
    "not_yet": Fault(
        "answer `status` for an attachment that is `younger_s` and less old",
        (20,),
        _CDN,
        {"status": 404, "younger_s": 2.0},
    ),
    "expire": Fault("end in the middle of the body; the link is dead from here on", (17,), _CDN),
    "ignore_range": Fault("answer 200 with the whole", (), _CDN),
    "corrupt": Fault("flip a bit of what is sent", (), _CDN),
}
# Without a request of its own: settings, for as long as the rule is in force.
SWITCHES = {
    "switch": Fault(
        "other settings, `set`, for `for_s`", (2, 16, 23, 24, 25, 28), _BOTH, {"set": {}}
    ),
}
TABLE: dict[str, Fault] = BEFORE | AFTER | HEADERS | INSIDE | SWITCHES


@dataclass(slots=True)
class Rule:
    kind: str
    route: str
    times: int | None  # None: without end
    until: float | None
    probability: float
    fields: dict[str, Any]
    struck: int = 0

    def shown(self, now: float) -> dict[str, Any]:
        left = None if self.until is None else max(0.0, round(self.until - now, 3))
        about = {"kind": self.kind, "route": self.route, "times": self.times, "for_s": left}
        return {**about, "probability": self.probability, "struck": self.struck, **self.fields}


class Faults:
    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, routes: Collection[str] = ()
    ) -> None:
        """`routes` are the names that exist; without them any name is taken."""
        self._clock = clock
        self._routes = routes
        self._random = random.Random(0)
        self._rules: list[Rule] = []

    def replace(self, rules: Iterable[dict[str, Any]], *, seed: int = 0) -> None:
        """These rules from now on, and no others. ValueError says what is wrong with one."""
        self._rules = [self._made(rule) for rule in rules]
        self._random.seed(seed)

    def _made(self, about: dict[str, Any]) -> Rule:
        kind, route = str(about.get("kind")), str(about.get("route", "*"))
        if kind not in TABLE:
            raise ValueError(f"no such kind: {kind}")
        fault = TABLE[kind]
        if strange := about.keys() - _COMMON - fault.fields.keys():
            raise ValueError(f"{kind} has no {', '.join(sorted(strange))}")
        if self._routes and route not in {"*", *self._routes, *fault.where}:
            raise ValueError(f"no such route for {kind}: {route}")
        if route != "*" and not fault.strikes(route):
            raise ValueError(f"{kind} does not strike {route}")
        for_s = about.get("for_s")
        times = about.get("times", 1 if for_s is None else None)
        return Rule(
            kind,
            route,
            None if times is None else int(times),
            None if for_s is None else self._clock() + float(for_s),
            float(about.get("probability", 1.0)),
            {key: about.get(key, plain) for key, plain in fault.fields.items()},
        )

    def take(
        self,
        route: str,
        kind: str,
        *,
        applies: Callable[[dict[str, Any]], bool] | None = None,
    ) -> dict[str, Any] | None:
        """The fields of the first rule that fits, which is used up by one; None: no fault."""
        for rule in self._rules:
            fits = rule.kind == kind and rule.route in (route, "*") and TABLE[kind].strikes(route)
            if not (fits and self._in_force(rule)) or (applies and not applies(rule.fields)):
                continue
            if self._random.random() < rule.probability:
                rule.struck += 1
                if rule.times is not None:
                    rule.times -= 1
                return {"kind": kind, **rule.fields}
        return None

    def _in_force(self, rule: Rule) -> bool:
        timely = rule.until is None or self._clock() < rule.until
        return timely and (rule.times is None or rule.times > 0)

    def switched(self) -> dict[str, Any]:
        """Settings that rules in force replace."""
        changes: dict[str, Any] = {}
        for rule in self._rules:
            if rule.kind == "switch" and self._in_force(rule):
                changes |= rule.fields["set"]
        return changes

    def choose(self, values: Any) -> Any:
        """One of a list's, else the value itself."""
        return self._random.choice(values) if isinstance(values, list) else values

    def around(self, width: float) -> float:
        """A number between -width and width."""
        return self._random.uniform(-width, width)

    def shown(self) -> list[dict[str, Any]]:
        return [rule.shown(self._clock()) for rule in self._rules]
