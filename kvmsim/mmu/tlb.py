"""A model of a vCPU's TLB: translations that it used lately, and how often that helped.

What is in it may be used without looking at the page table, so whoever takes a mapping or a permission away must flush
it in the same critical section; that is the whole of its correctness. A range is flushed by gfn as long as that is
cheaper than forgetting everything, which is how the kernel decides, too (kvm_flush_remote_tlbs_range).

What an entry holds is the engine's choice: usually what the PTE led to. The oldest entry makes room for a new one.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

from memfs.contract.units import Gfn, GfnRange

TLB_ENTRIES: Final = 1536  #: as many as the second-level TLB of a Skylake core has

_T = TypeVar("_T")


class Tlb(Generic[_T]):
    """Translations by gfn. `entries` may be read directly: an engine's loop has no time for a call."""

    def __init__(self, capacity: int = TLB_ENTRIES) -> None:
        self.capacity: Final = capacity
        self.entries: Final[dict[int, _T]] = {}
        self.hits = 0
        self.misses = 0
        self.flushes = 0  #: how often something was taken out of it
        self.flushed = 0  #: how many entries

    @property
    def version(self) -> int:
        """A number that is another one after each change of the entries."""
        return self.misses + self.flushes

    def fill(self, gfn: Gfn, entry: _T) -> None:
        """A walk was made after a miss."""
        self.misses += 1
        self.entries.pop(gfn, None)
        if len(self.entries) >= self.capacity:
            del self.entries[next(iter(self.entries))]
        self.entries[gfn] = entry

    def flush(self, gfns: GfnRange) -> None:
        """Forget the translations of a range."""
        if len(gfns) > len(self.entries):
            gone = [gfn for gfn in self.entries if gfn in gfns]
        else:
            gone = [gfn for gfn in range(gfns.start, gfns.end) if gfn in self.entries]
        for gfn in gone:
            del self.entries[gfn]
        self.flushes += 1
        self.flushed += len(gone)
