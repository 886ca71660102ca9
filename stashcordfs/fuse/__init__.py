"""pyfuse3 alone lives here: requests in, errno and attributes out. No rule of the file system."""

from __future__ import annotations
