"""What KVM lets a VMM change about memslots: the checks of KVM_SET_USER_MEMORY_REGION, in the kernel's order.

Order and errnos are those of __kvm_set_memory_region (virt/kvm/kvm_main.c) as the real kernel answers them, which
tests/model/test_kvm_memslots.py asks it. What is the RFC's own is said where it stands. Nothing here changes anything.
"""

from __future__ import annotations

import enum
import errno
from typing import Final

from kvmsim.backing import GuestFile
from kvmsim.slots.memslots import Memslot, Memslots
from kvmsim.uapi import (
    KVM_MAX_GPA,
    KVM_MEM_FD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_MAX_NR_PAGES,
    KVM_MEM_READONLY,
    KVM_USER_MEM_SLOTS,
    USER_ADDRESS_MAX,
    UserspaceMemoryRegion,
)
from memfs.contract.units import GfnRange, Gpa, bytes_to_pages, gpa_to_gfn, is_page_aligned

_KNOWN_FLAGS: Final = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY | KVM_MEM_FD
_U64: Final = 1 << 64


class Change(enum.Enum):
    """What setting a region comes to (enum kvm_mr_change)."""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS_ONLY = "flags only"
    NONE = "none"


def check_region(slots: Memslots, region: UserspaceMemoryRegion) -> Change:
    """Return what setting a region would change; its files are not looked at yet.

    Raises OSError. EINVAL: flags, alignment, wrap, size, immutability; EEXIST: gfns that another slot has; EBADF: no
    fd. A region that is to be created or moved must also pass `check_reach`, after its files.
    """
    _check_numbers(region)
    old = slots.get(region.slot)
    if region.memory_size == 0:
        if old is None:
            raise OSError(errno.EINVAL, f"no slot {region.slot} to delete")
        return Change.DELETE
    change = Change.CREATE if old is None else _change(old, region)
    if change in (Change.CREATE, Change.MOVE) and slots.overlapping(gfn_range(region), but=old) is not None:
        raise OSError(errno.EEXIST, "the gfns overlap with another slot's")
    if region.flags & KVM_MEM_FD and region.fd < 0:
        raise OSError(errno.EBADF, "no fd")
    return change


def _change(old: Memslot, region: UserspaceMemoryRegion) -> Change:
    """Return what becomes of a slot. Raises OSError(EINVAL)."""
    if old.private is not None or (region.private_fd >= 0 and region.flags & KVM_MEM_FD):
        raise OSError(errno.EINVAL, "a slot with private memory can only be deleted")  # RFC patch 06
    if region.userspace_addr != old.userspace_addr or bytes_to_pages(region.memory_size) != len(old.gfns):
        raise OSError(errno.EINVAL, "a slot's size and memory cannot be changed")
    if (region.flags ^ old.flags) & (KVM_MEM_READONLY | KVM_MEM_FD):
        raise OSError(errno.EINVAL, "KVM_MEM_READONLY and KVM_MEM_FD cannot be changed")
    if gpa_to_gfn(region.guest_phys_addr) != old.gfns.start:
        return Change.MOVE
    return Change.NONE if region.flags == old.flags else Change.FLAGS_ONLY


def _check_numbers(region: UserspaceMemoryRegion) -> None:
    on_files = bool(region.flags & KVM_MEM_FD)
    private = on_files and region.private_fd >= 0
    gpa, size, address = region.guest_phys_addr, region.memory_size, region.userspace_addr
    address_end = _U64 if on_files else USER_ADDRESS_MAX + 1
    checks = (
        (not region.flags & ~_KNOWN_FLAGS, f"unknown flags {region.flags & ~_KNOWN_FLAGS:#x}"),
        (
            not (private and region.flags & (KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES)),
            "no flag but KVM_MEM_FD goes with a private_fd",
        ),
        (is_page_aligned(size) and 0 <= size < _U64, "memory_size is not page-aligned"),
        (is_page_aligned(gpa) and 0 <= gpa < _U64, "guest_phys_addr is not page-aligned"),
        (is_page_aligned(address) and 0 <= address < _U64, "userspace_addr is not page-aligned"),
        (address + size < address_end, "userspace_addr is beyond user space, or wraps"),
        (0 <= region.slot < KVM_USER_MEM_SLOTS, f"slot ids are below {KVM_USER_MEM_SLOTS}"),
        (gpa + size < _U64, "guest_phys_addr wraps"),
        (bytes_to_pages(size) <= KVM_MEM_MAX_NR_PAGES, f"more than {KVM_MEM_MAX_NR_PAGES} pages"),
    )
    for holds, otherwise in checks:
        if not holds:
            raise OSError(errno.EINVAL, otherwise)


def check_files(
    slots: Memslots, region: UserspaceMemoryRegion, shared: GuestFile, private: GuestFile | None, old: Memslot | None
) -> None:
    """Raise OSError(EINVAL) if files do not fit a region: past their end, of the wrong kind, or bound already."""
    for file in (shared, private):
        if file is not None and region.userspace_addr + region.memory_size > file.size:
            raise OSError(errno.EINVAL, "past the end of a file")
    if shared is private:
        raise OSError(errno.EINVAL, "fd and private_fd are one file")
    if shared.page_map is not None:
        raise OSError(errno.EINVAL, "fd is of a guest-sealed file")
    if old is not None and old.shared is not shared:
        raise OSError(errno.EINVAL, "a slot's size and memory cannot be changed")
    if private is None:
        return
    if private.page_map is None:
        raise OSError(errno.EINVAL, "private_fd is of a file that is not guest-sealed")
    probe = Memslot(region.slot, region.flags, gfn_range(region), region.userspace_addr, shared, private)
    if slots.touching(private.id, probe.pages):
        raise OSError(errno.EINVAL, "private memory is bound to another slot")  # a private frame has one gfn


def check_reach(region: UserspaceMemoryRegion, max_gpa: int) -> None:
    """Raise OSError(EINVAL) for guest physical addresses from `max_gpa` on, or that KVM never has."""
    if region.guest_phys_addr + region.memory_size > min(max_gpa, KVM_MAX_GPA):
        raise OSError(errno.EINVAL, "beyond the largest guest physical address")


def gfn_range(region: UserspaceMemoryRegion) -> GfnRange:
    """Return the gfns of a region that is not empty."""
    end = gpa_to_gfn(Gpa(region.guest_phys_addr + region.memory_size))
    return GfnRange(gpa_to_gfn(region.guest_phys_addr), end)
