"""KVM's ioctls and their structures (include/uapi/linux/kvm.h) that the service answers; the real KVM's are the same.

Between the service and its VMMs a structure goes over the socket as it is. Where KVM would follow a pointer, what it
points to comes behind the structure, or as a descriptor; which is said beside each.
"""

from __future__ import annotations

import struct
from typing import Final

KVM_API_VERSION: Final = 12

# on /dev/kvm
KVM_GET_API_VERSION: Final = 0xAE00
KVM_CREATE_VM: Final = 0xAE01  #: type 0
KVM_CHECK_EXTENSION: Final = 0xAE03  #: on a VM as well
KVM_GET_VCPU_MMAP_SIZE: Final = 0xAE04

# on a VM
KVM_CREATE_VCPU: Final = 0xAE41  #: its descriptor, and a memfd that is its struct kvm_run
KVM_GET_DIRTY_LOG: Final = 0x4010AE42  #: the bitmap comes as a memfd
KVM_SET_USER_MEMORY_REGION: Final = 0x4020AE46
KVM_ENABLE_CAP: Final = 0x4068AEA3
KVM_SET_USER_MEMORY_REGION2: Final = 0x40A0AE49
KVM_SET_MEMORY_ATTRIBUTES: Final = 0x4020AED2
KVM_CREATE_GUEST_MEMFD: Final = 0xC040AED4  #: brings a descriptor
KVM_CLEAR_DIRTY_LOG: Final = 0xC018AEC0  #: the bitmap comes behind the structure

# on a vCPU
KVM_RUN: Final = 0xAE80
KVM_GET_REGS: Final = 0x8090AE81
KVM_SET_REGS: Final = 0x4090AE82
KVM_GET_SREGS: Final = 0x8138AE83
KVM_SET_SREGS: Final = 0x4138AE84
KVM_PRE_FAULT_MEMORY: Final = 0xC040AED5

# not KVM's: a vCPU that runs no code, but makes accesses one after the other, where there is no real KVM
KVMSIM_SET_ACCESSES: Final = 0x4018AF00  #: array of ACCESS
KVMSIM_GET_VALUES: Final = 0x8008AF01  #: array of u64: what the loads have found so far
KVMSIM_SHARED_BIT: Final = 0xAF02  #: on a VM: the number of the address bit by which its guest means shared memory

KVM_CAP_USER_MEMORY: Final = 3
KVM_CAP_NR_VCPUS: Final = 9
KVM_CAP_NR_MEMSLOTS: Final = 10
KVM_CAP_MAX_VCPUS: Final = 66
KVM_CAP_SYNC_REGS: Final = 74
KVM_CAP_READONLY_MEM: Final = 81
KVM_CAP_MAX_VCPU_ID: Final = 128
KVM_CAP_IMMEDIATE_EXIT: Final = 136
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: Final = 168
KVM_CAP_USER_MEMORY2: Final = 231
KVM_CAP_MEMORY_FAULT_INFO: Final = 232
KVM_CAP_MEMORY_ATTRIBUTES: Final = 233  #: which there are
KVM_CAP_GUEST_MEMFD: Final = 234
KVM_CAP_PRE_FAULT_MEMORY: Final = 236

KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3
KVM_MEM_GUEST_MEMFD: Final = 1 << 2  #: mainline's KVM_MEM_FD

REGION: Final = struct.Struct("<IIQQQ")  #: slot, flags, guest_phys_addr, memory_size, userspace_addr
REGION_EXT: Final = struct.Struct("<IIQQQii24x")  #: the same, fd, private_fd (RFC patch 03)
#: of classic memory: REGION, and where in the file it lies that is mapped at userspace_addr
REGION_MAPPED: Final = struct.Struct("<IIQQQQ")
#: slot, flags, guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset, guest_memfd
REGION2: Final = struct.Struct("<IIQQQQi116x")
#: the same, and where in the file it lies that is mapped at userspace_addr
REGION2_MAPPED: Final = struct.Struct("<IIQQQQi116xQ")
MEMORY_ATTRIBUTES: Final = struct.Struct("<QQQQ")  #: address, size, attributes, flags
GUEST_MEMFD: Final = struct.Struct("<QQ48x")  #: size, flags
DIRTY_LOG: Final = struct.Struct("<IIQ")  #: slot, padding, pointer
CLEAR_DIRTY_LOG: Final = struct.Struct("<IIQQ")  #: slot, num_pages, first_page, pointer
PRE_FAULT: Final = struct.Struct("<QQQ40x")  #: gpa, size, flags
CAPABILITY: Final = struct.Struct("<II4Q64x")  #: cap, flags, arguments
ACCESS: Final = struct.Struct("<QIIQ")  #: gpa, ACCESS_*, bytes, value
VALUE: Final = struct.Struct("<Q")

ACCESS_LOAD, ACCESS_STORE, ACCESS_HYPERCALL = range(3)  #: the hypercall is KVM_HC_MAP_GPA_RANGE: gpa, pages, attributes
