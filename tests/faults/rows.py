"""The rows of the fault matrix: what is wrong with the service, and what may fail because of it.

Every behaviour of docs/sandbox.md has one, but those in `WITHOUT_ROW`; `number` is the behaviour's.
Where `may_fail` is false every operation must succeed though the fault is there; else a cold read
may give EIO, and `sync` and `umount` may wait or give up. Local operations must always succeed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_LONG_S = 86_400
_SOME = {"probability": 0.4, "for_s": _LONG_S}
_LONG = {"for_s": _LONG_S}
# Discord sends it for edits of old messages. No message is edited, so other calls get it here.
_UNANNOUNCED = {"kind": "rate_limit", "code": 30046, "retry_after": 0.5}
_CREATE = {"route": "create_message"}
_CDN = {"route": "cdn"}
_LAG = {"younger_s": 10 * _LONG_S}
_BURST = [502, 503, 504, 520, 522, 524]


@dataclass(frozen=True)
class Row:
    name: str
    number: int | None
    rules: list[dict[str, Any]] = field(default_factory=list)
    may_fail: bool = False
    token: bool = False  # reset the token
    stall: bool = False  # the server's process stands still
    loses: bool = False  # somebody deletes what is uploaded: it may be gone afterwards
    settles_late: bool = False  # an unclear outcome may take longer than the matrix waits
    purges: bool = False  # a file is purged as well, so that something is deleted on Discord


def always(kind: str, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "for_s": _LONG_S, **more}


def switch(**settings: Any) -> dict[str, Any]:
    return {"kind": "switch", "set": settings}


WITHOUT_ROW = {28: "no message is edited, and each row looks that none was"}
ROWS = [
    Row("no fault", None, purges=True),
    Row("create: made, then 504, twice", 1, [{"kind": "lost_answer", "times": 2, **_CREATE}]),
    Row(
        "create: made, then reset, always",
        1,
        [always("lost_answer", status=0, **_CREATE)],
        may_fail=True,
    ),
    Row("create: made, answer cut", 1, [{"kind": "cut", "times": 2, "reset": True, **_CREATE}]),
    Row("all answers reset, 40 %", 1, [{"kind": "reset", **_SOME}], may_fail=True),
    Row("no connection survives", 1, [always("reset")], may_fail=True),
    Row("upload reset in its middle, twice", 1, [{"kind": "cut_upload", "times": 2, **_CREATE}]),
    Row("upload reset in its middle, always", 1, [always("cut_upload", **_CREATE)], may_fail=True),
    Row(
        "answer lost, nonce forgotten",
        2,
        [{"kind": "lost_answer", **_CREATE}, {"kind": "forget_nonce"}],
    ),
    Row("early 401", 4, [always("early")], may_fail=True),
    Row("early 429, twice", 4, [{"kind": "early", "status": 429, "times": 2, **_CREATE}]),
    Row("early 413, once", 4, [{"kind": "early", "status": 413, "code": 40005, **_CREATE}]),
    Row("burst of 5xx, HTML", 5, [always("status", status=_BURST)], may_fail=True),
    Row("burst of 5xx, empty", 5, [always("status", status=_BURST, empty=True)], may_fail=True),
    Row("5xx, 40 %", 5, [{"kind": "status", "status": _BURST, **_SOME}], may_fail=True),
    Row(
        "502: without effect, then with",
        6,
        [{"kind": "status", **_CREATE}, {"kind": "lost_answer", "status": 502, **_CREATE}],
    ),
    Row("429, user, 40 %", 7, [{"kind": "rate_limit", "retry_after": 0.5, **_SOME}]),
    Row("429, user, always", 7, [always("rate_limit")], may_fail=True),
    Row(  # three in a row must fit into the matrix's deadline
        "429, global",
        8,
        [{"kind": "rate_limit", "scope": "global", "retry_after": 0.5, "times": 3}],
    ),
    Row(
        "429, shared",
        9,
        [{"kind": "rate_limit", "scope": "shared", "code": 20028, "retry_after": 0.3, "times": 4}],
    ),
    Row("429 that no header announced, 40 %", 10, [_UNANNOUNCED | _SOME]),
    Row("429 that no header announced, always", 10, [_UNANNOUNCED | _LONG], may_fail=True),
    Row("Cloudflare 1015, HTML", 11, [always("cloudflare")], may_fail=True),
    Row("Cloudflare 1015, JSON", 11, [always("cloudflare", json=True)], may_fail=True),
    Row("bucket hashes change", 12, [always("new_bucket")]),
    Row("no rate headers", 13, [always("no_headers")]),
    Row("Reset 40 s ahead", 14, [always("skew", seconds=40, jitter_s=0.5)]),
    Row("Reset 40 s behind", 14, [always("skew", seconds=-40, jitter_s=0.5)]),
    Row("Date 3 h ahead", 14, [always("skew_date", seconds=10_800)]),
    Row("Date 3 h behind", 14, [always("skew_date", seconds=-10_800)]),
    Row("all answers 6 s late", 15, [always("delay", seconds=6.0)], may_fail=True),
    Row("creates answered 40 s late", 15, [always("late", seconds=40, **_CREATE)], may_fail=True),
    Row("upload at 1 MB/s", 15, [always("slow_upload", bytes_per_s=1_000_000, **_CREATE)]),
    Row("the server stands still", 15, stall=True, may_fail=True),
    Row("CDN 404", 16, [always("status", status=404, **_CDN)], may_fail=True),
    Row("CDN 403", 16, [always("status", status=403, **_CDN)], may_fail=True),
    Row("CDN 415", 16, [always("status", status=415, **_CDN)], may_fail=True),
    Row("links live for 2 s", 16, [switch(link_lifetime_s=2)]),
    Row("a link expires while read", 17, [{"kind": "expire"}]),
    Row("every link expires while read", 17, [always("expire")], may_fail=True),
    Row("the CDN serves what was deleted", 18, [always("linger")], purges=True),
    Row("lists and GETs lag 30 s", 19, [always("hide", younger_s=30)]),
    Row(
        "lists lag 30 s, answer lost",
        19,
        [always("hide", younger_s=30), {"kind": "lost_answer", "status": 0, "times": 9, **_CREATE}],
        may_fail=True,
    ),
    Row(
        "not yet in list and GET, 4 times", 19, [_LAG | {"kind": "hide", "times": 4}], may_fail=True
    ),
    Row("not yet on the CDN, 404 once", 20, [_LAG | {"kind": "not_yet"}]),
    Row(
        "not yet on the CDN, 404 4 times",
        20,
        [_LAG | {"kind": "not_yet", "times": 4}],
        may_fail=True,
    ),
    Row(
        "not yet on the CDN, 503 twice", 20, [_LAG | {"kind": "not_yet", "status": 503, "times": 2}]
    ),
    Row("names changed", 21, [{"kind": "rename", "times": 2, **_CREATE}], may_fail=True),
    Row("messages of others between", 22, [always("interleave")]),
    Row("messages shown as another bot's, empty", 23, [always("foreign")], may_fail=True),
    Row("no right to read history", 24, [switch(read_history=False)], may_fail=True),
    Row("lists are empty", 24, [always("no_history")]),
    Row("limit lowered to 2 MiB", 25, [switch(attachment_bytes=2 << 20)]),
    Row("limit lowered to 1 MiB", 25, [switch(attachment_bytes=1 << 20)], may_fail=True),
    Row(
        "413 for each create",
        25,
        [always("refuse", status=413, code=40005, **_CREATE)],
        may_fail=True,
    ),
    Row("403 for each create", 25, [always("refuse", status=403, code=50013)], may_fail=True),
    Row("token reset", 26, token=True, may_fail=True),
    Row("uploads stored with 0 bytes", 27, [always("empty_file", **_CREATE)], may_fail=True),
    Row("CDN cuts six bodies", None, [{"kind": "cut", "times": 6, "reset": True, **_CDN}]),
    Row("CDN ignores ranges", None, [always("ignore_range")]),
    Row("CDN flips a bit", None, [{"kind": "corrupt"}], may_fail=True),
    Row(
        "answer lost, message deleted",
        3,
        [{"kind": "lost_answer", **_CREATE}, {"kind": "moderated"}],
        may_fail=True,
        settles_late=True,
    ),
    Row("message deleted once made", 3, [{"kind": "moderated"}], loses=True),
]
