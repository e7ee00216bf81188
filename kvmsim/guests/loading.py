"""Loading a program into the private memory of a guest that has not run yet."""

from __future__ import annotations

from kvmsim.engines.user_mode import MAX_MEMORY, USER_START, tables
from kvmsim.guests.elf import Elf
from kvmsim.side import Side
from kvmsim.vm import VM
from kvmsim.vmm.guest_memory import GuestMemory
from kvmsim.vmm.vmm import Vmm
from memfs.contract.units import PAGE_SIZE, Gpa


class LoadError(Exception):
    """Why a program does not fit into guest memory: one sentence."""


def check_size(elf: Elf, memory_size: int, rest: int) -> None:
    """Raise LoadError if a program, and `rest` bytes behind it, are not within guest memory of so many bytes."""
    if elf.start < USER_START:
        raise LoadError(f"the program is to lie at {elf.start:#x}, where the processor's tables are")
    if elf.end + rest > memory_size:
        needed = -(-(elf.end + rest) // (1 << 20))
        raise LoadError(f"guest memory is too small: the program needs {needed} MiB")
    if memory_size > MAX_MEMORY:
        raise LoadError(f"guest memory is too large: at most {MAX_MEMORY >> 30} GiB")


async def make_private(vmm: Vmm) -> None:
    """Empty guest memory, and make all of it private. Raises OSError (ENOSPC)."""
    for side in (Side.SHARED, Side.PRIVATE):
        await vmm.convert(Gpa(0), vmm.size, side)


async def load(vm: VM, vmm: Vmm, elf: Elf) -> GuestMemory:
    """Empty guest memory, make all of it private, and load a program. Returns that memory, as the program sees it.

    Raises OSError (ENOSPC).
    """
    await make_private(vmm)
    memory = GuestMemory(vm, vmm)
    await memory.write(Gpa(PAGE_SIZE), tables(vmm.size, vm.type.shared_bit)[PAGE_SIZE:])
    for segment in elf.segments:
        await memory.write(Gpa(segment.address), segment.data)
    return memory
