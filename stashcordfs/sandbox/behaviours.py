"""What the real service does that a client must bear, numbered; and how to have it here.

`BEHAVIOURS` says each in words, `WAYS` how it is had beside the faults that name its number:
always, by a setting, or by an admin route. Tests hold both, the faults and docs/sandbox.md against
each other.
"""

from __future__ import annotations

BEHAVIOURS = {
    1: "a message is made, then the answer is lost: 500, 502, 504, or a reset",
    2: "a create repeated with its nonce brings the first message back",
    3: "a create repeated after its message was deleted: 10008, Unknown Message",
    4: "an error is answered before the body is read, then the connection closed",
    5: "bursts of 502, 503, 504, 520, 522, 524 with HTML or nothing as body",
    6: "a 502 that had no effect, and one that had",
    7: "a 429 for this bot: all headers, `Retry-After` rounded up, `retry_after` exact",
    8: "a 429 of the global limit, without a bucket",
    9: "a 429 of a shared limit though requests remain: code 20028",
    10: "a 429 for edits of old messages, code 30046, that no header announced",
    11: "a 429 of Cloudflare's own: error 1015 as HTML or JSON, no headers",
    12: "bucket hashes change; deletes have three buckets by age",
    13: "answers without any rate-limit header",
    14: "`X-RateLimit-Reset` and `Date` tell another time than the client's clock",
    15: "an upload slower than the client's patience, which the server completes",
    16: "the CDN refuses: 404 for an expired link, 403, 415 from the media host",
    17: "a link expires while its body is being read",
    18: "the CDN still serves what was deleted, for some time",
    19: "a message just made is missing from a list or a GET",
    20: "the CDN does not serve an attachment yet that was just made",
    21: "the server changes a file's name, and keeps the old one as its title",
    22: "messages of others and of the system stand between one's own",
    23: "attachments of other authors are shown as none without the intent",
    24: "a list is empty, with status 200, when the right to read the history is missing",
    25: "the size limit falls while running",
    26: "the token is reset: 401 for every call",
    27: "an upload's body was not rewound: an attachment of 0 bytes, and status 200",
    28: "an edit that brings files and no list drops the other attachments",
}

WAYS = {
    2: "always, with `enforce_nonce`; setting `nonce_window_s`",
    3: "always, with `enforce_nonce`",
    7: "always; setting `rate_limits`",
    8: "always; setting `rate_limits`",
    10: "always; setting `rate_limits`",
    11: "always; settings `ban_after`, `ban_window_s`, `ban_s`",
    12: "always for deletes",
    13: "setting `rate_limits`",
    15: "setting `latency_s`",
    16: "always for expired links and the media host; setting `link_lifetime_s`, route `clock`",
    22: "route `messages`; always for the system message that a pin makes",
    23: "always; route `bots`, setting `message_content`",
    24: "setting `read_history`",
    25: "settings `attachment_bytes`, `premium_tier`",
    26: "route `token`",
    28: "always; setting `edits_drop`",
}
