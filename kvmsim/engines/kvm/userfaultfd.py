"""userfaultfd(2) over ranges of a mapped file: who touches a page that is not mapped sleeps until we say otherwise.

Both kinds of faults are asked for: MISSING, the file has no such page, and MINOR, it has one which is not mapped here.
Write-protection (WP) is a third. A page is mapped with UFFDIO_CONTINUE and wakes nobody; that is said separately, by
page, because more pages are mapped than were asked for and those who sleep are not all to go on.

KVM's own accesses are the kernel's, so the descriptor must be one that serves those as well: root, CAP_SYS_PTRACE,
vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd. Everything used here is in Linux 6.4.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_SYS_USERFAULTFD: Final = 323  # x86-64
_USERFAULTFD_IOC_NEW: Final = 0xAA00
_UFFD_API: Final = 0xAA
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_WAKE: Final = 0x8010AA02
_UFFDIO_WRITEPROTECT: Final = 0xC018AA06
_UFFDIO_CONTINUE: Final = 0xC020AA07
_MISSING_WP_MINOR: Final = 7
_CONTINUE_DONTWAKE: Final = 1
_CONTINUE_WP: Final = 2
_WRITEPROTECT_DONTWAKE: Final = 2
_EVENT_PAGEFAULT: Final = 0x12
_FLAG_WRITE: Final = 1
_MESSAGE: Final = struct.Struct("=B7xQQI4x")  # struct uffd_msg: event; flags, address, thread id
_MESSAGES_AT_ONCE: Final = 16

_FEATURE_THREAD_ID: Final = 1 << 8
_FEATURE_MINOR_SHMEM: Final = 1 << 10
_FEATURE_WP_SHMEM: Final = 1 << 12
_FEATURE_WP_UNPOPULATED: Final = 1 << 13  # came with UFFDIO_CONTINUE_MODE_WP; not wanted itself
_WANTED: Final = _FEATURE_THREAD_ID | _FEATURE_MINOR_SHMEM | _FEATURE_WP_SHMEM


class UserfaultfdUnavailable(Exception):
    """Why there is no userfaultfd that serves KVM's faults: one sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class FaultEvent:
    """Somebody sleeps at an address."""

    address: int
    write: bool
    thread: int  #: native id


class Userfaultfd:
    """A userfaultfd, of which `fd` can be waited for. Raises UserfaultfdUnavailable."""

    def __init__(self) -> None:
        self.fd: Final = _open()
        request = bytearray(struct.pack("=QQQ", _UFFD_API, _WANTED, 0))
        try:
            fcntl.ioctl(self.fd, _UFFDIO_API, request)
            has_all = bool(struct.unpack("=QQQ", request)[1] & _FEATURE_WP_UNPOPULATED)
        except OSError:  # EINVAL for a feature that it does not know
            has_all = False
        if not has_all:
            os.close(self.fd)
            raise UserfaultfdUnavailable("this kernel's userfaultfd cannot map pages of files as Linux 6.4 can")

    def register(self, address: int, size: int) -> None:
        """Have all faults of a range of a shared mapping of a tmpfs file come here; bytes. Raises OSError."""
        fcntl.ioctl(self.fd, _UFFDIO_REGISTER, bytearray(struct.pack("=QQQQ", address, size, _MISSING_WP_MINOR, 0)))

    def map_pages(self, address: int, size: int, *, writable: bool) -> tuple[int, int]:
        """Map pages that the file has; bytes. Wakes nobody.

        Returns how many bytes it did, and the errno with which it stopped: 0, EEXIST at a page that is mapped, EFAULT
        at one that the file does not have.
        """
        mode = _CONTINUE_DONTWAKE | (0 if writable else _CONTINUE_WP)
        request, done = bytearray(struct.pack("=QQQq", address, size, mode, 0)), 0
        while done < size:
            struct.pack_into("=QQQq", request, 0, address + done, size - done, mode, 0)
            try:
                fcntl.ioctl(self.fd, _UFFDIO_CONTINUE, request)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    return done, error.errno or 0
            done += max(0, struct.unpack_from("=q", request, 24)[0])
        return done, 0

    def allow_stores(self, address: int, size: int) -> None:
        """Make mapped pages writable; bytes. Wakes nobody. Raises OSError."""
        fcntl.ioctl(
            self.fd, _UFFDIO_WRITEPROTECT, bytearray(struct.pack("=QQQ", address, size, _WRITEPROTECT_DONTWAKE))
        )

    def wake(self, address: int, size: int) -> None:
        """Have whoever sleeps in a range try again; bytes."""
        fcntl.ioctl(self.fd, _UFFDIO_WAKE, struct.pack("=QQ", address, size))

    def events(self) -> Iterator[FaultEvent]:
        """Generate the events that are there, at most 16. Does not wait."""
        try:
            data = os.read(self.fd, _MESSAGES_AT_ONCE * _MESSAGE.size)
        except BlockingIOError:
            return
        for event, flags, address, thread in _MESSAGE.iter_unpack(data):
            if event == _EVENT_PAGEFAULT:
                yield FaultEvent(address, bool(flags & _FLAG_WRITE), thread)

    def close(self) -> None:
        """Close it. Whoever sleeps goes on as if there had never been one: unmap the ranges first."""
        os.close(self.fd)


def _open() -> int:
    try:
        with open("/dev/userfaultfd", "rb", buffering=0) as device:
            fd: int = fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
            return fd
    except OSError:
        pass  # there is the older way
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd >= 0:
        return fd
    number = ctypes.get_errno()
    if number == errno.EPERM:
        raise UserfaultfdUnavailable(
            "this user may not serve the kernel's page faults (userfaultfd): be root, have CAP_SYS_PTRACE or access to "
            "/dev/userfaultfd, or set vm.unprivileged_userfaultfd=1"
        )
    raise UserfaultfdUnavailable(f"no userfaultfd: {os.strerror(number)}")
