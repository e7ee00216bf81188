"""A tree is written down and built again from that (records.py says how)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter

from memfs.state.journal import INODE, Committed, Journal, LogJournal, number_in, numbered, rest_of
from memfs.store.file import File
from memfs.tree import records
from memfs.tree.inode import Directory, EntryFromBefore, Ino, Inode
from memfs.tree.tree import ROOT_INO, UNSURE, Tree


def keep(tree: Tree, journal: Journal) -> None:
    """Have a journal find the values of all that a tree has."""

    def inode_value(key: bytes) -> bytes | None:
        inode = tree.inodes.find(number_in(key))
        return records.pack_inode(inode) if inode is not None else None

    def entry_value(key: bytes) -> bytes | None:
        directory = tree.inodes.find(number_in(key))
        entry = directory.entries.get(rest_of(key)) if isinstance(directory, Directory) else None
        return records.pack_entry(entry.inode.ino, entry.cookie) if entry is not None else None

    def xattr_value(key: bytes) -> bytes | None:
        inode = tree.inodes.find(number_in(key))
        return inode.xattrs.get(rest_of(key)) if inode is not None and inode.xattrs else None

    journal.keeps(INODE, inode_value)
    journal.keeps(records.XATTR, xattr_value)
    journal.keeps(records.ENTRY, entry_value)
    journal.keeps(records.TREE, lambda key: records.pack_tree(tree.next_ino, tree.space.nr_inodes))


def rebuild(tree: Tree, state: Committed, journal: LogJournal, old_file: Callable[[Ino, int], File]) -> None:
    """Build the tree that was written down, in place of one that is new. What is open has to be held again.

    `old_file` finds the file with a number and seals. Ordinary files that have a name are built later, out of the
    journal.
    """

    def build(ino: Ino, packed: bytes) -> tuple[Inode, int]:
        inode, parent = records.unpack_inode(ino, packed, old_file)
        inode.nlookup = UNSURE
        return inode, parent

    with_xattrs = {number_in(key) for key in state.of(records.XATTR)}
    unbuilt: dict[Ino, None] = {}
    extra_links = 0
    parents: list[tuple[Directory, int]] = []
    for key, packed in state.items_of(INODE):
        ino = Ino(number_in(key))
        if ino not in with_xattrs and (links := records.plain_links(packed)):
            unbuilt[ino] = None
            extra_links += links - 1
            continue
        inode, parent = build(ino, packed)
        tree.inodes[ino] = inode
        if isinstance(inode, Directory):
            parents.append((inode, parent))
    for key, value in state.items_of(records.XATTR):
        owner = tree.inodes.find(number_in(key))
        if owner is None:
            journal.drop(iter([key]))
        else:
            owner.xattrs = owner.xattrs or {}
            owner.xattrs[rest_of(key)] = value
    for directory, parent in parents:
        above = tree.inodes.find(parent)
        if isinstance(above, Directory):
            directory.parent = above
        else:  # both were removed, and only this one is still known
            directory.parent = directory
            tree.changed(directory)
    next_ino, tree.space.nr_inodes = records.unpack_tree(state[records.TREE])
    tree.next_ino, tree.root = Ino(next_ino), tree.directory(ROOT_INO)
    tree.root.nlookup = 0
    tree.space.count(tree.inodes.values(), len(unbuilt), extra_links)
    tree.inodes.add_unbuilt(unbuilt, lambda ino: build(ino, journal.committed(numbered(INODE, ino)))[0])
    _restore_names(tree, state)


def _restore_names(tree: Tree, state: Committed) -> None:
    names: dict[int, list[EntryFromBefore]] = {}
    inodes, unpack = tree.inodes, records.unpack_entry
    for key, value in state.items_of(records.ENTRY):
        ino, cookie = unpack(value)
        entry = EntryFromBefore(rest_of(key), Ino(ino), cookie, inodes)
        number = number_in(key)
        if number in names:
            names[number].append(entry)
        else:
            names[number] = [entry]
    for number, entries in names.items():
        tree.directory(number).restore(sorted(entries, key=attrgetter("cookie")))


def free_forgotten(tree: Tree) -> Iterator[Inode]:
    """Free the inodes from before to which nothing refers any more; yields each that it has looked at."""
    for inode in [each for each in tree.inodes.values() if not (each.nlink or each.holds)]:
        tree.free_if_unused(inode)
        yield inode


def keys_of(tree: Tree) -> set[bytes]:
    """Return the keys of all that a tree has."""
    keys = {numbered(INODE, ino) for ino in tree.inodes.numbers} | {records.TREE}
    for inode in tree.inodes.all():
        keys |= {records.xattr_key(inode.ino, name) for name in inode.xattrs or ()}
        if isinstance(inode, Directory):
            keys |= {records.entry_key(inode.ino, name) for name in inode.entries}
    return keys
