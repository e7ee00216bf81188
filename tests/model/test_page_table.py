"""PageTable against a dict: after any sequence of changes both say the same, and the table's invariants hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvmsim.mmu.page_table import (
    MAX_GFN,
    PTE_D,
    PTE_PRIVATE,
    PTE_RWX,
    PTE_W,
    PageTable,
    is_private,
    pte_pfn,
)
from memfs.units import Gfn, GfnRange, Pfn

# Around every boundary of a table, and at both ends of what there is.
STARTS = st.sampled_from([0, 1, 500, 511, 512, 1 << 18, (1 << 18) - 3, (1 << 27) - 700, MAX_GFN - 1500])
RANGES = st.builds(
    lambda start, shift, length: GfnRange(Gfn(start + shift), Gfn(start + shift + length)),
    STARTS,
    st.integers(0, 40),
    st.integers(1, 1100),
)


class PageTableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable()
        self.model: dict[int, tuple[int, bool]] = {}

    @rule(gfns=RANGES, pfn=st.integers(0, 1 << 39), private=st.booleans())
    def map_range(self, gfns: GfnRange, pfn: int, private: bool) -> None:
        self.table.map_range(gfns, Pfn(pfn), PTE_RWX | (PTE_PRIVATE if private else 0))
        self.model.update({gfn: (pfn + gfn - gfns.start, private) for gfn in range(gfns.start, gfns.end)})

    @rule(gfns=RANGES, private=st.sampled_from([None, True, False]))
    def unmap_range(self, gfns: GfnRange, private: bool | None) -> None:
        gone = [
            gfn for gfn in range(gfns.start, gfns.end) if gfn in self.model and private in (None, self.model[gfn][1])
        ]
        assert self.table.count(gfns, private) == len(gone)
        assert self.table.unmap_range(gfns, private) == len(gone)
        for gfn in gone:
            del self.model[gfn]

    @rule(gfns=RANGES)
    def translate(self, gfns: GfnRange) -> None:
        asked = np.random.default_rng(len(gfns)).permutation(np.arange(gfns.start, gfns.end))
        for gfn, pte in zip(asked.tolist(), self.table.translate(asked).tolist(), strict=True):
            assert pte == self.table.lookup(Gfn(gfn))
            assert ((pte_pfn(pte), is_private(pte)) if pte else None) == self.model.get(gfn)

    @rule()
    def unmap_everything(self) -> None:
        assert self.table.unmap_range(GfnRange(Gfn(0), Gfn(MAX_GFN))) == len(self.model)
        self.model.clear()
        assert self.table.nr_tables == 1

    @invariant()
    def sound(self) -> None:
        self.table.check()
        assert self.table.mapped == len(self.model)


TestPageTable = PageTableMachine.TestCase
TestPageTable.settings = settings(max_examples=60, stateful_step_count=20)


def test_flags_are_added_to_one_entry() -> None:
    table = PageTable()
    table.map_range(GfnRange(Gfn(5), Gfn(8)), Pfn(9), PTE_RWX)
    table.set_flags(Gfn(6), PTE_D)
    assert [bool(table.lookup(Gfn(gfn)) & PTE_D) for gfn in range(5, 8)] == [False, True, False]


@pytest.mark.parametrize(
    ("start", "end", "pfn", "flags"),
    [(MAX_GFN - 1, MAX_GFN + 1, 0, PTE_RWX), (0, 2, (1 << 40) - 1, PTE_RWX), (0, 1, -1, PTE_RWX), (0, 1, 1, PTE_W)],
)
def test_what_no_entry_can_hold_is_refused(start: int, end: int, pfn: int, flags: int) -> None:
    table = PageTable()
    with pytest.raises(ValueError, match=r"more than|cannot be read"):
        table.map_range(GfnRange(Gfn(start), Gfn(end)), Pfn(pfn), flags)
    assert (table.mapped, table.nr_tables) == (0, 1)
    for gfn in (-1, MAX_GFN):
        with pytest.raises(ValueError, match="gfn"):
            table.translate(np.array([0, gfn]))
