"""The table of opcodes: which handler answers a request, or why pyfuse3 may. The channel is made from it.

A request that has a handler of our own is answered where it arrives, and what changes something is answered in the same
step. pyfuse3 has the session: what both sides can do, and its end. One that waits or is long would stop the mount for
everybody there (channel.py says why). Opcodes that the table does not know, because the kernel is newer, go to pyfuse3
as well, and libfuse answers ENOSYS.
"""

from __future__ import annotations

import errno

from memfs.fuse.abi import Opcode, Request
from memfs.fuse.channel import Handler, Pyfuse3
from memfs.fuse.files import FileHandlers
from memfs.fuse.init import Init
from memfs.fuse.ioctl import IoctlHandlers
from memfs.fuse.names import NameHandlers
from memfs.fuse.xattrs import XattrHandlers


async def _succeed(request: Request) -> bytes:
    """Do nothing: there is nothing to write back."""
    return b""


async def _not_implemented(request: Request) -> bytes:
    """Let the kernel do it by itself: it asks once and never again."""
    raise OSError(errno.ENOSYS, "not implemented")


def who_answers(
    init: Init, names: NameHandlers, files: FileHandlers, xattrs: XattrHandlers, ioctl: IoctlHandlers
) -> dict[int, Handler | Pyfuse3]:
    """Return the table."""
    return {
        # The session
        Opcode.INIT: Pyfuse3("immediate: settles what both sides can do, before anything else is asked", init.amend),
        Opcode.DESTROY: Pyfuse3("immediate: ends libfuse's session"),
        Opcode.INTERRUPT: Pyfuse3("immediate: libfuse takes note; what waits here the channel cancels before that"),
        # By name
        Opcode.LOOKUP: names.lookup,
        Opcode.FORGET: names.forget,
        Opcode.BATCH_FORGET: names.batch_forget,
        Opcode.CREATE: names.create,
        Opcode.TMPFILE: names.tmpfile,
        Opcode.UNLINK: names.unlink,
        Opcode.OPENDIR: names.opendir,
        Opcode.READDIRPLUS: names.readdirplus,
        Opcode.RELEASEDIR: files.release,
        Opcode.MKNOD: names.mknod,
        Opcode.MKDIR: names.mkdir,
        Opcode.SYMLINK: names.symlink,
        Opcode.LINK: names.link,
        Opcode.RMDIR: names.rmdir,
        Opcode.RENAME: names.rename,
        Opcode.RENAME2: names.rename2,
        Opcode.READLINK: names.readlink,
        # Inodes and open files
        Opcode.GETATTR: files.getattr,
        Opcode.STATX: files.statx,
        Opcode.SETATTR: files.setattr,
        Opcode.STATFS: files.statfs,
        Opcode.OPEN: files.open,
        Opcode.RELEASE: files.release,
        Opcode.READ: files.read,
        Opcode.WRITE: files.write,
        Opcode.LSEEK: files.lseek,
        Opcode.FALLOCATE: files.fallocate,
        Opcode.IOCTL: ioctl.ioctl,
        Opcode.NOTIFY_REPLY: files.page_cache.retrieved,
        # Extended attributes
        Opcode.SETXATTR: xattrs.set,
        Opcode.GETXATTR: xattrs.get,
        Opcode.LISTXATTR: xattrs.list,
        Opcode.REMOVEXATTR: xattrs.remove,
        # Nobody
        Opcode.SYNCFS: _succeed,
        Opcode.FLUSH: _not_implemented,  # nothing is written back
        Opcode.FSYNC: _not_implemented,  # memory is as durable as it gets; the kernel then succeeds by itself
        Opcode.FSYNCDIR: _not_implemented,
        Opcode.COPY_FILE_RANGE: _not_implemented,  # the kernel copies by itself, as on tmpfs
        Opcode.COPY_FILE_RANGE_64: _not_implemented,
        Opcode.POLL: _not_implemented,  # files are always ready
        Opcode.ACCESS: _not_implemented,  # the kernel checks permissions (default_permissions)
        Opcode.READDIR: _not_implemented,  # READDIRPLUS is negotiated
        Opcode.GETLK: _not_implemented,  # locks are the kernel's: remote ones are not negotiated
        Opcode.SETLK: _not_implemented,
        Opcode.SETLKW: _not_implemented,
        Opcode.BMAP: _not_implemented,  # no block device
    }
