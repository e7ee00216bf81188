"""Names: inodes, directories, links, and how long an inode lives. No FUSE in it.

The kernel asks permission questions itself (default_permissions) and has locked the directories involved before it
asks us, so what is left is what tmpfs's own inode operations do (mm/shmem.c, fs/libfs.c): keep entries and link
counts, inherit from setgid directories, refuse what only the filesystem can know (ENOTEMPTY, EEXIST, ENOSPC).

An inode lives as long as anything refers to it: links, the kernel (which counts its look-ups and forgets them again)
and holds (open handles, and registrations of owners: RFC patch 06 and the reviewers' complaint about unbalanced file
references). With the last of the three its memory is freed. Inode numbers are never used twice, so a stale number
means nothing rather than another file.

All that changes is noted in the journal, which writes it down (records.py). A tree that was built again from that does
not know how often the kernel has looked its inodes up. So those are **unsure**, and before one is freed the kernel is
asked whether it has it.
"""

from __future__ import annotations

import errno
import functools
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from memfs.state.journal import INODE, NO_JOURNAL, Journal
from memfs.tree import acl, inode_flags, records
from memfs.tree.inode import CAPABILITY, Directory, Ino, Inode, RegularFile, Symlink
from memfs.tree.inode_space import InodeSpace
from memfs.tree.inodes import Inodes
from memfs.tree.invariants import check_inodes
from memfs.tree.new_inode import NewFile, NewInode
from memfs.tree.stored_xattrs import StoredXattrs

ROOT_INO: Final = Ino(1)
NAME_MAX: Final = 255  # bytes
UNSURE: Final = 1 << 48  #: look-ups of an inode from before; the kernel forgets fewer
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4


class Tree:
    """All inodes of a mount. Methods raise OSError with the errno that tmpfs gives.

    `nr_inodes` limits how many inodes there are, the root included. With `inode32` there are no more numbers than 32
    bits have, ever.
    `is_known` says whether the kernel has an inode; it is asked of a tree that was built again.
    """

    def __init__(
        self,
        new_file: NewFile,
        nr_inodes: int,
        mode: int,
        uid: int,
        gid: int,
        *,
        inode32: bool = False,
        journal: Journal = NO_JOURNAL,
        is_known: Callable[[int], bool] = lambda ino: True,
    ) -> None:
        self._new_file: Final = new_file
        self._journal: Final = journal
        self._is_known: Final = is_known
        self.space: Final = InodeSpace(nr_inodes, journal)
        self.xattrs: Final = StoredXattrs(self.space, journal)
        self.next_ino = ROOT_INO  #: of the inode that comes next
        self._last_ino: Final = (1 << (32 if inode32 else 63)) - 1
        self.inodes: Final = Inodes()
        self.root = Directory(self._new_ino(), stat.S_IFDIR | mode, uid, gid, None)
        self._add(self.root)

    def _add(self, inode: Inode) -> None:
        self.inodes[inode.ino] = inode
        self.space.add_inode()
        self.changed(inode)

    # -- look-up ----------------------------------------------------------------------------------------------------

    def inode(self, ino: int) -> Inode:
        """Return the inode with a number. ESTALE if it has been freed."""
        try:
            return self.inodes[Ino(ino)]
        except KeyError:
            raise OSError(errno.ESTALE, f"no inode {ino}") from None

    def directory(self, ino: int) -> Directory:
        """Return the directory with a number. ENOTDIR if it is something else."""
        inode = self.inode(ino)
        if not isinstance(inode, Directory):
            raise OSError(errno.ENOTDIR, "not a directory")
        return inode

    def regular(self, ino: int) -> RegularFile:
        """Return the regular file with a number. EINVAL if it is something else."""
        inode = self.inode(ino)
        if not isinstance(inode, RegularFile):
            raise OSError(errno.EINVAL, "not a regular file")
        return inode

    def lookup(self, parent: int, name: bytes) -> Inode:
        """Return what a name in a directory names; "." is any inode itself, as for file handles. ENOENT if nothing."""
        if name == b".":
            return self.inode(parent)
        directory = self.directory(parent)
        if name == b"..":
            return directory.parent
        if len(name) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, "name too long")
        try:
            return directory.entries[name].inode
        except KeyError:
            raise OSError(errno.ENOENT, "no such entry") from None

    # -- creation -----------------------------------------------------------------------------------------------------

    def create(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        *,
        umask: int = 0,
        rdev: int = 0,
        seals: int = 0,
        held: bool = False,
    ) -> Inode:
        """Create an inode of the type in `mode`: mknod(2), mkdir(2) and the creating half of open(2).

        A regular file has initial `seals` (F_SEAL_* bits), and may be `held`: then `release` is to be called. `umask`
        counts where there is no default ACL.
        """
        directory = self._writable(parent)
        self._check_new(directory, name)
        inode = self._create(directory, NewInode(mode, uid, gid, umask, rdev, seals, held))
        self._enter(directory, name, inode)
        return inode

    def create_unlinked(self, parent: int, mode: int, uid: int, gid: int, *, umask: int = 0, seals: int = 0) -> Inode:
        """Create a regular file without a name, as open(2) with O_TMPFILE. It is held; `release` is to be called."""
        inode = self._create(self._writable(parent), NewInode(mode, uid, gid, umask, seals=seals, held=True))
        inode.nlink = 0
        return inode

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        """Create a symbolic link, as symlink(2)."""
        directory = self._writable(parent)
        self._check_new(directory, name)
        inode = self._create(directory, NewInode(stat.S_IFLNK | 0o777, uid, gid, target=target))
        self._enter(directory, name, inode)
        return inode

    def link(self, ino: int, parent: int, name: bytes) -> Inode:
        """Give an inode another name, as link(2)."""
        inode, directory = self.inode(ino), self._writable(parent)
        self._check_new(directory, name)
        inode_flags.check_change(inode)
        if inode.nlink:
            self.space.check_inode()
            self.space.add_extra_link()
        inode.nlink += 1
        self._touch(inode)
        self._enter(directory, name, inode)
        return inode

    def _create(self, parent: Directory, new: NewInode) -> Inode:
        self.space.check_inode()
        mode, gid, xattrs = new.inherit(parent)
        self.space.add_xattrs(xattrs)
        try:
            inode = new.make(self._new_ino(), mode, gid, parent, self._new_file)
        except OSError:
            self.space.remove_xattrs(xattrs)
            raise
        inode.xattrs = xattrs or None
        self._add(inode)
        for name in xattrs:
            self.xattrs.changed(inode, name)
        return inode

    def _new_ino(self) -> Ino:
        ino = self.next_ino
        if ino > self._last_ino:
            raise OSError(errno.ENOSPC, "all inode numbers have been used")
        self.next_ino = Ino(ino + 1)
        self._journal.changed(records.TREE)
        return ino

    def _writable(self, ino: int) -> Directory:
        directory = self.directory(ino)
        if directory.nlink == 0:
            raise OSError(errno.ENOENT, "the directory has been removed")
        inode_flags.check_add(directory)
        return directory

    def _check_new(self, directory: Directory, name: bytes) -> None:
        if len(name) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, "name too long")
        if name in directory.entries:
            raise OSError(errno.EEXIST, "the name exists")

    # -- removing and renaming --------------------------------------------------------------------------------------

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name, as unlink(2)."""
        inode, directory = self.lookup(parent, name), self.directory(parent)
        inode_flags.check_remove(directory, inode)
        if inode.is_dir:
            raise OSError(errno.EISDIR, "a directory")
        self._unlinked(self._leave(directory, name))

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory, as rmdir(2)."""
        inode, directory = self.lookup(parent, name), self.directory(parent)
        inode_flags.check_remove(directory, inode)
        if not isinstance(inode, Directory):
            raise OSError(errno.ENOTDIR, "not a directory")
        self._check_empty(inode)
        self._unlinked(self._leave(directory, name))

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0, *, uid: int = 0, gid: int = 0
    ) -> None:
        """Rename as renameat2(2): RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT (the whiteout is uid's)."""
        exchange, whiteout = flags & RENAME_EXCHANGE, flags & RENAME_WHITEOUT
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT) or (exchange and flags != exchange):
            raise OSError(errno.EINVAL, f"rename flags {flags:#x}")
        source, target = self.directory(parent), self._writable(new_parent)
        inode = self.lookup(parent, name)
        inode_flags.check_remove(source, inode)
        if len(new_name) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, "name too long")
        if exchange:
            self._exchange(source, name, target, new_name)
            return
        existing = target.entries.get(new_name)
        if existing is not None:
            if flags & RENAME_NOREPLACE:
                raise OSError(errno.EEXIST, "the name exists")
            if existing.inode is inode:
                return
            inode_flags.check_remove(target, existing.inode)
            self._check_replaceable(inode, existing.inode)
        left_behind = self._create(source, NewInode(stat.S_IFCHR, uid, gid)) if whiteout else None
        if existing is not None:
            self._unlinked(self._leave(target, new_name))
        self._move(self._leave(source, name), target, new_name)
        if left_behind is not None:
            self._enter(source, name, left_behind)

    def _exchange(self, source: Directory, name: bytes, target: Directory, new_name: bytes) -> None:
        first, second = self.lookup(source.ino, name), self.lookup(target.ino, new_name)  # or ENOENT
        inode_flags.check_remove(target, second)
        if first is second:
            return
        self._leave(source, name)
        self._leave(target, new_name)
        self._move(first, target, new_name)
        self._move(second, source, name)

    def _move(self, inode: Inode, target: Directory, name: bytes) -> None:
        self._enter(target, name, inode)
        self._touch(inode)
        if isinstance(inode, Directory):
            inode.parent = target

    def _enter(self, directory: Directory, name: bytes, inode: Inode) -> None:
        directory.add(name, inode)
        self._journal.changed(records.ENTRY, directory.ino, name)
        self.changed(directory)

    def _leave(self, directory: Directory, name: bytes) -> Inode:
        self._journal.changed(records.ENTRY, directory.ino, name)
        self.changed(directory)
        return directory.remove(name)

    def _touch(self, inode: Inode) -> None:
        inode.changed()
        self.changed(inode)

    def _check_replaceable(self, inode: Inode, existing: Inode) -> None:
        if isinstance(existing, Directory):
            if not inode.is_dir:
                raise OSError(errno.EISDIR, "a directory")
            self._check_empty(existing)
        elif inode.is_dir:
            raise OSError(errno.ENOTDIR, "not a directory")

    def _check_empty(self, directory: Directory) -> None:
        if directory.entries:
            raise OSError(errno.ENOTEMPTY, "the directory is not empty")

    def _unlinked(self, inode: Inode) -> None:
        inode.nlink -= 2 if inode.is_dir else 1
        if inode.nlink:
            self.space.remove_extra_link()
        self._touch(inode)
        if isinstance(inode, RegularFile) and not inode.nlink and not inode.holds:
            inode.file.unlinked()
        self.free_if_unused(inode)

    # -- references -------------------------------------------------------------------------------------------------

    def hold(self, inode: Inode) -> None:
        """Keep an inode alive until `release`, and a regular file open. Raises OSError(EMFILE), changing nothing."""
        if isinstance(inode, RegularFile):
            inode.file.hold()
        inode.holds += 1

    def release(self, inode: Inode) -> None:
        """Undo one `hold`."""
        assert inode.holds > 0
        inode.holds -= 1
        if isinstance(inode, RegularFile):
            inode.file.release()
        self.free_if_unused(inode)

    @contextmanager
    def holding(self, inode: Inode) -> Iterator[None]:
        """Keep an inode alive within a with statement."""
        self.hold(inode)
        try:
            yield
        finally:
            self.release(inode)

    def looked_up(self, inode: Inode) -> None:
        """Count a reply by which the kernel knows an inode until it forgets it."""
        inode.nlookup += 1

    def forget(self, ino: int, nlookup: int) -> None:
        """Forget so many of the kernel's look-ups (FUSE_FORGET). Never raises: there is no reply."""
        inode = self.inodes.get(Ino(ino))  # of what is not built nobody has counted the look-ups
        if inode is not None and inode is not self.root:
            inode.nlookup = max(0, inode.nlookup - nlookup)
            self.free_if_unused(inode)

    def free_if_unused(self, inode: Inode) -> None:
        """Free an inode if nothing refers to it any more."""
        if inode.nlink or inode.holds or self._is_looked_up(inode):
            return
        del self.inodes[inode.ino]
        self.space.remove_inode()
        self.space.remove_xattrs(inode.xattrs)
        if inode.xattrs:
            self._journal.drop(records.xattr_key(inode.ino, name) for name in list(inode.xattrs))
        self.changed(inode)
        self._journal.defer(functools.partial(_free, inode))

    def _is_looked_up(self, inode: Inode) -> bool:
        """Return whether the kernel knows an inode."""
        if inode.nlookup >= UNSURE // 2:
            return self._is_known(inode.ino)
        return inode.nlookup > 0

    def close(self) -> None:
        """Free every file; the mount has ended."""
        for inode in self.inodes.all():
            _close(inode)
        self.inodes.clear()

    # -- attributes ---------------------------------------------------------------------------------------------------

    def chmod(self, inode: Inode, mode: int) -> None:
        """Change the permission bits as chmod(2) does, and the access ACL with them."""
        inode.chmod(mode)
        if inode.xattrs is not None and acl.ACCESS in inode.xattrs:
            self.xattrs.changed(inode, acl.ACCESS)
        self.changed(inode)

    def kill_suidgid(self, inode: Inode, *, in_group: bool) -> None:
        """Drop setuid, setgid and file capabilities as Inode.kill_suidgid says."""
        mode = inode.mode
        inode.kill_suidgid(in_group=in_group)
        capability = None if inode.is_dir else (inode.xattrs or {}).get(CAPABILITY)
        if capability is not None:
            self.xattrs.drop(inode, CAPABILITY, capability)
        if capability is not None or mode != inode.mode:
            self.changed(inode)

    # -- what is written down ---------------------------------------------------------------------------------------

    def changed(self, inode: Inode) -> None:
        """Note that an inode has changed, other than by a method of this class."""
        self._journal.changed(INODE, inode.ino)

    def commit(self) -> None:
        """Commit what has changed other than by a request of the kernel's."""
        self._journal.commit()

    def set_limit(self, nr_inodes: int) -> None:
        """Change how many inodes there may be. Raises OSError(EINVAL), changing nothing, below what is in use."""
        self.space.set_limit(nr_inodes)
        self._journal.changed(records.TREE)

    # -- invariants -------------------------------------------------------------------------------------------------

    def files(self) -> Iterator[RegularFile]:
        """Return every regular file, linked or not."""
        return (inode for inode in self.inodes.all() if isinstance(inode, RegularFile))

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        check_inodes({inode.ino: inode for inode in self.inodes.all()})
        self.space.check(self.inodes.values())


def _free(inode: Inode) -> None:
    """Free the memory of an inode that nobody refers to any more."""
    if isinstance(inode, RegularFile):
        inode.file.free()
    else:
        _close(inode)


def _close(inode: Inode) -> None:
    """Free an inode's memory, immediately."""
    if isinstance(inode, RegularFile):
        inode.file.close()
    elif isinstance(inode, Symlink) and inode.page is not None:
        inode.page.close()
