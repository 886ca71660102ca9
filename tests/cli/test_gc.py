"""The command gc: what it asks the daemon for, and what it shows."""

from __future__ import annotations

import json

from click.testing import CliRunner

import stashcordfs.daemon
from stashcordfs.cli.main import main
from stashcordfs.vfs.collecting import Outcome

FOUND = Outcome(
    messages=9, held_bytes=9 << 20, live_bytes=5 << 20, condemned_messages=2, deleted_messages=3,
    deleted_bytes=4 << 20, orphans=1, requests=7,
)  # fmt: skip
EVENTS = ({"stage": "deleting"}, {"outcome": FOUND.as_json()})


def run(*args: str):
    return CliRunner().invoke(main, list(args))


def test_a_mounted_volume_is_collected_by_its_daemon(volume, answering):
    with answering(volume, "gc", *EVENTS) as got:
        done = run("gc", "v")
    assert len(got) == 1
    assert done.exit_code == 0
    assert "held by Discord\t9\t9 MiB" in done.output
    assert "deleted\t3\t4 MiB" in done.output
    assert "v: 7 requests" in done.output


def test_json_is_one_object(volume, answering):
    with answering(volume, "gc", *EVENTS):
        done = run("gc", "v", "--json")
    assert json.loads(done.stdout) == FOUND.as_json()


def test_without_a_daemon_the_command_does_it(volume, monkeypatch):
    asked = []

    def collect_volume(settings, name, **_):
        asked.append(name)
        return FOUND.as_json()

    monkeypatch.setattr(stashcordfs.daemon, "collect_volume", collect_volume)
    assert run("gc", "v").exit_code == 0
    assert asked == ["v"]


def test_an_unknown_volume_is_wrong_use(volume):
    assert run("gc", "w").exit_code == 2
