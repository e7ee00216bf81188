"""Why a vCPU stopped running: what KVM_RUN returns to the VMM, one class a reason, with KVM's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from kvmsim.uapi import (
    KVM_EXIT_HLT,
    KVM_EXIT_MEM_MAP_PRIVATE,
    KVM_EXIT_MEMORY_ERROR,
    KVM_EXIT_MMIO,
)
from memfs.units import Gpa


@dataclass(frozen=True, slots=True)
class MemoryErrorExit:
    """KVM_EXIT_MEMORY_ERROR: the VMM is to convert memory, then run the vCPU again (RFC patch 02)."""

    reason: ClassVar[int] = KVM_EXIT_MEMORY_ERROR
    type: int  #: KVM_EXIT_MEM_MAP_SHARED or KVM_EXIT_MEM_MAP_PRIVATE: what the memory is to become
    gpa: Gpa
    size: int  #: bytes

    @property
    def name(self) -> str:
        """For people."""
        return "MAP_PRIVATE" if self.type == KVM_EXIT_MEM_MAP_PRIVATE else "MAP_SHARED"


@dataclass(frozen=True, slots=True)
class MmioExit:
    """KVM_EXIT_MMIO: no memory there, or a write to a read-only slot."""

    reason: ClassVar[int] = KVM_EXIT_MMIO
    name: ClassVar[str] = "MMIO"
    gpa: Gpa
    size: int  #: bytes
    is_write: bool


@dataclass(frozen=True, slots=True)
class HaltExit:
    """KVM_EXIT_HLT: the guest has nothing more to do."""

    reason: ClassVar[int] = KVM_EXIT_HLT
    name: ClassVar[str] = "HLT"


Exit = MemoryErrorExit | MmioExit | HaltExit

HALT: Final = HaltExit()
