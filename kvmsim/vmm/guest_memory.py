"""Guest memory as the guest's own software sees it, for what stands in for that software in this process.

A guest kernel in Python reads and writes the memory of its guest like any code of the guest does: by the page table,
and through faults, with the conversions that they ask for. Each page is copied without an await, so what is read or
written is not being freed.
"""

from __future__ import annotations

import errno
from typing import Final

from kvmsim.exits import MemoryErrorExit
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.tlb import Tlb, TlbEntry
from kvmsim.mmu.walk import translate
from kvmsim.side import Side
from kvmsim.vm import VM
from kvmsim.vmm.vmm import Vmm
from memfs.contract.units import PAGE_SIZE, Gpa, gpa_to_gfn, offset_in_page


class GuestMemory:
    """One side of a VM's memory, by gpa."""

    def __init__(self, vm: VM, vmm: Vmm, side: Side = Side.PRIVATE) -> None:
        self._vm: Final = vm
        self._vmm: Final = vmm
        self._side: Final = side
        self._tlb: Final = Tlb()
        vm.mmu.tlbs.append(self._tlb)

    async def read(self, gpa: Gpa, size: int) -> bytes:
        """Return bytes. Raises OSError(EFAULT) where there is no memory, and as `VM.fault` does."""
        parts = []
        while size:
            within = offset_in_page(gpa)
            length = min(size, PAGE_SIZE - within)
            entry = await self._translate(gpa, write=False)
            parts.append(bytes(entry.memory[entry.offset + within : entry.offset + within + length]))
            gpa, size = Gpa(gpa + length), size - length
        return b"".join(parts)

    async def read_string(self, gpa: Gpa, most: int) -> bytes:
        """Return the bytes before the next zero. Raises OSError: ENAMETOOLONG if that is not within `most`, EFAULT."""
        found = b""
        while len(found) < most:
            part = await self.read(Gpa(gpa + len(found)), min(most, PAGE_SIZE - offset_in_page(gpa + len(found))))
            found += part
            if 0 in part:
                return found[: found.index(0)]
        raise OSError(errno.ENAMETOOLONG, "a string that does not end")

    async def write(self, gpa: Gpa, data: bytes) -> None:
        """Store bytes. Raises OSError as `read` does; then some may have been stored."""
        done = 0
        while done < len(data):
            within = offset_in_page(gpa + done)
            length = min(len(data) - done, PAGE_SIZE - within)
            entry = await self._translate(Gpa(gpa + done), write=True)
            entry.memory[entry.offset + within : entry.offset + within + length] = data[done : done + length]
            done += length

    async def _translate(self, gpa: Gpa, *, write: bool) -> TlbEntry:
        access = Access(gpa_to_gfn(gpa), write, self._side)
        if access.gfn >= self._vm.mmu.table.max_gfn:
            raise OSError(errno.EFAULT, f"nothing is at gpa {gpa:#x}")
        while (entry := translate(self._vm.mmu, self._tlb, access)) is None:
            exit_ = await self._vm.fault(access)
            if isinstance(exit_, MemoryErrorExit):
                await self._vmm.answer(exit_)
            elif exit_ is not None:
                raise OSError(errno.EFAULT, f"nothing is at gpa {gpa:#x}")
        return entry
