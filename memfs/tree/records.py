"""How inodes and names are written down, so that a tree can be built again: values of keys (state/journal.py).

    i INO        an inode: what stat(2) tells of it that the backing does not, and what its kind has besides
    x INO NAME   an extended attribute: its value. They may be many and long, and a chmod(2) is to write none of them
    e DIR NAME   a name: the inode, and its cookie
    t            of the tree: the next inode number and the limit

What follows from others is not written: links are counted by the names, but for those that are gone from the tree; what
is open, by the handles; how often the kernel has looked an inode up, it can be asked (tree.py).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable
from typing import Final

from memfs.state.journal import numbered
from memfs.store.file import File
from memfs.tree.inode import Directory, Ino, Inode, RegularFile, Special, Symlink, TimedInode

ENTRY: Final = b"e"
XATTR: Final = b"x"
TREE: Final = b"t"

_INODE: Final = struct.Struct("=IIIIIq")  # mode, nlink, uid, gid, flags, btime (ns)
_REGULAR: Final = struct.Struct("=I?B")  # seals, whether it was given out, bytes of what follows: its initial image
_PLAIN: Final = _REGULAR.pack(0, False, 0)  # a file that is not sealed, and that no owner has had
_MODE_AND_NLINK: Final = struct.Struct("=II")  # with which an inode begins
_TIME_BYTES: Final = 12  # nanoseconds, signed: utimensat(2) takes more than fit into 64 bits
_TIMES: Final = 3 * _TIME_BYTES  # atime, mtime, ctime
_DIRECTORY: Final = struct.Struct("=QQ")  # parent, next cookie
_SPECIAL: Final = struct.Struct("=Q")  # rdev
_SYMLINK: Final = struct.Struct("=I?")  # length of the target, whether a file has it; then the target
_ENTRY: Final = struct.Struct("=QQ")  # inode, cookie
_TREE: Final = struct.Struct("=QQ")


def entry_key(directory: int, name: bytes) -> bytes:
    """Return the key of a name in a directory."""
    return numbered(ENTRY, directory, name)


def xattr_key(ino: int, name: bytes) -> bytes:
    """Return the key of an extended attribute of an inode."""
    return numbered(XATTR, ino, name)


def pack_tree(next_ino: int, nr_inodes: int) -> bytes:
    """Return what is written of the tree itself."""
    return _TREE.pack(next_ino, nr_inodes)


def unpack_tree(value: bytes) -> tuple[int, int]:
    """Return the next inode number and the limit."""
    next_ino, nr_inodes = _TREE.unpack(value)
    return next_ino, nr_inodes


def pack_entry(ino: int, cookie: int) -> bytes:
    """Return what is written of a name."""
    return _ENTRY.pack(ino, cookie)


def unpack_entry(value: bytes) -> tuple[int, int]:
    """Return inode and cookie of a name."""
    return _ENTRY.unpack(value)


def pack_inode(inode: Inode) -> bytes:
    """Return what is written of an inode, without its extended attributes."""
    packed = _INODE.pack(inode.mode, inode.nlink, inode.uid, inode.gid, inode.flags, inode.btime_ns)
    if isinstance(inode, RegularFile):
        image = inode.file.image_state
        packed += _REGULAR.pack(inode.file.seals, inode.file.is_given_out, len(image)) + image
    else:
        assert isinstance(inode, TimedInode)
        times = inode.atime_ns, inode.mtime_ns, inode.ctime_ns
        packed += b"".join([time_ns.to_bytes(_TIME_BYTES, "little", signed=True) for time_ns in times])
        if isinstance(inode, Directory):
            packed += _DIRECTORY.pack(inode.parent.ino, inode.next_cookie)
        elif isinstance(inode, Symlink):
            packed += _SYMLINK.pack(len(inode.target), inode.page is not None) + inode.target
        elif isinstance(inode, Special):
            packed += _SPECIAL.pack(inode.rdev)
    return packed


def plain_links(packed: bytes) -> int:
    """Return how many links an ordinary file has that is as files are created; 0 for what is anything else."""
    mode, nlink = _MODE_AND_NLINK.unpack_from(packed)
    return nlink if stat.S_ISREG(mode) and packed[_INODE.size :] == _PLAIN else 0


def unpack_inode(ino: Ino, packed: bytes, old_file: Callable[[Ino, int], File]) -> tuple[Inode, int]:
    """Build an inode again, without its extended attributes, and say which directory is its parent (0: it is none).

    `old_file` finds the file with a number and seals, which must be recovered.
    """
    mode, nlink, uid, gid, flags, btime_ns = _INODE.unpack_from(packed)
    position, parent = _INODE.size, 0
    inode: Inode
    if stat.S_ISREG(mode):
        seals, is_given_out, length = _REGULAR.unpack_from(packed, position)
        position += _REGULAR.size + length
        file = old_file(ino, seals)
        file.recover(is_given_out=is_given_out, image=packed[position - length : position])
        inode = RegularFile(ino, mode, uid, gid, file)
    else:
        times = [
            int.from_bytes(packed[at : at + _TIME_BYTES], "little", signed=True)
            for at in range(position, position + _TIMES, _TIME_BYTES)
        ]
        position += _TIMES
        timed: TimedInode
        if stat.S_ISDIR(mode):
            parent, next_cookie = _DIRECTORY.unpack_from(packed, position)
            position += _DIRECTORY.size
            timed = directory = Directory(ino, mode, uid, gid, None)
            directory.next_cookie = next_cookie
        elif stat.S_ISLNK(mode):
            length, has_page = _SYMLINK.unpack_from(packed, position)
            position += _SYMLINK.size + length
            page = old_file(ino, 0) if has_page else None
            timed = Symlink(ino, mode, uid, gid, packed[position - length : position], page)
        else:
            (rdev,) = _SPECIAL.unpack_from(packed, position)
            position += _SPECIAL.size
            timed = Special(ino, mode, uid, gid, rdev)
        timed.atime_ns, timed.mtime_ns, timed.ctime_ns = times
        inode = timed
    inode.nlink, inode.flags, inode.btime_ns = nlink, flags, btime_ns
    return inode, parent
