"""Mount options: every one is understood, and every wrong one is refused by its name."""

from __future__ import annotations

import os
from typing import Any

import pytest

from memfs.contract.sizes import parse_size, total_ram
from memfs.contract.units import PAGE_SIZE
from memfs.options import _FLAGS, _VALUES, MountOptions, OptionError, RemountOptions

UNDERSTOOD: dict[str, tuple[str, Any]] = {
    "size=64m": ("size", 64 << 20),
    "size=1": ("size", PAGE_SIZE),
    "size=50%": ("size", -(-(total_ram() // 2) // PAGE_SIZE) * PAGE_SIZE),
    "nr_blocks=3": ("size", 3 * PAGE_SIZE),
    "nr_blocks=1k": ("size", 1024 * PAGE_SIZE),
    "nr_inodes=2k": ("nr_inodes", 2048),
    "mode=0750": ("mode", 0o750),
    "mode=1777": ("mode", 0o1777),
    "uid=12": ("uid", 12),
    "uid=root": ("uid", 0),
    "gid=13": ("gid", 13),
    "gid=root": ("gid", 0),
    "huge=within_size": ("huge", "within_size"),
    "mpol=bind:0": ("mpol", "bind:0"),
    "socket=x": ("socket", os.path.abspath("x")),
    "socket_mode=0660": ("socket_mode", 0o660),
    "socket_mode=600": ("socket_mode", 0o600),
    "socket_group=root": ("socket_group", 0),
    "socket_group=13000": ("socket_group", 13000),
    "passthrough=off": ("passthrough", "off"),
    "backing=memfd": ("backing", "memfd"),
    "notify_timeout=0.5": ("notify_timeout", 0.5),
    "allow_other": ("allow_other", True),
    "default_permissions": ("default_permissions", True),
    "ro": ("ro", True),
    "ro,rw": ("ro", False),
    "noatime": ("atime", "noatime"),
    "noatime,relatime": ("atime", "relatime"),
    "suid": ("suid", True),
    "suid,nosuid": ("suid", False),
    "dev": ("dev", True),
    "dev,nodev": ("dev", False),
    "noexec": ("exec", False),
    "noexec,exec": ("exec", True),
    "noswap": ("noswap", True),
    "size=1m,size=2m": ("size", 2 << 20),
}
REFUSED = ["nonsense", "nonsense=1", "Size=1m", "size", "size=", "size=0", "size=-1", "size=1x", "size=1.5m", "size=m"]
REFUSED += ["size=99999999t", "size= 1m", "mode=8", "mode=77777", "mode=", "uid=-1", "uid=nobody-of-that-name"]
REFUSED += ["gid=no group", "huge=maybe", "passthrough=1", "backing=disk", "notify_timeout=0", "notify_timeout=-1"]
REFUSED += ["socket_mode=8", "socket_mode=1777", "socket_mode=", "socket_mode=rw", "socket_group=no group"]
REFUSED += ["notify_timeout=inf", "notify_timeout=nan", "nr_inodes=0", "nr_blocks=1t", "ro=1", "allow_other=yes", "=1"]


@pytest.mark.parametrize("text", UNDERSTOOD)
def test_option_is_understood(text: str) -> None:
    name, value = UNDERSTOOD[text]
    assert getattr(MountOptions.parse(text), name) == value


def test_every_option_is_tried() -> None:
    tried = {item.partition("=")[0] for text in UNDERSTOOD for item in text.split(",")}
    assert tried == {*_FLAGS, *_VALUES}


@pytest.mark.parametrize("text", REFUSED)
def test_wrong_option_is_refused_by_its_name(text: str) -> None:
    for options in (text, f"size=1m,{text}", f"{text},ro"):
        with pytest.raises(OptionError) as caught:
            MountOptions.parse(options)
        assert text.partition("=")[0] in str(caught.value)


def test_nothing_given_is_the_defaults() -> None:
    assert MountOptions.parse("") == MountOptions.parse(",,") == MountOptions()
    assert MountOptions().mode == 0o1777
    assert MountOptions().size <= total_ram() // 2
    assert (MountOptions().uid, MountOptions().gid) == (os.geteuid(), os.getegid())


def test_remount_takes_limits_only() -> None:
    assert RemountOptions.parse("size=1m,nr_inodes=5") == RemountOptions(1 << 20, 5)
    assert RemountOptions.parse("nr_blocks=2") == RemountOptions(2 * PAGE_SIZE, None)
    for text in ("mode=700", "ro", "socket=x", "size=0"):
        with pytest.raises(OptionError) as caught:
            RemountOptions.parse(text)
        assert text.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "pages"), [("1", 1), ("4096", 1), ("4097", 2), ("5K", 2), ("1M", 256), ("1g", 1 << 18), ("2T", 2 << 28)]
)
def test_sizes_are_whole_pages(text: str, pages: int) -> None:
    assert parse_size(text) == pages * PAGE_SIZE
