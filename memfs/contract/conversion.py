"""Conversion: pages change sides between the two files behind a memslot, by one ioctl(2) on the private file.

KVM_SET_MEMORY_ATTRIBUTES is the model: one call, one invalidation. Its words are used: `attributes` is
KVM_MEMORY_ATTRIBUTE_PRIVATE or 0.

    u64 key, u64 attributes, u64 flags, then up to MAX_RANGES times: u64 offset, u64 length (bytes)

The number of the command says how many ranges follow, as that of SPI_IOC_MESSAGE(n) does. Ranges may come in any order;
they are whole pages within both files, and do not overlap.

`key` says which file is the shared one. A FUSE server does not see its callers' descriptors, so the caller asks for the
key of its descriptor once (MEMFS_IOC_GET_KEY on the shared file), and it is good for as long as that is open: a number
of 64 bits, drawn by lot, that only those have who may write to the file, or were told by one who may. Rejected:

- a descriptor in each call, looked up in /proc/PID/fd: between the call and the look-up it can become another file's; a
  caller in another pid namespace has no PID here, and memfs without privileges may not look at another user's.
- an inode number: anybody who can open one private file for writing could destroy the content of every file.
- two files that Register binds: it is not the VMM that registers but KVM, and files without an owner have a memory to
  convert as well.
- two files bound by an ioctl of its own: state that outlives the descriptors it was made with, where several VMMs, and
  several slots of one, may each have their own idea of the pair.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NewType, Self

import numpy as np

from memfs.contract.page_ranges import PageRanges
from memfs.contract.sys.ioctl import IOC_READ, IOC_WRITE, ioc, without_size
from memfs.contract.units import (
    MAX_OFFSET,
    PAGE_SHIFT,
    PAGE_SIZE,
    ByteOffset,
    PageRange,
    is_page_aligned,
    page_floor,
)

Key = NewType("Key", int)  #: stands for an open shared file

MAX_RANGES: Final = 512  #: in one call
KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3  #: linux/kvm.h
MEMFS_CONVERT_PRESERVE: Final = 1 << 0  #: in flags: pages keep their content; without it they arrive zeroed

KEY: Final = struct.Struct("=Q")  #: what MEMFS_IOC_GET_KEY writes
_HEADER: Final = struct.Struct("=QQQ")
_RANGE: Final = struct.Struct("=QQ")
_CONVERT: Final = 0x43
_OF_NO_SIZE: Final = ioc(IOC_WRITE, _CONVERT, 0)

MEMFS_IOC_GET_KEY: Final = ioc(IOC_READ, 0x42, KEY.size)  #: on the shared file; EBADF: not open for writing


def MEMFS_IOC_CONVERT(ranges: int) -> int:
    """Return the command with so many ranges: in C it is a macro."""
    return ioc(IOC_WRITE, _CONVERT, _HEADER.size + ranges * _RANGE.size)


def is_convert(command: int) -> bool:
    """Return whether an ioctl command is MEMFS_IOC_CONVERT, with however many bytes."""
    return without_size(command) == _OF_NO_SIZE


@dataclass(frozen=True, slots=True)
class Conversion:
    """What MEMFS_IOC_CONVERT asks for."""

    key: Key
    ranges: PageRanges
    to_private: bool
    preserve: bool = False

    def pack(self) -> bytes:
        """Return the argument of the ioctl."""
        attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if self.to_private else 0
        header = _HEADER.pack(self.key, attributes, MEMFS_CONVERT_PRESERVE if self.preserve else 0)
        return header + b"".join(_RANGE.pack(pages.offset, pages.nbytes) for pages in self.ranges)

    @classmethod
    def unpack(cls, argument: bytes | memoryview) -> Self:
        """Return what an argument asks for. Raises OSError(EINVAL)."""
        number, rest = divmod(len(argument) - _HEADER.size, _RANGE.size)
        if rest or number < 1:
            raise OSError(errno.EINVAL, f"{len(argument)} bytes are no conversion of one range or more")
        if number > MAX_RANGES:
            raise OSError(errno.EINVAL, f"{number} ranges; at most {MAX_RANGES}")
        key, attributes, flags = _HEADER.unpack_from(argument)
        if attributes & ~KVM_MEMORY_ATTRIBUTE_PRIVATE or flags & ~MEMFS_CONVERT_PRESERVE:
            raise OSError(errno.EINVAL, f"attributes {attributes:#x}, flags {flags:#x}")
        try:
            return cls(Key(key), _parse(argument[_HEADER.size :]), bool(attributes), bool(flags))
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from error


def _parse(data: bytes | memoryview) -> PageRanges:
    """Return ranges from offsets and lengths in bytes. Raises ValueError."""
    if len(data) == _RANGE.size:
        offset, length = _RANGE.unpack(data)
        if not (is_page_aligned(offset | length) and offset | length <= MAX_OFFSET):
            raise ValueError("offset or length is no multiple of a page, or beyond any file")
        return PageRanges.single(PageRange(page_floor(offset), page_floor(ByteOffset(offset + length))))
    pairs = np.frombuffer(data, np.uint64).reshape(-1, 2)
    if (pairs & np.uint64(PAGE_SIZE - 1)).any() or (pairs > MAX_OFFSET).any():
        raise ValueError("offset or length is no multiple of a page, or beyond any file")
    starts, lengths = (pairs >> np.uint64(PAGE_SHIFT)).astype(np.int64).T
    return PageRanges.merged(np.stack((starts, starts + lengths), axis=1))


def key_of(shared: int) -> Key:
    """Return the key of a descriptor of a shared file, good until it is closed. Blocking: not for the event loop.

    Raises OSError: EBADF if it is not open for writing, ENOTTY if it is not of a memfs that knows conversions.
    """
    argument = bytearray(KEY.size)
    fcntl.ioctl(shared, MEMFS_IOC_GET_KEY, argument)
    return Key(*KEY.unpack(argument))


def convert(private: int, key: Key, ranges: Iterable[PageRange], *, to_private: bool, preserve: bool = False) -> None:
    """Convert up to MAX_RANGES ranges between a private file, by its descriptor, and the shared file with a key.

    What is on the wanted side already stays as it is, and if that is all, the call succeeds. Other pages arrive zeroed,
    or, with `preserve`, with their content. Blocking: it returns when owners have acknowledged, so the thread that does
    that must not make it.

    It goes in chunks of 256 MiB, in ascending order. An error in the first of them has changed nothing; one in a later
    one leaves those before it converted; and if the kernel fails to free memory, a part of its chunk is. Always each
    page is on one side, and to ask again converts the rest. What the shared file had of a page that stays private may
    have been zeroed. Raises OSError:

    EBADF       the private file is not open for writing, or the key is no open file's
    EINVAL      ranges are none, too many, empty, unaligned (to the private file's huge pages, if it has such),
                overlapping, or past the end of a file; or the files are not an ordinary and a guest-sealed one
    EPERM       a seal or an inode flag forbids it; the files have different owners; with `preserve`: the private
                file has no owner that allows it
    EBUSY       with `preserve`, to private: the guest has not been launched, and what it begins with is measured
    ENOSPC      there would be more memory in use than may be
    EINTR       a signal came: a part has been converted, and to ask again converts the rest
    EOPNOTSUPP  the shared file is open through the kernel's page cache (there is no passthrough): there, fallocate(2)
                of both files converts; with `preserve`, to private: the private file lies on huge pages
    """
    try:
        conversion = Conversion(key, PageRanges.of(ranges), to_private, preserve)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from error
    if len(conversion.ranges) > MAX_RANGES:
        raise OSError(errno.EINVAL, f"{len(conversion.ranges)} ranges; at most {MAX_RANGES}")
    argument = bytearray(conversion.pack())  # of bytes, Python would take 1,024 at most
    fcntl.ioctl(private, MEMFS_IOC_CONVERT(len(conversion.ranges)), argument)
