"""Names, links and inodes, without a mount; where a tmpfs can be mounted, it says whether the tests are right."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress

import pytest

from memfs.store.memfd_backing import MemfdBacking
from memfs.store.seals import F_SEAL_GUEST, F_SEAL_SEAL
from memfs.tree.inode import RegularFile
from memfs.tree.tree import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, ROOT_INO
from tests.helpers import raises

from .places import NR_INODES, SIZE, Facts, OnTree, Place

REGULAR = stat.S_IFREG | 0o644


# -- names ------------------------------------------------------------------------------------------------------------


def test_newest_name_comes_first(place: Place) -> None:
    for name in ("a", "b", "c"):
        place.make(name)
    place.unlink("b")
    place.make("b")
    place.rename("a", "z")
    assert place.names() == ["z", "b", "c"]


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        (stat.S_IFREG | 0o640, "-rw-r-----"),
        (stat.S_IFIFO | 0o600, "prw-------"),
        (stat.S_IFSOCK | 0o777, "srwxrwxrwx"),
        (stat.S_IFCHR | 0o666, "crw-rw-rw-"),
        (stat.S_IFBLK | 0o660, "brw-rw----"),
    ],
)
def test_what_is_made_is_what_was_asked_for(place: Place, mode: int, text: str) -> None:
    device = os.makedev(1, 3) if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0
    place.make("x", mode, uid=5, gid=7, rdev=device)
    assert place.facts("x") == Facts(text, 1, 5, 7, device, 0, 0)


def test_directories_count_their_subdirectories_and_entries(place: Place) -> None:
    place.mkdir("d")
    assert place.facts("d") == Facts("drwxr-xr-x", 2, 0, 0, 0, 40, 0)
    place.mkdir("d/e")
    place.make("d/f")
    assert (place.facts("d").nlink, place.facts("d").size, place.facts(".").nlink) == (3, 80, 3)
    assert place.number("d/e/..") == place.number("d")
    place.rmdir("d/e")
    assert (place.facts("d").nlink, place.facts("d").size) == (2, 60)


def test_setgid_directory_hands_down_its_group(place: Place) -> None:
    place.make("d", stat.S_IFDIR | 0o755, gid=7)
    place.chmod("d", 0o2755)
    place.make("d/file")
    place.mkdir("d/e")
    assert (place.facts("d/file").mode, place.facts("d/file").gid) == ("-rw-r--r--", 7)
    assert (place.facts("d/e").mode, place.facts("d/e").gid) == ("drwxr-sr-x", 7)


@pytest.mark.parametrize(("length", "blocks"), [(1, 0), (127, 0), (128, 8), (4095, 8)])
def test_long_symlink_takes_a_page(place: Place, length: int, blocks: int) -> None:
    before = place.free_pages
    place.symlink("t" * length, "link")
    assert place.readlink("link") == "t" * length
    assert place.facts("link") == Facts("lrwxrwxrwx", 1, 0, 0, 0, length, blocks)
    assert place.free_pages == before - blocks // 8
    place.unlink("link")
    assert place.free_pages == before


def test_symlink_without_memory_for_its_target_is_not_made(place: Place) -> None:
    place.make("file")
    with suppress(OSError):
        place.write("file", b"x" * (place.free_pages * 4096))
    before = place.everything()
    with raises(errno.ENOSPC):
        place.symlink("t" * 200, "link")
    assert place.everything() == before
    assert place.free_pages == 0
    place.symlink("t" * 100, "short")


# -- what is refused --------------------------------------------------------------------------------------------------

NAME_TOO_LONG = "n" * 256
REFUSED: dict[str, tuple[int, Callable[[Place], object]]] = {
    "make what is there": (errno.EEXIST, lambda place: place.make("file")),
    "make a directory that is there": (errno.EEXIST, lambda place: place.mkdir("full")),
    "symlink that is there": (errno.EEXIST, lambda place: place.symlink("x", "file")),
    "make with a long name": (errno.ENAMETOOLONG, lambda place: place.make(NAME_TOO_LONG)),
    "symlink with a long name": (errno.ENAMETOOLONG, lambda place: place.symlink("x", NAME_TOO_LONG)),
    "make below a file": (errno.ENOTDIR, lambda place: place.make("file/x")),
    "make below nothing": (errno.ENOENT, lambda place: place.make("none/x")),
    "look up a long name": (errno.ENAMETOOLONG, lambda place: place.facts(NAME_TOO_LONG)),
    "look up nothing": (errno.ENOENT, lambda place: place.facts("none")),
    "look below a file": (errno.ENOTDIR, lambda place: place.facts("file/x")),
    "link to what is there": (errno.EEXIST, lambda place: place.link("file", "other")),
    "link with a long name": (errno.ENAMETOOLONG, lambda place: place.link("file", NAME_TOO_LONG)),
    "link of nothing": (errno.ENOENT, lambda place: place.link("none", "new")),
    "unlink nothing": (errno.ENOENT, lambda place: place.unlink("none")),
    "unlink a directory": (errno.EISDIR, lambda place: place.unlink("empty")),
    "rmdir of a file": (errno.ENOTDIR, lambda place: place.rmdir("file")),
    "rmdir of what is not empty": (errno.ENOTEMPTY, lambda place: place.rmdir("full")),
    "rmdir of nothing": (errno.ENOENT, lambda place: place.rmdir("none")),
    "rename nothing": (errno.ENOENT, lambda place: place.rename("none", "new")),
    "rename to a long name": (errno.ENAMETOOLONG, lambda place: place.rename("file", NAME_TOO_LONG)),
    "rename a file over a directory": (errno.EISDIR, lambda place: place.rename("file", "empty")),
    "rename a directory over a file": (errno.ENOTDIR, lambda place: place.rename("empty", "file")),
    "rename a directory over one that is not empty": (errno.ENOTEMPTY, lambda place: place.rename("empty", "full")),
    "rename below a file": (errno.ENOTDIR, lambda place: place.rename("empty", "file/x")),
    "rename without replacing": (errno.EEXIST, lambda place: place.rename("file", "other", RENAME_NOREPLACE)),
    "rename to another name of it without replacing": (
        errno.EEXIST,
        lambda place: place.rename("file", "second", RENAME_NOREPLACE),
    ),
    "exchange with nothing": (errno.ENOENT, lambda place: place.rename("file", "none", RENAME_EXCHANGE)),
    "exchange of nothing": (errno.ENOENT, lambda place: place.rename("none", "file", RENAME_EXCHANGE)),
    "exchange without replacing": (
        errno.EINVAL,
        lambda place: place.rename("file", "other", RENAME_EXCHANGE | RENAME_NOREPLACE),
    ),
    "exchange that leaves a whiteout": (
        errno.EINVAL,
        lambda place: place.rename("file", "other", RENAME_EXCHANGE | RENAME_WHITEOUT),
    ),
    "rename with a flag that is none": (errno.EINVAL, lambda place: place.rename("file", "new", 1 << 10)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_changes_nothing(place: Place, name: str) -> None:
    number, call = REFUSED[name]
    for file in ("file", "other"):
        place.make(file)
    place.link("file", "second")
    place.mkdir("empty")
    place.mkdir("full")
    place.make("full/x")
    before = place.everything(), place.free_inodes, place.free_pages
    with raises(number):
        call(place)
    assert (place.everything(), place.free_inodes, place.free_pages) == before
    place.check()


# -- links ------------------------------------------------------------------------------------------------------------


def test_links_are_names_of_one_inode(place: Place) -> None:
    place.make("file")
    place.mkdir("d")
    place.link("file", "d/second")
    place.write("d/second", b"content")
    assert place.number("file") == place.number("d/second")
    assert (place.facts("file").nlink, place.facts("file").size) == (2, 7)
    place.unlink("file")
    assert place.facts("d/second").nlink == 1
    place.symlink("x", "symlink")
    place.link("symlink", "again")
    assert place.facts("again").nlink == 2
    place.check()


def test_each_inode_and_each_further_name_counts(place: Place) -> None:
    assert place.free_inodes == NR_INODES - 1
    place.make("file")
    place.link("file", "second")
    place.symlink("x", "symlink")
    assert place.free_inodes == NR_INODES - 4
    place.unlink("file")
    place.unlink("second")
    assert place.free_inodes == NR_INODES - 2


def test_without_an_inode_left_nothing_is_made(place: Place) -> None:
    for number in range(NR_INODES - 1):
        place.make(str(number))
    before = place.everything()
    for call in (
        lambda: place.make("new"),
        lambda: place.mkdir("new"),
        lambda: place.symlink("x", "new"),
        lambda: place.link("0", "new"),
        lambda: place.open_unnamed("."),
        lambda: place.rename("0", "new", RENAME_WHITEOUT),
    ):
        with raises(errno.ENOSPC):
            call()
        assert (place.everything(), place.free_inodes) == (before, 0)
    place.rename("0", "1")
    assert place.free_inodes == 1
    place.make("new")
    place.check()


# -- rename -----------------------------------------------------------------------------------------------------------


def test_rename_replaces(place: Place) -> None:
    place.make("a")
    place.make("b")
    place.write("b", b"x" * 4096)
    place.mkdir("d")
    place.mkdir("e")
    moved, free = place.number("a"), place.free_pages
    place.rename("a", "b")
    assert (place.number("b"), place.facts("b").size, place.free_pages) == (moved, 0, free + 1)
    moved = place.number("d")
    place.rename("d", "e")
    assert (place.number("e"), place.names(), place.facts(".").nlink) == (moved, ["e", "b"], 3)
    place.check()


def test_rename_of_a_directory_moves_its_parent(place: Place) -> None:
    for name in ("a", "b", "a/d"):
        place.mkdir(name)
    place.rename("a/d", "b/d")
    assert place.number("b/d/..") == place.number("b")
    assert (place.facts("a").nlink, place.facts("b").nlink) == (2, 3)
    place.check()


def test_rename_to_another_name_of_the_same_file_does_nothing(place: Place) -> None:
    place.make("a")
    place.link("a", "b")
    before = place.everything()
    place.rename("a", "b")
    assert place.everything() == before


def test_exchange_takes_any_two(place: Place) -> None:
    place.make("file")
    for name in ("d", "d/e"):
        place.mkdir(name)
    file, directory = place.number("file"), place.number("d/e")
    place.rename("file", "d/e", RENAME_EXCHANGE)
    assert (place.number("d/e"), place.number("file")) == (file, directory)
    assert place.number("file/..") == place.number(".")
    assert (place.facts(".").nlink, place.facts("d").nlink) == (4, 2)
    place.rename("file", "file", RENAME_EXCHANGE)
    place.link("d/e", "second")
    place.rename("d/e", "second", RENAME_EXCHANGE)
    assert (place.number("file"), place.number("d/e"), place.number("second")) == (directory, file, file)
    place.check()


def test_whiteout_is_left_behind(place: Place) -> None:
    place.make("a")
    place.make("b")
    moved, free = place.number("a"), place.free_inodes
    place.rename("a", "b", RENAME_WHITEOUT)
    assert (place.number("b"), place.free_inodes) == (moved, free)
    assert place.facts("a") == Facts("c---------", 1, 0, 0, 0, 0, 0)
    place.check()


# -- what has no name -------------------------------------------------------------------------------------------------


def test_unlinked_file_lives_while_it_is_open(place: Place) -> None:
    place.make("file")
    place.write("file", b"x" * 8192)
    before = place.free_pages, place.free_inodes
    handle = place.open("file")
    place.unlink("file")
    assert place.nlink_of_handle(handle) == 0
    assert (place.free_pages, place.free_inodes) == before
    place.check()
    place.close(handle)
    assert (place.free_pages, place.free_inodes) == (before[0] + 2, before[1] + 1)


def test_removed_directory_takes_no_new_names(place: Place) -> None:
    place.mkdir("d")
    handle = place.open("d")
    place.rmdir("d")
    assert place.nlink_of_handle(handle) == 0
    with raises(errno.ENOENT):
        place.make_in_handle(handle, "x")
    assert place.names_in_handle(handle) == []
    place.check()


def test_unnamed_file_can_be_given_a_name(place: Place) -> None:
    handle = place.open_unnamed(".")
    assert (place.nlink_of_handle(handle), place.names(), place.free_inodes) == (0, [], NR_INODES - 2)
    place.name_handle(handle, "named")
    assert (place.nlink_of_handle(handle), place.free_inodes) == (1, NR_INODES - 2)
    place.name_handle(handle, "second")
    assert place.free_inodes == NR_INODES - 3
    place.close(handle)
    assert place.facts("named").nlink == 2
    place.check()


# -- what only the kernel's protocol has ------------------------------------------------------------------------------


def test_inode_that_the_kernel_looked_up_lives_until_it_is_forgotten(tree_place: OnTree) -> None:
    tree = tree_place.tree
    inode = tree.create(ROOT_INO, b"file", REGULAR, 0, 0)
    inode.nlookup = 3
    tree.unlink(ROOT_INO, b"file")
    tree.forget(inode.ino, 2)
    assert tree.inode(inode.ino) is inode
    tree.check()
    tree.forget(inode.ino, 1)
    with raises(errno.ESTALE):
        tree.inode(inode.ino)
    assert tree.space.free_inodes == NR_INODES - 1


def test_forgetting_too_much_or_what_is_gone_is_harmless(tree_place: OnTree) -> None:
    tree = tree_place.tree
    inode = tree.create(ROOT_INO, b"file", REGULAR, 0, 0)
    tree.forget(inode.ino, 1 << 60)
    tree.forget(999, 1)
    tree.forget(ROOT_INO, 1 << 60)
    assert tree.lookup(ROOT_INO, b"file") is inode
    assert tree.inode(ROOT_INO) is tree.root
    tree.check()


def test_numbers_are_never_used_twice(tree_place: OnTree) -> None:
    tree, seen = tree_place.tree, set()
    for _ in range(3):
        seen.add(tree.create(ROOT_INO, b"file", REGULAR, 0, 0).ino)
        tree.unlink(ROOT_INO, b"file")
    assert len(seen) == 3
    for ino in seen:
        with raises(errno.ESTALE):
            tree.lookup(ino, b".")


def test_number_of_something_else(tree_place: OnTree) -> None:
    tree = tree_place.tree
    file = tree.create(ROOT_INO, b"file", REGULAR, 0, 0)
    with raises(errno.ENOTDIR):
        tree.directory(file.ino)
    with raises(errno.EINVAL):
        tree.regular(ROOT_INO)
    assert tree.regular(file.ino) is file
    assert tree.directory(ROOT_INO) is tree.root


def test_files_are_born_with_seals(tree_place: OnTree) -> None:
    inode = tree_place.tree.create(ROOT_INO, b"file", REGULAR, 0, 0, seals=F_SEAL_GUEST | F_SEAL_SEAL)
    assert isinstance(inode, RegularFile)
    assert (inode.file.seals, inode.file.guest) == (F_SEAL_GUEST | F_SEAL_SEAL, True)
    assert list(tree_place.tree.files()) == [inode]


def test_umask_counts_for_everything_but_symlinks(tree_place: OnTree) -> None:
    tree = tree_place.tree
    assert tree.create(ROOT_INO, b"file", REGULAR | 0o666, 0, 0, umask=0o027).mode == stat.S_IFREG | 0o640
    assert tree.create(ROOT_INO, b"d", stat.S_IFDIR | 0o777, 0, 0, umask=0o027).mode == stat.S_IFDIR | 0o750
    assert tree.symlink(ROOT_INO, b"link", b"x", 0, 0).mode == stat.S_IFLNK | 0o777


def test_what_cannot_be_held_is_not_left_behind(tree_place: OnTree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tree_place.tree

    def no_descriptor(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "no descriptor left")

    named = tree.create(ROOT_INO, b"file", REGULAR, 0, 0)
    monkeypatch.setattr(tree_place.backing, "open", no_descriptor)
    with raises(errno.EMFILE):
        tree.hold(named)
    assert named.holds == 0
    assert tree.lookup(ROOT_INO, b"file") is named
    monkeypatch.setattr(tree_place.backing, "create", no_descriptor)
    inodes = len(tree.inodes)
    for held in (False, True):
        with raises(errno.EMFILE):
            tree.create(ROOT_INO, b"other", REGULAR, 0, 0, held=held)
    with raises(errno.EMFILE):
        tree.create_unlinked(ROOT_INO, REGULAR, 0, 0)
    assert len(tree.inodes) == inodes
    assert b"other" not in tree.root.entries
    tree.check()


def test_holding_ends_with_the_block(tree_place: OnTree) -> None:
    tree = tree_place.tree
    inode = tree.create(ROOT_INO, b"file", REGULAR, 0, 0)
    with tree.holding(inode):
        tree.unlink(ROOT_INO, b"file")
        assert (inode.holds, tree.inode(inode.ino)) == (1, inode)
    with raises(errno.ESTALE):
        tree.inode(inode.ino)


# -- check ------------------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[Callable[[OnTree], object], str]] = {
    "a link too many": (lambda place: setattr(place.inode("file"), "nlink", 2), "nlink 2, 1 names"),
    "a link too few": (lambda place: setattr(place.inode("file"), "nlink", 0), "should have been freed"),
    "a subdirectory too many": (lambda place: setattr(place.inode("d"), "nlink", 3), "nlink 3"),
    "another parent": (lambda place: setattr(place.inode("d"), "parent", place.inode("d")), "does not know its parent"),
    "a freed inode": (lambda place: place.tree.inodes.pop(place.tree.lookup(1, b"file").ino), "names a freed inode"),
    "a limit below what there is": (lambda place: setattr(place.tree.space, "nr_inodes", 2), "more inodes"),
    "attributes past the count": (lambda place: setattr(place.inode("d"), "xattrs", {b"user.a": b""}), "bytes of"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_finds_what_is_broken(name: str) -> None:
    spoil, sentence = BROKEN[name]
    place = OnTree(MemfdBacking(SIZE))
    place.make("file")
    place.mkdir("d")
    place.check()
    spoil(place)
    with pytest.raises(AssertionError, match=sentence):
        place.check()
