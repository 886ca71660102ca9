"""Mount options: what reaches the kernel, what is for other programs, what is refused."""

from __future__ import annotations

import pytest

from stashcordfs.errors import UsageError
from stashcordfs.fuse.operations import Shown
from stashcordfs.fuse.options import sort_options

FIXED = {"fsname=discord:photos", "subtype=stashcordfs", "default_permissions"}


def kernel(*, is_root=False, **options):
    return sort_options("photos", options, is_root=is_root).kernel - FIXED


def test_the_mount_names_its_volume():
    assert sort_options("photos", {}, is_root=False).kernel == FIXED


def test_roots_mounts_are_for_all_unless_told():
    assert kernel(is_root=True) == {"allow_other"}
    assert kernel(is_root=True, noallow_other=True) == set()
    assert kernel(is_root=True, allow_root=True) == {"allow_root"}
    assert kernel() == set()
    assert kernel(allow_other=True) == {"allow_other"}


def test_kernel_flags_pass():
    flags = dict.fromkeys(["ro", "nodev", "dev", "nosuid", "suid", "noexec", "noatime"], True)
    assert kernel(**flags) == set(flags)


@pytest.mark.parametrize(
    "option",
    ["noauto", "_netdev", "nofail", "user", "users", "defaults", "rw", "x-systemd.automount",
     "x-gvfs-show", "comment", "uhelper", "default_permissions"],
)  # fmt: skip
def test_words_for_other_programs_do_not_pass(option):
    assert kernel(**{option: "value"}) == set()


def test_an_unknown_option_is_named():
    with pytest.raises(UsageError, match="-o turbo: unknown mount option; known: allow_other"):
        sort_options("v", {"turbo": True})


def test_what_is_shown():
    sorted_options = sort_options("v", {"uid": "1000", "umask": "027"})
    assert sorted_options.shown == Shown(uid=1000, gid=None, umask=0o027)
    assert sort_options("v", {"ro": True}).shown is None


@pytest.mark.parametrize("options", [{"uid": "me"}, {"gid": True}, {"umask": "9"}, {"uid": "-1"}])
def test_what_is_no_number_is_refused(options):
    with pytest.raises(UsageError, match="write a number, such as"):
        sort_options("v", options)


def test_when_reading_updates_the_access_time():
    def atime(**options):
        return sort_options("v", options).atime

    assert (atime(), atime(relatime=True)) == ("relatime", "relatime")
    assert (atime(noatime=True), atime(ro=True)) == ("noatime", "noatime")
    assert atime(nodiratime=True) == "nodiratime"
