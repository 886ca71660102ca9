"""The server as a client sees it, its answers held against the official description."""

from __future__ import annotations

import json
import urllib.error
from typing import Any

import httpx
import pytest

BLOB = bytes(range(256)) * 40


def test_who_and_where(api):
    sandbox = api.sandbox
    api.valid(api("GET", "/users/@me").json(), "UserPIIResponse")
    api.valid(api("GET", "/gateway/bot").json(), "GatewayBotResponse")
    api.valid(api("GET", f"/guilds/{sandbox.guild_id}").json(), "GuildWithCountsResponse")
    api.valid(api("GET", api.channel).json(), "GuildChannelResponse")
    api.refused(api("GET", "/channels/5"), 404, 10003)
    api.refused(api("GET", "/guilds/5"), 404, 10004)
    api.refused(api("GET", "/nothing"), 404, 0)


def test_credentials_and_agent(api):
    assert api("GET", "/users/@me", headers={"Authorization": "Bot x"}).status_code == 401
    answer = api("GET", "/users/@me", headers={"User-Agent": "Mozilla/5.0"})
    api.refused(answer, 403, 40333)
    fresh = api.sandbox.admin("token", {})["token"]
    assert api.post(BLOB).status_code == 401
    api.use(fresh)
    assert api("GET", "/users/@me").status_code == 200


def test_a_message_comes_back_by_every_way(api):
    made = api.valid(api.post(BLOB, b"", nonce="n").json(), "MessageResponse")
    assert made["nonce"] == "n"
    first, second = made["attachments"]
    assert (first["size"], second["size"]) == (len(BLOB), 0)
    got = api.valid(api("GET", f"{api.messages}/{made['id']}").json(), "MessageResponse")
    assert "nonce" not in got
    assert got["attachments"][0]["id"] == first["id"]
    assert httpx.get(first["url"]).content == BLOB
    assert httpx.get(second["url"]).content == b""
    assert api("GET", api.channel).json()["last_message_id"] == made["id"]


def test_listing_is_newest_first_by_every_cursor(api):
    ids = [api("POST", api.messages, json={"content": str(n)}).json()["id"] for n in range(5)]

    def page(**params: Any) -> list[int]:
        return [ids.index(one["id"]) for one in api("GET", api.messages, params=params).json()]

    assert page() == [4, 3, 2, 1, 0]
    assert page(limit=2, before=ids[4]) == [3, 2]
    assert page(limit=2, after=ids[0]) == [2, 1]
    assert page(limit=2, around=ids[2]) == [3, 2]
    api.refused(api("GET", api.messages, params={"limit": 101}), 400, 50035)
    api.refused(api("GET", api.messages, params={"after": "x"}), 400, 50035)


def test_the_nonce_makes_a_create_safe_to_repeat(api):
    first = api.post(BLOB, nonce="k", enforce_nonce=True).json()
    assert api.post(BLOB, nonce="k", enforce_nonce=True).json()["id"] == first["id"]
    assert api.post(BLOB, nonce="k").json()["id"] != first["id"]
    again = api.post(BLOB, nonce="z", enforce_nonce=True).json()
    assert api("DELETE", f"{api.messages}/{again['id']}").status_code == 204
    api.refused(api.post(BLOB, nonce="z", enforce_nonce=True), 404, 10008)
    api.sandbox.clock(301)
    assert api.post(BLOB, nonce="z", enforce_nonce=True).status_code == 200
    api.refused(api.post(BLOB, nonce="n" * 26), 400, 50035)
    elsewhere = f"/channels/{api.sandbox.channel_ids[1]}/messages"
    kept = api.post(b"y", nonce="z", enforce_nonce=True, path=elsewhere).json()
    assert kept["channel_id"] == api.sandbox.channel_ids[0]


def test_what_a_create_refuses(api):
    api.refused(api("POST", api.messages, json={}), 400, 50006)
    api.refused(api("POST", api.messages, json={"content": "x" * 2001}), 400, 50035)
    api.refused(api("POST", api.messages, content=b"x"), 400, 50035)
    api.refused(api("POST", api.messages, json=[]), 400, 50035)
    broken = {"Content-Type": "multipart/form-data; boundary=b"}
    api.refused(api("POST", api.messages, content=b"nonsense", headers=broken), 400, 50006)
    api.refused(api.post(*[b"x"] * 10, attachments=[{"id": n} for n in range(11)]), 400, 30015)
    api.sandbox.settings(attachment_bytes=100, request_bytes=4000)
    api.refused(api.post(b"x" * 101), 413, 40005)
    api.refused(api.post(b"x" * 4001), 413, 40005)
    api.sandbox.settings(attach_files=False)
    api.refused(api.post(b"x"), 403, 50013)
    api.sandbox.settings(send_messages=False)
    api.refused(api.post(content="x"), 403, 50013)
    assert list((api.sandbox.folder / "incoming").iterdir()) == []
    assert api.sandbox.stats()["messages"] == 0


def test_edits_keep_what_they_list(api):
    made = api.post(b"a", b"b", b"c").json()
    ids = [one["id"] for one in made["attachments"]]
    path = f"{api.messages}/{made['id']}"

    def left(**payload: Any) -> list[str]:
        answer = api.valid(api("PATCH", path, json=payload).json(), "MessageResponse")
        assert answer["edited_timestamp"]
        return [one["id"] for one in answer["attachments"]]

    assert left(content="x") == ids
    assert left(attachments=[{"id": ids[1]}, {"id": ids[2]}]) == ids[1:]
    files = {"files[0]": ("d", b"d")}
    payload = json.dumps({"attachments": [{"id": ids[1]}, {"id": 0}]})
    more = api("PATCH", path, files=files, data={"payload_json": payload}).json()
    assert [one["size"] for one in more["attachments"]] == [1, 1]
    alone = api("PATCH", path, files={"files[0]": ("e", b"eee")}).json()
    assert [one["size"] for one in alone["attachments"]] == [3]
    api.refused(api("PATCH", path, json={"content": "", "attachments": []}), 400, 50006)
    other = api.sandbox.admin("messages", {"channel_id": api.sandbox.channel_ids[0]})["id"]
    api.refused(api("PATCH", f"{api.messages}/{other}", json={"content": "x"}), 403, 50005)
    assert api.sandbox.stats()["attachment_bytes"] == 3


def test_bulk_delete_knows_count_and_age(api):
    ids = [api.post(b"x").json()["id"] for _ in range(3)]
    bulk = f"{api.messages}/bulk-delete"
    api.refused(api("POST", bulk, json={"messages": ids[:1]}), 400, 50016)
    assert api("POST", bulk, json={"messages": ids[:2]}).status_code == 204
    api.sandbox.clock(15 * 86_400)
    api.refused(api("POST", bulk, json={"messages": ids}), 400, 50034)
    assert api.sandbox.stats()["attachment_bytes"] == 1


def test_pins(api):
    made = api.post(b"x").json()["id"]
    pin = f"{api.messages}/pins/{made}"
    assert [api("PUT", pin).status_code for _ in range(2)] == [204, 204]
    shown = api.valid(api("GET", f"{api.messages}/pins").json(), "PinnedMessagesResponse")
    assert [one["message"]["id"] for one in shown["items"]] == [made]
    assert [one["type"] for one in api("GET", api.messages).json()] == [6, 0]
    assert api("DELETE", pin).status_code == 204
    assert api("GET", f"{api.messages}/pins").json()["items"] == []


def test_webhooks(api):
    hook = api("POST", f"{api.channel}/webhooks", json={"name": "w"}).json()
    api.valid(hook, "GuildIncomingWebhookResponse")
    api.refused(api("POST", f"{api.channel}/webhooks", json={"name": "Clyde"}), 400, 50035)
    api.refused(api("POST", f"{api.channel}/webhooks", json={"name": ""}), 400, 50035)
    assert [one["id"] for one in api("GET", f"{api.channel}/webhooks").json()] == [hook["id"]]
    path = f"/webhooks/{hook['id']}/{hook['token']}"
    del api.http.headers["Authorization"]
    assert api.post(BLOB, path=path).status_code == 204
    made = api.valid(api.post(BLOB, path=path + "?wait=true").json(), "MessageResponse")
    message = f"{path}/messages/{made['id']}"
    assert api.valid(api("GET", message).json(), "MessageResponse")["attachments"]
    assert api("PATCH", message, json={"content": "y"}).json()["content"] == "y"
    api.refused(api("GET", f"/webhooks/{hook['id']}/wrong"), 401, 50027)
    api.refused(api("GET", "/webhooks/5/x"), 404, 10015)
    api.use(api.sandbox.token)
    hidden = api("GET", f"{api.messages}/{made['id']}").json()
    assert (hidden["content"], hidden["attachments"]) == ("", [])
    api.sandbox.settings(message_content=True)
    assert api("GET", f"{api.messages}/{made['id']}").json()["attachments"]
    assert api("DELETE", message).status_code == 204
    assert api("GET", f"/webhooks/{hook['id']}").json()["name"] == "w"
    assert api("DELETE", path).status_code == 204
    api.refused(api("DELETE", f"/webhooks/{hook['id']}"), 404, 10015)


def test_without_history_a_list_is_empty_and_no_error(api):
    made = api.post(b"x").json()["id"]
    api.sandbox.settings(read_history=False)
    assert api("GET", api.messages).json() == []
    api.refused(api("GET", f"{api.messages}/{made}"), 403, 50013)


def test_links_have_ranges_and_an_end(api):
    url = api.post(BLOB, name="my pack.bin").json()["attachments"][0]["url"]
    assert "/my_pack.bin?ex=" in url
    part = httpx.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, BLOB[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(BLOB)}"
    beyond = httpx.get(url, headers={"Range": f"bytes={len(BLOB)}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(BLOB)}")
    head = httpx.head(url)
    assert (head.headers["content-length"], head.content) == (str(len(BLOB)), b"")
    assert httpx.get(url.replace("hm=", "hm=0")).status_code == 404
    assert httpx.get(url.replace("/attachments/", "/media/attachments/")).status_code == 415
    assert api.sandbox.stats()["cdn_bytes"] == 10
    api.sandbox.clock(86_401)
    gone = httpx.get(url)
    assert (gone.status_code, gone.text) == (404, "This content is no longer available.")
    body = {"attachment_urls": [url]}
    (fresh,) = api("POST", "/attachments/refresh-urls", json=body).json()["refreshed_urls"]
    assert fresh["original"] == url
    assert httpx.get(fresh["refreshed"]).content == BLOB
    api.refused(api("POST", "/attachments/refresh-urls", json={}), 400, 50035)


def test_the_sixth_create_in_a_window_is_refused_with_all_headers(api):
    api.sandbox.settings(rate_limits=True)
    answers = [api.post(b"x") for _ in range(6)]
    assert [one.status_code for one in answers] == [200] * 5 + [429]
    assert answers[0].headers["x-ratelimit-remaining"] == "4"
    last = answers[5]
    assert last.headers["x-ratelimit-scope"] == "user"
    assert int(last.headers["retry-after"]) >= last.json()["retry_after"] > 0
    assert last.json()["global"] is False
    assert api.sandbox.stats()["rate_limited"] == {"provoked": 1, "injected": 0}
    api.sandbox.clock(6)
    assert api.post(b"x").status_code == 200


def test_all_is_there_after_a_restart(api):
    url = api.post(BLOB, nonce="k", enforce_nonce=True).json()["attachments"][0]["url"]
    before = vars(api.sandbox).copy()
    assert api.sandbox.stop() == 0
    api.sandbox.start()
    for name in ("api_url", "token", "guild_id", "channel_ids"):
        assert getattr(api.sandbox, name) == before[name]
    assert httpx.get(url).content == BLOB
    assert api.post(BLOB, nonce="k", enforce_nonce=True).status_code == 200
    assert api.sandbox.stats()["messages"] == 1


def test_the_admin_routes_refuse_what_they_do_not_know(api):
    for path, body in [
        ("clock", {"advance_s": -1}),
        ("faults", {"rules": [{"kind": "gremlin"}]}),
        ("settings", {"port": 1}),
        ("attachments/1", {"action": "delete"}),
    ]:
        with pytest.raises(urllib.error.HTTPError):
            api.sandbox.admin(path, body)
    assert api.sandbox.admin("faults") == {"rules": []}
    api.refused(api("GET", f"{api.messages}/{2**64}"), 404, 10008)
    api.refused(api("GET", f"{api.messages}/pins?limit=x"), 400, 50035)


def test_damage_by_hand(api):
    made = api.post(BLOB, BLOB, BLOB).json()["attachments"]
    for one, action in zip(made, ["corrupt", "truncate", "delete"], strict=True):
        api.sandbox.damage(one["id"], action, offset=5, size=7)
    corrupt, short, gone = (httpx.get(one["url"]) for one in made)
    assert [n for n, byte in enumerate(corrupt.content) if byte != BLOB[n]] == [5]
    assert short.content == BLOB[:7]
    assert gone.status_code == 404
