"""Where names are: a Tree without a mount, and the tmpfs that judges it, behind one interface.

What a test says of a place must be true of both, so that a tmpfs shows whether what is said is right.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final, NamedTuple

import trio

from memfs.store.backing import Backing
from memfs.store.file import File
from memfs.tree.inode import Directory, Inode, Symlink
from memfs.tree.tree import Tree
from memfs.tree.xattrs import Control, Xattrs
from tests.helpers import at, describe_nothing

SIZE: Final = 1 << 20  #: bytes of memory
NR_INODES: Final = 20  #: the root included
AT_FDCWD: Final = -100
AT_SYMLINK_FOLLOW: Final = 0x400

_FS_IOC_SETFLAGS: Final = 0x40086602  # linux/fs.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.linkat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]


class Facts(NamedTuple):
    """What stat(2) says that does not depend on when or where. Size in bytes, blocks of 512 bytes."""

    mode: str  #: as `ls -l` writes it
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int


class Place(ABC):
    """A filesystem with nothing in it. Paths are relative to its root; all methods raise OSError."""

    @abstractmethod
    def make(self, path: str, mode: int = 0o644, *, uid: int = 0, gid: int = 0, rdev: int = 0) -> None:
        """mknod(2), or mkdir(2) for a mode that says so. Without a type in the mode, a regular file."""

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        """mkdir(2)."""
        self.make(path, stat.S_IFDIR | mode)

    @abstractmethod
    def symlink(self, target: str, path: str) -> None:
        """symlink(2)."""

    @abstractmethod
    def link(self, path: str, new: str) -> None:
        """link(2)."""

    @abstractmethod
    def unlink(self, path: str) -> None:
        """unlink(2)."""

    @abstractmethod
    def rmdir(self, path: str) -> None:
        """rmdir(2)."""

    @abstractmethod
    def rename(self, path: str, new: str, flags: int = 0) -> None:
        """renameat2(2)."""

    @abstractmethod
    def chmod(self, path: str, mode: int) -> None:
        """chmod(2)."""

    @abstractmethod
    def facts(self, path: str) -> Facts:
        """lstat(2)."""

    @abstractmethod
    def number(self, path: str) -> int:
        """The inode's number."""

    @abstractmethod
    def readlink(self, path: str) -> str:
        """readlink(2)."""

    @abstractmethod
    def names(self, path: str = ".") -> list[str]:
        """The names in a directory, in the order in which readdir(3) gives them."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Write a file's content, from its beginning."""

    @abstractmethod
    def open(self, path: str) -> int:
        """Keep a file or directory open; returns a handle."""

    @abstractmethod
    def open_unnamed(self, directory: str) -> int:
        """open(2) with O_TMPFILE; returns a handle."""

    @abstractmethod
    def name_handle(self, handle: int, path: str) -> None:
        """Give a name to an open file that has none."""

    @abstractmethod
    def names_in_handle(self, handle: int) -> list[str]:
        """The names in a directory that is open."""

    @abstractmethod
    def make_in_handle(self, handle: int, name: str) -> None:
        """Make a regular file in a directory that is open."""

    @abstractmethod
    def nlink_of_handle(self, handle: int) -> int:
        """The link count of an open file."""

    @abstractmethod
    def close(self, handle: int) -> None:
        """Close a handle."""

    @property
    @abstractmethod
    def free_inodes(self) -> int:
        """How many inodes can still be made."""

    @property
    @abstractmethod
    def free_pages(self) -> int:
        """How many pages can still be allocated."""

    @abstractmethod
    def setxattr(self, path: str, name: str, value: bytes) -> None:
        """setxattr(2)."""

    @abstractmethod
    def getxattr(self, path: str, name: str) -> bytes:
        """getxattr(2)."""

    @abstractmethod
    def removexattr(self, path: str, name: str) -> None:
        """removexattr(2)."""

    @abstractmethod
    def listxattr(self, path: str) -> list[str]:
        """listxattr(2), as root."""

    @abstractmethod
    def set_flags(self, path: str, flags: int) -> None:
        """Set the FS_*_FL of chattr(1) that an inode has."""

    @abstractmethod
    def check(self) -> None:
        """Raise AssertionError if it is not well."""

    @abstractmethod
    def end(self) -> None:
        """Close everything that is open, and see that it is well."""

    def everything(self) -> dict[str, tuple[Facts, int, dict[str, bytes]]]:
        """All that names reach: what stat(2) says, inode numbers, attributes."""
        found = {}
        paths = ["."]
        while paths:
            path = paths.pop()
            facts = self.facts(path)
            links = facts.mode.startswith("l")
            xattrs = {} if links else {name: self.getxattr(path, name) for name in self.listxattr(path)}
            found[path] = facts, self.number(path), xattrs
            if facts.mode.startswith("d"):
                paths += [f"{path}/{name}" for name in self.names(path)]
        return found


class OnTree(Place):
    """A Tree, asked as the kernel asks: by the directory's number and a name."""

    def __init__(self, backing: Backing) -> None:
        self.backing: Final = backing
        self.tree: Final = Tree(lambda ino, seals: File(self.backing, ino, seals, held=True), NR_INODES, 0o755, 0, 0)
        self.xattrs: Final = Xattrs(
            self.tree, Control("/socket", describe_nothing, lambda options: None, lambda inode: "{}")
        )
        self._open: Final[dict[int, Inode]] = {}

    def inode(self, path: str) -> Inode:
        """What a path names."""
        inode: Inode = self.tree.root
        for name in path.split("/"):
            inode = self.tree.lookup(inode.ino, os.fsencode(name))
        return inode

    def _split(self, path: str) -> tuple[int, bytes]:
        head, _, tail = path.rpartition("/")
        return self.inode(head or ".").ino, os.fsencode(tail)

    def make(self, path: str, mode: int = 0o644, *, uid: int = 0, gid: int = 0, rdev: int = 0) -> None:
        mode |= 0 if stat.S_IFMT(mode) else stat.S_IFREG
        self.tree.create(*self._split(path), mode, uid, gid, rdev=rdev)

    def symlink(self, target: str, path: str) -> None:
        self.tree.symlink(*self._split(path), os.fsencode(target), 0, 0)

    def link(self, path: str, new: str) -> None:
        self.tree.link(self.inode(path).ino, *self._split(new))

    def unlink(self, path: str) -> None:
        self.tree.unlink(*self._split(path))

    def rmdir(self, path: str) -> None:
        self.tree.rmdir(*self._split(path))

    def rename(self, path: str, new: str, flags: int = 0) -> None:
        self.tree.rename(*self._split(path), *self._split(new), flags)

    def chmod(self, path: str, mode: int) -> None:
        self.inode(path).chmod(mode)

    def facts(self, path: str) -> Facts:
        status = self.inode(path).stat()
        return Facts(stat.filemode(status.mode), *status[2:8])

    def number(self, path: str) -> int:
        return self.inode(path).ino

    def readlink(self, path: str) -> str:
        inode = self.inode(path)
        assert isinstance(inode, Symlink)
        return os.fsdecode(inode.target)

    def names(self, path: str = ".") -> list[str]:
        return [os.fsdecode(entry.name) for entry in self.tree.directory(self.inode(path).ino).entries_after(0)]

    def write(self, path: str, data: bytes) -> None:
        inode = self.tree.regular(self.inode(path).ino)
        with self.tree.holding(inode):
            written = inode.file.write(at(0), data)
        if written < len(data):
            raise OSError(errno.ENOSPC, "no room")

    def open(self, path: str) -> int:
        return self._hold(self.inode(path))

    def open_unnamed(self, directory: str) -> int:
        return self._handle(self.tree.create_unlinked(self.inode(directory).ino, stat.S_IFREG | 0o600, 0, 0))

    def _hold(self, inode: Inode) -> int:
        self.tree.hold(inode)
        return self._handle(inode)

    def _handle(self, inode: Inode) -> int:
        handle = len(self._open) + 1
        self._open[handle] = inode
        return handle

    def name_handle(self, handle: int, path: str) -> None:
        self.tree.link(self._open[handle].ino, *self._split(path))

    def names_in_handle(self, handle: int) -> list[str]:
        directory = self._open[handle]
        assert isinstance(directory, Directory)
        return [os.fsdecode(entry.name) for entry in directory.entries_after(0)]

    def make_in_handle(self, handle: int, name: str) -> None:
        self.tree.create(self._open[handle].ino, os.fsencode(name), stat.S_IFREG | 0o644, 0, 0)

    def nlink_of_handle(self, handle: int) -> int:
        return self._open[handle].nlink

    def close(self, handle: int) -> None:
        self.tree.release(self._open.pop(handle))

    @property
    def free_inodes(self) -> int:
        return self.tree.space.free_inodes

    @property
    def free_pages(self) -> int:
        return self.backing.free_pages

    def setxattr(self, path: str, name: str, value: bytes) -> None:
        async def set_xattr() -> None:
            await self.xattrs.set(self.inode(path).ino, os.fsencode(name), value, uid=lambda: 0)

        trio.run(set_xattr)

    def getxattr(self, path: str, name: str) -> bytes:
        return self.xattrs.get(self.inode(path).ino, os.fsencode(name))

    def removexattr(self, path: str, name: str) -> None:
        self.xattrs.remove(self.inode(path).ino, os.fsencode(name))

    def listxattr(self, path: str) -> list[str]:
        return [os.fsdecode(name) for name in self.xattrs.list(self.inode(path).ino, uid=lambda: 0)]

    def set_flags(self, path: str, flags: int) -> None:
        self.inode(path).flags = flags

    def check(self) -> None:
        self.tree.check()

    def end(self) -> None:
        """Close everything, and see that no memory is left."""
        for handle in list(self._open):
            self.close(handle)
        self.check()
        self.tree.close()
        assert self.backing.free_pages == self.backing.total_pages
        self.backing.close()


class OnTmpfs(Place):
    """A real tmpfs, mounted in a directory, with the same limits. The process's umask must be 0."""

    def __init__(self, root: Path) -> None:
        self._root: Final = root
        self._open: Final[set[int]] = set()

    def make(self, path: str, mode: int = 0o644, *, uid: int = 0, gid: int = 0, rdev: int = 0) -> None:
        if stat.S_ISDIR(mode):
            os.mkdir(self._root / path, stat.S_IMODE(mode))
        else:
            os.mknod(self._root / path, mode, rdev)
        if (uid, gid) != (0, 0):
            os.chown(self._root / path, uid, gid)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self._root / path)

    def link(self, path: str, new: str) -> None:
        os.link(self._root / path, self._root / new, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        os.unlink(self._root / path)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._root / path)

    def rename(self, path: str, new: str, flags: int = 0) -> None:
        paths = [os.fsencode(self._root / name) for name in (path, new)]
        _checked(_libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], flags))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._root / path, mode)

    def facts(self, path: str) -> Facts:
        status = os.lstat(self._root / path)
        return Facts(
            stat.filemode(status.st_mode),
            *(status.st_nlink, status.st_uid, status.st_gid, status.st_rdev, status.st_size, status.st_blocks),
        )

    def number(self, path: str) -> int:
        return os.lstat(self._root / path).st_ino

    def readlink(self, path: str) -> str:
        return os.readlink(self._root / path)

    def names(self, path: str = ".") -> list[str]:
        return os.listdir(self._root / path)

    def write(self, path: str, data: bytes) -> None:
        with (self._root / path).open("r+b", buffering=0) as file:
            if (file.write(data) or 0) < len(data):
                raise OSError(errno.ENOSPC, "no room")

    def open(self, path: str) -> int:
        return self._keep(os.open(self._root / path, os.O_RDONLY))

    def open_unnamed(self, directory: str) -> int:
        return self._keep(os.open(self._root / directory, os.O_TMPFILE | os.O_RDWR, 0o600))

    def _keep(self, fd: int) -> int:
        self._open.add(fd)
        return fd

    def name_handle(self, handle: int, path: str) -> None:
        source, target = f"/proc/self/fd/{handle}", os.fsencode(self._root / path)
        _checked(_libc.linkat(AT_FDCWD, source.encode(), AT_FDCWD, target, AT_SYMLINK_FOLLOW))

    def names_in_handle(self, handle: int) -> list[str]:
        return os.listdir(handle)

    def make_in_handle(self, handle: int, name: str) -> None:
        os.mknod(name, 0o644, dir_fd=handle)

    def nlink_of_handle(self, handle: int) -> int:
        return os.fstat(handle).st_nlink

    def close(self, handle: int) -> None:
        self._open.remove(handle)
        os.close(handle)

    @property
    def free_inodes(self) -> int:
        return os.statvfs(self._root).f_ffree

    @property
    def free_pages(self) -> int:
        return os.statvfs(self._root).f_bfree

    def setxattr(self, path: str, name: str, value: bytes) -> None:
        os.setxattr(self._root / path, name, value, follow_symlinks=False)

    def getxattr(self, path: str, name: str) -> bytes:
        return os.getxattr(self._root / path, name, follow_symlinks=False)

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(self._root / path, name, follow_symlinks=False)

    def listxattr(self, path: str) -> list[str]:
        return os.listxattr(self._root / path, follow_symlinks=False)

    def set_flags(self, path: str, flags: int) -> None:
        fd = os.open(self._root / path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("=I", flags))
        finally:
            os.close(fd)

    def check(self) -> None:
        """The kernel's is well."""

    def end(self) -> None:
        """Close everything, so that it can be unmounted."""
        for handle in list(self._open):
            self.close(handle)


def _checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
