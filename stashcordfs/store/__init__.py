"""Chunks <-> packs <-> messages: formats, sealing, limits, and the stores that hold packs."""

from __future__ import annotations
