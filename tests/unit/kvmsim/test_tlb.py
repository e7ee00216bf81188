"""The TLB: what is flushed from it is gone, and nothing else is."""

from __future__ import annotations

import pytest

from kvmsim.mmu.tlb import Tlb, TlbEntry
from kvmsim.side import Side
from memfs.contract.units import Gfn, GfnRange


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
