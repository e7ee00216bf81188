"""Answers to the requests on open files that pyfuse3 does not know: FALLOCATE, LSEEK, IOCTL and friends."""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Coroutine
from typing import Any, Final

from memfs.contract.logs import fields
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from memfs.contract.units import MAX_OFFSET, ByteOffset
from memfs.fuse import abi
from memfs.fuse.abi import (
    FALLOCATE_IN,
    IOCTL_IN,
    IOCTL_OUT,
    LSEEK_IN,
    LSEEK_OUT,
    Opcode,
    Request,
    error_reply,
    reply,
    unpack,
)
from memfs.fuse.channel import Handler
from memfs.store import seals
from memfs.store.file import File
from memfs.tree import inode_flags
from memfs.tree.open_files import OpenFile, OpenFiles
from memfs.tree.tree import Tree

log = logging.getLogger(__name__)

_U32: Final = struct.Struct("=I")
_FSXATTR: Final = struct.Struct("=I24x")  # struct fsxattr: xflags; extent sizes, projects
#: FS_IMMUTABLE_FL, FS_APPEND_FL, FS_NODUMP_FL and FS_NOATIME_FL, and the same as FS_XFLAG_*
_XFLAGS: Final = {inode_flags.FS_IMMUTABLE_FL: 0x8, inode_flags.FS_APPEND_FL: 0x10, 0x40: 0x80, 0x80: 0x40}
_PUNCH: Final = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


class Requests:
    """The channel's handlers. They raise OSError; the channel makes replies of that."""

    def __init__(self, tree: Tree, handles: OpenFiles) -> None:
        self._tree: Final = tree
        self._handles: Final = handles
        self.handlers: Final[dict[int, Handler]] = {
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            Opcode.IOCTL: self._ioctl,
            Opcode.SYNCFS: _nothing_to_do,
            Opcode.FLUSH: _not_implemented,  # nothing to flush; the kernel asks once and never again
            Opcode.FSYNC: _not_implemented,  # memory is as durable as it gets; the kernel then succeeds by itself
            Opcode.COPY_FILE_RANGE: _not_implemented,  # the kernel copies by itself, as on tmpfs
        }

    def _fallocate(self, request: Request) -> Coroutine[Any, Any, bytes]:
        fh, offset, length, mode, _ = unpack(FALLOCATE_IN, request.body)
        if mode not in (0, FALLOC_FL_KEEP_SIZE, _PUNCH):
            raise OSError(errno.EOPNOTSUPP, f"fallocate mode {mode:#x}")
        if not length or offset > MAX_OFFSET:
            raise OSError(errno.EINVAL, f"{length} bytes from {offset} on")
        if offset + length > MAX_OFFSET:
            raise OSError(errno.EFBIG, f"{length} bytes from {offset} on")
        inode = self._handles.file(fh).inode
        inode_flags.check_fallocate(inode, mode)
        file = inode.file
        if log.isEnabledFor(logging.INFO):
            said = fields(ino=inode.ino, mode=mode, offset=offset, length=length, pid=request.pid, uid=request.uid)
            log.info("fallocate", extra=said)
        return self._change_pages(file, ByteOffset(offset), length, mode, request.unique)

    async def _change_pages(self, file: File, offset: ByteOffset, length: int, mode: int, unique: int) -> bytes:
        if mode == _PUNCH:
            await file.punch(offset, length)
        else:
            await file.allocate(offset, length, keep_size=bool(mode))
        return reply(unique)

    def _lseek(self, request: Request) -> bytes:
        fh, offset, whence, _ = unpack(LSEEK_IN, request.body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):  # the others are the kernel's
            raise OSError(errno.EINVAL, f"whence {whence}")
        signed = offset - (1 << 64) if offset >> 63 else offset
        found = self._handles.file(fh).inode.file.seek(ByteOffset(signed), whence)
        return reply(request.unique, LSEEK_OUT.pack(found))

    def _ioctl(self, request: Request) -> bytes | Coroutine[Any, Any, bytes]:
        fh, _, command, _, in_size, out_size = unpack(IOCTL_IN, request.body)
        data = request.body[IOCTL_IN.size : IOCTL_IN.size + in_size]
        match command:
            case seals.MEMFS_IOC_GET_SEALS if out_size >= _U32.size:
                return _ioctl_reply(request.unique, _U32.pack(self._handles.file(fh).inode.file.seals))
            case seals.MEMFS_IOC_ADD_SEALS:
                handle = self._handles.file(fh)
                if not handle.writable:
                    raise OSError(errno.EPERM, "not open for writing")
                (bits,) = unpack(_U32, data)
                return self._add_seals(handle, bits, request.unique)
            case abi.FS_IOC_GETFLAGS if out_size >= _U32.size:
                return _ioctl_reply(request.unique, _U32.pack(self._tree.inode(request.nodeid).flags))
            case abi.FS_IOC_SETFLAGS:
                (flags,) = unpack(_U32, data)
                self._set_flags(request.nodeid, flags)
                return _ioctl_reply(request.unique)
            case abi.FS_IOC_FSGETXATTR if out_size >= _FSXATTR.size:
                flags = self._tree.inode(request.nodeid).flags
                xflags = sum(xflag for flag, xflag in _XFLAGS.items() if flags & flag)
                return _ioctl_reply(request.unique, _FSXATTR.pack(xflags))
        raise OSError(errno.ENOTTY, f"ioctl {command:#x}")

    def _set_flags(self, nodeid: int, flags: int) -> None:
        inode = self._tree.inode(nodeid)
        if flags & ~sum(_XFLAGS):
            raise OSError(errno.EOPNOTSUPP, f"inode flags {flags:#x}")
        inode.flags = flags
        inode.changed()

    async def _add_seals(self, handle: OpenFile, bits: int, unique: int) -> bytes:
        await handle.inode.file.add_seals(bits)
        handle.inode.changed()
        return _ioctl_reply(unique)


def _ioctl_reply(unique: int, data: bytes = b"") -> bytes:
    return reply(unique, IOCTL_OUT.pack(0, 0, 0, 0) + data)


def _nothing_to_do(request: Request) -> bytes:
    return reply(request.unique)


def _not_implemented(request: Request) -> bytes:
    return error_reply(request.unique, errno.ENOSYS)
