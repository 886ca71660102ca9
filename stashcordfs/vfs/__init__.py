"""The file system: open files, reading, read-ahead, writing, durability, uploading.

`blocks` owns a block's life; `reading` brings chunks in, `uploading` sends them out, `durability`
makes things safe on this machine; `filesystem` is the facade that `fuse` serves.
"""

from __future__ import annotations
