"""Faults on request: rules that say on which route, of what kind, and how often. No I/O.

A rule is {"route", "kind", "count", "probability", ...}: route is a route's name
("create_message", "cdn", ...) or "*"; count (1) is how often it strikes, probability (1.0) how
likely at each chance; the further fields belong to the kind.

Before the request is looked at:
  status       answer `status` (502) with HTML; the request had no effect
  early        the same as JSON, before the body is read, and hang up
  reset        hang up without an answer
  rate_limit   429 with `scope` (user, global, shared), `retry_after` (1.0), `code`
  cloudflare   429 that is not the API's; `json` true for its JSON form
  delay        wait `seconds` (1.0), then go on
After it had its effect:
  lost_answer  answer `status` (504) all the same, or hang up when it is 0, after `seconds` (0)
  late         answer rightly, `seconds` (1.0) later than it could
  no_headers   leave out the rate-limit headers
  new_bucket   another bucket hash from here on
  skew         shift X-RateLimit-Reset by `seconds` (40)
Inside:
  rename       the attachments of a create get other names
  hide         a single message or the newest of a list is not there yet
  linger       the CDN goes on serving what a delete removed
  cut          the CDN ends in the middle of the body
  ignore_range the CDN answers 200 with the whole
  corrupt      the CDN flips a bit of what it sends
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

BEFORE = ("delay", "status", "early", "reset", "rate_limit", "cloudflare")
AFTER = ("lost_answer", "late", "no_headers", "new_bucket", "skew")
INSIDE = ("rename", "hide", "linger", "cut", "ignore_range", "corrupt")
KINDS = frozenset(BEFORE + AFTER + INSIDE)


class Faults:
    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        self._chance = chance
        self.rules: list[dict[str, Any]] = []

    def replace(self, rules: list[dict[str, Any]]) -> None:
        for rule in rules:
            if rule.get("kind") not in KINDS:
                raise ValueError(f"no such kind: {rule.get('kind')}")
        plain = {"route": "*", "count": 1, "probability": 1.0}
        self.rules = [{**plain, **rule} for rule in rules]

    def take(self, route: str, kind: str) -> dict[str, Any] | None:
        """The first rule that fits, used up by one."""
        for rule in self.rules:
            fits = rule["kind"] == kind and rule["route"] in (route, "*") and rule["count"] > 0
            if fits and self._chance() < rule["probability"]:
                rule["count"] -= 1
                return rule
        return None
