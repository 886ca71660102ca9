"""What channel edits, old pin routes, boosts and odd numbers get."""

from __future__ import annotations

import socket

import httpx
import pytest

from stashcordfs.sandbox.__main__ import main

AGENT = "DiscordBot (https://example.invalid, 1)"


@pytest.fixture
def http(sandbox):
    headers = {"User-Agent": AGENT, "Authorization": f"Bot {sandbox.token}"}
    with httpx.Client(base_url=sandbox.api_url, headers=headers) as client:
        yield client


def test_a_channel_keeps_its_new_topic_and_has_a_limit_no_header_shows(sandbox, http):
    path = f"/channels/{sandbox.channel_ids[0]}"
    assert http.patch(path, json={"topic": "root"}).json()["topic"] == "root"
    assert http.patch(path, json={"name": "n", "topic": None}).json()["topic"] is None
    refused = http.patch(path, json={"topic": "third"})
    assert (refused.status_code, "x-ratelimit-limit" in refused.headers) == (429, False)
    assert refused.headers["x-ratelimit-scope"] == "user"
    assert 590 < refused.json()["retry_after"] <= 600
    assert http.patch(path, json={}).status_code == 200
    for wrong in ({"name": ""}, {"name": None}, {"topic": "x" * 1025}):
        assert http.patch(path, json=wrong).json()["code"] == 50035
    sandbox.restart()
    sandbox.clock(601)
    assert http.get(path).json()["name"] == "n"
    assert http.patch(path, json={"topic": "third"}).json()["topic"] == "third"


def test_pins_by_the_old_routes_and_in_pages(sandbox, http):
    sandbox.settings(rate_limits=False)
    channel = f"/channels/{sandbox.channel_ids[0]}"
    ids = [
        http.post(f"{channel}/messages", json={"content": str(n)}).json()["id"] for n in range(3)
    ]
    for one in ids:
        assert http.put(f"{channel}/pins/{one}").status_code == 204
    assert [one["id"] for one in http.get(f"{channel}/pins").json()] == ids[::-1]
    first = http.get(f"{channel}/messages/pins", params={"limit": 2}).json()
    assert [one["message"]["id"] for one in first["items"]] == ids[:0:-1]
    assert first["has_more"]
    before = {"before": first["items"][-1]["pinned_at"]}
    rest = http.get(f"{channel}/messages/pins", params=before).json()
    assert [one["message"]["id"] for one in rest["items"]] == ids[:1]
    for wrong in ({"limit": "x"}, {"limit": "51"}, {"before": "x"}):
        answer = http.get(f"{channel}/messages/pins", params=wrong)
        assert (answer.status_code, answer.json()["code"]) == (400, 50035)
    assert http.delete(f"{channel}/pins/{ids[0]}").status_code == 204
    assert len(http.get(f"{channel}/pins").json()) == 2
    sandbox.settings(read_history=False)
    assert http.get(f"{channel}/pins").json() == []
    assert http.get(f"{channel}/messages/pins").json()["items"] == []


def test_a_lost_boost_makes_yesterdays_size_too_large(sandbox, http):
    sandbox.settings(attachment_bytes=10, request_bytes=60 * 2**20, premium_tier=2)
    path = f"/channels/{sandbox.channel_ids[0]}/messages"
    assert http.post(path, files={"files[0]": ("a", b"x" * 11)}).status_code == 200
    sandbox.settings(premium_tier=0)
    refused = http.post(path, files={"files[0]": ("a", b"x" * 11)})
    assert (refused.status_code, refused.json()["code"]) == (413, 40005)


def test_numbers_beyond_64_bits_and_flags_that_are_none_get_an_answer(sandbox, http):
    path, huge = f"/channels/{sandbox.channel_ids[0]}/messages", "9" * 30
    assert http.get(f"{path}/{huge}").json()["code"] == 10008
    assert http.get(f"/webhooks/{huge}").json()["code"] == 10015
    assert http.get(path, params={"after": "\u00b2"}).json()["code"] == 50035
    assert http.post(path, json={"content": "x", "flags": "y"}).json()["code"] == 50035


def test_another_bot_sees_no_content_without_the_intent_and_edits_only_its_own(sandbox, http):
    other = sandbox.admin("bots", {})
    path = f"/channels/{sandbox.channel_ids[0]}/messages"
    keyed = {"nonce": "k", "enforce_nonce": True}
    made = http.post(path, json={"content": "x", **keyed}).json()
    theirs = {"Authorization": f"Bot {other['token']}"}
    assert http.get("/users/@me", headers=theirs).json()["id"] == other["user_id"]
    assert http.get(f"{path}/{made['id']}", headers=theirs).json()["content"] == ""
    assert http.get(f"{path}/{made['id']}").json()["content"] == "x"
    denied = http.patch(f"{path}/{made['id']}", json={"content": "y"}, headers=theirs)
    assert (denied.status_code, denied.json()["code"]) == (403, 50005)
    own = http.post(path, json={"content": "z", **keyed}, headers=theirs).json()
    assert (own["id"] != made["id"], own["content"]) == (True, "z")
    sandbox.settings(message_content=True)
    assert http.get(f"{path}/{made['id']}", headers=theirs).json()["content"] == "x"
    sandbox.restart()
    assert http.get("/users/@me", headers=theirs).status_code == 200


def test_what_hinders_the_start_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file: File exists"):
        main(["--dir", str(tmp_path / "file")])
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(SystemExit, match=f"127.0.0.1:{port}: Address already in use"):
            main(["--dir", str(tmp_path / "new"), "--port", port])
    with pytest.raises(SystemExit):
        main(["--port", "99999"])
    assert "0 to 65535" in capsys.readouterr().err
