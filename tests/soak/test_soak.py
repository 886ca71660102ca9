"""A thirtieth of the long runs, which `make soak-uploads` and `make soak-offline` start."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest
import trio

sys.path += [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "support")]
from directory import soak_directory
from garbage import soak_garbage
from mounted import fuse_missing
from offline import MIB, overtaken, soak_offline
from recovering import soak_recover
from scale import soak_scale
from served import served
from uploads import KINDS, soak_uploads


def test_uploads_whose_answers_are_lost_happen_exactly_once(tmp_path):
    result = soak_uploads(tmp_path, uploads=33, seed=5)

    assert result.problems == []
    assert result.uploads >= 33
    assert result.bytes_read_back > 0
    assert all(result.struck[kind] for kind in KINDS)


@pytest.mark.fuse
@pytest.mark.skipif(bool(fuse_missing()), reason=fuse_missing() or "fuse")
def test_what_was_written_offline_arrives_in_order(tmp_path):
    result = soak_offline(
        tmp_path / "volume",
        data_bytes=64 * MIB,
        file_bytes=4 * MIB,
        cache_bytes=128 * MIB,
        seed=5,
    )

    assert result.problems == []
    assert result.bytes_read_back == 67 * MIB


@pytest.mark.fuse
@pytest.mark.skipif(bool(fuse_missing()), reason=fuse_missing() or "fuse")
def test_what_was_told_before_a_machine_was_lost_is_back(tmp_path):
    result = soak_recover(tmp_path, rounds=1, seed=5, files=700, shortest_s=60, longest_s=60)

    assert result.problems == []
    assert result.told > 0
    assert result.back > 0


@pytest.mark.fuse
@pytest.mark.skipif(bool(fuse_missing()), reason=fuse_missing() or "fuse")
def test_a_volume_of_many_files_comes_back_row_by_row(tmp_path):
    result = soak_scale(tmp_path / "volume", files=2000, seed=5, hurried=True)

    assert result.problems == []
    assert result.steps["checkpoint"]["parts"] == 1
    assert result.steps["recover"]["changes"] > 0
    assert result.steps["recover_from_packs"]["inodes"] > 1900


@pytest.mark.parametrize("how", ["groups", "random"])
def test_discord_holds_little_more_than_is_needed_and_collecting_costs_little(tmp_path, how):
    result = soak_garbage(
        tmp_path, how=how, seed=5, days=18, total_bytes=100 * MIB, sessions_a_day=2, life_days=1.5
    )

    assert result.problems == []
    assert result.condemned > 0
    assert result.bytes_read_back > 0


# The soaks themselves


@pytest.mark.parametrize(
    ("messages", "most"),
    [([], 0), ([1, 1, 2, 2, 3], 0), ([1, 2, 1, 2], 1), ([3, 1, 2, 2], 3), ([1, 2, 3, 2, 2], 2)],
)
def test_overtaking_is_told(messages, most):
    assert overtaken(messages) == most


async def test_a_server_in_the_process_goes_on_without_its_client(tmp_path, autojump_clock):
    async with served(tmp_path) as server, server.client() as client:
        server.sandbox.faults.replace([{"kind": "delay", "route": "me", "seconds": 100}])
        begun = trio.current_time()
        await client.current_user()  # again after a minute without an answer
        assert 60 < trio.current_time() - begun < 100
        assert server.sandbox.requests["me"] == 2


async def test_a_reset_in_the_process_is_an_error_of_the_connection(tmp_path, autojump_clock):
    async with served(tmp_path) as server:
        server.sandbox.faults.replace([{"kind": "reset", "route": "me"}])
        async with httpx.AsyncClient(transport=server.transport) as client:
            with pytest.raises(httpx.ReadError):
                await client.get(f"{server.sandbox.view.base_url}/api/v10/users/@me")


@pytest.mark.fuse
@pytest.mark.skipif(bool(fuse_missing()), reason=fuse_missing() or "fuse")
def test_a_folder_is_listed_rightly_while_it_changes(tmp_path):
    result = soak_directory(tmp_path / "volume", entries=3000, seed=5)

    assert result.problems == []
    assert result.changes_while_listing > 0
