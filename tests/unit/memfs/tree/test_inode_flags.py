"""What +i and +a of chattr(1) forbid, operation by operation. A tmpfs judges."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from memfs.tree import inode_flags
from memfs.tree.inode import Inode
from memfs.tree.inode_flags import FS_APPEND_FL, FS_IMMUTABLE_FL
from memfs.tree.tree import RENAME_EXCHANGE
from tests.helpers import raises

from .places import OnTmpfs, OnTree, Place

FLAGS = {"": 0, "i": FS_IMMUTABLE_FL, "a": FS_APPEND_FL, "ia": FS_IMMUTABLE_FL | FS_APPEND_FL}
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

# -- names and attributes, which the tree refuses itself --------------------------------------------------------------

#: Which inode has the flags, with which of them the operation fails, and the operation
OPERATIONS: dict[str, tuple[str, str, Callable[[Place], object]]] = {
    "unlink it": ("file", "ia", lambda place: place.unlink("file")),
    "link to it": ("file", "ia", lambda place: place.link("file", "new")),
    "rename it": ("file", "ia", lambda place: place.rename("file", "new")),
    "rename over it": ("file", "ia", lambda place: place.rename("other", "file")),
    "exchange it": ("file", "ia", lambda place: place.rename("file", "other", RENAME_EXCHANGE)),
    "exchange for it": ("file", "ia", lambda place: place.rename("other", "file", RENAME_EXCHANGE)),
    "set an attribute": ("file", "ia", lambda place: place.setxattr("file", "user.a", b"2")),
    "remove an attribute": ("file", "ia", lambda place: place.removexattr("file", "user.a")),
    "get an attribute": ("file", "", lambda place: place.getxattr("file", "user.a")),
    "unlink another": ("file", "", lambda place: place.unlink("other")),
    "remove the directory": ("d", "ia", lambda place: place.rmdir("d")),
    "rename the directory": ("d", "ia", lambda place: place.rename("d", "new")),
    "make in it": ("d", "i", lambda place: place.make("d/new")),
    "make a directory in it": ("d", "i", lambda place: place.mkdir("d/new")),
    "symlink in it": ("d", "i", lambda place: place.symlink("x", "d/new")),
    "link into it": ("d", "i", lambda place: place.link("file", "d/new")),
    "rename into it": ("d", "i", lambda place: place.rename("file", "d/new")),
    "open unnamed in it": ("d", "i", lambda place: place.open_unnamed("d")),
    "unlink in it": ("full", "ia", lambda place: place.unlink("full/x")),
    "rename out of it": ("full", "ia", lambda place: place.rename("full/x", "new")),
    "rename in it": ("full", "ia", lambda place: place.rename("full/x", "full/y")),
    "rename over what is in it": ("full", "ia", lambda place: place.rename("file", "full/x")),
    "exchange with what is in it": ("full", "ia", lambda place: place.rename("file", "full/x", RENAME_EXCHANGE)),
    "list it": ("full", "", lambda place: place.names("full")),
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_names_and_attributes(place: Place, name: str, flags: str) -> None:
    protected, forbid, operation = OPERATIONS[name]
    for file in ("file", "other"):
        place.make(file)
    for directory in ("d", "full"):
        place.mkdir(directory)
    place.make("full/x")
    place.setxattr("file", "user.a", b"1")
    place.set_flags(protected, FLAGS[flags])
    if set(flags) & set(forbid):
        before = place.everything(), place.free_inodes
        with raises(errno.EPERM):
            operation(place)
        assert (place.everything(), place.free_inodes) == before
    else:
        operation(place)
    place.check()


# -- content and the rest, of which the filesystem asks before it is changed ------------------------------------------


def opened(flags: int) -> tuple[Callable[[Inode], None], Callable[[str, int], object]]:
    """An open(2): the question that is asked, and what asks it of a tmpfs (with a path, and a descriptor of it)."""
    return (lambda inode: inode_flags.check_open(inode, flags)), lambda path, _: os.close(os.open(path, flags))


def allocated(mode: int) -> tuple[Callable[[Inode], None], Callable[[str, int], object]]:
    """A fallocate(2), likewise."""
    return (lambda inode: inode_flags.check_fallocate(inode, mode)), lambda _, fd: fallocate(fd, mode, 0, 4096)


QUESTIONS: dict[str, tuple[str, tuple[Callable[[Inode], None], Callable[[str, int], object]]]] = {
    "open to read": ("", opened(os.O_RDONLY)),
    "open to write": ("ia", opened(os.O_WRONLY)),
    "open to read and write": ("ia", opened(os.O_RDWR)),
    "open to append": ("i", opened(os.O_WRONLY | os.O_APPEND)),
    "open to read and append": ("i", opened(os.O_RDWR | os.O_APPEND)),
    "open to append and truncate": ("ia", opened(os.O_WRONLY | os.O_APPEND | os.O_TRUNC)),
    "open to read and truncate": ("ia", opened(os.O_RDONLY | os.O_TRUNC)),
    "open to read, appending": ("", opened(os.O_RDONLY | os.O_APPEND)),
    "allocate": ("i", allocated(0)),
    "allocate and keep the size": ("i", allocated(FALLOC_FL_KEEP_SIZE)),
    "punch": ("ia", allocated(PUNCH)),
    "truncate": ("ia", (inode_flags.check_change, lambda path, _: os.truncate(path, 0))),
    "chmod": ("ia", (inode_flags.check_change, lambda path, _: os.chmod(path, 0o600))),
    "chown": ("ia", (inode_flags.check_change, lambda path, _: os.chown(path, 1, 1))),
    "set times": ("ia", (inode_flags.check_change, lambda path, _: os.utime(path, (1, 1)))),
    "touch": ("i", (inode_flags.check_touch, lambda path, _: os.utime(path))),
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", QUESTIONS)
def test_content_and_attributes(tree_place: OnTree, name: str, flags: str) -> None:
    forbid, (ask, _) = QUESTIONS[name]
    tree_place.make("file")
    inode = tree_place.inode("file")
    inode.flags = FLAGS[flags]
    if set(flags) & set(forbid):
        with raises(errno.EPERM):
            ask(inode)
    else:
        ask(inode)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", QUESTIONS)
def test_content_and_attributes_on_tmpfs(tmpfs: Path, name: str, flags: str) -> None:
    forbid, (_, call) = QUESTIONS[name]
    place, path = OnTmpfs(tmpfs), str(tmpfs / "file")
    place.make("file")
    fd = os.open(path, os.O_RDWR)
    place.set_flags("file", FLAGS[flags])
    try:
        if set(flags) & set(forbid):
            with raises(errno.EPERM):
                call(path, fd)
        else:
            call(path, fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("flags", FLAGS)
def test_owner_could_do_anything_so_it_must_not_become_one(tree_place: OnTree, flags: str) -> None:
    tree_place.make("file")
    inode = tree_place.inode("file")
    inode.flags = FLAGS[flags]
    if flags:
        with raises(errno.EPERM):
            inode_flags.check_own(inode)
    else:
        inode_flags.check_own(inode)


@pytest.mark.parametrize(("flags", "word"), [("i", "immutable"), ("a", "append-only"), ("ia", "immutable")])
def test_the_sentence_says_which(tree_place: OnTree, flags: str, word: str) -> None:
    tree_place.make("file")
    inode = tree_place.inode("file")
    inode.flags = FLAGS[flags]
    with raises(errno.EPERM, match=f"^.*{word}: cannot be changed"):
        inode_flags.check_change(inode)
