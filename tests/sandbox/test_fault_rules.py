"""Rules without a server: how often, how long, how likely; and that all kinds are documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stashcordfs.sandbox.ban import Bans
from stashcordfs.sandbox.behaviours import BEHAVIOURS, WAYS
from stashcordfs.sandbox.faults import TABLE, Faults
from stashcordfs.sandbox.settings import CHANGEABLE

DOC = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text(encoding="utf-8")
SERVER_TESTS = Path(__file__).with_name("test_fault_kinds.py").read_text(encoding="utf-8")


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def made(*rules, seed=0, **more) -> Faults:
    faults = Faults(**more)
    faults.replace(list(rules), seed=seed)
    return faults


def strikes(faults: Faults, kind: str, chances: int, route: str = "me") -> list[bool]:
    return [faults.take(route, kind) is not None for _ in range(chances)]


def test_a_rule_is_used_up_on_its_route_only():
    faults = made({"kind": "reset", "route": "me", "times": 2})
    assert strikes(faults, "reset", 1, "guild") == [False]
    assert strikes(faults, "reset", 3) == [True, True, False]
    assert faults.shown()[0]["struck"] == 2


def test_a_rule_without_times_strikes_once_or_for_its_time():
    time = Time()
    faults = made({"kind": "reset"}, {"kind": "late", "for_s": 5}, clock=time)
    assert strikes(faults, "reset", 2) == [True, False]
    assert strikes(faults, "late", 2) == [True, True]
    time.now = 5.0
    assert strikes(faults, "late", 1) == [False]
    assert faults.shown()[1]["for_s"] == 0


def test_times_and_time_bound_a_rule_together():
    faults = made({"kind": "late", "for_s": 5, "times": 1}, clock=Time())
    assert strikes(faults, "late", 2) == [True, False]


def test_chance_is_the_same_for_the_same_seed_only():
    rule = {"kind": "reset", "probability": 0.5, "times": 1000}
    runs = [strikes(made(rule, seed=seed), "reset", 200) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert 60 < sum(runs[0]) < 140
    assert strikes(made({"kind": "reset", "probability": 0.0}), "reset", 50) == [False] * 50


def test_a_rule_that_does_not_apply_is_not_used_up():
    faults = made({"kind": "reset"})
    assert faults.take("me", "reset", applies=lambda fields: False) is None
    assert faults.take("me", "reset") is not None


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"kind": "gremlin"}, "no such kind"),
        ({"kind": "late", "count": 1}, "late has no count"),
        ({"kind": "late", "route": "nowhere"}, "no such route"),
        ({"kind": "late", "route": "cdn"}, "no such route for late"),
        ({"kind": "corrupt", "route": "me"}, "does not strike me"),
        ({"kind": "late", "times": "often"}, "invalid literal"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(rule, says):
    with pytest.raises(ValueError, match=says):
        made(rule, routes={"me"})


def test_switches_hold_while_their_rule_does():
    time = Time()
    faults = made({"kind": "switch", "set": {"premium_tier": 2}, "for_s": 1}, clock=time)
    assert faults.switched() == {"premium_tier": 2}
    time.now = 1.0
    assert faults.switched() == {}


def test_every_known_behaviour_is_a_fault_or_a_switch():
    assert set(BEHAVIOURS) == set(range(1, 29))
    by_fault = {row for fault in TABLE.values() for row in fault.rows}
    assert by_fault | WAYS.keys() == BEHAVIOURS.keys()
    named = {name for way in WAYS.values() for name in re.findall(r"settings? .*", way)}
    words = {word for way in named for word in re.findall(r"`(\w+)`", way)}
    assert words <= CHANGEABLE | {"clock"}


@pytest.mark.parametrize("kind", TABLE)
def test_every_fault_is_documented_and_tried_on_a_server(kind):
    (line,) = [line for line in DOC.splitlines() if line.startswith(f"| `{kind}` |")]
    fault = TABLE[kind]
    assert [int(n) for n in line.split("|")[2].replace(",", " ").split()] == list(fault.rows)
    assert all(f"`{name}`" in line for name in fault.fields)
    assert f'"{kind}"' in SERVER_TESTS


def test_every_behaviour_and_setting_is_documented():
    for number, text in BEHAVIOURS.items():
        assert f"| {number} | {text} |" in DOC
    assert [name for name in CHANGEABLE if f"`{name}`" not in DOC] == []


# The ban


def refused(bans: Bans, count: int, *, status=401, scope="", now=0.0, after=20) -> None:
    for _ in range(count):
        bans.count("a", status, scope, now=now, after=after, window_s=600.0, ban_s=100.0)


@pytest.mark.parametrize("status", [401, 403, 429])
def test_the_last_refusal_in_the_window_bans(status):
    bans = Bans()
    refused(bans, 19, status=status)
    assert not bans.banned("a", 0.0)
    refused(bans, 1, status=status)
    assert bans.banned("a", 99.0)
    assert not bans.banned("b", 99.0)
    assert not bans.banned("a", 100.0)


def test_other_answers_shared_limits_and_old_refusals_do_not_count():
    bans = Bans()
    refused(bans, 100, status=404)
    refused(bans, 100, status=429, scope="shared")
    refused(bans, 19)
    refused(bans, 1, now=600.0)
    assert not bans.banned("a", 600.0)
    refused(bans, 100, after=0)
    assert not bans.banned("a", 0.0)
