"""userfaultfd(2), served by another process: what a VMM has today to provide memory page by page, through ctypes."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import signal
import struct
import time
from typing import Final, NoReturn

PAGE: Final = mmap.PAGESIZE
_SYSCALL: Final = {"x86_64": 323, "aarch64": 282}
_UFFD_USER_MODE_ONLY: Final = 1
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
_UFFD_API, _MODE_MISSING = 0xAA, 1
_MESSAGE: Final = struct.Struct("=B7xQQQ")  # struct uffd_msg: event; flags, address


class Unavailable(Exception):
    """Why there is no userfaultfd here: one sentence."""


def pages_per_second(pages: int, server_cpu: int) -> float:
    """Touch so many absent pages of anonymous memory, each filled by a child on that CPU. Raises Unavailable."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYSCALL.get(platform.machine())
    uffd = -1 if number is None else libc.syscall(number, os.O_CLOEXEC | _UFFD_USER_MODE_ONLY)
    if uffd < 0:
        raise Unavailable(f"no userfaultfd: {os.strerror(ctypes.get_errno())}")
    with mmap.mmap(-1, pages * PAGE) as area:
        hold = ctypes.c_char.from_buffer(area)
        address = ctypes.addressof(hold)
        try:
            fcntl.ioctl(uffd, _UFFDIO_API, struct.pack("=QQQ", _UFFD_API, 0, 0))
            fcntl.ioctl(uffd, _UFFDIO_REGISTER, struct.pack("=QQQQ", address, pages * PAGE, _MODE_MISSING, 0))
            child = os.fork()
            if child == 0:
                _serve(uffd, server_cpu)
            try:
                started = time.perf_counter()
                for at in range(0, pages * PAGE, PAGE):
                    area[at] = 1
                taken = time.perf_counter() - started
            finally:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        finally:
            del hold
            os.close(uffd)
    return pages / taken


def _serve(uffd: int, cpu: int) -> NoReturn:
    os.sched_setaffinity(0, {cpu})
    source = ctypes.create_string_buffer(2 * PAGE)
    page = -(-ctypes.addressof(source) // PAGE) * PAGE
    while True:
        _, _, address, _ = _MESSAGE.unpack(os.read(uffd, _MESSAGE.size))
        fcntl.ioctl(uffd, _UFFDIO_COPY, struct.pack("=QQQQQ", address & -PAGE, page, PAGE, 0, 0))
