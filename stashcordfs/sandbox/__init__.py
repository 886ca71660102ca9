"""A Discord-compatible server for trying and testing; imports nothing of the rest."""

from stashcordfs.sandbox.settings import SandboxSettings

__all__ = ["SandboxSettings"]
