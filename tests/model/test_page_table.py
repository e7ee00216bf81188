"""PageTable against a dict: after any sequence of changes both say the same, and the table's invariants hold.

The dict has one entry a 4 KiB page and knows nothing of huge leaves: whether a mapping is huge may never be seen in
what is mapped where. How large leaves are is tested by itself below.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmsim.mmu.page_table import PageTable
from kvmsim.mmu.pte import (
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    PTE_A,
    PTE_D,
    PTE_HUGE,
    PTE_PRIVATE,
    PTE_RWX,
    PTE_W,
    level_pages,
    pte_pfn,
    side_of,
)
from kvmsim.side import Side
from memfs.contract.units import ORDER_1G, ORDER_2M, ORDER_4K, Gfn, GfnRange, Pfn

MAX_GFN = 1 << 36
BLOCK_2M, BLOCK_1G = 1 << ORDER_2M, 1 << ORDER_1G

# Around every boundary of a table, and at both ends of what there is.
STARTS = st.sampled_from([0, 1, 500, 511, 512, 1 << 18, (1 << 18) - 3, (1 << 27) - 700, MAX_GFN - 1500])
RANGES = st.builds(
    lambda start, shift, length: GfnRange(Gfn(start + shift), Gfn(start + shift + length)),
    STARTS,
    st.integers(0, 40),
    st.integers(1, 1100),
)
SIDES = st.sampled_from([Side.BOTH, Side.PRIVATE, Side.SHARED])


def gfn_range(start: int, length: int) -> GfnRange:
    return GfnRange(Gfn(start), Gfn(start + length))


class PageTableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model: dict[int, int] = {}  # gfn: PTE without PTE_HUGE

    @initialize(levels=st.sampled_from([4, 5]))
    def make(self, levels: int) -> None:
        self.table = PageTable(levels)

    def put(self, gfns: GfnRange, pfn: int, flags: int, order: int) -> None:
        self.table.map_range(gfns, Pfn(pfn), flags, order)
        self.model.update(
            {gfn: ((pfn + gfn - gfns.start) << 12) | flags for gfn in range(gfns.start, gfns.end)},
        )

    def mapped(self, gfns: GfnRange, side: Side = Side.BOTH) -> list[int]:
        return [gfn for gfn in range(gfns.start, gfns.end) if gfn in self.model and side_of(self.model[gfn]) in side]

    @rule(gfns=RANGES, pfn=st.integers(0, 1 << 39), private=st.booleans())
    def map_anywhere(self, gfns: GfnRange, pfn: int, private: bool) -> None:
        self.put(gfns, pfn, PTE_RWX | (PTE_PRIVATE if private else 0), ORDER_2M)

    @rule(gfns=RANGES, private=st.booleans(), order=st.sampled_from([ORDER_4K, ORDER_2M, ORDER_1G]))
    def map_aligned(self, gfns: GfnRange, private: bool, order: int) -> None:
        self.put(gfns, (1 << 37) + gfns.start, PTE_RWX | (PTE_PRIVATE if private else 0), order)

    @rule(gfns=RANGES, step=st.integers(1, 5), pfn=st.integers(0, 1 << 38))
    def map_pages(self, gfns: GfnRange, step: int, pfn: int) -> None:
        wanted = np.array([gfn for gfn in range(gfns.start, gfns.end, step) if gfn not in self.model], np.int64)
        frames = pfn + np.random.default_rng(step).permutation(len(wanted))
        self.table.map_pages(wanted, frames, PTE_RWX)
        self.model.update(dict(zip(wanted.tolist(), ((frames << 12) | PTE_RWX).tolist(), strict=True)))
        mapped = self.mapped(gfns)
        if mapped:
            with pytest.raises(ValueError, match="is mapped"):
                self.table.map_pages(np.array(mapped[:1]), np.array([1]), PTE_RWX)

    @rule(gfns=RANGES, side=SIDES)
    def unmap_range(self, gfns: GfnRange, side: Side) -> None:
        gone = self.mapped(gfns, side)
        assert self.table.count(gfns, side) == len(gone)
        assert self.table.unmap_range(gfns, side) == len(gone)
        for gfn in gone:
            del self.model[gfn]

    @rule(gfns=RANGES, step=st.integers(1, 5), side=SIDES)
    def unmap_pages(self, gfns: GfnRange, step: int, side: Side) -> None:
        asked = np.arange(gfns.start, gfns.end, step)
        gone = set(self.mapped(gfns, side)) & set(asked.tolist())
        former = self.table.unmap_pages(asked, side)
        for gfn, pte in zip(asked.tolist(), former.tolist(), strict=True):
            assert pte & ~PTE_HUGE == (self.model.pop(gfn) if gfn in gone else 0)

    @rule(gfns=RANGES)
    def write_protect(self, gfns: GfnRange) -> None:
        writable = [gfn for gfn in self.mapped(gfns) if self.model[gfn] & PTE_W]
        assert self.table.write_protect(gfns) == len(writable)
        self.model.update({gfn: self.model[gfn] & ~PTE_W for gfn in writable})

    @rule(gfns=RANGES)
    def mark(self, gfns: GfnRange) -> None:
        self.table.protect_range(gfns, add=PTE_A | PTE_D)
        self.model.update({gfn: self.model[gfn] | PTE_A | PTE_D for gfn in self.mapped(gfns)})

    @rule(gfns=RANGES)
    def collapse(self, gfns: GfnRange) -> None:
        block = gfn_range(gfns.start & -BLOCK_2M, BLOCK_2M)
        first = self.model.get(block.start, 0)
        ignored = PTE_A | PTE_D
        whole = bool(first) and pte_pfn(first) % BLOCK_2M == 0
        whole = whole and all(
            self.model.get(block.start + number, 0) & ~ignored == (first & ~ignored) + (number << 12)
            for number in range(BLOCK_2M)
        )
        if self.table.collapse(gfns.start, ORDER_2M):
            assert whole
            marks = {self.model[gfn] & ignored for gfn in self.mapped(block)}
            together = (PTE_A if any(mark & PTE_A for mark in marks) else 0) | (
                PTE_D if any(mark & PTE_D for mark in marks) else 0
            )
            self.model.update({gfn: (self.model[gfn] & ~ignored) | together for gfn in self.mapped(block)})
        else:
            assert not whole

    @rule(gfns=RANGES)
    def translate(self, gfns: GfnRange) -> None:
        asked = np.random.default_rng(len(gfns)).permutation(np.arange(gfns.start, gfns.end))
        ptes = self.table.translate(asked)
        for gfn, pte in zip(asked.tolist(), ptes.tolist(), strict=True):
            assert pte & ~PTE_HUGE == self.model.get(gfn, 0)
        some = np.sort(asked[: 1 + len(asked) // 2])
        assert np.array_equal(self.table.translate_in_order(some), self.table.translate(some))
        for gfn in asked[::97].tolist():
            assert self.table.lookup(Gfn(gfn)) & ~PTE_HUGE == self.model.get(gfn, 0)

    @rule(gfns=RANGES)
    def test_age(self, gfns: GfnRange) -> None:
        young = any(self.model[gfn] & PTE_A for gfn in self.mapped(gfns))
        assert self.table.test_age(gfns) >= young  # a huge leaf is young as a whole

    @rule()
    def unmap_everything(self) -> None:
        assert self.table.unmap_range(self.table.everything) == len(self.model)
        self.model.clear()
        assert self.table.nr_tables == 1

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "table"):
            self.table.check()
            assert self.table.mapped == len(self.model)


TestPageTable = PageTableMachine.TestCase
TestPageTable.settings = settings(max_examples=60, stateful_step_count=20)


# -- sizes of leaves -------------------------------------------------------------------------------------


def levels_in(table: PageTable, gfns: GfnRange) -> list[tuple[int, int]]:
    """(level, gfns mapped) for each group of leaves."""
    return [
        (leaves.level, int(np.count_nonzero(leaves.ptes)) * level_pages(leaves.level)) for leaves in table.leaves(gfns)
    ]


def test_leaves_are_as_large_as_alignment_and_order_allow() -> None:
    table = PageTable()
    table.map_range(
        gfn_range(BLOCK_1G - BLOCK_2M - 1, BLOCK_1G + 2 * BLOCK_2M + 2), Pfn(BLOCK_1G - BLOCK_2M - 1), PTE_RWX, ORDER_1G
    )
    assert levels_in(table, table.everything) == [
        (PG_LEVEL_4K, 1),
        (PG_LEVEL_2M, BLOCK_2M),
        (PG_LEVEL_1G, BLOCK_1G),
        (PG_LEVEL_2M, BLOCK_2M),
        (PG_LEVEL_4K, 1),
    ]
    table.check()


def test_frames_that_are_not_aligned_as_gfns_are_get_small_leaves() -> None:
    table = PageTable()
    table.map_range(gfn_range(0, BLOCK_2M), Pfn(BLOCK_2M + 1), PTE_RWX, ORDER_1G)
    assert levels_in(table, table.everything) == [(PG_LEVEL_4K, BLOCK_2M)]


def test_change_inside_a_huge_leaf_splits_it_and_mapping_it_whole_again_collapses_it() -> None:
    table = PageTable()
    block = gfn_range(BLOCK_1G, BLOCK_1G)
    table.map_range(block, Pfn(BLOCK_1G), PTE_RWX, ORDER_1G)
    assert table.huge == {PG_LEVEL_2M: 0, PG_LEVEL_1G: 1}
    hole = Gfn(BLOCK_1G + 5 * BLOCK_2M + 7)
    assert table.unmap_range(gfn_range(hole, 1)) == 1
    assert table.huge == {PG_LEVEL_2M: BLOCK_2M - 1, PG_LEVEL_1G: 0}
    assert table.mapped == BLOCK_1G - 1
    assert [bool(table.lookup(Gfn(hole + step))) for step in (-1, 0, 1)] == [True, False, True]
    assert not table.collapse(hole, ORDER_2M)
    table.map_range(gfn_range(hole, 1), Pfn(hole), PTE_RWX)
    assert table.collapse(hole, ORDER_1G)
    assert table.huge == {PG_LEVEL_2M: 0, PG_LEVEL_1G: 1}
    assert table.nr_tables == 2  # the root, and the one that holds the leaf
    table.check()


def test_mapping_over_small_leaves_frees_their_table() -> None:
    table = PageTable()
    table.map_range(gfn_range(0, BLOCK_2M), Pfn(BLOCK_2M), PTE_RWX)
    assert table.nr_tables == 4
    table.map_range(gfn_range(0, BLOCK_2M), Pfn(BLOCK_2M), PTE_RWX, ORDER_2M)
    assert (table.nr_tables, table.mapped) == (3, BLOCK_2M)
    table.check()


def test_part_of_a_huge_leaf_loses_a_permission() -> None:
    table = PageTable()
    table.map_range(gfn_range(0, BLOCK_2M), Pfn(0), PTE_RWX, ORDER_2M)
    assert table.write_protect(gfn_range(3, 2)) == 2
    assert [bool(table.lookup(Gfn(gfn)) & PTE_W) for gfn in range(2, 6)] == [True, False, False, True]
    assert table.huge[PG_LEVEL_2M] == 0


def test_side_that_is_not_meant_does_not_split_a_huge_leaf() -> None:
    table = PageTable()
    table.map_range(gfn_range(0, BLOCK_2M), Pfn(0), PTE_RWX | PTE_PRIVATE, ORDER_2M)
    assert table.unmap_range(gfn_range(3, 2), Side.SHARED) == 0
    assert table.huge[PG_LEVEL_2M] == 1


def test_walk_shows_every_level() -> None:
    for levels in (4, 5):
        table = PageTable(levels)
        table.map_range(gfn_range(0, BLOCK_2M), Pfn(BLOCK_2M), PTE_RWX, ORDER_2M)
        table.map_range(gfn_range(BLOCK_2M, 1), Pfn(7), PTE_RWX)
        huge, small, absent = table.walk(Gfn(3)), table.walk(Gfn(BLOCK_2M)), table.walk(Gfn(BLOCK_1G))
        assert (huge.level, len(huge.entries), pte_pfn(huge.pte)) == (PG_LEVEL_2M, levels - 1, BLOCK_2M)
        assert (small.level, len(small.entries), pte_pfn(small.pte)) == (PG_LEVEL_4K, levels, 7)
        assert (absent.level, absent.pte) == (PG_LEVEL_1G, 0)
        assert pte_pfn(table.lookup(Gfn(3))) == BLOCK_2M + 3


def test_age_is_forgotten_when_asked() -> None:
    table = PageTable()
    table.map_range(gfn_range(0, 8), Pfn(9), PTE_RWX)
    table.set_flags(Gfn(3), PTE_A)
    assert [table.test_age(gfn_range(gfn, 1)) for gfn in (2, 3)] == [False, True]
    assert table.age(gfn_range(0, 8))
    assert not table.age(gfn_range(0, 8))


def test_flags_are_added_to_one_entry() -> None:
    table = PageTable()
    table.map_range(GfnRange(Gfn(5), Gfn(8)), Pfn(9), PTE_RWX)
    table.set_flags(Gfn(6), PTE_D)
    assert [bool(table.lookup(Gfn(gfn)) & PTE_D) for gfn in range(5, 8)] == [False, True, False]


def test_one_tebibyte_in_2m_leaves_is_small_and_ends_empty() -> None:
    table = PageTable()
    whole = gfn_range(0, 1 << 28)
    table.map_range(whole, Pfn(0), PTE_RWX, ORDER_2M)
    assert table.nbytes <= 8 << 20
    assert table.count(whole) == table.mapped == 1 << 28
    table.unmap_range(whole)
    assert table.nr_tables == 1
    table.check()


@pytest.mark.parametrize(
    ("start", "end", "pfn", "flags"),
    [
        (MAX_GFN - 1, MAX_GFN + 1, 0, PTE_RWX),
        (0, 2, (1 << 40) - 1, PTE_RWX),
        (0, 1, -1, PTE_RWX),
        (0, 1, 1, PTE_W),
        (0, 1, 1, PTE_RWX | PTE_HUGE),
    ],
)
def test_what_no_entry_can_hold_is_refused(start: int, end: int, pfn: int, flags: int) -> None:
    table = PageTable()
    with pytest.raises(ValueError, match=r"more than|make no leaf"):
        table.map_range(GfnRange(Gfn(start), Gfn(end)), Pfn(pfn), flags)
    with pytest.raises(ValueError, match="no leaf has order"):
        table.map_range(gfn_range(0, 1), Pfn(0), PTE_RWX, 3)
    with pytest.raises(ValueError, match="cannot be changed"):
        table.protect_range(gfn_range(0, 1), clear=1)
    assert (table.mapped, table.nr_tables) == (0, 1)
    for gfn in (-1, MAX_GFN):
        with pytest.raises(ValueError, match="gfn"):
            table.translate(np.array([0, gfn]))
        with pytest.raises(ValueError, match="gfn"):
            table.walk(Gfn(gfn))


def test_levels_are_four_or_five() -> None:
    assert PageTable(5).max_gfn == 1 << 45
    with pytest.raises(ValueError, match="4 or 5"):
        PageTable(3)
