"""The TLB: what is flushed from it is gone, and nothing else is."""

from __future__ import annotations

import pytest

from kvmsim.mmu.page_table import PageTable
from kvmsim.mmu.pte import PG_LEVEL_1G, PG_LEVEL_2M, PTE_PRIVATE, PTE_R, PTE_W, level_pages
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


# -- huge leaves -------------------------------------------------------------------------------------------------------

HUGE, GIB = level_pages(PG_LEVEL_2M), level_pages(PG_LEVEL_1G)


def offset(entry: TlbEntry | None) -> int | None:
    return entry.offset if entry is not None else None


@pytest.mark.parametrize("level", [PG_LEVEL_2M, PG_LEVEL_1G])
def test_a_huge_leaf_takes_one_entry_for_all_of_its_pages(level: int) -> None:
    tlb, memory, pages = Tlb(), memoryview(bytes(8)), level_pages(level)
    page = tlb.fill(Gfn(3 * pages + 7), TlbEntry(memory, 1 << 20, Side.PRIVATE, dirty=False), level)
    assert page.offset == (1 << 20) + 7 * PAGE_SIZE
    for within in (0, 7, pages - 1):
        found = tlb.lookup(Gfn(3 * pages + within), Side.PRIVATE, write=False)
        assert offset(found) == (1 << 20) + within * PAGE_SIZE
        assert tlb.lookup(Gfn(3 * pages + within), Side.PRIVATE, write=True) is None
        assert tlb.lookup(Gfn(3 * pages + within), Side.SHARED, write=False) is None
    assert [tlb.lookup(Gfn(gfn), Side.PRIVATE, write=False) for gfn in (3 * pages - 1, 4 * pages)] == [None, None]
    tlb.fill(Gfn(3 * pages), TlbEntry(memory, 1 << 20, Side.PRIVATE, dirty=True), level)
    assert tlb.lookup(Gfn(3 * pages + 7), Side.PRIVATE, write=True) is not None
    assert (tlb.misses, len(tlb.huge[level])) == (2, 1)


@pytest.mark.parametrize("span", [(0, HUGE + 1), (2 * HUGE - 1, 2 * HUGE), (HUGE, 2 * HUGE), (0, 1 << 40)])
def test_what_touches_a_huge_leaf_flushes_all_of_it(span: tuple[int, int]) -> None:
    tlb, memory = Tlb(), memoryview(bytes(8))
    for number in range(1, 4):
        tlb.fill(Gfn(number * HUGE), TlbEntry(memory, 0, Side.PRIVATE, dirty=True), PG_LEVEL_2M)
    tlb.fill(Gfn(0), TlbEntry(memory, 0, Side.PRIVATE, dirty=True), PG_LEVEL_1G)
    tlb.flush(gfns(*span))
    assert tlb.lookup(Gfn(HUGE + 9), Side.PRIVATE, write=False) is None
    left = 0 if span[1] == 1 << 40 else 2
    assert (len(tlb.huge[PG_LEVEL_2M]), len(tlb.huge[PG_LEVEL_1G]), tlb.flushed) == (left, 0, 4 - left)


def test_oldest_leaf_makes_space_and_takes_its_pages_along() -> None:
    tlb, memory = Tlb(capacity=2), memoryview(bytes(8))
    for number in range(3):
        tlb.fill(Gfn(number * HUGE), TlbEntry(memory, 0, Side.PRIVATE, dirty=True), PG_LEVEL_2M)
    found = [tlb.lookup(Gfn(number * HUGE), Side.PRIVATE, write=False) is not None for number in range(3)]
    assert found == [False, True, True]


def test_tlb_with_more_of_a_leaf_than_is_mapped_is_found() -> None:
    tlb, table, memory = Tlb(), PageTable(), memoryview(bytes(8))
    table.map_range(gfns(0, 2 * HUGE), Pfn(GIB), PTE_R | PTE_W | PTE_PRIVATE, order=9)
    tlb.fill(Gfn(0), TlbEntry(memory, 0, Side.PRIVATE, dirty=True), PG_LEVEL_2M)
    tlb.check(table)
    table.write_protect(gfns(5, 6))
    with pytest.raises(AssertionError, match="read-only"):
        tlb.check(table)
    tlb.fill(Gfn(0), TlbEntry(memory, 0, Side.PRIVATE, dirty=False), PG_LEVEL_2M)
    tlb.check(table)
    table.unmap_range(gfns(5, 6))
    with pytest.raises(AssertionError, match="not mapped"):
        tlb.check(table)


def test_load_hits_what_a_store_does_not() -> None:
    tlb, memory = Tlb(), memoryview(bytes(1))
    for gfn, dirty in ((1, False), (2, True)):
        tlb.fill(Gfn(gfn), TlbEntry(memory, 0, Side.SHARED, dirty=dirty))
    hits = [[tlb.lookup(Gfn(gfn), Side.SHARED, write) is not None for write in (False, True)] for gfn in (1, 2)]
    assert hits == [[True, False], [True, True]]
    assert tlb.lookup(Gfn(2), Side.PRIVATE, False) is None
