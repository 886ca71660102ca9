"""The trash through the kernel, the commands, and the control socket."""

from __future__ import annotations
