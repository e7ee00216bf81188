"""A model of a vCPU's TLB: translations that it used lately, and how often that helped.

What is in it may be used without looking at the page table, so code that removes a mapping or a permission must flush
it in the same critical section; that is the whole of its correctness. A range is flushed by gfn as long as that is
cheaper than flushing everything, which is how the kernel decides, too (kvm_flush_remote_tlbs_range).

An entry holds what the PTE led to. The oldest entry makes space for a new one.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from kvmsim.mmu.pte import PTE_W, side_of
from kvmsim.side import Side
from kvmsim.slots.hva import LocalMemory
from memfs.contract.units import Gfn, GfnRange

if TYPE_CHECKING:
    from kvmsim.mmu.radix import Radix

TLB_ENTRIES: Final = 1536  #: as many as the second-level TLB of a Skylake core has


class Translations(Protocol):
    """What keeps translations beside the page table, in whatever form, and so has to be flushed."""

    def flush(self, gfns: GfnRange) -> None:
        """Drop the translations of a range. It is called under the MMU lock; when it returns nobody uses them."""

    def check(self, table: Radix) -> None:
        """Raise AssertionError on the first translation that allows what the page table does not."""


@dataclass(slots=True)
class TlbEntry:
    """The translation of one page."""

    memory: mmap.mmap | memoryview | LocalMemory
    offset: int  #: of the page in that memory, in bytes
    side: Side
    dirty: bool  #: the PTE is writable and marked as dirty, so that a store needs no walk


class Tlb:
    """Translations by gfn."""

    def __init__(self, capacity: int = TLB_ENTRIES) -> None:
        self.capacity: Final = capacity
        self.entries: Final[dict[int, TlbEntry]] = {}
        self.hits = 0
        self.misses = 0
        self.flushes = 0  #: how often something was taken out of it
        self.flushed = 0  #: how many entries

    @property
    def version(self) -> int:
        """A number that differs after each change of the entries."""
        return self.misses + self.flushes

    def lookup(self, gfn: Gfn, side: Side, write: bool) -> TlbEntry | None:
        """Return the entry that allows an access. Does not count as a hit yet."""
        entry = self.entries.get(gfn)
        return entry if entry is not None and entry.side is side and (entry.dirty or not write) else None

    def fill(self, gfn: Gfn, entry: TlbEntry) -> None:
        """Insert the translation that a walk found after a miss."""
        self.misses += 1
        self.entries.pop(gfn, None)
        if len(self.entries) >= self.capacity:
            del self.entries[next(iter(self.entries))]
        self.entries[gfn] = entry

    def flush(self, gfns: GfnRange) -> None:
        """Drop the translations of a range."""
        if len(gfns) > len(self.entries):
            gone = [gfn for gfn in self.entries if gfn in gfns]
        else:
            gone = [gfn for gfn in range(gfns.start, gfns.end) if gfn in self.entries]
        for gfn in gone:
            del self.entries[gfn]
        self.flushes += 1
        self.flushed += len(gone)

    def check(self, table: Radix) -> None:
        """Raise AssertionError on the first translation that allows what the page table does not."""
        for gfn, entry in self.entries.items():
            pte = table.lookup(Gfn(gfn))
            assert pte, f"a TLB has gfn {gfn:#x}, which is not mapped"
            assert side_of(pte) is entry.side, f"a TLB has gfn {gfn:#x} on the wrong side"
            assert not entry.dirty or pte & PTE_W, f"a TLB allows stores to gfn {gfn:#x}, which is mapped read-only"
