"""From a guest frame number to host memory, as a processor goes: the TLB, else the page table, else a fault."""

from __future__ import annotations

from kvmsim.mmu.mmu import Mmu
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import PTE_A, PTE_D, PTE_W, PTE_X, pte_pfn, side_of
from kvmsim.mmu.tlb import Tlb, TlbEntry


def translate(mmu: Mmu, tlb: Tlb, access: Access) -> TlbEntry | None:
    """Return where an access goes; None: it faults.

    An engine that counts its hits by the block does this in two steps: `Tlb.lookup` and `walk`.
    """
    entry = tlb.lookup(access.gfn, access.side, access.write)
    if entry is None:
        return walk(mmu, tlb, access)
    tlb.hits += 1
    return entry


def walk(mmu: Mmu, tlb: Tlb, access: Access) -> TlbEntry | None:
    """Translate an access that missed the TLB, set the accessed and dirty bits, and fill the TLB; None: it faults."""
    found = mmu.table.walk(access.gfn)
    pte = found.pte
    if not pte or side_of(pte) is not access.side or (access.write and not pte & PTE_W):
        return None
    if access.fetch and not pte & PTE_X:
        return None
    mmu.table.set_flags(access.gfn, PTE_A | PTE_D if access.write else PTE_A)
    file, offset = mmu.frames.locate(pte_pfn(pte))
    is_dirty = access.write or bool(pte & PTE_W and pte & PTE_D)
    return tlb.fill(access.gfn, TlbEntry(file.memory, offset, access.side, is_dirty), found.level)
