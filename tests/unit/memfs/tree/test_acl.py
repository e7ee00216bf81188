"""POSIX ACLs: what they do to modes, what chmod does to them, and what a directory hands down. A tmpfs judges."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfs.store.memfd_backing import MemfdBacking
from memfs.tree import acl
from tests.helpers import raises

from .places import SIZE, OnTmpfs, OnTree, Place

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
TAGS = {"u": (0x01, 0x02), "g": (0x04, 0x08), "m": (0x10, 0x10), "o": (0x20, 0x20)}  # linux/posix_acl_xattr.h
UNDEFINED_ID = 0xFFFFFFFF


def packed(text: str) -> bytes:
    """An ACL as the kernel has it, from the short form of getfacl(1): "u::rw,u:5:r,g::r,m::rw,o::-"."""
    value = struct.pack("<I", 2)
    for entry in text.split(","):
        tag, name, permissions = entry.split(":")
        bits = sum(bit for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if letter in permissions)
        value += struct.pack("<HHI", TAGS[tag][bool(name)], bits, int(name) if name else UNDEFINED_ID)
    return value


MINIMAL = packed("u::rw,g::r,o::-")
NAMED = packed("u::rw,u:5:rx,g::r,m::rx,o::-")


def state(place: Place, path: str) -> tuple[str, dict[str, bytes]]:
    """A file's mode and ACLs."""
    return place.facts(path).mode, {name: place.getxattr(path, name) for name in place.listxattr(path)}


# -- access -----------------------------------------------------------------------------------------------------------


def test_acl_that_says_no_more_than_a_mode_is_only_the_mode(place: Place) -> None:
    place.make("file", 0o777)
    place.setxattr("file", ACCESS, MINIMAL)
    assert state(place, "file") == ("-rw-r-----", {})
    place.setxattr("file", ACCESS, NAMED)
    place.setxattr("file", ACCESS, MINIMAL)
    assert state(place, "file") == ("-rw-r-----", {})


def test_mask_is_what_the_mode_says_of_the_group(place: Place) -> None:
    place.make("file", 0o777)
    place.setxattr("file", ACCESS, NAMED)
    assert state(place, "file") == ("-rw-r-x---", {ACCESS: NAMED})


def test_special_bits_stay(place: Place) -> None:
    place.make("file", 0o777)
    place.chmod("file", 0o7777)
    place.setxattr("file", ACCESS, NAMED)
    assert place.facts("file").mode == "-rwSr-s--T"


def test_chmod_changes_the_mask_and_not_the_group(place: Place) -> None:
    place.make("file")
    place.setxattr("file", ACCESS, NAMED)
    place.chmod("file", 0o627)
    assert state(place, "file") == ("-rw--w-rwx", {ACCESS: packed("u::rw,u:5:rx,g::r,m::w,o::rwx")})


def test_removed_acl_leaves_the_mode(place: Place) -> None:
    place.make("file")
    place.setxattr("file", ACCESS, NAMED)
    place.removexattr("file", ACCESS)
    assert state(place, "file") == ("-rw-r-x---", {})


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (b"", errno.EINVAL),
        (b"abc", errno.EINVAL),
        (MINIMAL[:-1], errno.EINVAL),
        (struct.pack("<I", 1) + MINIMAL[4:], errno.EOPNOTSUPP),
        (packed("u::rw,g::r"), errno.EINVAL),
        (packed("u::rw,o::r"), errno.EINVAL),
        (packed("g::rw,o::r"), errno.EINVAL),
    ],
)
def test_what_is_no_acl_changes_nothing(tree_place: OnTree, value: bytes, number: int) -> None:
    """The kernel has checked it before it asks; nothing comes of it when it has not."""
    tree_place.make("file", 0o604)
    tree_place.setxattr("file", ACCESS, NAMED)
    before = state(tree_place, "file")
    with raises(number):
        tree_place.setxattr("file", ACCESS, value)
    assert state(tree_place, "file") == before


# -- what a directory hands down --------------------------------------------------------------------------------------


def test_default_acl_is_what_new_inodes_begin_with(place: Place) -> None:
    place.mkdir("d")
    place.setxattr("d", DEFAULT, NAMED)
    assert state(place, "d") == ("drwxr-xr-x", {DEFAULT: NAMED})
    place.make("d/file", 0o666)
    place.mkdir("d/e", 0o777)
    handed_down = packed("u::rw,u:5:rx,g::r,m::r,o::-")
    assert state(place, "d/file") == ("-rw-r-----", {ACCESS: handed_down})
    assert state(place, "d/e") == ("drw-r-x---", {ACCESS: NAMED, DEFAULT: NAMED})


def test_minimal_default_acl_is_only_a_mode(place: Place) -> None:
    place.mkdir("d")
    place.setxattr("d", DEFAULT, MINIMAL)
    place.make("d/file", 0o777)
    place.mkdir("d/e", 0o777)
    assert state(place, "d/file") == ("-rw-r-----", {})
    assert state(place, "d/e") == ("drw-r-----", {DEFAULT: MINIMAL})


def test_symlink_inherits_nothing(place: Place) -> None:
    place.mkdir("d")
    place.setxattr("d", DEFAULT, NAMED)
    place.symlink("x", "d/link")
    assert place.facts("d/link").mode == "lrwxrwxrwx"
    with raises(errno.ENODATA, errno.EOPNOTSUPP):
        place.getxattr("d/link", ACCESS)


def test_other_inodes_inherit_as_files_do(place: Place) -> None:
    place.mkdir("d")
    place.setxattr("d", DEFAULT, NAMED)
    place.make("d/fifo", stat.S_IFIFO | 0o777)
    assert state(place, "d/fifo") == ("prw-r-x---", {ACCESS: NAMED})


def test_umask_counts_only_without_a_default_acl(tree_place: OnTree) -> None:
    tree_place.mkdir("d")
    tree = tree_place.tree
    ino = tree_place.number("d")
    assert tree.create(ino, b"a", stat.S_IFREG | 0o666, 0, 0, umask=0o077).mode == stat.S_IFREG | 0o600
    tree_place.setxattr("d", DEFAULT, packed("u::rwx,g::rwx,o::rwx"))
    assert tree.create(ino, b"b", stat.S_IFREG | 0o666, 0, 0, umask=0o077).mode == stat.S_IFREG | 0o666


# -- all of it, against the kernel's ----------------------------------------------------------------------------------

bits = st.integers(0, 7)
named_users = st.dictionaries(st.integers(1, 5), bits, max_size=2)


@st.composite
def acls(draw: st.DrawFn) -> bytes:
    """A valid ACL: entries in the kernel's order, and a mask where it must be."""
    letters = ["".join(letter for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if n & bit) for n in range(8)]
    users, groups = draw(named_users), draw(named_users)
    entries = [f"u::{letters[draw(bits)]}", *(f"u:{uid}:{letters[users[uid]]}" for uid in sorted(users))]
    entries += [f"g::{letters[draw(bits)]}", *(f"g:{gid}:{letters[groups[gid]]}" for gid in sorted(groups))]
    has_mask = draw(st.booleans())
    if users or groups or has_mask:
        entries.append(f"m::{letters[draw(bits)]}")
    return packed(",".join([*entries, f"o::{letters[draw(bits)]}"]))


@settings(max_examples=60)
@given(acls(), acls(), st.integers(0, 0o777), st.integers(0, 0o777))
def test_as_on_tmpfs(tmpfs: Path, access: bytes, default: bytes, mode: int, changed: int) -> None:
    ours, theirs = OnTree(MemfdBacking(SIZE)), OnTmpfs(tmpfs)
    seen = []
    for place in (ours, theirs):
        place.mkdir("d")
        place.setxattr("d", DEFAULT, default)
        place.make("d/file", mode)
        place.mkdir("d/e", mode)
        paths = ("d", "d/file", "d/e")
        seen.append([state(place, path) for path in paths])
        place.setxattr("d/file", ACCESS, access)
        seen[-1].append(state(place, "d/file"))
        for path in paths:
            place.chmod(path, changed)
            seen[-1].append(state(place, path))
    for path in ("d/file", "d/e", "d"):
        (os.rmdir if path != "d/file" else os.unlink)(tmpfs / path)
    assert seen[0] == seen[1]
    ours.end()


def test_mode_and_acl_say_the_same_after_any_chmod() -> None:
    for before, mode in itertools.product((MINIMAL, NAMED), range(0o1000)):
        after = acl.after_chmod(before, mode)
        assert acl.mode_of(after, 0)[0] == mode
