"""A model of a vCPU's TLB: translations that it used lately, and how often that helped.

What is in it may be used without looking at the page table, so code that removes a mapping or a permission must flush
it in the same critical section; that is the whole of its correctness. A range is flushed by gfn as long as that is
cheaper than flushing everything, which is how the kernel decides, too (kvm_flush_remote_tlbs_range).

An entry holds what the PTE led to, of a page or of a huge leaf, which takes one entry for all of its pages. The oldest
entry of a size makes space for a new one. Engines want to know where a page is: where the pages of huge leaves are is
worked out when it is asked for, and kept beside until something changes.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from kvmsim.mmu.pte import PG_LEVEL_2M, PG_LEVEL_4K, PTE_W, level_pages, level_shift, side_of
from kvmsim.side import Side
from kvmsim.slots.hva import LocalMemory
from memfs.contract.units import Gfn, GfnRange, pages_to_bytes

if TYPE_CHECKING:
    from kvmsim.mmu.radix import Radix

TLB_ENTRIES: Final = 1536  #: as many as the second-level TLB of a Skylake core has, of 4 KiB and of 2 MiB
_ENTRIES_1G: Final = 16  # and of 1 GiB


class Translations(Protocol):
    """What keeps translations beside the page table, in whatever form, and so has to be flushed."""

    def flush(self, gfns: GfnRange) -> None:
        """Drop the translations of a range. It is called under the MMU lock; when it returns nobody uses them."""

    def check(self, table: Radix) -> None:
        """Raise AssertionError on the first translation that allows what the page table does not."""


@dataclass(slots=True)
class TlbEntry:
    """The translation of a page, or of a huge leaf."""

    memory: mmap.mmap | memoryview | LocalMemory
    offset: int  #: in that memory, in bytes
    side: Side
    dirty: bool  #: the PTE is writable and marked as dirty, so that a store needs no walk


class Tlb:
    """Translations by gfn."""

    def __init__(self, capacity: int = TLB_ENTRIES) -> None:
        self.capacity: Final = capacity
        self.entries: Final[dict[int, TlbEntry]] = {}  #: of pages, by gfn
        self.huge: Final[dict[int, dict[int, TlbEntry]]] = {}  #: by level, of leaves, by gfn / their pages
        self._within: Final[dict[int, TlbEntry]] = {}  # pages of those, by gfn
        self.hits = 0
        self.misses = 0
        self.flushes = 0  #: how often something was taken out of it
        self.flushed = 0  #: how many entries

    @property
    def version(self) -> int:
        """A number that differs after each change of the entries."""
        return self.misses + self.flushes

    def lookup(self, gfn: Gfn, side: Side, write: bool) -> TlbEntry | None:
        """Return the translation of a page that allows an access. Does not count as a hit yet."""
        entry = self.entries.get(gfn)
        if entry is not None and entry.side is side and (entry.dirty or not write):
            return entry
        return self._lookup_huge(gfn, side, write) if self.huge else None

    def _lookup_huge(self, gfn: Gfn, side: Side, write: bool) -> TlbEntry | None:
        entry = self._within.get(gfn)
        if entry is not None and entry.side is side and (entry.dirty or not write):
            return entry
        for level, leaves in self.huge.items():
            leaf = leaves.get(gfn >> level_shift(level))
            if leaf is not None and leaf.side is side and (leaf.dirty or not write):
                return self._page_of(leaf, gfn, level)
        return None

    def _page_of(self, leaf: TlbEntry, gfn: Gfn, level: int) -> TlbEntry:
        offset = leaf.offset + pages_to_bytes(gfn & (level_pages(level) - 1))
        if len(self._within) >= self.capacity:
            self._within.clear()
        page = self._within[gfn] = TlbEntry(leaf.memory, offset, leaf.side, leaf.dirty)
        return page

    def fill(self, gfn: Gfn, entry: TlbEntry, level: int = PG_LEVEL_4K) -> TlbEntry:
        """Insert the translation that a walk found after a miss, of the leaf around a gfn. Returns that of its page."""
        self.misses += 1
        if level == PG_LEVEL_4K:
            _insert(self.entries, gfn, entry, self.capacity)
            return entry
        capacity = self.capacity if level == PG_LEVEL_2M else _ENTRIES_1G
        if _insert(self.huge.setdefault(level, {}), gfn >> level_shift(level), entry, capacity):
            self._within.clear()
        return self._page_of(entry, gfn, level)

    def flush(self, gfns: GfnRange) -> None:
        """Drop the translations of a range."""
        if len(gfns) > len(self.entries):
            gone = [gfn for gfn in self.entries if gfn in gfns]
        else:
            gone = [gfn for gfn in range(gfns.start, gfns.end) if gfn in self.entries]
        for gfn in gone:
            del self.entries[gfn]
        self.flushes += 1
        self.flushed += len(gone) + self._flush_huge(gfns)

    def _flush_huge(self, gfns: GfnRange) -> int:
        """Drop leaves that have a page in a range. Returns how many."""
        flushed = 0
        for level, leaves in self.huge.items():
            pages = level_pages(level)
            first, last = gfns.start // pages, (gfns.end - 1) // pages
            gone = [number for number in leaves if first <= number <= last]
            for number in gone:
                del leaves[number]
            flushed += len(gone)
        if flushed:
            self._within.clear()
        return flushed

    def check(self, table: Radix) -> None:
        """Raise AssertionError on the first translation that allows what the page table does not."""
        for gfn, entry in self.entries.items():
            pte = table.lookup(Gfn(gfn))
            assert pte, f"a TLB has gfn {gfn:#x}, which is not mapped"
            assert side_of(pte) is entry.side, f"a TLB has gfn {gfn:#x} on the wrong side"
            assert not entry.dirty or pte & PTE_W, f"a TLB allows stores to gfn {gfn:#x}, which is mapped read-only"
        for level, huge in self.huge.items():
            for number, entry in huge.items():
                pages = level_pages(level)
                gfns = GfnRange(Gfn(number * pages), Gfn((number + 1) * pages))
                assert table.count(gfns, entry.side) == pages, f"a TLB has gfns {gfns}, of which some are not mapped"
                writable = all((each.ptes & PTE_W).all() for each in table.leaves(gfns))
                assert not entry.dirty or writable, f"a TLB allows stores to gfns {gfns}, of which some are read-only"


def _insert(entries: dict[int, TlbEntry], key: int, entry: TlbEntry, capacity: int) -> bool:
    """Insert an entry. Returns whether another had to make space for it."""
    entries.pop(key, None)
    is_full = len(entries) >= capacity
    if is_full:
        del entries[next(iter(entries))]
    entries[key] = entry
    return is_full
