"""Kernel passthrough: reads, writes and mappings of ordinary files go straight from the kernel to the backing file.

Since Linux 6.9 a FUSE server with CAP_SYS_ADMIN may register a backing file on /dev/fuse and answer OPEN with its
backing id (FOPEN_PASSTHROUGH). From then on that handle never asks the server for content.

While such a handle or a mapping made through it lives, the kernel refuses (EIO) every other open of the inode that is
not answered with the same backing. So one rule decides for an inode, in `tree/open_files.py`: as its open handles have
it. The backing file is registered with the first handle and unregistered with the last: a backing id that is forgotten
would pin the backing inode's memory.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import logging
import os
import struct
from collections.abc import Collection
from typing import Final

from memfs.fuse.abi import BACKING_MAP, FUSE_DEV_IOC_BACKING_CLOSE, FUSE_DEV_IOC_BACKING_OPEN

log = logging.getLogger(__name__)

_U32: Final = struct.Struct("=I")


class Wanted(enum.Enum):
    """The mount option passthrough=."""

    ON = "on"  #: or do not mount
    OFF = "off"
    AUTO = "auto"  #: where it can be had


class Passthrough:
    """Registers backing files with the kernel.

    Whether it is in force is known once the kernel has said in INIT what it offers (`negotiate`).
    """

    def __init__(self, fuse_fd: int, wanted: Wanted, unable: str | None) -> None:
        self._fuse: Final = fuse_fd
        self._is_over = False
        self.wanted: Final = wanted
        #: why it is not in force, a sentence for people; None if it is
        self.why_not: str | None = "switched off (passthrough=off)" if wanted is Wanted.OFF else unable

    def negotiate(self, offered: bool) -> bool:
        """Take note of whether the kernel offers it, and return whether it is in force from now on."""
        if self.why_not is None and not offered:
            self.why_not = (
                f"the kernel is older than 6.9 or built without CONFIG_FUSE_PASSTHROUGH ({os.uname().release})"
            )
        return self.why_not is None

    def try_it(self, in_use: Collection[int] = ()) -> None:
        """Find out, once INIT is answered, whether the kernel takes a file from us: root of a container it refuses.

        Backing ids ascend. If the one before is not `in_use`, a predecessor was killed before it could say so.
        """
        fd = os.memfd_create("memfs", os.MFD_CLOEXEC)
        try:
            backing_id = self.open(fd)
        finally:
            os.close(fd)
        if backing_id is not None:
            self.close(backing_id)
            if backing_id > 1 and backing_id - 1 not in in_use:
                self.close(backing_id - 1)
        elif self.why_not is None:
            self.why_not = "the kernel takes no backing files"

    @property
    def note(self) -> str | None:
        """What people are to be told if it is not in force."""
        if self.in_force:
            return None
        return f"no passthrough, so mappings cannot be pinned (io_uring, VFIO) or have userfaultfd: {self.why_not}"

    @property
    def in_force(self) -> bool:
        """Whether ordinary files are opened in passthrough mode."""
        return self.why_not is None

    def open(self, fd: int) -> int | None:
        """Register a backing file and return its backing id (> 0), or None if the kernel refuses it; that is logged."""
        if not self.in_force:
            return None
        try:
            # With a mutable argument, fcntl.ioctl returns what ioctl(2) returned.
            backing_id: int = fcntl.ioctl(self._fuse, FUSE_DEV_IOC_BACKING_OPEN, bytearray(BACKING_MAP.pack(fd, 0, 0)))
        except OSError as error:
            if error.errno == errno.EPERM:
                self.why_not = "the daemon has no CAP_SYS_ADMIN on the host, outside of user namespaces"
            else:
                log.warning("no passthrough for a file: %s", error.strerror)
            return None
        return backing_id

    def close(self, backing_id: int) -> None:
        """Unregister a backing file."""
        if self._is_over:
            return
        try:
            fcntl.ioctl(self._fuse, FUSE_DEV_IOC_BACKING_CLOSE, _U32.pack(backing_id))
        except OSError as error:
            if error.errno != errno.ENOENT:  # a predecessor had done it when it was killed
                log.warning("backing id %d cannot be unregistered: %s", backing_id, error.strerror)

    def end(self) -> None:
        """Unregister nothing any more: the mount has ended, and with it all backing ids."""
        self._is_over = True
