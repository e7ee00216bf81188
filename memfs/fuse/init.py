"""INIT: the features that the kernel offers, and those that memfs uses.

pyfuse3 answers INIT, but knows neither kernel passthrough nor HANDLE_KILLPRIV_V2. So its reply is amended on its way
back to the kernel.

ALLOW_IDMAP is for root's mounts: only those can be idmapped by somebody else, and the kernel then says of a caller only
what caller.py tells.

Without AUTO_INVAL_DATA, which libfuse asks for: with it the kernel empties its cache of a file whenever it sees a new
mtime, also after writes of its own; it even drops pages that are pinned, and what a disk then reads into them is lost.
And it asks for the attributes before every read(2).

HANDLE_KILLPRIV_V2 is needed for speed as much as for safety: once GETXATTR has been answered, a kernel without it asks
for security.capability before every single write.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from memfs.contract.units import bytes_to_pages
from memfs.fuse.abi import (
    FUSE_ALLOW_IDMAP_2,
    FUSE_AUTO_INVAL_DATA,
    FUSE_DONT_MASK,
    FUSE_HANDLE_KILLPRIV_V2,
    FUSE_INIT_EXT,
    FUSE_PASSTHROUGH_2,
    FUSE_SETXATTR_EXT,
    INIT_IN,
    INIT_OUT,
    MAX_STACK_DEPTH,
    MAX_WRITE,
    OUT_HEADER,
    Request,
    unpack,
)
from memfs.fuse.channel import Amendment
from memfs.fuse.passthrough import Passthrough
from memfs.fuse.xattrs import XattrHandlers
from memfs.state.journal import NO_JOURNAL, Journal

INIT: Final = b"I"  #: the key of the request, with which a successor begins as well
_UNIQUE: Final = 8  # where its number is, in bytes


class Init:
    """Negotiates with the kernel. `initialized` is called when INIT has been answered.

    `idmapped`: whether whoever may may mount it again with other ids (mount_setattr(2)).
    """

    def __init__(
        self,
        passthrough: Passthrough,
        xattrs: XattrHandlers,
        initialized: Callable[[], None],
        *,
        idmapped: bool,
        journal: Journal = NO_JOURNAL,
    ) -> None:
        self._passthrough: Final = passthrough
        self._xattrs: Final = xattrs
        self._idmapped: Final = idmapped
        self._initialized: Final = initialized
        self._journal: Final = journal
        self._request: bytes | None = None
        journal.keeps(INIT, lambda key: self._request)

    def amend(self, request: Request) -> Amendment:
        """Return the amendment of pyfuse3's reply to INIT."""
        _, _, _, offered, offered2 = unpack(INIT_IN, request.body)
        offered2 = offered2 if offered & FUSE_INIT_EXT else 0
        self._request = _without_resent(request)
        passthrough = self._passthrough.negotiate(bool(offered2 & FUSE_PASSTHROUGH_2))
        idmapped = self._idmapped and offered2 & FUSE_ALLOW_IDMAP_2

        def amend(reply: bytearray) -> None:
            fields = list(INIT_OUT.unpack_from(reply, OUT_HEADER.size))
            fields[6] = min(fields[6], MAX_WRITE)  # max_write and max_pages: no request that does not fit our buffer
            fields[8] = bytes_to_pages(fields[6])
            fields[3] |= offered & (FUSE_HANDLE_KILLPRIV_V2 | FUSE_DONT_MASK)
            fields[3] &= ~FUSE_AUTO_INVAL_DATA
            fields[3] = fields[3] & ~FUSE_SETXATTR_EXT | offered & FUSE_SETXATTR_EXT
            self._xattrs.are_flagged = bool(offered & FUSE_SETXATTR_EXT)
            if passthrough:
                fields[3] |= FUSE_INIT_EXT
                fields[10] |= FUSE_PASSTHROUGH_2
                fields[11] = MAX_STACK_DEPTH
            if idmapped:
                fields[3] |= FUSE_INIT_EXT
                fields[10] |= FUSE_ALLOW_IDMAP_2
            INIT_OUT.pack_into(reply, OUT_HEADER.size, *fields)
            self._journal.changed(INIT)
            self._journal.commit()
            self._initialized()

        return amend


def _without_resent(request: Request) -> bytes:
    """Return a request's message as it came first."""
    message = bytearray(request.message)
    struct.pack_into("=Q", message, _UNIQUE, request.number)
    return bytes(message)
