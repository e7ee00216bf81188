"""The parts of a VM that faults and notifications work on, and the only two ways in which mappings come and go.

`install` and `unmap` keep page table, ownership of private frames and TLBs in step; nothing else maps or unmaps.
Everything here is called under the MMU lock, that is: nothing awaits (invalidate.py).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from kvmsim.arrays import Gfns, Numbers, divide, runs
from kvmsim.backing import Backing
from kvmsim.mmu.fault_around import FaultAround
from kvmsim.mmu.frame_map import FrameMap
from kvmsim.mmu.invalidate import InvalidationState
from kvmsim.mmu.ownership import OwnershipTable
from kvmsim.mmu.page_fault import PageFault
from kvmsim.mmu.page_table import PageTable
from kvmsim.mmu.pte import PTE_PRIVATE, PTE_R, PTE_W, PTE_X, is_private, level_pages, pte_pfn, pte_pfns, select
from kvmsim.mmu.tlb import Translations
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot, Memslots, Window
from memfs.contract.units import Gfn, GfnRange, PageIndex, PageRange, Pfn


@dataclass(slots=True)
class Mmu:
    """The secondary MMU of one VM."""

    backing: Backing
    table: PageTable
    ownership: OwnershipTable
    vm: int  #: its number in the ownership table
    slots: Memslots = field(default_factory=Memslots)
    frames: FrameMap = field(default_factory=FrameMap)
    invalidations: InvalidationState = field(default_factory=InvalidationState)
    fault_around: FaultAround = field(default_factory=FaultAround)
    tlbs: list[Translations] = field(default_factory=list)  #: of all vCPUs, and what else is flushed with them
    retries: int = 0  #: faults that had to start again
    tlb_flushes: int = 0

    def add_slot(self, slot: Memslot) -> None:
        """Add a slot, which takes over the invalidations in progress on its files."""
        self.slots.add(slot)
        self._take_over(self.slots.windows_of(slot))

    def add_window(self, window: Window) -> None:
        """Add a window of a slot, which takes over the invalidations in progress on its file."""
        self.slots.add_window(window)
        self._take_over([window])

    def _take_over(self, windows: list[Window]) -> None:
        def gfns_of(space: Hashable, pages: PageRange) -> list[GfnRange]:
            return [each.gfns_of(pages) for each in windows if each.space == space and each.pages.overlaps(pages)]

        self.invalidations.take_over(gfns_of)

    def install(self, fault: PageFault, gfns: GfnRange, pfn: Pfn, order: int) -> None:
        """Map gfns of a fault, or the block around them, to neighbouring frames, with leaves of at most 2**order pages.

        In a slot whose dirty pages are logged, only a store makes them writable. Raises OwnershipViolation, changing
        nothing.
        """
        slot, flags = fault.slot, PTE_R | PTE_X
        if not slot.readonly and (fault.write or not slot.logs_dirty):
            flags |= PTE_W
        if fault.side is Side.PRIVATE:
            flags |= PTE_PRIVATE
            self.ownership.assign(self.vm, gfns, pfn)
        if fault.write:
            self.mark_dirty(slot, gfns)
        before = self.table.mapped
        self.table.map_range(gfns, pfn, flags, order)
        if self.table.mapped - before != len(gfns):
            self.flush_tlbs(gfns)  # something else was mapped there

    def install_pages(self, slot: Memslot, side: Side, gfns: Numbers, pfns: Numbers) -> None:
        """Map single absent gfns of a slot, in order and each once, to frames of a side; int64, shape (n,).

        Not where dirty pages are logged. Raises OwnershipViolation, changing nothing.
        """
        assert not slot.logs_dirty
        flags = PTE_R | PTE_X | (0 if slot.readonly else PTE_W)
        if side is Side.PRIVATE:
            flags |= PTE_PRIVATE
            self.ownership.assign_pages(self.vm, gfns, pfns)
        self.table.map_pages(gfns, pfns, flags)

    def make_writable(self, fault: PageFault) -> bool:
        """Handle a store to a page that is mapped read-only, if that is all that is wrong (fast_page_fault).

        It is so mapped since its slot logs, or did, what is written; such a slot has no private memory.
        """
        pte = self.table.lookup(fault.gfns.start)
        if not pte or pte & PTE_W:
            return False
        self.mark_dirty(fault.slot, fault.gfns)
        self.table.protect_range(fault.gfns, add=PTE_W)
        return True

    def mark_dirty(self, slot: Memslot, gfns: GfnRange) -> None:
        """Mark pages of a slot as dirty, if it logs that (mark_page_dirty_in_slot)."""
        if slot.dirty is not None:
            for gfn in range(gfns.start, gfns.end):
                slot.dirty.mark(gfn - slot.gfns.start)

    def unmap(self, gfns: GfnRange, side: Side = Side.BOTH) -> int:
        """Unmap what a range maps of a side. Returns how many pages that were."""
        if self.table.mapped == 0:
            return 0
        if side is not Side.SHARED and self.ownership.owned:
            self._release(gfns)
        count = self.table.unmap_range(gfns, side)
        if count:
            self.flush_tlbs(gfns)
        return count

    def unmap_ranges(self, ranges: Gfns, side: Side = Side.BOTH) -> None:
        """Unmap what ranges of gfns, in order, map of a side: many short ones as an array of pages."""
        steps, gfns = divide(ranges)
        for each in steps:
            self.unmap(each, side)
        if self.table.mapped and len(gfns):
            ptes = self.table.unmap_pages(gfns, side)
            self.ownership.release_frames(pte_pfns(ptes[select(ptes, Side.PRIVATE)]))
            for start, end in runs(gfns[ptes != 0]):
                self.flush_tlbs(GfnRange(Gfn(start), Gfn(end)))

    def _release(self, gfns: GfnRange) -> None:
        """Release the private frames that a range maps, before it is unmapped."""
        if len(gfns) == 1:
            pte = self.table.lookup(gfns.start)
            if pte and is_private(pte):
                self.ownership.release_run(pte_pfn(pte), 1)
            return
        for leaves in self.table.leaves(gfns):
            ptes = leaves.ptes[select(leaves.ptes, Side.PRIVATE)]
            if not len(ptes):
                continue
            if len(leaves.gfns) == len(leaves.ptes) * level_pages(leaves.level):
                self.ownership.release(ptes, level_pages(leaves.level))
            else:  # a part of one huge leaf
                within = leaves.gfns.start % level_pages(leaves.level)
                self.ownership.release_run(Pfn(pte_pfn(int(ptes[0])) + within), len(leaves.gfns))

    def write_protect(self, gfns: GfnRange) -> None:
        """Have the next store to each page of a range fault."""
        if self.table.write_protect(gfns):
            self.flush_tlbs(gfns)

    def flush_tlbs(self, gfns: GfnRange) -> None:
        """Flush a range from all TLBs: what it maps may be used less than before."""
        self.tlb_flushes += 1
        for tlb in self.tlbs:
            tlb.flush(gfns)

    def is_uniform(self, slot: Memslot, gfns: GfnRange, side: Side) -> bool:
        """Return whether all pages that serve a range are on one side now, by the page map, and can be mapped."""
        if slot.private is None or slot.private.page_map is None:
            return side is Side.SHARED
        pages, page_map, is_private = slot.pages_of(gfns), slot.private.page_map, side is Side.PRIVATE
        if page_map.is_allocated(PageIndex(pages.end - 1)) is not is_private:  # as in most blocks of both sides
            return False
        allocated = page_map.count(pages) if len(gfns) > 1 else int(is_private)
        return allocated == len(gfns) and slot.private.reaches(pages.end) if is_private else not allocated
