"""StashcordFS: a Linux file system whose files live, encrypted, in Discord channels."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("stashcordfs")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
