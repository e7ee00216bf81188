"""Why a vCPU stopped running: what KVM_RUN returns to the VMM, one class a reason, with KVM's numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Final

from kvmsim.uapi import (
    KVM_EXIT_EXCEPTION,
    KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR,
    KVM_EXIT_IO,
    KVM_EXIT_MEM_MAP_PRIVATE,
    KVM_EXIT_MEMORY_ERROR,
    KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
)
from memfs.contract.units import Gpa


@dataclass(frozen=True, slots=True)
class MemoryFaultExit:
    """KVM_EXIT_MEMORY_FAULT: mainline's word for a MemoryErrorExit (KVM_RUN then returns -1 with EFAULT).

    `flags`: KVM_MEMORY_EXIT_FLAG_PRIVATE if the access was private, so that the memory is to become so.
    """

    reason: ClassVar[int] = KVM_EXIT_MEMORY_FAULT
    name: ClassVar[str] = "MEMORY_FAULT"
    flags: int
    gpa: Gpa
    size: int  #: bytes


@dataclass(frozen=True, slots=True)
class MemoryErrorExit:
    """KVM_EXIT_MEMORY_ERROR: the VMM is to convert memory, then run the vCPU again (RFC patch 02)."""

    reason: ClassVar[int] = KVM_EXIT_MEMORY_ERROR
    type: int  #: KVM_EXIT_MEM_MAP_SHARED or KVM_EXIT_MEM_MAP_PRIVATE: what the memory is to become
    gpa: Gpa
    size: int  #: bytes

    @property
    def name(self) -> str:
        """The direction of the conversion, for reports."""
        return "MAP_PRIVATE" if self.type == KVM_EXIT_MEM_MAP_PRIVATE else "MAP_SHARED"

    @property
    def memory_fault(self) -> MemoryFaultExit:
        """The same exit for a VMM that knows mainline's only."""
        private = self.type == KVM_EXIT_MEM_MAP_PRIVATE
        return MemoryFaultExit(KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0, self.gpa, self.size)


@dataclass(slots=True)
class MmioExit:
    """KVM_EXIT_MMIO: no memory there, or a write to a read-only slot. For a read, the VMM fills in `data`."""

    reason: ClassVar[int] = KVM_EXIT_MMIO
    name: ClassVar[str] = "MMIO"
    gpa: Gpa
    size: int  #: bytes
    is_write: bool
    data: bytes = field(default=b"", compare=False)


@dataclass(slots=True)
class HypercallExit:
    """KVM_EXIT_HYPERCALL: the guest called; the VMM fills in `ret` before it runs the vCPU again."""

    reason: ClassVar[int] = KVM_EXIT_HYPERCALL
    name: ClassVar[str] = "HYPERCALL"
    nr: int  #: KVM_HC_*
    args: tuple[int, ...]
    ret: int = field(default=0, compare=False)  #: 0, or minus an errno


@dataclass(slots=True)
class IoExit:
    """KVM_EXIT_IO: the guest executed `in` or `out`. For a read, the VMM fills in `data`."""

    reason: ClassVar[int] = KVM_EXIT_IO
    name: ClassVar[str] = "IO"
    port: int
    size: int  #: bytes: 1, 2 or 4
    is_write: bool
    data: bytes = field(default=b"", compare=False)


@dataclass(frozen=True, slots=True)
class HaltExit:
    """KVM_EXIT_HLT: the guest has nothing more to do. `code`: what it says about how it went, 0 if well."""

    reason: ClassVar[int] = KVM_EXIT_HLT
    name: ClassVar[str] = "HLT"
    code: int = 0


@dataclass(frozen=True, slots=True)
class InterruptExit:
    """KVM_EXIT_INTR: the vCPU was kicked (`VCPU.kick`). The guest goes on where it was when it is run again."""

    reason: ClassVar[int] = KVM_EXIT_INTR
    name: ClassVar[str] = "INTR"


@dataclass(frozen=True, slots=True)
class ExceptionExit:
    """KVM_EXIT_EXCEPTION: an exception of the processor that the guest does not handle itself."""

    reason: ClassVar[int] = KVM_EXIT_EXCEPTION
    name: ClassVar[str] = "EXCEPTION"
    vector: int
    rip: int  #: of the instruction that raised it, or for a trap of the next
    address: int | None = None  #: that a page fault was about, or its page's

    NAMES: ClassVar[dict[int, str]] = {
        0: "divide error",
        1: "debug exception",
        3: "breakpoint",
        6: "invalid opcode",
        13: "general protection fault",
        14: "page fault",
        16: "floating-point error",
        17: "alignment check",
        19: "SIMD floating-point error",
    }

    def __str__(self) -> str:
        """Return what happened and where, for a sentence."""
        at = "" if self.address is None else f" at address {self.address:#x}"
        return f"{self.NAMES.get(self.vector, f'exception {self.vector}')}{at}, rip {self.rip:#x}"


@dataclass(frozen=True, slots=True)
class ShutdownExit:
    """KVM_EXIT_SHUTDOWN: a triple fault."""

    reason: ClassVar[int] = KVM_EXIT_SHUTDOWN
    name: ClassVar[str] = "SHUTDOWN"


@dataclass(frozen=True, slots=True)
class InternalErrorExit:
    """KVM_EXIT_INTERNAL_ERROR: the guest did what KVM cannot emulate, such as executing what is no memory."""

    reason: ClassVar[int] = KVM_EXIT_INTERNAL_ERROR
    name: ClassVar[str] = "INTERNAL_ERROR"
    suberror: int  #: KVM_INTERNAL_ERROR_*
    gpa: Gpa | None = None  #: where that was, if it is known


Exit = (
    MemoryErrorExit
    | MmioExit
    | IoExit
    | HypercallExit
    | HaltExit
    | InterruptExit
    | ExceptionExit
    | ShutdownExit
    | InternalErrorExit
)

HALT: Final = HaltExit()
INTERRUPTED: Final = InterruptExit()
