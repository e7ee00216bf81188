"""Extended attributes that memfs gives a meaning, all in the namespace user.memfs; everything else is plain storage.

    user.memfs.seals          of a regular file: its seals by name; setting it adds seals (fcntl(2): F_ADD_SEALS)
    user.memfs.default_seals  of a directory: initial seals of regular files created in it
    user.memfs.socket         of anything, read-only: the socket on which owners talk to this memfs
    user.memfs.stat           of anything, read-only: the state of the mount, as JSON (`memfs stat`)
    user.memfs.locks          of a regular file, read-only: pages that its owner has locked, as JSON (`memfs map`)
    trusted.memfs.remount     of anything, write-only: options to change (`memfs remount`), for CAP_SYS_ADMIN
    user.memfs.remount        the same, for the user that mounted it without being root

Who may remount is who has CAP_SYS_ADMIN over the mount, as for mount(2), and a FUSE request does not say who that is:
uid 0 may be the root of a container that has no capabilities. But the kernel asks for CAP_SYS_ADMIN, in the initial
user namespace, before it lets anybody set a trusted attribute. Rejected: to read the caller's capabilities in
/proc/PID/status, since anybody has all of them in a user namespace of one's own, and which namespace a process is in
the kernel tells only those who may trace it.

getfattr -d and cp -a see only those that were set: the seals of a sealed file, the default seals of a directory.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from memfs.contract.protocol.messages import SOCKET_XATTR
from memfs.contract.sys.constants import XATTR_SIZE_MAX
from memfs.options import OptionError, RemountOptions
from memfs.privileges import is_root_of_the_host
from memfs.store import seals
from memfs.tree import acl, inode_flags
from memfs.tree.inode import Directory, Inode, RegularFile
from memfs.tree.tree import Tree

SEALS: Final = b"user.memfs.seals"
DEFAULT_SEALS: Final = b"user.memfs.default_seals"
SOCKET: Final = SOCKET_XATTR.encode()
STAT: Final = b"user.memfs.stat"
LOCKS: Final = b"user.memfs.locks"
REMOUNT: Final = b"user.memfs.remount"
PRIVILEGED_REMOUNT: Final = b"trusted.memfs.remount"
_PREFIX: Final = b"user.memfs."
_TRUSTED: Final = b"trusted."
_NAMESPACES: Final = (b"user.", b"trusted.", b"security.")  # those of tmpfs; who may use which the kernel checks


@dataclass(frozen=True, slots=True)
class Control:
    """How attributes of the mount itself are answered."""

    socket_path: str
    describe: Callable[[int, int], Awaitable[str]]  #: as JSON, of at most so many bytes, for a user
    remount: Callable[[RemountOptions], None]
    locks: Callable[[RegularFile], str]  #: as JSON, of a file
    pagesize: int | None = None  #: as it was mounted with


class Xattrs:
    """getxattr(2) and its siblings. Methods raise OSError as the kernel would."""

    def __init__(self, tree: Tree, control: Control) -> None:
        self._tree: Final = tree
        self._control: Final = control

    async def set(
        self, ino: int, name: bytes, value: bytes, *, uid: Callable[[], int], kill_sgid: bool = False
    ) -> None:
        """Set an attribute, as setxattr(2) by a user, which is asked for only where it matters: that takes its time.

        `kill_sgid`: with an access ACL, setgid goes.

        EOPNOTSUPP: a name in user.memfs that cannot be set here. EINVAL: a bad value.
        """
        inode = self._tree.inode(ino)
        _check_name(name)
        if name in (SEALS, acl.ACCESS):
            inode_flags.check_change(inode)
        if name == SEALS and isinstance(inode, RegularFile):
            await inode.file.add_seals(seals.parse(_text(value)))
            inode.changed()
            self._tree.changed(inode)
            return
        if name in (REMOUNT, PRIVILEGED_REMOUNT):
            if name == REMOUNT and (uid() != os.geteuid() or is_root_of_the_host()):
                raise OSError(errno.EPERM, "only with CAP_SYS_ADMIN, or for the ordinary user that mounted it")
            self._remount(_text(value))
            return
        if name in (acl.ACCESS, acl.DEFAULT):
            acl.check_size(value)
        if name == acl.ACCESS:
            self._set_access_acl(inode, value, kill_sgid)
            return
        if name == DEFAULT_SEALS and isinstance(inode, Directory):
            seals.parse(_text(value))
        elif name.startswith(_PREFIX):
            raise OSError(errno.EOPNOTSUPP, f"{_text(name)} cannot be set here")
        self._tree.xattrs.set(inode, name, value)

    def _set_access_acl(self, inode: Inode, value: bytes, kill_sgid: bool) -> None:
        """Set the access ACL and the mode, which say the same; an ACL that says no more than the mode is not kept."""
        mode, kept = acl.mode_of(value, inode.mode)
        if kept is not None:
            self._tree.xattrs.set(inode, acl.ACCESS, kept)
        elif acl.ACCESS in (inode.xattrs or ()):
            self._tree.xattrs.remove(inode, acl.ACCESS)
        inode.mode = mode & ~stat.S_ISGID if kill_sgid else mode
        inode.changed()
        self._tree.changed(inode)

    def _remount(self, options: str) -> None:
        try:
            self._control.remount(RemountOptions.parse(options, self._control.pagesize))
        except OptionError as error:
            raise OSError(errno.EINVAL, str(error)) from error

    def get(self, ino: int, name: bytes) -> bytes:
        """Return an attribute, as getxattr(2); the state of the mount `describe` returns."""
        inode = self._tree.inode(ino)
        _check_name(name)
        if name == SOCKET:
            return os.fsencode(self._control.socket_path)
        if name == SEALS and isinstance(inode, RegularFile):
            return seals.format_seals(inode.file.seals).encode()
        if name == LOCKS and isinstance(inode, RegularFile):
            return self._control.locks(inode).encode()
        return self._tree.xattrs.get(inode, name)

    async def describe(self, uid: int) -> bytes:
        """Return the state of the mount, for a user, whose turns that takes."""
        return (await self._control.describe(XATTR_SIZE_MAX, uid)).encode()

    def list(self, ino: int, *, uid: Callable[[], int]) -> list[bytes]:
        """Return the names of attributes, as listxattr(2).

        Only root is shown the trusted ones (simple_xattr_list() asks for CAP_SYS_ADMIN).
        """
        inode = self._tree.inode(ino)
        names = list(self._tree.xattrs.names(inode))
        if any(name.startswith(_TRUSTED) for name in names) and uid() != 0:
            names = [name for name in names if not name.startswith(_TRUSTED)]
        return [SEALS, *names] if isinstance(inode, RegularFile) and inode.file.seals else names

    def remove(self, ino: int, name: bytes) -> None:
        """Remove an attribute, as removexattr(2). EPERM for seals: they are for good."""
        _check_name(name)
        inode = self._tree.inode(ino)
        if name == SEALS and isinstance(inode, RegularFile):
            raise OSError(errno.EPERM, "seals cannot be removed")
        self._tree.xattrs.remove(inode, name)

    def default_seals(self, parent: int) -> int:
        """Return the initial seals of a regular file that is created in a directory, as F_SEAL_* bits."""
        return seals.parse(_text((self._tree.inode(parent).xattrs or {}).get(DEFAULT_SEALS, b"")))


def _check_name(name: bytes) -> None:
    """Check a name, as the kernel's xattr_resolve_name().

    EOPNOTSUPP: there is no such namespace. EINVAL: no name in one.
    """
    if name in _NAMESPACES:
        raise OSError(errno.EINVAL, "an attribute without a name")
    if not name.startswith(_NAMESPACES) and name not in (acl.ACCESS, acl.DEFAULT):
        raise OSError(errno.EOPNOTSUPP, "no such namespace of attributes")


def _text(value: bytes) -> str:
    try:
        return value.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        raise OSError(errno.EINVAL, "not text") from None
