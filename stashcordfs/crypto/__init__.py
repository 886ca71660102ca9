"""Keys, key slots, chunk ids and object ids. It knows nothing of where things are stored."""

from __future__ import annotations
