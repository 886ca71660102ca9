"""Mount options: what reaches the kernel, what is for other programs, what is refused."""

from __future__ import annotations

import pytest

from stashcordfs.errors import UsageError
from stashcordfs.fuse.session import kernel_options


def test_the_mount_names_its_volume():
    assert kernel_options("photos", {}) == {
        "fsname=stashcordfs:photos",
        "subtype=stashcordfs",
        "default_permissions",
    }


def test_kernel_flags_pass_and_fstab_words_do_not():
    options = {"ro": True, "noauto": True, "x-systemd.automount": True, "_netdev": True}
    assert kernel_options("v", options) - kernel_options("v", {}) == {"ro"}


def test_an_unknown_option_is_named():
    with pytest.raises(UsageError, match="-o turbo"):
        kernel_options("v", {"turbo": True})
