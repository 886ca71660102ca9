"""Keys, key slots, object ids and chunk ids. No I/O, and no knowledge of where anything is kept."""
