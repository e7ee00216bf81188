"""Memslots: which guest frames are served by which pages of which files, and what KVM lets a VMM change about that.

The order of the checks and their errnos are those of KVM_SET_USER_MEMORY_REGION (__kvm_set_memory_region in
virt/kvm/kvm_main.c) as the real kernel answers them; what is the RFC's own is said where it stands.
"""

from __future__ import annotations

import bisect
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvmsim.store import StoreFile
from kvmsim.uapi import (
    KVM_MAX_GPA,
    KVM_MEM_FD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_MAX_NR_PAGES,
    KVM_MEM_READONLY,
    KVM_USER_MEM_SLOTS,
    UserspaceMemoryRegion,
)
from memfs.guest.messages import FileId
from memfs.units import (
    Gfn,
    GfnRange,
    Gpa,
    PageIndex,
    PageRange,
    bytes_to_pages,
    gpa_to_gfn,
    is_page_aligned,
    page_floor,
)

_KNOWN_FLAGS: Final = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY | KVM_MEM_FD


@dataclass(frozen=True, slots=True)
class Memslot:
    """A range of guest frames and the files behind it, both from the same page on (RFC patch 04)."""

    id: int
    flags: int
    gfns: GfnRange
    first_page: PageIndex
    shared: StoreFile
    private: StoreFile | None

    @property
    def readonly(self) -> bool:
        return bool(self.flags & KVM_MEM_READONLY)

    def page(self, gfn: Gfn) -> PageIndex:
        """The page of either file that serves a gfn."""
        return PageIndex(gfn - self.gfns.start + self.first_page)

    def gfns_of(self, pages: PageRange) -> GfnRange | None:
        """The gfns that pages of either file serve, clipped to the slot; None if they serve none here."""
        mine = pages.intersect(PageRange(self.first_page, PageIndex(self.first_page + len(self.gfns))))
        if mine is None:
            return None
        shift = self.gfns.start - self.first_page
        return GfnRange(Gfn(mine.start + shift), Gfn(mine.end + shift))

    def pages_of(self, gfns: GfnRange) -> PageRange:
        """The pages that serve gfns of the slot."""
        return PageRange(self.page(gfns.start), self.page(gfns.end))


class Memslots:
    """The slots of one VM, found by id, by gfn and by file."""

    def __init__(self) -> None:
        self._by_id: dict[int, Memslot] = {}
        self._starts: list[Gfn] = []  # of the slots in _in_order
        self._in_order: list[Memslot] = []  # by gfn
        self._by_file: dict[FileId, list[Memslot]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Memslot]:
        return iter(self._in_order)

    def get(self, slot_id: int) -> Memslot | None:
        """The slot with an id."""
        return self._by_id.get(slot_id)

    def find(self, gfn: Gfn) -> Memslot | None:
        """The slot that a gfn lies in."""
        index = bisect.bisect_right(self._starts, gfn) - 1
        return self._in_order[index] if index >= 0 and gfn in self._in_order[index].gfns else None

    def overlapping(self, gfns: GfnRange) -> Memslot | None:
        """Some slot that shares a gfn with a range."""
        index = bisect.bisect_left(self._starts, gfns.end) - 1
        return self._in_order[index] if index >= 0 and self._in_order[index].gfns.overlaps(gfns) else None

    def of_file(self, file: FileId) -> list[Memslot]:
        """The slots behind which a file lies, as shared or as private."""
        return self._by_file.get(file, [])

    def add(self, slot: Memslot) -> None:
        """Add a slot that `check` has let pass."""
        assert slot.id not in self._by_id
        assert self.overlapping(slot.gfns) is None
        self._by_id[slot.id] = slot
        index = bisect.bisect(self._starts, slot.gfns.start)
        self._starts.insert(index, slot.gfns.start)
        self._in_order.insert(index, slot)
        for file in filter(None, (slot.shared, slot.private)):
            self._by_file.setdefault(file.id, []).append(slot)

    def remove(self, slot: Memslot) -> None:
        """Remove a slot."""
        del self._by_id[slot.id]
        index = self._in_order.index(slot)
        del self._starts[index], self._in_order[index]
        for file in filter(None, (slot.shared, slot.private)):
            slots = self._by_file[file.id]
            slots.remove(slot)
            if not slots:
                del self._by_file[file.id]


def check_region(slots: Memslots, region: UserspaceMemoryRegion) -> None:
    """Raise OSError, in the kernel's order, if a region may not be set; the files themselves are not looked at.

    EINVAL: flags, alignment, wrap, size, immutability; EEXIST: gfns that another slot has.
    """
    _check_numbers(region)
    old = slots.get(region.slot)
    if region.memory_size == 0:
        if old is None:
            raise OSError(errno.EINVAL, f"no slot {region.slot} to delete")
        return
    if old is not None:
        raise OSError(errno.EINVAL, "a slot on files can only be deleted")  # RFC patch 06
    if slots.overlapping(gfn_range(region)) is not None:
        raise OSError(errno.EEXIST, "the gfns overlap with another slot's")
    if region.fd < 0:
        raise OSError(errno.EBADF, "no fd")
    if region.guest_phys_addr + region.memory_size > KVM_MAX_GPA:
        raise OSError(errno.EINVAL, "beyond the largest guest physical address")


def _check_numbers(region: UserspaceMemoryRegion) -> None:
    private = region.private_fd >= 0
    checks = (
        (not region.flags & ~_KNOWN_FLAGS, f"unknown flags {region.flags & ~_KNOWN_FLAGS:#x}"),
        (bool(region.flags & KVM_MEM_FD) or region.memory_size == 0, "only slots with KVM_MEM_FD"),
        (not (private and region.flags & (KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES)), "flags and a private fd"),
        (is_page_aligned(region.memory_size) and region.memory_size >= 0, "memory_size is not page-aligned"),
        (
            is_page_aligned(region.guest_phys_addr) and region.guest_phys_addr >= 0,
            "guest_phys_addr is not page-aligned",
        ),
        (is_page_aligned(region.userspace_addr) and region.userspace_addr >= 0, "the offset is not page-aligned"),
        (0 <= region.slot < KVM_USER_MEM_SLOTS, f"slot ids are below {KVM_USER_MEM_SLOTS}"),
        (region.guest_phys_addr + region.memory_size < 1 << 64, "guest_phys_addr wraps"),
        (bytes_to_pages(region.memory_size) <= KVM_MEM_MAX_NR_PAGES, f"more than {KVM_MEM_MAX_NR_PAGES} pages"),
    )
    for holds, otherwise in checks:
        if not holds:
            raise OSError(errno.EINVAL, otherwise)


def check_files(region: UserspaceMemoryRegion, shared: StoreFile, private: StoreFile | None) -> None:
    """Raise OSError(EINVAL) if the files do not fit the region: past their end, or of the wrong kind."""
    for file in filter(None, (shared, private)):
        if region.userspace_addr + region.memory_size > file.size:
            raise OSError(errno.EINVAL, "past the end of a file")
    if shared.page_map is not None:
        raise OSError(errno.EINVAL, "fd is of a guest-sealed file")
    if private is not None and private.page_map is None:
        raise OSError(errno.EINVAL, "private_fd is of a file that is not guest-sealed")


def gfn_range(region: UserspaceMemoryRegion) -> GfnRange:
    """The gfns of a region that is not empty."""
    end = gpa_to_gfn(Gpa(region.guest_phys_addr + region.memory_size))
    return GfnRange(gpa_to_gfn(region.guest_phys_addr), end)


def first_page(region: UserspaceMemoryRegion) -> PageIndex:
    """The page of the files that serves the region's first gfn."""
    return page_floor(region.userspace_addr)
