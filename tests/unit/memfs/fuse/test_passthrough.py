"""Backing files, registered with a kernel that a function stands for."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

import pytest

from memfs.fuse.abi import FUSE_DEV_IOC_BACKING_OPEN
from memfs.fuse.passthrough import Passthrough, Wanted
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.tree.open_files import Access, OpenFiles
from memfs.tree.tree import ROOT_INO, Tree


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The backing ids that the kernel has given and not been given back."""
    ids: set[int] = set()

    def ioctl(fd: int, command: int, argument: bytes | bytearray) -> int:
        if command == FUSE_DEV_IOC_BACKING_OPEN:
            ids.add(1)
        else:
            ids.remove(int.from_bytes(argument, "little"))
        return 1

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return ids


@pytest.mark.parametrize("is_gone", [False, True])
def test_backing_ids_are_given_back_unless_the_mount_is_gone(registered: set[int], is_gone: bool) -> None:
    passthrough = Passthrough(-1, Wanted.AUTO, None)
    assert passthrough.negotiate(True)
    backing = MemfdBacking(1 << 20)
    tree = Tree(lambda ino, seals: File(backing, ino, seals, held=True), 10, 0o755, 0, 0)
    opens = OpenFiles(tree, passthrough)
    inode = tree.regular(tree.create(ROOT_INO, b"file", stat.S_IFREG | 0o600, 0, 0).ino)
    assert opens.open_file(inode, os.O_RDWR)[1].access is Access.PASSTHROUGH
    assert registered == {1}
    if is_gone:
        passthrough.end()
    opens.close()
    opens.check()
    assert (len(opens), inode.holds, inode.file.opens.backing_id) == (0, 0, None)
    assert registered == ({1} if is_gone else set()), "the kernel forgets it by itself"
    tree.close()


def test_kernel_that_refuses_a_file_may_accept_another(caplog: pytest.LogCaptureFixture) -> None:
    with open(os.devnull) as no_fuse:
        passthrough = Passthrough(no_fuse.fileno(), Wanted.AUTO, None)
        assert passthrough.open(no_fuse.fileno()) is None
    assert os.strerror(errno.ENOTTY) in caplog.text
    assert passthrough.in_force
