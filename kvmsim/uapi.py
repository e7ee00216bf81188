"""KVM's numbers and structures (include/uapi/linux/kvm.h), with what the RFC adds to them.

`UserspaceMemoryRegion` is struct kvm_userspace_memory_region_ext of RFC patch 03; mainline's struct
kvm_userspace_memory_region2 is its descendant, KVM_MEM_GUEST_MEMFD that of KVM_MEM_FD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from memfs.contract.units import ByteOffset, Gpa

KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
KVM_MEM_FD: Final = 1 << 2  #: the slot lies on files (RFC patch 03)

KVM_USER_MEM_SLOTS: Final = 32764  #: slot ids are below this
KVM_MEM_MAX_NR_PAGES: Final = (1 << 31) - 1  #: the most pages a slot can have
KVM_MAX_GPA: Final = 1 << 52  #: bytes
KVM_MAX_VCPU_ID: Final = 4096
USER_ADDRESS_MAX: Final = 0x7FFFFFFFF000  #: no hva of x86-64 is above (USER_PTR_MAX)

KVM_EXIT_EXCEPTION: Final = 1
KVM_EXIT_IO: Final = 2
KVM_EXIT_HYPERCALL: Final = 3
KVM_EXIT_HLT: Final = 5
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_FAIL_ENTRY: Final = 9
KVM_EXIT_INTR: Final = 10
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_INTERNAL_ERROR_EMULATION: Final = 1
KVM_EXIT_MEMORY_ERROR: Final = 36  #: RFC patch 02
KVM_EXIT_MEMORY_FAULT: Final = 39  #: what mainline made of it (Linux 6.8)
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3  #: in the flags of KVM_EXIT_MEMORY_FAULT

KVM_HC_MAP_GPA_RANGE: Final = 12  #: hypercall: convert a range (include/uapi/linux/kvm_para.h)
KVM_MAP_GPA_RANGE_ENCRYPTED: Final = 1 << 4  #: to private; clear: to shared
KVM_EINVAL: Final = 22  #: hypercalls return 0 or minus an errno
KVM_ENOSYS: Final = 1000

KVM_EXIT_MEM_MAP_SHARED: Final = 1
KVM_EXIT_MEM_MAP_PRIVATE: Final = 2


@dataclass(frozen=True, slots=True)
class UserspaceMemoryRegion:
    """The argument of KVM_SET_USER_MEMORY_REGION. Sizes and addresses in bytes.

    Without KVM_MEM_FD, `userspace_addr` is a hva. With it, it is the offset into both files, `fd` the file of shared
    memory and `private_fd` that of private memory, -1 for none.
    """

    slot: int
    flags: int
    guest_phys_addr: Gpa
    memory_size: int
    userspace_addr: ByteOffset
    fd: int = -1
    private_fd: int = -1


@dataclass(slots=True)
class PreFaultMemory:
    """The argument of KVM_PRE_FAULT_MEMORY (struct kvm_pre_fault_memory), in bytes; it then says what is left."""

    gpa: Gpa
    size: int
    flags: int = 0  #: none is defined
