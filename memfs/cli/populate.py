"""The commands `memfs allocate` and `memfs populate`: allocate memory to files, and fill them, with a progress bar.

Both talk to a mounted memfs from outside, as any program may: by fallocate(2), and over its socket.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import closing
from typing import BinaryIO, Final

import trio

from memfs.cli.progress import progress
from memfs.contract.on_memfs import OnMemfs, naming
from memfs.contract.protocol import StoreGone, connect, socket_of
from memfs.contract.protocol.messages import Notification, Populate
from memfs.contract.sys.libc import fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageRange, pages_to_bytes

_STEP: Final = 256 << 20  # bytes that are allocated at a time
_CHUNK: Final = pages_to_bytes(Populate.MAX_PAGES)


def allocate(fd: int, offset: ByteOffset, length: int | None) -> None:
    """Allocate memory to a file from byte `offset` on, `length` bytes or up to its end, with a progress bar.

    Raises OSError: ENOSPC, and what had been allocated until then stays.
    """
    size = os.fstat(fd).st_size
    end = size if length is None else offset + length
    if offset >= end:
        why = "--length is 0" if length == 0 else "the file is empty" if not size else f"it ends at byte {size}"
        raise OSError(errno.EINVAL, f"nothing to allocate: {why}; say how much with --length")
    with progress("allocate", end - offset) as bar:
        step = max(_STEP, os.fstat(fd).st_blksize)  # in whole huge pages, if it has such
        for start in range(offset, end, step):
            fallocate(fd, 0, start, min(step, end - start))
            bar(min(step, end - start))


def populate(file: OnMemfs, source: BinaryIO, offset: ByteOffset, total: int | None) -> bytes:
    """Fill a guest-sealed file from byte `offset` on with all that `source` gives, with a progress bar.

    The last page is filled up with zeros. `total` is how many bytes there will be, if that is known. Returns the
    measurement (store/measurement.py). Raises OSError as `messages.Populate` says.
    """
    if offset % PAGE_SIZE:
        raise OSError(errno.EINVAL, f"--offset must be a multiple of {PAGE_SIZE}", file.path)
    return trio.run(_populate, file, source, offset, total)


async def _populate(file: OnMemfs, source: BinaryIO, offset: ByteOffset, total: int | None) -> bytes:
    fd = file.open(os.O_RDWR)
    with closing(_Buffer()) as buffer, progress("populate", total) as bar:
        try:
            measurement = b""
            async with connect(socket_of(fd), "populate", _own_nothing) as client:
                while size := buffer.fill(source):
                    pages = PageRange.covering(offset, size)
                    with naming(file.path):
                        measurement = await client.populate(fd, pages, buffer.fd, ByteOffset(0))
                    offset = ByteOffset(offset + size)
                    bar(size)
        except StoreGone as error:
            raise OSError(errno.ECONNRESET, str(error), file.path) from error
        finally:
            os.close(fd)
    if not measurement:
        raise OSError(errno.EINVAL, "there is nothing in it to populate memory with", _name(source))
    return measurement


def _name(source: BinaryIO) -> str:
    return source.name if isinstance(source.name, str) else "standard input"


async def _own_nothing(message: Notification) -> None:
    raise AssertionError(f"an owner of nothing was notified of {message}")


class _Buffer:
    """A memfd that carries content to the store, a chunk at a time."""

    def __init__(self) -> None:
        self.fd: Final = os.memfd_create("populate", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, _CHUNK)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self._map: Final = mmap.mmap(self.fd, _CHUNK)

    def fill(self, source: BinaryIO) -> int:
        """Read until it is full or the source ends, and round up to whole pages. Returns bytes; 0 at the end."""
        with memoryview(self._map) as view, naming(_name(source)):
            size = 0
            while size < _CHUNK and (more := source.readinto(view[size:])):  # type: ignore[attr-defined]
                size += more
            padded = -(-size // PAGE_SIZE) * PAGE_SIZE
            view[size:padded] = bytes(padded - size)
        return padded

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)
