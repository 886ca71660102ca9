"""Chunks <-> packs <-> messages: formats, sealing, limits, and where objects are kept."""
