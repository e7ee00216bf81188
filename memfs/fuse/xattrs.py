"""Answers to requests on extended attributes. tree/xattrs.py says what they mean.

Setting an attribute may wait (a seal takes the file's lock), and a list of names can be 64 KiB long: neither is for
pyfuse3. Reading one has to be fast, because the kernel reads security.capability before it changes content.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from memfs.fuse.abi import (
    FUSE_SETXATTR_ACL_KILL_SGID,
    GETXATTR_IN,
    GETXATTR_OUT,
    SETXATTR_EXT_IN,
    SETXATTR_IN,
    Malformed,
    Request,
    unpack,
    unpack_name,
)
from memfs.fuse.caller import uid_of
from memfs.tree.xattrs import STAT, Xattrs


class XattrHandlers:
    """The channel's handlers for extended attributes. Each raises OSError with the errno to answer."""

    def __init__(self, xattrs: Xattrs) -> None:
        self._xattrs: Final = xattrs
        self.are_flagged = False  #: whether requests to set one have setxattr_flags (FUSE_SETXATTR_EXT)

    async def get(self, request: Request) -> bytes:
        """Answer getxattr(2)."""
        body = request.body
        size, _ = unpack(GETXATTR_IN, body)
        name = unpack_name(body[GETXATTR_IN.size :])
        if name == STAT:
            return _fitting(await self._xattrs.describe(uid_of(request)), size)  # it is for their eyes only
        return _fitting(self._xattrs.get(request.nodeid, name), size)

    async def list(self, request: Request) -> bytes:
        """Answer listxattr(2)."""
        size, _ = unpack(GETXATTR_IN, request.body)
        names = self._xattrs.list(request.nodeid, uid=lambda: uid_of(request))
        return _fitting(b"".join(name + b"\0" for name in names), size)

    async def set(self, request: Request) -> bytes:
        """Answer setxattr(2)."""
        body = request.body
        layout = SETXATTR_EXT_IN if self.are_flagged else SETXATTR_IN
        size, flags, *more = unpack(layout, body)
        name, _, value = bytes(body[layout.size :]).partition(b"\0")
        if len(value) != size:
            raise Malformed(f"an attribute's value of {len(value)} bytes instead of {size}")
        self._check_existence(request.nodeid, name, flags)
        kill_sgid = bool(more and more[0] & FUSE_SETXATTR_ACL_KILL_SGID)
        await self._xattrs.set(request.nodeid, name, value, uid=lambda: uid_of(request), kill_sgid=kill_sgid)
        return b""

    def _check_existence(self, nodeid: int, name: bytes, flags: int) -> None:
        """Raise OSError if XATTR_CREATE or XATTR_REPLACE forbids setting an attribute."""
        if not flags & (os.XATTR_CREATE | os.XATTR_REPLACE):
            return
        try:
            self._xattrs.get(nodeid, name)
        except OSError as error:
            if error.errno != errno.ENODATA or flags & os.XATTR_REPLACE:
                raise
        else:
            if flags & os.XATTR_CREATE:
                raise OSError(errno.EEXIST, "the attribute exists")

    async def remove(self, request: Request) -> bytes:
        """Answer removexattr(2)."""
        self._xattrs.remove(request.nodeid, unpack_name(request.body))
        return b""


def _fitting(value: bytes, size: int) -> bytes:
    """Return a value, or only its length if `size` is 0. Raises OSError(ERANGE) if it is longer than `size` bytes."""
    if not size:
        return GETXATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, "the attribute is larger")
    return value
