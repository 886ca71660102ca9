"""`stashcordfs` whose key slots cost next to nothing: for mkfs in tests, and the mounts after it.

python tests/support/quick_mkfs.py mkfs NAME --channel ID
"""

from __future__ import annotations

from stashcordfs.cli.main import main
from stashcordfs.crypto import slots

if __name__ == "__main__":
    slots.DEFAULT_COST = slots.Argon2Cost(memory_kib=64, passes=1, lanes=1)
    main()
