"""Classic memory: host virtual addresses of this process, which is the VMM's (KVM calls them hva).

KVM asks the host's page tables what lies at a hva, and an mmu_notifier tells it when that changes. This process can see
its own mappings in /proc/self/maps, but is not notified of changes, so:

- A shared mapping of a file on memfs is followed to the file: it is registered with memfs, pages are asked for there,
  and a punch of the file is notified like any other.
- All other memory has no store behind it. Its frame number is its own page number with a high bit, above all that memfs
  ever allots. A VMM that unmaps such memory says so to `VM.invalidate_hva`, which stands for the mmu_notifier.

As in KVM, a mapping is looked at when a guest first touches it and not when its slot is made.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Final

from memfs.contract.sys.fdinfo import fdinfo
from memfs.contract.sys.libc import device_of, read_own_memory, write_own_memory
from memfs.contract.sys.mountinfo import type_of_device
from memfs.contract.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    ByteOffset,
    PageIndex,
    PageRange,
    Pfn,
    page_floor,
    page_offset,
)

LOCAL_PFN: Final = 1 << 39  #: frames from here on are memory of this process, without a store
_MEMFS: Final = "fuse.memfs"


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of /proc/self/maps. `pages`: of the address space; `offset`: bytes into the file."""

    pages: PageRange
    readable: bool
    writable: bool
    shared: bool
    offset: ByteOffset
    device: str  #: "major:minor" in decimal, as in mountinfo
    ino: int

    @property
    def is_memfs(self) -> bool:
        """Whether changes of a file on some memfs are seen through it."""
        return self.shared and self.ino != 0 and type_of_device(self.device) == _MEMFS

    def file_page(self, page: PageIndex) -> PageIndex:
        """Return the page of the file that is mapped at a page of the address space."""
        return PageIndex(page - self.pages.start + page_floor(self.offset))


def find_mapping(page: PageIndex) -> Mapping | None:
    """Return what is mapped at a page of our address space; None if nothing is."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            span, permissions, offset, device, ino = line.split(None, 5)[:5]
            start, end = (page_floor(ByteOffset(int(bound, 16))) for bound in span.split("-"))
            if start <= page < end:
                major, minor = (int(part, 16) for part in device.split(":"))
                return Mapping(
                    PageRange(start, end),
                    *("r" in permissions, "w" in permissions, "s" in permissions),
                    ByteOffset(int(offset, 16)),
                    f"{major}:{minor}",
                    int(ino),
                )
    return None


def open_mapped_file(mapping: Mapping) -> int:
    """Return a writable descriptor of the file behind a mapping, which the caller closes.

    It is of one that this process has open already, or of the one that the kernel offers to root. Blocking: not for the
    event loop. Raises OSError(EACCES).
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            info = fdinfo(name)
            is_it = int(info.get("ino", "0")) == mapping.ino and int(info["flags"], 8) & os.O_ACCMODE == os.O_RDWR
            if is_it and device_of(int(name)) == mapping.device:
                return os.dup(int(name))
        except OSError:  # closed meanwhile, as is the one of the listing
            continue
    span = "-".join(f"{page_offset(bound):x}" for bound in (mapping.pages.start, mapping.pages.end))
    try:
        return os.open(f"/proc/self/map_files/{span}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(errno.EACCES, f"no descriptor of the file mapped at {span}: {error.strerror}") from error


def local_pfn(page: PageIndex) -> Pfn:
    """Return the frame of a page of our own address space."""
    return Pfn(LOCAL_PFN | page)


class LocalMemory:
    """One page of this process's own memory, by slices: `memory[start:end]`.

    Nobody says when such memory goes: it may have been unmapped, or the file that is mapped there been truncated, which
    would be a signal to whoever touched it. So it is copied by the kernel. Raises OSError(EFAULT) if it is gone.
    """

    def __init__(self, pfn: Pfn) -> None:
        assert pfn >= LOCAL_PFN
        self._address: Final = (pfn & (LOCAL_PFN - 1)) << PAGE_SHIFT

    @property
    def memory(self) -> LocalMemory:
        """Its bytes."""
        return self

    def __getitem__(self, part: slice) -> bytes:
        """Return some of its bytes."""
        start, end, _ = part.indices(PAGE_SIZE)
        return read_own_memory(self._address + start, end - start)

    def __setitem__(self, part: slice, data: bytes) -> None:
        """Change some of its bytes."""
        write_own_memory(self._address + part.indices(PAGE_SIZE)[0], data)
