"""What must be true of the inodes of a tree between any two requests."""

from __future__ import annotations

import os
from collections.abc import Mapping

from memfs.tree.inode import Directory, Ino, Inode, RegularFile


def check_inodes(inodes: Mapping[Ino, Inode]) -> None:
    """Raise AssertionError on the first broken invariant. Costs time proportional to all names and pages."""
    links: dict[Ino, int] = dict.fromkeys(inodes, 0)
    for inode in inodes.values():
        assert inode.nlink or inode.nlookup or inode.holds, f"inode {inode.ino} should have been freed"
        if isinstance(inode, RegularFile):
            inode.file.check()
        if isinstance(inode, Directory) and inode.nlink:
            _check_directory(inode, inodes, links)
    for ino, count in links.items():
        inode = inodes[ino]
        if not inode.is_dir:
            assert inode.nlink == count, f"inode {ino}: nlink {inode.nlink}, {count} names"


def _check_directory(directory: Directory, inodes: Mapping[Ino, Inode], links: dict[Ino, int]) -> None:
    cookies = [entry.cookie for entry in directory.entries.values()]
    assert cookies == sorted(set(cookies)), f"directory {directory.ino}: cookies do not ascend"
    subdirectories = 0
    for name, entry in directory.entries.items():
        assert inodes.get(entry.inode.ino) is entry.inode, f"{os.fsdecode(name)} names a freed inode"
        links[entry.inode.ino] += 1
        if isinstance(entry.inode, Directory):
            subdirectories += 1
            assert entry.inode.parent is directory, f"{os.fsdecode(name)} does not know its parent"
    assert directory.nlink == subdirectories + 2, f"directory {directory.ino}: nlink {directory.nlink}"
