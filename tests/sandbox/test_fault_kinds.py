"""Each fault once on a running server: what a client sees of it, and that it ends."""

from __future__ import annotations

import json
import socket
import time
from email.utils import parsedate_to_datetime

import httpx
import pytest

BLOB = bytes(range(256)) * 40
KEYED = {"nonce": "k", "enforce_nonce": True}


def status_of(api, method="GET", path="/users/@me", **more) -> int:
    return api.http.request(method, path, **more).status_code


def keyed(api, **more) -> httpx.Response:
    data = {"payload_json": json.dumps(KEYED)}
    return api.http.post(api.messages, data=data, files={"files[0]": ("a", BLOB)}, **more)


def listed(api) -> list[str]:
    return [one["id"] for one in api("GET", api.messages).json()]


# Before a request has an effect


def test_a_burst_of_errors_lasts_its_time(api):
    rule = {"kind": "status", "status": [502, 503, 504, 520, 522, 524], "for_s": 60}
    api.sandbox.faults(rule)
    answers = [api.http.get("/users/@me") for _ in range(20)]
    assert {one.status_code for one in answers} > {502, 503}
    assert {one.status_code for one in answers} <= {502, 503, 504, 520, 522, 524}
    assert answers[0].text.startswith("<html>")
    assert status_of(api, "POST", api.messages, json={"content": "x"}) >= 500
    api.sandbox.clock(61)
    assert status_of(api) == 200
    assert api.sandbox.stats()["created"] == 0


def test_an_error_may_have_no_body_and_a_retry_after(api):
    api.sandbox.faults({"kind": "status", "empty": True, "retry_after": 3, "status": 503})
    answer = api.http.get("/users/@me")
    assert (answer.content, answer.headers["retry-after"]) == (b"", "3")


def test_a_reset_a_refusal_and_a_delay(api):
    api.sandbox.faults(
        {"kind": "reset", "route": "me"},
        {"kind": "refuse", "route": "channel", "status": 403, "code": 50001},
        {"kind": "delay", "route": "guild", "seconds": 0.3},
    )
    with pytest.raises(httpx.ReadError):
        api.http.get("/users/@me")
    api.refused(api("GET", api.channel), 403, 50001)
    begun = time.monotonic()
    assert status_of(api, path=f"/guilds/{api.sandbox.guild_id}") == 200
    assert time.monotonic() - begun >= 0.3


def test_an_error_before_the_body_is_read_ends_the_connection(api):
    api.sandbox.faults({"route": "create_message", "kind": "early", "status": 413, "code": 40005})
    with socket.create_connection(("127.0.0.1", api.http.base_url.port)) as connection:
        head = f"POST /api/v10{api.messages} HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n"
        connection.sendall(head.encode())
        connection.settimeout(10)
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()
    assert api.sandbox.stats()["created"] == 0
    assert status_of(api) == 200


def test_an_early_429_is_the_api_s(api):
    api.sandbox.faults({"kind": "early", "status": 429})
    answer = api("GET", "/users/@me")
    assert (answer.status_code, answer.json()["retry_after"]) == (429, 1.0)
    assert answer.headers["connection"] == "close"


def test_an_upload_is_cut_in_its_middle(api):
    api.sandbox.faults({"route": "create_message", "kind": "cut_upload", "times": 2})
    with pytest.raises(httpx.TransportError):
        api.http.post(api.messages, files={"files[0]": ("a", bytes(16 << 20))})
    with pytest.raises(httpx.TransportError):
        api.http.post(api.messages, files={"files[0]": ("a", bytes(1000))})
    assert api.sandbox.stats()["created"] == 0
    assert list((api.sandbox.folder / "incoming").iterdir()) == []
    assert api.post(BLOB).status_code == 200


def test_an_upload_is_read_slowly_but_completed(api):
    api.sandbox.faults({"route": "create_message", "kind": "slow_upload", "bytes_per_s": 20_000})
    with pytest.raises(httpx.ReadTimeout):
        keyed(api, timeout=0.1)
    deadline = time.monotonic() + 20
    while not api.sandbox.stats()["created"]:
        assert time.monotonic() < deadline
    assert len(listed(api)) == 1


@pytest.mark.parametrize("scope", ["user", "global", "shared"])
def test_a_429_of_each_scope(api, scope):
    rule = {"route": "me", "kind": "rate_limit", "scope": scope, "retry_after": 1.3, "code": 20028}
    api.sandbox.faults(rule)
    answer = api("GET", "/users/@me")
    api.refused(answer, 429, 20028)
    assert (answer.json()["retry_after"], answer.headers["retry-after"]) == (1.3, "2")
    assert answer.headers["x-ratelimit-scope"] == scope
    assert (answer.headers.get("x-ratelimit-global") == "true") is (scope == "global")
    remaining = {"user": "0", "global": None, "shared": "3"}[scope]
    assert answer.headers.get("x-ratelimit-remaining") == remaining
    assert ("x-ratelimit-bucket" in answer.headers) is (scope != "global")
    assert api.sandbox.stats()["rate_limited"] == {"provoked": 0, "injected": 1}


def test_a_429_for_old_edits_is_unannounced(api):
    api.sandbox.faults({"route": "edit_message", "kind": "rate_limit", "code": 30046})
    made = api.post(content="x").json()["id"]
    answer = api("PATCH", f"{api.messages}/{made}", json={"content": "y"})
    api.refused(answer, 429, 30046)
    assert "x-ratelimit-remaining" not in answer.headers


def test_cloudflare_has_two_forms_and_no_headers(api):
    api.sandbox.faults({"kind": "cloudflare"}, {"kind": "cloudflare", "json": True})
    answers = [api.http.get("/users/@me") for _ in range(2)]
    assert [one.status_code for one in answers] == [429, 429]
    assert answers[0].text == "error code: 1015"
    assert (answers[1].json()["code"], "retry_after" in answers[1].json()) == (0, False)
    for one in answers:
        assert not [key for key in one.headers if key == "via" or key.startswith("x-rate")]


# After it had its effect


@pytest.mark.parametrize("status", [500, 502, 504, 0])
def test_an_answer_is_lost_after_the_message_was_made(api, status):
    api.sandbox.faults({"route": "create_message", "kind": "lost_answer", "status": status})
    if status:
        assert keyed(api).status_code == status
    else:
        with pytest.raises(httpx.TransportError):
            keyed(api)
    assert keyed(api).status_code == 200
    assert api.sandbox.stats()["messages"] == 1


def test_a_late_answer_is_a_right_one(api):
    api.sandbox.faults({"route": "create_message", "kind": "late", "seconds": 3})
    with pytest.raises(httpx.ReadTimeout):
        keyed(api, timeout=0.2)
    assert api.sandbox.stats()["created"] == 1
    assert keyed(api).status_code == 200
    assert api.sandbox.stats()["messages"] == 1


@pytest.mark.parametrize("reset", [False, True])
def test_an_answer_ends_in_its_middle(api, reset):
    api.sandbox.faults({"route": "create_message", "kind": "cut", "reset": reset})
    with pytest.raises(httpx.TransportError):
        keyed(api)
    assert keyed(api).json()["id"] == listed(api)[0]
    assert api.sandbox.stats()["messages"] == 1


# Headers


def test_the_bucket_changes_with_each_answer(api):
    api.sandbox.settings(rate_limits=True)
    api.sandbox.faults({"kind": "new_bucket", "for_s": 60})
    path = f"{api.messages}/pins"
    assert len({api("GET", path).headers["x-ratelimit-bucket"] for _ in range(3)}) == 3
    api.sandbox.faults()
    assert len({api("GET", path).headers["x-ratelimit-bucket"] for _ in range(3)}) == 1


def test_reset_is_another_clock_s(api):
    api.sandbox.settings(rate_limits=True)
    api.sandbox.faults({"kind": "skew", "seconds": 40})
    shifts = []
    for _ in range(2):
        headers = api("GET", f"{api.messages}/pins").headers
        after = float(headers["x-ratelimit-reset-after"])
        shifts.append(float(headers["x-ratelimit-reset"]) - after - time.time())
    assert [abs(shift - right) < 3 for shift, right in zip(shifts, (40, 0), strict=True)] == [
        True,
        True,
    ]


def test_reset_jitters(api):
    api.sandbox.settings(rate_limits=True)
    api.sandbox.faults({"kind": "skew", "seconds": 0, "jitter_s": 20, "times": 4})
    resets = [
        float(api("GET", f"{api.messages}/pins").headers["x-ratelimit-reset"]) for _ in range(4)
    ]
    assert max(resets) - min(resets) > 2


def test_date_is_another_clock_s(api):
    api.sandbox.faults({"kind": "skew_date", "seconds": -300})
    for right in (-300, 0):
        date = parsedate_to_datetime(api("GET", "/users/@me").headers["date"])
        assert abs(date.timestamp() - time.time() - right) < 5


def test_rate_headers_are_missing_also_on_a_429(api):
    api.sandbox.settings(rate_limits=True)
    api.sandbox.faults({"route": "create_message", "kind": "no_headers", "times": 6})
    answers = [api("POST", api.messages, json={"content": "x"}) for _ in range(7)]
    assert [one.status_code for one in answers] == [200] * 5 + [429] * 2
    shown = [[k for k in one.headers if k.startswith("x-ratelimit-")] for one in answers]
    assert shown[:6] == [[]] * 6
    assert "x-ratelimit-reset-after" in shown[6]


# What is made, and what is seen of it


def test_a_forgotten_nonce_makes_a_duplicate(api):
    api.sandbox.faults({"kind": "forget_nonce"})
    assert len({keyed(api).json()["id"] for _ in range(3)}) == 2


def test_a_message_deleted_by_somebody_leaves_its_nonce_behind(api):
    api.sandbox.faults({"kind": "moderated"})
    url = keyed(api).json()["attachments"][0]["url"]
    assert listed(api) == []
    assert httpx.get(url).status_code == 404
    answer = keyed(api)
    api.refused(answer, 404, 10008)


def test_messages_of_others_stand_between(api):
    api.sandbox.faults({"kind": "interleave", "types": [7], "times": 2})
    own = [api.post(BLOB).json()["id"] for _ in range(3)]
    page = api("GET", api.messages).json()
    assert [one["type"] for one in page] == [0, 0, 7, 0, 7]
    assert [one["id"] for one in page if one["type"] == 0] == own[::-1]
    assert {one["author"]["id"] for one in page[2::2]}.isdisjoint({page[0]["author"]["id"]})


def test_messages_of_others_by_the_admin_route_hide_their_files(api):
    about = {"channel_id": api.sandbox.channel_ids[0], "type": 18, "filename": "f", "size": 5}
    api.sandbox.admin("messages", about)
    (shown,) = api("GET", api.messages).json()
    assert (shown["type"], shown["attachments"], shown["content"]) == (18, [], "")
    api.sandbox.faults({"kind": "switch", "set": {"message_content": True}, "for_s": 60})
    (shown,) = api("GET", api.messages).json()
    assert [(one["filename"], one["size"]) for one in shown["attachments"]] == [("f", 5)]
    assert len(httpx.get(shown["attachments"][0]["url"]).content) == 5
    api.sandbox.clock(61)
    assert api("GET", api.messages).json()[0]["attachments"] == []


def test_names_are_changed_by_the_server(api):
    api.sandbox.faults({"kind": "rename", "route": "create_message"})
    made = api.valid(api.post(b"x").json(), "MessageResponse")["attachments"][0]
    assert (made["filename"], made["title"]) == ("file0", "pack.bin")
    assert httpx.get(made["url"]).content == b"x"


def test_an_unrewound_body_leaves_an_empty_attachment(api):
    api.sandbox.faults({"kind": "empty_file"})
    made = api.post(BLOB).json()["attachments"][0]
    assert made["size"] == 0
    assert httpx.get(made["url"]).content == b""


def test_the_newest_message_is_hidden_for_a_number_of_requests(api):
    ids = [api.post(BLOB).json()["id"] for _ in range(3)]
    api.sandbox.faults(
        {"kind": "hide", "route": "list_messages", "newest": 2, "times": 2},
        {"kind": "hide", "route": "get_message"},
    )
    assert [len(listed(api)) for _ in range(3)] == [1, 1, 3]
    older, newest = (f"{api.messages}/{ids[n]}" for n in (0, 2))
    assert [status_of(api, path=path) for path in (older, newest, newest)] == [200, 404, 200]


def test_a_message_is_hidden_for_some_time(api):
    api.sandbox.faults({"kind": "hide", "younger_s": 30, "for_s": 3600})
    made = api.post(BLOB).json()["id"]
    params = {"after": int(made) - 1}
    assert api("GET", api.messages, params=params).json() == []
    assert api("GET", api.messages, params={"around": made}).json() == []
    api.refused(api("GET", f"{api.messages}/{made}"), 404, 10008)
    api.sandbox.clock(31)
    later = api.post(BLOB).json()["id"]
    assert listed(api) == [made]
    api.sandbox.clock(31)
    assert listed(api) == [later, made]


def test_own_messages_are_shown_as_another_bot_s(api):
    made = api.post(BLOB).json()
    api.sandbox.faults({"kind": "foreign", "times": 2})
    for shown in (api("GET", api.messages).json()[0], api("GET", f"{api.messages}/{made['id']}")):
        one = shown if isinstance(shown, dict) else shown.json()
        assert (one["id"], one["attachments"], one["content"]) == (made["id"], [], "")
        assert one["author"]["id"] != made["author"]["id"]
    assert api("GET", f"{api.messages}/{made['id']}").json()["attachments"]


def test_without_history_lists_and_pins_are_empty(api):
    made = api.post(BLOB).json()["id"]
    api("PUT", f"{api.messages}/pins/{made}")
    api.sandbox.faults({"kind": "no_history", "for_s": 60})
    assert listed(api) == []
    assert api("GET", f"{api.messages}/pins").json()["items"] == []
    api.sandbox.faults({"kind": "switch", "set": {"read_history": False}, "for_s": 60})
    assert listed(api) == []
    api.refused(api("GET", f"{api.messages}/{made}"), 403, 50013)
    api.sandbox.faults()
    assert made in listed(api)


def test_a_limit_falls_for_a_time(api):
    api.sandbox.faults({"kind": "switch", "set": {"attachment_bytes": 10}, "for_s": 60})
    api.refused(api.post(BLOB), 413, 40005)
    api.sandbox.clock(61)
    assert api.post(BLOB).status_code == 200


def test_a_token_can_be_reset_and_given_back(api):
    api.sandbox.admin("token", {})
    assert {status_of(api, path=path) for path in ("/users/@me", api.channel, api.messages)} == {
        401
    }
    api.sandbox.admin("token", {"token": api.sandbox.token})
    assert status_of(api) == 200


def test_an_edit_with_files_and_no_list_drops_the_others_unless_switched(api):
    path = f"{api.messages}/{api.post(b'a', b'bb').json()['id']}"
    files = {"files[0]": ("c", b"ccc")}
    api.sandbox.faults({"kind": "switch", "set": {"edits_drop": False}})
    assert len(api("PATCH", path, files=files).json()["attachments"]) == 3
    api.sandbox.faults()
    assert len(api("PATCH", path, files=files).json()["attachments"]) == 1


# The CDN


def test_a_deleted_attachment_lingers_for_a_time(api):
    made = [api.post(BLOB).json() for _ in range(2)]
    urls = [one["attachments"][0]["url"] for one in made]
    api.sandbox.faults({"route": "delete_message", "kind": "linger", "seconds": 100})
    for one in made:
        assert api("DELETE", f"{api.messages}/{one['id']}").status_code == 204
    assert [httpx.get(url).status_code for url in urls] == [200, 404]
    api.sandbox.restart()
    assert httpx.get(urls[0]).content == BLOB
    api.sandbox.clock(101)
    assert httpx.get(urls[0]).status_code == 404


def test_a_dropped_attachment_of_an_edit_lingers_too(api):
    made = api.post(BLOB, b"x").json()
    keep = {"attachments": [{"id": made["attachments"][1]["id"]}]}
    api.sandbox.faults({"route": "edit_message", "kind": "linger"})
    api("PATCH", f"{api.messages}/{made['id']}", json=keep)
    assert httpx.get(made["attachments"][0]["url"]).content == BLOB


@pytest.mark.parametrize("status", [404, 403, 503])
def test_a_new_attachment_is_not_served_yet(api, status):
    url = api.post(BLOB).json()["attachments"][0]["url"]
    rule = {"kind": "not_yet", "status": status, "younger_s": 10, "for_s": 3600}
    api.sandbox.faults(rule)
    assert httpx.get(url).status_code == status
    api.sandbox.clock(11)
    assert httpx.get(url).content == BLOB


def test_a_link_dies_while_it_is_read_and_a_new_one_lives(api):
    made = api.post(BLOB).json()
    url = made["attachments"][0]["url"]
    api.sandbox.faults({"kind": "expire"})
    got = bytearray()

    def read_it() -> None:
        with httpx.stream("GET", url) as answer:
            for piece in answer.iter_raw():
                got.extend(piece)

    with pytest.raises(httpx.RemoteProtocolError):
        read_it()
    assert got == BLOB[: len(BLOB) // 2]
    assert [httpx.get(url).status_code for _ in range(2)] == [404, 404]
    fresh = api("GET", f"{api.messages}/{made['id']}").json()["attachments"][0]["url"]
    assert fresh != url
    assert httpx.get(fresh).content == BLOB


def test_a_link_expires_by_the_clock(api):
    api.sandbox.faults({"kind": "switch", "set": {"link_lifetime_s": 60}, "for_s": 3600})
    url = api.post(BLOB).json()["attachments"][0]["url"]
    assert httpx.get(url).content == BLOB
    api.sandbox.clock(61)
    assert httpx.get(url).status_code == 404


@pytest.mark.parametrize("reset", [False, True])
def test_the_cdn_ends_in_the_middle(api, reset):
    url = api.post(bytes(1 << 20)).json()["attachments"][0]["url"]
    api.sandbox.faults({"route": "cdn", "kind": "cut", "reset": reset})
    with pytest.raises(httpx.ReadError if reset else httpx.RemoteProtocolError):
        httpx.get(url)
    assert len(httpx.get(url).content) == 1 << 20


def test_the_cdn_refuses_resets_and_delays(api):
    url = api.post(BLOB).json()["attachments"][0]["url"]
    api.sandbox.faults(
        {"route": "cdn", "kind": "status", "status": 403},
        {"route": "cdn", "kind": "reset"},
        {"route": "cdn", "kind": "delay", "seconds": 0.3},
    )
    begun = time.monotonic()
    assert httpx.get(url).status_code == 403
    assert time.monotonic() - begun >= 0.3
    with pytest.raises(httpx.TransportError):
        httpx.get(url)
    assert httpx.get(url).content == BLOB
    assert httpx.get(url.replace("/attachments/", "/media/attachments/")).status_code == 415


def test_the_cdn_ignores_ranges_and_flips_bits(api):
    url = api.post(BLOB).json()["attachments"][0]["url"]
    api.sandbox.faults({"kind": "ignore_range"}, {"kind": "corrupt"})
    whole = httpx.get(url, headers={"Range": "bytes=0-1"})
    assert (whole.status_code, whole.content) == (200, b"\x01" + BLOB[1:])
    assert httpx.get(url).content == BLOB


# The ban


def test_too_many_refusals_ban_the_address_for_all_its_tokens(api):
    api.sandbox.settings(ban_after=20, ban_s=100)
    url = api.post(BLOB).json()["attachments"][0]["url"]
    wrong = {"Authorization": "Bot wrong"}
    assert {status_of(api, headers=wrong) for _ in range(20)} == {401}
    banned = api.http.get("/users/@me")
    assert (banned.status_code, banned.text) == (429, "error code: 1015")
    assert "via" not in banned.headers
    assert httpx.get(url).content == BLOB
    stats = api.sandbox.stats()
    assert (stats["invalid"], stats["banned_answers"]) == (20, 1)
    api.sandbox.clock(101)
    assert status_of(api) == 200


def test_injected_refusals_count_too_but_not_those_of_a_shared_limit(api):
    api.sandbox.settings(ban_after=5)
    rule = {"kind": "rate_limit", "route": "me", "retry_after": 0.1}
    api.sandbox.faults({**rule, "scope": "shared", "times": 9})
    assert [status_of(api) for _ in range(10)] == [429] * 9 + [200]
    api.sandbox.faults({**rule, "times": 5})
    assert [status_of(api) for _ in range(6)] == [429] * 6
    assert api.sandbox.stats()["banned_answers"] == 1
