"""Real KVM, asked through ioctl(2): the parts that the differential tests and the guest on a memfs file need.

linux/kvm.h; x86-64. Slots made here stay below 2**20 pages: KVM allocates its own book-keeping for each page.
"""

from __future__ import annotations

import fcntl
import os
import struct

import pytest

KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CHECK_EXTENSION = 0xAE03
KVM_CREATE_VCPU = 0xAE41
KVM_GET_DIRTY_LOG = 0x4010AE42
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_REGS = 0x4090AE82
KVM_CREATE_GUEST_MEMFD = 0xC040AED4
KVM_PRE_FAULT_MEMORY = 0xC040AED5
KVM_CAP_PRE_FAULT_MEMORY = 236


class RealKvm:
    """/dev/kvm and one VM."""

    def __init__(self) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        try:
            self.vm = fcntl.ioctl(self.kvm, KVM_CREATE_VM, 0)
        except OSError:
            os.close(self.kvm)
            raise

    def set_region(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> int:
        """KVM_SET_USER_MEMORY_REGION; 0 or an errno."""
        try:
            fcntl.ioctl(self.vm, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", slot, flags, gpa, size, hva))
        except OSError as error:
            return error.errno or 0
        return 0

    def create_vcpu(self, number: int) -> int:
        """A vCPU's descriptor. Raises OSError."""
        return fcntl.ioctl(self.vm, KVM_CREATE_VCPU, number)

    def pre_fault_memory(self, vcpu: int, gpa: int, size: int, flags: int) -> tuple[int, int, int]:
        """KVM_PRE_FAULT_MEMORY on a vCPU: 0 or an errno, and what is left: gpa and size."""
        memory = bytearray(struct.pack("=QQQ40x", gpa, size, flags))
        number = 0
        try:
            fcntl.ioctl(vcpu, KVM_PRE_FAULT_MEMORY, memory)
        except OSError as error:
            number = error.errno or 0
        gpa, size = struct.unpack_from("=QQ", memory)
        return number, gpa, size

    def has(self, capability: int) -> bool:
        """KVM_CHECK_EXTENSION."""
        return fcntl.ioctl(self.vm, KVM_CHECK_EXTENSION, capability) > 0

    def create_guest_memfd(self, size: int) -> int:
        """A guest_memfd's descriptor. Raises OSError (ENOTTY where the kernel has none)."""
        fd: int = fcntl.ioctl(self.vm, KVM_CREATE_GUEST_MEMFD, bytearray(struct.pack("=QQ48x", size, 0)))
        return fd

    def close(self) -> None:
        os.close(self.vm)
        os.close(self.kvm)


def real_kvm_or_skip() -> RealKvm:
    """A VM of the real KVM; skips the test with the reason where there is none."""
    try:
        return RealKvm()
    except OSError as error:
        pytest.skip(f"no KVM to compare with: /dev/kvm: {error.strerror}")
