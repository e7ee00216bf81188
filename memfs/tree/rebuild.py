"""A tree is written down and built again from that (records.py says how)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from memfs.state.journal import INODE, Journal, number_in, numbered, rest_of
from memfs.store.file import File
from memfs.tree import records
from memfs.tree.inode import Directory, Ino, Inode
from memfs.tree.tree import ROOT_INO, UNSURE, Tree


def keep(tree: Tree, journal: Journal) -> None:
    """Have a journal find the values of all that a tree has."""

    def inode_value(key: bytes) -> bytes | None:
        inode = tree.inodes.get(Ino(number_in(key)))
        return records.pack_inode(inode) if inode is not None else None

    def entry_value(key: bytes) -> bytes | None:
        directory = tree.inodes.get(Ino(number_in(key)))
        entry = directory.entries.get(rest_of(key)) if isinstance(directory, Directory) else None
        return records.pack_entry(entry.inode.ino, entry.cookie) if entry is not None else None

    def xattr_value(key: bytes) -> bytes | None:
        inode = tree.inodes.get(Ino(number_in(key)))
        return inode.xattrs.get(rest_of(key)) if inode is not None and inode.xattrs else None

    journal.keeps(INODE, inode_value)
    journal.keeps(records.XATTR, xattr_value)
    journal.keeps(records.ENTRY, entry_value)
    journal.keeps(records.TREE, lambda key: records.pack_tree(tree.next_ino, tree.space.nr_inodes))


def rebuild(tree: Tree, state: Mapping[bytes, bytes], old_file: Callable[[Ino, int], File]) -> None:
    """Build the tree that was written down, in place of one that is new. What is open has to be held again.

    `old_file` finds the file with a number and seals.
    """
    parents: list[tuple[Directory, int]] = []
    xattrs: list[tuple[bytes, bytes]] = []
    names: dict[int, list[tuple[int, bytes, int]]] = {}
    for key, value in state.items():
        if key[:1] == INODE:
            inode, parent = records.unpack_inode(Ino(number_in(key)), value, old_file)
            inode.nlookup = UNSURE
            tree.inodes[inode.ino] = inode
            if isinstance(inode, Directory):
                parents.append((inode, parent))
        elif key[:1] == records.ENTRY:
            ino, cookie = records.unpack_entry(value)
            names.setdefault(number_in(key), []).append((cookie, rest_of(key), ino))
        elif key[:1] == records.XATTR:
            xattrs.append((key, value))
    for key, value in xattrs:
        owner = tree.inodes.get(Ino(number_in(key)))
        if owner is None:
            tree.dropped(iter([key]))
        else:
            owner.xattrs = owner.xattrs or {}
            owner.xattrs[rest_of(key)] = value
    for directory, parent in parents:
        above = tree.inodes.get(Ino(parent))
        directory.parent = above if isinstance(above, Directory) else directory  # it may have been removed
    for number, entries in names.items():
        directory = tree.directory(number)
        for cookie, name, ino in sorted(entries):
            directory.restore(name, tree.inodes[Ino(ino)], cookie)
    next_ino, tree.space.nr_inodes = records.unpack_tree(state[records.TREE])
    tree.next_ino, tree.root = Ino(next_ino), tree.directory(ROOT_INO)
    tree.root.nlookup = 0
    tree.space.count(tree.inodes.values())


def free_forgotten(tree: Tree) -> Iterator[Inode]:
    """Free the inodes from before to which nothing refers any more; yields each that it has looked at."""
    for inode in [each for each in tree.inodes.values() if not (each.nlink or each.holds)]:
        tree.free_if_unused(inode)
        yield inode


def keys_of(tree: Tree) -> set[bytes]:
    """Return the keys of all that a tree has."""
    keys = {numbered(INODE, ino) for ino in tree.inodes} | {records.TREE}
    for inode in tree.inodes.values():
        keys |= {records.xattr_key(inode.ino, name) for name in inode.xattrs or ()}
        if isinstance(inode, Directory):
            keys |= {records.entry_key(inode.ino, name) for name in inode.entries}
    return keys
