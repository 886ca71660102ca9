"""The Discord room: REST client, rate limits, CDN ranges and link leases.

Knows nothing of files, chunks or keys. httpx lives here alone; its exceptions do not leave.
"""

from __future__ import annotations
