"""What the kernel does with mapped memory for others is done as on tmpfs; where it cannot be, mount says so."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from memfs.contract.units import PAGE_SIZE

from .conftest import MountMemfs

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
SYS_USERFAULTFD, SYS_IO_URING_SETUP, SYS_IO_URING_REGISTER = 323, 425, 427
IORING_REGISTER_BUFFERS = 0
UFFDIO_API, UFFDIO_REGISTER, UFFD_API, UFFDIO_REGISTER_MODE_MISSING = 0xC018AA3F, 0xC020AA00, 0xAA, 1
SIZE = 16 * PAGE_SIZE


def result_of(number: int) -> str:
    """Return "" for a system call that succeeded, otherwise the name of its errno."""
    return "" if number >= 0 else errno.errorcode[ctypes.get_errno()]


def pin(address: int) -> str:
    """Register memory as a fixed buffer of io_uring, which pins it for long, as VFIO does."""
    ring = _libc.syscall(SYS_IO_URING_SETUP, 4, ctypes.create_string_buffer(120))
    if ring < 0:
        pytest.skip(f"no io_uring: {result_of(ring)}")
    buffer = struct.pack("=QQ", address, SIZE)
    said = result_of(_libc.syscall(SYS_IO_URING_REGISTER, ring, IORING_REGISTER_BUFFERS, buffer, 1))
    os.close(ring)
    return said


def watch_faults(address: int) -> str:
    """Register memory with a userfaultfd, as postcopy migration does."""
    fd = _libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC)
    if fd < 0:
        pytest.skip(f"no userfaultfd: {result_of(fd)}")
    try:
        fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("=QQQ", UFFD_API, 0, 0)))
        wanted = struct.pack("=QQQQ", address, SIZE, UFFDIO_REGISTER_MODE_MISSING, 0)
        fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(wanted))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        os.close(fd)
    return ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls are those of x86_64")
@pytest.mark.parametrize(("use", "refused"), [(pin, "EFAULT"), (watch_faults, "EINVAL")])
@pytest.mark.parametrize("way", ["passthrough=auto", "passthrough=off", "backing=memfd"])
def test_mapping_is_used_as_on_tmpfs_or_it_was_said_that_it_cannot(
    mount_memfs: MountMemfs, tmpfs: Path, way: str, use: Callable[[int], str], refused: str
) -> None:
    memfs = mount_memfs(f"size=16m,{way}")
    passes_through = "no passthrough" not in memfs.notes
    if not passes_through:
        assert "mappings cannot be pinned (io_uring, VFIO) or have userfaultfd" in memfs.notes
    found = []
    for directory in (tmpfs, memfs.path):
        with (directory / "file").open("x+b") as file:
            file.truncate(SIZE)
            with mmap.mmap(file.fileno(), SIZE) as area:
                first = ctypes.c_char.from_buffer(area)
                found.append(use(ctypes.addressof(first)))
                del first
    assert found == ["", "" if passes_through else refused]
