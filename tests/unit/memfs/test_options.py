"""Mount options: every one is understood, and every wrong one is refused by its name."""

from __future__ import annotations

import os
from typing import Any

import pytest

from memfs.contract.sizes import parse_size, total_ram
from memfs.contract.sys.hugetlb import Pool
from memfs.contract.sys.libc import mount_detached
from memfs.contract.units import PAGE_SIZE
from memfs.options import (
    _FLAGS,
    _NOTHING_TO_DO,
    _VALUES,
    MountOptions,
    OptionError,
    RemountOptions,
    divide_remount,
)
from tests.huge_pages import SIZE_2M, huge_pages

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
    "survive=on": ("survive", "on"),
    "allow_other": ("allow_other", True),
    "default_permissions": ("default_permissions", True),
    "ro": ("ro", True),
    "ro,rw": ("ro", False),
    "noatime": ("atime", "noatime"),
    "noatime,relatime": ("atime", "relatime"),
    "noatime,atime": ("atime", "relatime"),
    "strictatime": ("atime", "strictatime"),
    "nodiratime": ("diratime", False),
    "nodiratime,diratime": ("diratime", True),
    "suid": ("suid", True),
    "suid,nosuid": ("suid", False),
    "dev": ("dev", True),
    "dev,nodev": ("dev", False),
    "noexec": ("exec", False),
    "noexec,exec": ("exec", True),
    "noswap": ("noswap", True),
    "pagesize=2M": ("pagesize", 2 << 20),
    "pagesize=1g": ("pagesize", 1 << 30),
    "pagesize=0x200000": ("pagesize", 2 << 20),
    "min_size=4M,pagesize=2M,size=8M": ("min_size", 4 << 20),
    "size=8M,pagesize=2M,size=16M": ("size", 16 << 20),
    "inode32": ("inode32", True),
    "inode32,inode64": ("inode32", False),
    "nr_blocks=1t": ("size", PAGE_SIZE << 40),
    "size=1m,defaults,auto,noauto,nofail,_netdev,nouser,x-systemd.automount,X-mount.mkdir=0750": ("size", 1 << 20),
    "comment=systemd.automount,size=1m,sync,async,dirsync,lazytime,nolazytime,silent,loud": ("size", 1 << 20),
    "user,nouser,users,nousers,owner,noowner,group,nogroup,user=root,size=1m": ("size", 1 << 20),
    "mand,nomand,iversion,noiversion,norelatime,nostrictatime,size=1m": ("size", 1 << 20),
    "nosymfollow": ("symfollow", False),
    "nosymfollow,symfollow": ("symfollow", True),
    "fsname=guest": ("fsname", "guest"),
    "size=1m,size=2m": ("size", 2 << 20),
}
REFUSED = ["nonsense", "nonsense=1", "Size=1m", "size", "size=", "size=0", "size=-1", "size=1x", "size=1.5m", "size=m"]
REFUSED += ["size=99999999t", "size= 1m", "mode=8", "mode=77777", "mode=", "uid=-1", "uid=nobody-of-that-name"]
REFUSED += [
    "gid=no group",
    "huge=maybe",
    "passthrough=1",
    "backing=disk",
    "survive=yes",
    "notify_timeout=0",
    "notify_timeout=-1",
]
REFUSED += ["socket_mode=8", "socket_mode=1777", "socket_mode=", "socket_mode=rw", "socket_group=no group"]
REFUSED += [
    "size=0x",
    "size=08",
    "size=0xg",
    "size=x10",
    "uid=08",
    "uid=0x100000000",
    "inode32=1",
    "defaults=x",
    "size=0b1",
]
REFUSED += ["pagesize=4k", "pagesize=3M", "pagesize=", "pagesize", "pagesize=-1", "min_size=1x", "min_size=0"]
REFUSED += ["min_size=4M", "min_size=1"]
REFUSED += ["notify_timeout=inf", "notify_timeout=nan", "nr_inodes=0", "nr_blocks=1p", "ro=1", "allow_other=yes", "=1"]


@pytest.mark.parametrize("text", UNDERSTOOD)
def test_option_is_understood(text: str) -> None:
    name, value = UNDERSTOOD[text]
    assert getattr(MountOptions.parse(text), name) == value


@pytest.mark.parametrize(
    "text",
    [
        *(
            "size=0x2000000",
            "size=0X100k",
            "size=0100000000",
            "size=01m",
            "size=1M",
            "size=0x1e",
            "size=4097",
            "size=08",
        ),
        *("nr_blocks=0x10", "nr_blocks=1k", "nr_blocks=010", "nr_inodes=0x100", "nr_inodes=1k", "nr_inodes=0400"),
        *(
            "mode=01777",
            "mode=0000755",
            "mode=0x1ff",
            "mode=755",
            "uid=010",
            "uid=0x10",
            "gid=0x7",
            "gid=-1",
            "size=1g1",
        ),
        *("inode32", "inode64", "uid=4294967295", "size=0x", "nr_inodes=1z", "size=010%", "size=-1"),
    ],
)
def test_numbers_are_read_as_tmpfs_reads_them(text: str) -> None:
    name, _, value = text.partition("=")
    try:
        root = mount_detached("tmpfs", {"size": "1g", "nr_inodes": "7", name: value or None})
    except PermissionError:
        pytest.skip("cannot mount a tmpfs to compare with")
    except OSError:
        with pytest.raises(OptionError):
            MountOptions.parse(text)
        return
    try:
        ours = MountOptions.parse(f"size=1g,nr_inodes=7,{text}")
        space, status = os.fstatvfs(root), os.fstat(root)
        assert (ours.size, ours.nr_inodes) == (space.f_blocks * PAGE_SIZE, space.f_files)
        assert (ours.mode, ours.uid, ours.gid) == (status.st_mode & 0o7777, status.st_uid, status.st_gid)
    finally:
        os.close(root)


def test_every_option_is_tried() -> None:
    tried = {item.partition("=")[0] for text in UNDERSTOOD for item in text.split(",")}
    assert {each for each in tried if not each.startswith(("x-", "X-", "comment"))} == {
        *_FLAGS,
        *_VALUES,
        *_NOTHING_TO_DO,
    }


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


def test_sizes_are_parts_of_the_pool_if_guests_have_huge_pages() -> None:
    """As on hugetlbfs, and wherever the option stands."""
    with huge_pages(6) as pool:
        size = pool.pages * SIZE_2M
        for text in ("pagesize=2M,size=50%,min_size=25%", "min_size=25%,size=50%,pagesize=2M"):
            options = MountOptions.parse(text)
            assert (options.size, options.min_size) == (size // 2, size // 4)
        assert RemountOptions.parse("size=50%", SIZE_2M).size == size // 2
        assert RemountOptions.parse("size=50%").size == MountOptions.parse("size=50%").size


def test_a_part_of_nothing_and_more_than_all_are_refused() -> None:
    if Pool(SIZE_2M).pages == 0:
        with pytest.raises(OptionError, match="'size=50%': the pool of 2M pages is empty"):
            MountOptions.parse("size=50%,pagesize=2M")
    with pytest.raises(OptionError, match="min_size"):
        MountOptions.parse("size=4M,min_size=6M,pagesize=2M")


def test_ordinary_files_get_huge_pages_where_guests_have_some() -> None:
    for text, huge in (
        ("", None),
        ("pagesize=2M", "always"),
        ("pagesize=2M,huge=never", None),
        ("huge=advise", "advise"),
    ):
        assert MountOptions.parse(text).tmpfs_options.get("huge") == huge


def test_remount_is_divided_among_those_who_change_something() -> None:
    mounted = MountOptions.parse("size=1g,huge=always,allow_other,uid=5")
    assert divide_remount("rw,nofail,remount,size=1m,x-a=b,nr_inodes=5", mounted) == ("size=1m,nr_inodes=5", ["rw"])
    assert divide_remount("ro,nosuid,dev,noexec,noatime,nodiratime,nosymfollow", mounted)[1][-1] == "nosymfollow"
    assert divide_remount("huge=always,allow_other,uid=0x5", mounted) == ("", [])


@pytest.mark.parametrize("text", ["huge=always", "uid=6", "noswap", "socket=/x", "inode32", "size=0", "nonsense"])
def test_what_cannot_be_changed_is_refused_by_its_name(text: str) -> None:
    for options in (text, f"remount,ro,{text}", f"{text},size=1m"):
        with pytest.raises(OptionError, match=text.partition("=")[0]):
            divide_remount(options, MountOptions())


@pytest.mark.parametrize(
    ("text", "pages"), [("1", 1), ("4096", 1), ("4097", 2), ("5K", 2), ("1M", 256), ("1g", 1 << 18), ("2T", 2 << 28)]
)
def test_sizes_are_whole_pages(text: str, pages: int) -> None:
    assert parse_size(text) == pages * PAGE_SIZE
