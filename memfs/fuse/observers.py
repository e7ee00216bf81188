"""What the kernel says and must be told in requests that pyfuse3 answers: passthrough, and killing of setuid bits.

pyfuse3 answers INIT, SETATTR and WRITE, but knows neither kernel passthrough nor HANDLE_KILLPRIV_V2, and does not say
whether a time is set to now. So the channel shows us these requests on their way there; we may refuse them, and amend
the reply to INIT on its way back.

HANDLE_KILLPRIV_V2 is needed for speed as much as for safety: once GETXATTR has been answered, a kernel without it asks
for security.capability before every single write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from memfs.contract.units import PAGE_SIZE, bytes_to_pages
from memfs.fuse.abi import (
    BUFFER_SIZE,
    FATTR_KILL_SUIDGID,
    FUSE_DONT_MASK,
    FUSE_HANDLE_KILLPRIV_V2,
    FUSE_INIT_EXT,
    FUSE_PASSTHROUGH_2,
    FUSE_WRITE_KILL_SUIDGID,
    INIT_IN,
    INIT_OUT,
    MAX_STACK_DEPTH,
    OUT_HEADER,
    SETATTR_VALID,
    WRITE_IN,
    Opcode,
    Request,
    unpack,
)
from memfs.fuse.caller import in_group_or_capable
from memfs.fuse.channel import Amendment, Observer
from memfs.fuse.passthrough import Passthrough
from memfs.tree import inode_flags
from memfs.tree.tree import Tree

_HEADROOM: Final = 4096  # bytes: what a WRITE or READ has beside its data
_FATTR_NOT_TIMES: Final = 0xF  # mode, uid, gid, size
_FATTR_TO_NOW: Final = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8  # atime, mtime, each to now
_FATTR_FH_AND_LOCKOWNER: Final = 1 << 6 | 1 << 9


class Observers:
    """The channel's observers. `initialized` is called when INIT has been answered."""

    def __init__(self, tree: Tree, passthrough: Passthrough, initialized: Callable[[], None]) -> None:
        self._tree: Final = tree
        self._passthrough: Final = passthrough
        self._initialized: Final = initialized
        self.max_message = BUFFER_SIZE  #: bytes: the largest request that fits through the channel
        self.observers: Final[dict[int, Observer]] = {
            Opcode.INIT: self._init,
            Opcode.SETATTR: self._setattr,
            Opcode.WRITE: self._write,
        }

    def _init(self, request: Request) -> Amendment:
        _, _, _, offered, offered2 = unpack(INIT_IN, request.body)
        passthrough = self._passthrough.negotiate(bool(offered & FUSE_INIT_EXT and offered2 & FUSE_PASSTHROUGH_2))

        def amend(reply: bytearray) -> None:
            fields = list(INIT_OUT.unpack_from(reply, OUT_HEADER.size))
            # max_write and max_pages: no request that does not fit through the socketpair
            fields[6] = min(fields[6], (self.max_message - _HEADROOM) // PAGE_SIZE * PAGE_SIZE)
            fields[8] = bytes_to_pages(fields[6])
            fields[3] |= offered & (FUSE_HANDLE_KILLPRIV_V2 | FUSE_DONT_MASK)
            if passthrough:
                fields[3] |= FUSE_INIT_EXT
                fields[10] |= FUSE_PASSTHROUGH_2
                fields[11] = MAX_STACK_DEPTH
            INIT_OUT.pack_into(reply, OUT_HEADER.size, *fields)
            self._initialized()

        return amend

    def _setattr(self, request: Request) -> None:
        (valid,) = unpack(SETATTR_VALID, request.body)
        inode = self._tree.inode(request.nodeid)
        if valid & _FATTR_TO_NOW == _FATTR_TO_NOW and not valid & _FATTR_NOT_TIMES:
            inode_flags.check_touch(inode)
        elif valid & (_FATTR_NOT_TIMES | _FATTR_TO_NOW):
            inode_flags.check_change(inode)
        if valid & FATTR_KILL_SUIDGID or not valid & ~_FATTR_FH_AND_LOCKOWNER:
            self._kill_suidgid(request)

    def _write(self, request: Request) -> None:
        _, _, _, write_flags, *_ = unpack(WRITE_IN, request.body)
        if write_flags & FUSE_WRITE_KILL_SUIDGID:
            self._kill_suidgid(request)

    def _kill_suidgid(self, request: Request) -> None:
        inode = self._tree.inode(request.nodeid)
        inode.kill_suidgid(in_group=in_group_or_capable(request, inode.gid))
