"""A Discord-compatible server for trying and testing; imports nothing of the rest."""
