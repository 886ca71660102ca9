"""The command verify: what it asks the daemon for, what it shows, how it ends."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import stashcordfs.daemon
from stashcordfs.cli.main import main
from stashcordfs.recovery.verify import Outcome


@pytest.fixture
def daemon(answering):
    def verify(volume, outcome: Outcome):
        events = {"stage": "listing", "done": 1, "total": 2}, {"outcome": outcome.as_json()}
        return answering(volume, "verify", *events)

    return verify


def run(*args: str):
    return CliRunner().invoke(main, list(args))


def test_a_mounted_volume_is_verified_by_its_daemon(volume, daemon):
    with daemon(volume, Outcome(packs=9, checked_packs=3)) as got:
        done = run("verify", "v", "--data", "--subset", "1/3")
    assert done.exit_code == 0
    assert done.output == "v: 3 of 9 packs checked\nv: nothing is missing\n"
    assert (got[0]["data"], got[0]["part"]) == (True, [1, 3])


def test_what_is_lost_is_told_by_path_and_ends_with_1(volume, daemon):
    lost = Outcome(
        packs=2, checked_packs=2, missing_packs=["abc"], corrupt_packs=["def"],
        resent_blocks=4, damaged_blocks=5, damaged={"b/file": 2, "a": 3}, objects=7,
        missing_objects=["segment 4"], checkpoint_wanted=True,
    )  # fmt: skip
    with daemon(volume, lost):
        done = run("verify", "v")
    assert done.exit_code == 1
    assert done.output.splitlines() == [
        "v: 2 of 2 packs checked, 7 segments and parts of checkpoints",
        "4 blocks are sent anew from this machine",
        "missing: pack abc",
        "missing: segment 4",
        "corrupt: pack def",
        "a new checkpoint takes the place of what is missing of the journal",
        "Damaged file\tBlocks",
        "a\t3",
        "b/file\t2",
        "v: 5 blocks are lost",
    ]


def test_json_is_one_object(volume, daemon):
    with daemon(volume, Outcome(packs=1, checked_packs=1)):
        done = run("verify", "v", "--json")
    assert json.loads(done.stdout)["clean"] is True


def test_without_a_daemon_the_command_does_it(volume, monkeypatch):
    asked = []

    def verify_volume(settings, name, **options):
        asked.append((name, options["data"], options["part"]))
        return Outcome().as_json()

    monkeypatch.setattr(stashcordfs.daemon, "verify_volume", verify_volume)
    assert run("verify", "v", "--subset", "2/60").exit_code == 0
    assert asked == [("v", False, (2, 60))]


@pytest.mark.parametrize("text", ["0/3", "4/3", "x", "1/0", "1", "1/3/4", "-1/3"])
def test_a_subset_that_is_none_is_wrong_use(volume, text):
    done = run("verify", "v", f"--subset={text}")
    assert done.exit_code == 2
    assert "such as 1/30" in done.output


def test_an_unknown_volume_is_wrong_use(volume):
    assert run("verify", "w").exit_code == 2
