"""SQLite as the journal's engine, through apsw. Nothing outside `journal` imports this."""

from __future__ import annotations
