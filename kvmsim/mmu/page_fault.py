"""An access of the guest, and what is known of its fault while that is being handled."""

from __future__ import annotations

from dataclasses import dataclass

from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from memfs.contract.units import Gfn, GfnRange, PageRange


@dataclass(frozen=True, slots=True)
class Access:
    """An access of the guest. `side`: which memory it means (PRIVATE: TDX's shared bit is clear, SNP's C-bit set)."""

    gfn: Gfn
    write: bool
    side: Side
    fetch: bool = False  #: of an instruction (PFERR_FETCH_MASK); a load otherwise, or a store


@dataclass(slots=True)
class PageFault:
    """Gfns of one slot that are to be mapped, and what that was decided on (struct kvm_page_fault).

    Usually the one gfn that faulted; with fault-around those around it, too, and in a batch or when memory is allocated
    as many as there are.
    """

    gfns: GfnRange
    write: bool  #: the guest is about to store
    side: Side
    slot: Memslot
    seq: int  #: `InvalidationState.sample` from before anything was decided (mmu_seq)

    def with_gfns(self, gfns: GfnRange) -> PageFault:
        """Return the same fault for other gfns of its slot."""
        return PageFault(gfns, self.write, self.side, self.slot, self.seq)

    @property
    def pages(self) -> PageRange:
        """The pages that serve its gfns."""
        return self.slot.pages_of(self.gfns)
