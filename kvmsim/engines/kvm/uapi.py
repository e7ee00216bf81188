"""The real KVM through ioctl(2): what an engine needs of it, for x86-64.

Registers go in and out through the page that KVM shares (KVM_CAP_SYNC_REGS), and never through an ioctl while a vCPU
runs: each ioctl of a vCPU waits until its KVM_RUN has returned, which, for one that waits for a page, is when the
caller has provided that page.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import struct
from typing import Final

from kvmsim import ioctls, kvm_run
from kvmsim.engines.registers import Registers
from kvmsim.uapi import KVM_MEM_READONLY

_KVM_GET_SUPPORTED_CPUID: Final = 0xC008AE05
_KVM_CREATE_IRQCHIP: Final = 0xAE60
_KVM_IRQ_LINE: Final = 0x4008AE61
_KVM_CREATE_PIT2: Final = 0x4040AE77
_KVM_SET_MSRS: Final = 0x4008AE89
_KVM_SET_CPUID2: Final = 0x4008AE90
_KVM_SET_XCRS: Final = 0x4188AEA7

#: capabilities without which this engine cannot be
_NEEDED: Final = {
    "KVM_CAP_SYNC_REGS": ioctls.KVM_CAP_SYNC_REGS,
    "KVM_CAP_READONLY_MEM": ioctls.KVM_CAP_READONLY_MEM,
    "KVM_CAP_IMMEDIATE_EXIT": ioctls.KVM_CAP_IMMEDIATE_EXIT,
}
_KVM_CAP_XCRS: Final = 56

_CPUID_ENTRIES: Final = 256
_CPUID_ENTRY: Final = struct.Struct("=IIIIIII12x")  # function, index, flags, eax, ebx, ecx, edx
_KVM_LEAVES: Final = range(0x4000_0000, 0x4001_0000)
_ADDRESS_SIZES: Final = 0x8000_0008
_FEATURES: Final = 1
_OSXSAVE: Final = 1 << 27  # of ecx of _FEATURES
_XSAVE: Final = 1 << 26

SREGS_SIZE: Final = 312


class KvmUnavailable(Exception):
    """Why native code cannot be run here: one sentence that says what is missing."""


class Kvm:
    """A VM of the real KVM. Raises KvmUnavailable."""

    def __init__(self) -> None:
        if platform.machine() != "x86_64":
            raise KvmUnavailable(f"native guests are x86-64 code, and this machine is {platform.machine()}")
        try:
            self._kvm: Final = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvmUnavailable(f"/dev/kvm: {error.strerror}") from error
        self.vm = -1
        try:
            self._check()
            self.cpuid: Final = _for_guests(self._supported_cpuid())
            self.vm = self._create()
            self._run_size: Final[int] = fcntl.ioctl(self._kvm, ioctls.KVM_GET_VCPU_MMAP_SIZE)
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        try:
            version = fcntl.ioctl(self._kvm, ioctls.KVM_GET_API_VERSION)
        except OSError as error:
            raise KvmUnavailable(f"/dev/kvm is no KVM: {error.strerror}") from error
        if version != ioctls.KVM_API_VERSION:
            raise KvmUnavailable(f"/dev/kvm has API version {version}, and not {ioctls.KVM_API_VERSION}")
        for name, number in _NEEDED.items():
            if not self.has(number):
                raise KvmUnavailable(f"this kernel's KVM has no {name}")

    def _create(self) -> int:
        try:
            return fcntl.ioctl(self._kvm, ioctls.KVM_CREATE_VM, 0)
        except OSError as error:
            raise KvmUnavailable(f"/dev/kvm creates no VM: {error.strerror}") from error

    def has(self, capability: int) -> int:
        """Return what KVM_CHECK_EXTENSION says of a capability; 0: it has not."""
        return fcntl.ioctl(self._kvm, ioctls.KVM_CHECK_EXTENSION, capability)

    def _supported_cpuid(self) -> list[list[int]]:
        buffer = bytearray(8 + _CPUID_ENTRIES * _CPUID_ENTRY.size)
        struct.pack_into("=I", buffer, 0, _CPUID_ENTRIES)
        fcntl.ioctl(self._kvm, _KVM_GET_SUPPORTED_CPUID, buffer)
        (count,) = struct.unpack_from("=I", buffer)
        return [list(_CPUID_ENTRY.unpack_from(buffer, 8 + number * _CPUID_ENTRY.size)) for number in range(count)]

    @property
    def address_bits(self) -> int:
        """How many bits a guest physical address has (MAXPHYADDR)."""
        return next(entry[3] & 0xFF for entry in self.cpuid if entry[0] == _ADDRESS_SIZES)

    @property
    def has_xsave(self) -> bool:
        """Whether a guest can have XSAVE."""
        return any(entry[0] == _FEATURES and entry[5] & _XSAVE for entry in self.cpuid)

    def create_irqchip(self) -> None:
        """Create PIC, IOAPIC, local APICs and a PIT, before any vCPU. Raises OSError."""
        fcntl.ioctl(self.vm, _KVM_CREATE_IRQCHIP)
        fcntl.ioctl(self.vm, _KVM_CREATE_PIT2, bytes(64))

    def set_irq(self, number: int, level: bool) -> None:
        """Set the level of an interrupt line. From any thread."""
        fcntl.ioctl(self.vm, _KVM_IRQ_LINE, struct.pack("=II", number, level))

    def set_memory(self, slot: int, gpa: int, size: int, address: int, *, readonly: bool) -> None:
        """Create a memslot on memory of this process (KVM_SET_USER_MEMORY_REGION); bytes. Raises OSError."""
        region = ioctls.REGION.pack(slot, KVM_MEM_READONLY if readonly else 0, gpa, size, address)
        fcntl.ioctl(self.vm, ioctls.KVM_SET_USER_MEMORY_REGION, region)

    def create_vcpu(self, number: int) -> KvmVcpu:
        """Create a vCPU. Raises OSError."""
        return KvmVcpu(fcntl.ioctl(self.vm, ioctls.KVM_CREATE_VCPU, number), self._run_size, self)

    def close(self) -> None:
        """Close it. It lasts until its vCPUs are closed as well."""
        for fd in (self.vm, self._kvm):
            if fd >= 0:
                os.close(fd)
        self.vm = -1


def _for_guests(entries: list[list[int]]) -> list[list[int]]:
    """Return CPUID without KVM's own leaves, and with OSXSAVE where there is XSAVE, as the guest's CR4 will say.

    A guest that found KVM's leaves could enable asynchronous page faults: then a kernel thread waits for the page.
    """
    kept = [entry for entry in entries if entry[0] not in _KVM_LEAVES]
    for entry in kept:
        if entry[0] == _FEATURES and entry[5] & _XSAVE:
            entry[5] |= _OSXSAVE
    return kept


class KvmVcpu:
    """A vCPU of the real KVM, and the page it shares with us. Registers are valid after `run`."""

    def __init__(self, fd: int, run_size: int, kvm: Kvm) -> None:
        self._fd: Final = fd
        try:
            self._page: Final = mmap.mmap(fd, run_size)
        except OSError:
            os.close(fd)
            raise
        cpuid = bytearray(struct.pack("=II", len(kvm.cpuid), 0))
        cpuid += b"".join(_CPUID_ENTRY.pack(*entry) for entry in kvm.cpuid)
        fcntl.ioctl(fd, _KVM_SET_CPUID2, cpuid)  # before any other register
        if kvm.has_xsave and kvm.has(_KVM_CAP_XCRS):
            xcr0 = struct.pack("=IIIIQ", 1, 0, 0, 0, 7).ljust(392, b"\0")  # x87, SSE, AVX
            fcntl.ioctl(fd, _KVM_SET_XCRS, xcr0)
        struct.pack_into("=Q", self._page, kvm_run.VALID_REGS, kvm_run.SYNC_GENERAL)

    def run(self) -> None:
        """Run it (KVM_RUN), without the GIL. Raises OSError: EINTR if it was kicked."""
        fcntl.ioctl(self._fd, ioctls.KVM_RUN, 0)

    # -- registers: not while it runs ---------------------------------------------------------------------------------

    def get_sregs(self) -> bytearray:
        """Return struct kvm_sregs."""
        sregs = bytearray(SREGS_SIZE)
        fcntl.ioctl(self._fd, ioctls.KVM_GET_SREGS, sregs)
        return sregs

    def set_sregs(self, sregs: bytes | bytearray) -> None:
        """Set segments, descriptor tables and control registers. Raises OSError(EINVAL)."""
        fcntl.ioctl(self._fd, ioctls.KVM_SET_SREGS, bytes(sregs))

    def set_msrs(self, values: dict[int, int]) -> None:
        """Set model-specific registers. Raises OSError(EINVAL) for one that KVM does not know."""
        msrs = bytearray(struct.pack("=II", len(values), 0))
        msrs += b"".join(struct.pack("=IIQ", number, 0, value) for number, value in values.items())
        if fcntl.ioctl(self._fd, _KVM_SET_MSRS, msrs) != len(values):
            raise OSError(errno.EINVAL, "an MSR that this KVM does not have")

    @property
    def registers(self) -> Registers:
        """The general registers, a copy."""
        return Registers.unpack(self._page[kvm_run.REGS : kvm_run.REGS + Registers.LAYOUT.size])

    @registers.setter
    def registers(self, values: Registers) -> None:
        self._page[kvm_run.REGS : kvm_run.REGS + Registers.LAYOUT.size] = values.pack()
        struct.pack_into("=Q", self._page, kvm_run.DIRTY_REGS, kvm_run.SYNC_GENERAL)

    # -- what it exited with ------------------------------------------------------------------------------------------

    @property
    def immediate_exit(self) -> bool:
        """Whether KVM_RUN is to return at once."""
        return bool(struct.unpack_from("=B", self._page, kvm_run.IMMEDIATE_EXIT)[0])

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        struct.pack_into("=B", self._page, kvm_run.IMMEDIATE_EXIT, value)

    @property
    def exit_reason(self) -> int:
        """KVM_EXIT_*."""
        return int(struct.unpack_from("=I", self._page, kvm_run.EXIT_REASON)[0])

    @property
    def io(self) -> tuple[bool, int, int, slice]:
        """Of KVM_EXIT_IO: whether it is `out`, port, size of a unit, and where its data is in `page`."""
        direction, size, port, count, offset = kvm_run.IO.unpack_from(self._page, kvm_run.UNION)
        return bool(direction), port, size, slice(offset, offset + size * count)

    @property
    def mmio(self) -> tuple[int, bytes, bool]:
        """Of KVM_EXIT_MMIO: gpa, the bytes (of a load, as many as it reads), whether it is a store."""
        gpa, data, length, is_write = kvm_run.MMIO.unpack_from(self._page, kvm_run.UNION)
        return gpa, data[:length], bool(is_write)

    @property
    def hypercall(self) -> tuple[int, tuple[int, int, int]]:
        """Of KVM_EXIT_HYPERCALL: number and the first three arguments."""
        nr, *arguments = kvm_run.HYPERCALL.unpack_from(self._page, kvm_run.UNION)
        return nr, (arguments[0], arguments[1], arguments[2])

    @property
    def suberror(self) -> int:
        """Of KVM_EXIT_INTERNAL_ERROR: KVM_INTERNAL_ERROR_*; of KVM_EXIT_FAIL_ENTRY the hardware's reason."""
        return int(struct.unpack_from("=I", self._page, kvm_run.UNION)[0])

    @property
    def page(self) -> mmap.mmap:
        """Memory that KVM shares: struct kvm_run, and the data of `in` and `out`."""
        return self._page

    def answer_mmio(self, data: bytes) -> None:
        """Give what a load from a device reads."""
        self._page[kvm_run.MMIO_DATA : kvm_run.MMIO_DATA + len(data)] = data

    def answer_hypercall(self, value: int) -> None:
        """Give what a hypercall returns."""
        struct.pack_into("=q", self._page, kvm_run.HYPERCALL_RET, value)

    def close(self) -> None:
        """Close it. It must not run."""
        self._page.close()
        os.close(self._fd)
