"""kvmsim: the KVM side of fd-based guest private memory, in userspace.

What a VMM needs is here by name; examples/vmm.py is one.
"""

from kvmsim.backing import StoreGone
from kvmsim.engines.program import Fetch, Hypercall, Load, Program, ProgramEngine, Store, convert
from kvmsim.engines.trace import IntegrityError, TraceEngine
from kvmsim.engines.trace_file import Trace, TraceError
from kvmsim.exits import (
    HALT,
    ExceptionExit,
    Exit,
    HaltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptExit,
    IoExit,
    MemoryErrorExit,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
)
from kvmsim.mmu.page_fault import Access
from kvmsim.side import Side
from kvmsim.uapi import (
    KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR,
    KVM_EXIT_MEM_MAP_PRIVATE,
    KVM_EXIT_MEM_MAP_SHARED,
    KVM_EXIT_MEMORY_ERROR,
    KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_MEM_FD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    PreFaultMemory,
    UserspaceMemoryRegion,
)
from kvmsim.vcpu import VCPU, Engine
from kvmsim.vm import VM, Listener, VmConfig, create_vm
from kvmsim.vm_type import VmType
from kvmsim.vmm.convert import Converter, RamDiscardListener
from kvmsim.vmm.vmm import Device, UnhandledExit, Vmm, open_memory
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gfn, GfnRange, Gpa, PageIndex, PageRange
from memfs.contract.version import VERSION as __version__

__all__ = [
    "HALT",
    "KVM_EXIT_HLT",
    "KVM_EXIT_HYPERCALL",
    "KVM_EXIT_INTERNAL_ERROR",
    "KVM_EXIT_INTR",
    "KVM_EXIT_MEMORY_ERROR",
    "KVM_EXIT_MEMORY_FAULT",
    "KVM_EXIT_MEM_MAP_PRIVATE",
    "KVM_EXIT_MEM_MAP_SHARED",
    "KVM_EXIT_MMIO",
    "KVM_HC_MAP_GPA_RANGE",
    "KVM_MAP_GPA_RANGE_ENCRYPTED",
    "KVM_MEMORY_EXIT_FLAG_PRIVATE",
    "KVM_MEM_FD",
    "KVM_MEM_LOG_DIRTY_PAGES",
    "KVM_MEM_READONLY",
    "PAGE_SIZE",
    "VCPU",
    "VM",
    "Access",
    "ByteOffset",
    "Converter",
    "Device",
    "Engine",
    "ExceptionExit",
    "Exit",
    "Fetch",
    "Gfn",
    "GfnRange",
    "Gpa",
    "HaltExit",
    "Hypercall",
    "HypercallExit",
    "IntegrityError",
    "InternalErrorExit",
    "InterruptExit",
    "IoExit",
    "Listener",
    "Load",
    "MemoryErrorExit",
    "MemoryFaultExit",
    "MmioExit",
    "PageIndex",
    "PageRange",
    "PreFaultMemory",
    "Program",
    "ProgramEngine",
    "RamDiscardListener",
    "ShutdownExit",
    "Side",
    "Store",
    "StoreGone",
    "Trace",
    "TraceEngine",
    "TraceError",
    "UnhandledExit",
    "UserspaceMemoryRegion",
    "VmConfig",
    "VmType",
    "Vmm",
    "__version__",
    "convert",
    "create_vm",
    "open_memory",
]
