"""What a sandbox is like: its limits and switches, as a real server without boosts has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1024 * 1024
_BOOSTED = {2: 50 * MIB, 3: 100 * MIB}


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    dir: Path
    host: str = "127.0.0.1"
    port: int = 0  # 0: the port of the last run, or a free one
    attachment_bytes: int = 20 * MIB
    request_bytes: int = 25 * MIB
    max_attachments: int = 10
    link_lifetime_s: int = 86_400
    nonce_window_s: int = 300
    rate_limits: bool = True
    read_history: bool = True
    attach_files: bool = True
    send_messages: bool = True
    message_content: bool = False  # the intent: other authors' messages come back empty without
    edits_drop: bool = True  # an edit that brings files and no list removes the other attachments
    premium_tier: int = 0
    latency_s: float = 0.0
    ban_after: int = 10_000  # refusals of one address, until Cloudflare bans it; 0: never
    ban_window_s: float = 600.0
    ban_s: float = 3600.0
    bandwidth: int = 0  # bytes per second and transfer; 0: as fast as it goes

    @property
    def file_bytes(self) -> int:
        """The limit in force for one attachment: a boosted guild takes more."""
        return max(self.attachment_bytes, _BOOSTED.get(self.premium_tier, 0))


# What may change while the server runs; the rest would need another one.
CHANGEABLE = frozenset(SandboxSettings.__dataclass_fields__) - {"dir", "host", "port"}
