"""The TLB: what is flushed from it is gone, and nothing else is."""

from __future__ import annotations

import pytest

from kvmsim.mmu.page_table import PageTable
from kvmsim.mmu.pte import PTE_PRIVATE, PTE_R
from kvmsim.mmu.tlb import Tlb, TlbEntry
from kvmsim.side import Side
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange, Pfn


def gfns(start: int, end: int) -> GfnRange:
    return GfnRange(Gfn(start), Gfn(end))


@pytest.mark.parametrize("span", [(3, 5), (0, 1 << 40)])
def test_tlb_forgets_a_range_and_counts(span: tuple[int, int]) -> None:
    tlb, memory = Tlb(capacity=4), memoryview(bytes(6))
    for gfn in range(6):
        tlb.fill(Gfn(gfn), TlbEntry(memory, gfn, Side.SHARED, dirty=False))
    assert list(tlb.entries) == [2, 3, 4, 5]
    tlb.flush(gfns(*span))
    assert list(tlb.entries) == [gfn for gfn in (2, 3, 4, 5) if not span[0] <= gfn < span[1]]
    assert (tlb.misses, tlb.flushes, tlb.flushed) == (6, 1, 4 - len(tlb.entries))


@pytest.mark.parametrize(
    ("gfn", "side", "dirty", "wrong"),
    [
        (4, Side.SHARED, False, "wrong side"),
        (4, Side.PRIVATE, True, "read-only"),
        (9, Side.PRIVATE, False, "not mapped"),
    ],
)
def test_tlb_that_allows_more_than_the_page_table_is_found(gfn: int, side: Side, dirty: bool, wrong: str) -> None:
    tlb, table, memory = Tlb(), PageTable(), memoryview(bytearray(PAGE_SIZE))
    table.map_range(gfns(3, 5), Pfn(100), PTE_R | PTE_PRIVATE)
    tlb.fill(Gfn(3), TlbEntry(memory, 0, Side.PRIVATE, dirty=False))
    tlb.check(table)
    tlb.fill(Gfn(gfn), TlbEntry(memory, 0, side, dirty))
    with pytest.raises(AssertionError, match=wrong):
        tlb.check(table)
