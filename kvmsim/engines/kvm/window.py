"""A window: one file of one slot, mapped for the real KVM, and which of its pages are mapped there at the moment.

KVM reads guest memory through a mapping of this process, as any VMM's. What is present in that mapping is what the
guest can reach, so kvmsim's page table is projected into it: a page is mapped with UFFDIO_CONTINUE when the guest needs
it and its PTE allows that, and unmapped with MADV_DONTNEED when the PTE goes. The kernel's own mmu_notifier takes it
out of KVM's tables before madvise(2) returns, also while the guest runs. It is one VMA, however scattered its pages.

A window is for KVM alone. kvmsim itself reads `GuestFile.memory`, since whoever touches a page here that is absent
sleeps until this event loop maps it, and the event loop is who would sleep.

Rejected: PROT_NONE and mmap(2) over it (KVM does not say which address faulted, and 65,530 VMAs are all there can be),
and a KVM memslot a range (32,764 is all there can be, each costs 30 us, and an absent one is emulated as MMIO).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvmsim.backing import GuestFile
from kvmsim.engines.kvm.userfaultfd import Userfaultfd
from kvmsim.mmu.page_fault import Access
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from memfs.contract.units import PAGE_SHIFT, PAGE_SIZE, Gfn, GfnRange

_MADV_DONTFORK: Final = 10
_ABSENT, _READABLE, _WRITABLE = 0, 1, 2

_PAGEMAP_ENTRY: Final = 8  # bytes a page of /proc/self/pagemap
_PAGEMAP_PRESENT: Final = 1 << 63
_PAGEMAP_WRITE_PROTECTED: Final = 1 << 57


class Window:
    """The window of `slot` on its file of one side; `number`: its KVM memslot's. Raises OSError."""

    def __init__(self, number: int, slot: Memslot, side: Side, file: GuestFile, uffd: Userfaultfd) -> None:
        self.number: Final = number
        self.readonly: Final = slot.readonly
        self.side: Final = side
        self.gfns: Final = slot.gfns
        self.size: Final = len(slot.gfns) << PAGE_SHIFT  #: bytes
        self._uffd: Final = uffd
        self._mapping: Final = mmap.mmap(file.fd, self.size, offset=slot.pages.offset)
        self.address: Final = _address_of(self._mapping)
        self._pages: Final = np.zeros(len(slot.gfns), np.uint8)  # how each page is mapped
        try:
            self._mapping.madvise(mmap.MADV_DONTDUMP)
            self._mapping.madvise(_MADV_DONTFORK)
            uffd.register(self.address, self.size)
        except OSError:
            self._mapping.close()
            raise

    def gfn_at(self, address: int) -> Gfn:
        """Return the gfn whose page lies at an address of the window."""
        return Gfn(self.gfns.start + ((address - self.address) >> PAGE_SHIFT))

    def is_absent(self, gfn: Gfn) -> bool:
        """Return whether the page of a gfn has not been mapped, as far as is known: the kernel may unmap what is."""
        return bool(self._pages[gfn - self.gfns.start] == _ABSENT)

    def project(self, gfn: Gfn, *, writable: bool) -> None:
        """Map the page of a gfn, or allow stores to it. Raises OSError(EFAULT) if the file does not have it."""
        index = gfn - self.gfns.start
        at = self.address + (index << PAGE_SHIFT)
        _, number = self._uffd.map_pages(at, PAGE_SIZE, writable=writable)
        if number == errno.EEXIST and writable and self._pages[index] != _WRITABLE:
            self._uffd.allow_stores(at, PAGE_SIZE)
        elif number not in (0, errno.EEXIST):
            raise OSError(number, f"gfn {gfn:#x} is mapped, but its file has no such page")
        self._pages[index] = max(int(self._pages[index]), _WRITABLE if writable else _READABLE)

    def project_range(self, gfns: GfnRange, *, writable: bool) -> None:
        """Map those pages of a range that are not mapped yet. Stops at one that the file does not have."""
        start, end = gfns.start - self.gfns.start, gfns.end - self.gfns.start
        if not self._pages[start:end].any():
            absent = [[start, end]]
        else:
            edges = np.flatnonzero(np.diff(self._pages[start:end] == _ABSENT, prepend=False, append=False)) + start
            absent = edges.reshape(-1, 2).tolist()
        for first, last in absent:
            at = self.address + (first << PAGE_SHIFT)
            done, number = self._uffd.map_pages(at, (last - first) << PAGE_SHIFT, writable=writable)
            self._pages[first : first + (done >> PAGE_SHIFT)] = _WRITABLE if writable else _READABLE
            if number:
                return

    def flush(self, gfns: GfnRange) -> None:
        """Unmap what is mapped of a range, which lies in the window: KVM has let go of it when this returns."""
        start, end = gfns.start - self.gfns.start, gfns.end - self.gfns.start
        if self._pages[start:end].any():
            self._mapping.madvise(mmap.MADV_DONTNEED, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)
            self._pages[start:end] = _ABSENT

    def present(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return which gfns are mapped, and whether stores to them are allowed, by what the kernel says of the mapping.

        Raises AssertionError if it is more than is remembered here.
        """
        entries = np.empty(len(self.gfns), np.uint64)
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek((self.address >> PAGE_SHIFT) * _PAGEMAP_ENTRY)
            assert pagemap.readinto(entries.data) == entries.nbytes
        indexes = np.flatnonzero(entries & _PAGEMAP_PRESENT)
        writable = (entries[indexes] & _PAGEMAP_WRITE_PROTECTED) == 0
        remembered = self._pages[indexes]
        assert (remembered != _ABSENT).all(), "a page is mapped in a window that nobody mapped there"
        assert (~writable | (remembered == _WRITABLE)).all(), "a page is writable in a window that was to be read-only"
        return indexes + self.gfns.start, writable

    def close(self) -> None:
        """Unmap it. Whoever sleeps there goes on sleeping until the userfaultfd is closed, and then faults."""
        self._mapping.close()


@dataclass(frozen=True, eq=False, slots=True)
class ParkedAt:
    """Where a vCPU is parked, and why."""

    window: Window
    access: Access

    def is_at(self, other: ParkedAt) -> bool:
        """Return whether both are at one page."""
        return self.window is other.window and self.access.gfn == other.access.gfn


def _address_of(mapping: mmap.mmap) -> int:
    view = ctypes.c_char.from_buffer(mapping)
    try:
        return ctypes.addressof(view)
    finally:
        del view
