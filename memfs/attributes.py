"""Extended attributes that memfs gives a meaning, all in the namespace user.memfs; everything else is plain storage.

    user.memfs.seals          of a regular file: its seals by name; setting it adds seals (fcntl(2): F_ADD_SEALS)
    user.memfs.default_seals  of a directory: seals that regular files made in it are born with
    user.memfs.socket         of anything, read-only: the socket on which owners talk to this memfs

getfattr -d and cp -a see only those that were set: the seals of a sealed file, the default seals of a directory.
"""

from __future__ import annotations

import errno
from typing import Final

from memfs import seals
from memfs.tree import Directory, RegularFile, Tree

SEALS: Final = b"user.memfs.seals"
DEFAULT_SEALS: Final = b"user.memfs.default_seals"
SOCKET: Final = b"user.memfs.socket"
_PREFIX: Final = b"user.memfs."


class Attributes:
    """getxattr(2) and its siblings. Methods raise OSError as the kernel would."""

    def __init__(self, tree: Tree, socket_path: str) -> None:
        self._tree: Final = tree
        self._socket_path: Final = socket_path

    async def set(self, ino: int, name: bytes, value: bytes) -> None:
        """setxattr(2). EOPNOTSUPP: a name in user.memfs that means nothing here. EINVAL: a value that does."""
        inode = self._tree.inode(ino)
        if name == SEALS and isinstance(inode, RegularFile):
            await inode.file.add_seals(seals.parse(_text(value)))
            inode.changed()
            return
        if name == DEFAULT_SEALS and isinstance(inode, Directory):
            seals.parse(_text(value))
        elif name.startswith(_PREFIX):
            raise OSError(errno.EOPNOTSUPP, f"{_text(name)} cannot be set here")
        self._tree.setxattr(ino, name, value)

    def get(self, ino: int, name: bytes) -> bytes:
        """getxattr(2)."""
        inode = self._tree.inode(ino)
        if name == SOCKET:
            return self._socket_path.encode()
        if name == SEALS and isinstance(inode, RegularFile):
            return seals.format_seals(inode.file.seals).encode()
        return self._tree.getxattr(ino, name)

    def list(self, ino: int) -> list[bytes]:
        """listxattr(2)."""
        inode = self._tree.inode(ino)
        names = self._tree.listxattr(ino)
        return [SEALS, *names] if isinstance(inode, RegularFile) and inode.file.seals else names

    def remove(self, ino: int, name: bytes) -> None:
        """removexattr(2). EPERM for seals: they are for good."""
        if name == SEALS and isinstance(self._tree.inode(ino), RegularFile):
            raise OSError(errno.EPERM, "seals cannot be taken off")
        self._tree.removexattr(ino, name)

    def default_seals(self, parent: int) -> int:
        """The seals that a regular file made in a directory is born with, as F_SEAL_* bits."""
        return seals.parse(_text((self._tree.inode(parent).xattrs or {}).get(DEFAULT_SEALS, b"")))


def _text(value: bytes) -> str:
    try:
        return value.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        raise OSError(errno.EINVAL, "not text") from None
