"""Ranges and conversions: what is true of every offset and length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.contract.units import (
    MAX_OFFSET,
    PAGE_SIZE,
    ByteOffset,
    Gfn,
    GfnRange,
    Gpa,
    PageIndex,
    PageRange,
    gfn_to_gpa,
    gpa_to_gfn,
    is_page_aligned,
    offset_in_page,
    page_ceil,
    page_floor,
    page_offset,
)

offsets = st.integers(0, MAX_OFFSET).map(ByteOffset)
small = st.integers(0, 40)
lengths = st.integers(1, 10 * PAGE_SIZE)


@given(offsets)
def test_floor_and_ceil_enclose(offset: ByteOffset) -> None:
    assert page_offset(page_floor(offset)) <= offset <= page_offset(page_ceil(offset))
    assert page_ceil(offset) - page_floor(offset) == (not is_page_aligned(offset))
    assert page_offset(page_floor(offset)) + offset_in_page(offset) == offset
    assert int(gfn_to_gpa(gpa_to_gfn(Gpa(offset)))) == page_offset(page_floor(offset))


@given(offsets, lengths)
def test_covering_touches_and_inside_is_whole(offset: ByteOffset, length: int) -> None:
    covering, inside = PageRange.covering(offset, length), PageRange.inside(offset, length)
    assert covering.offset <= offset < covering.offset + PAGE_SIZE
    assert covering.offset + covering.nbytes - PAGE_SIZE < offset + length <= covering.offset + covering.nbytes
    partial = (not is_page_aligned(offset)) + (not is_page_aligned(offset + length))
    if inside is None:
        assert length < 2 * PAGE_SIZE
    else:
        assert offset <= inside.offset
        assert inside.offset + inside.nbytes <= offset + length
        assert covering.intersect(inside) == inside
        assert len(covering) - len(inside) == partial


@given(small, small, small, small)
def test_ranges_are_sets_of_indexes(a: int, b: int, c: int, d: int) -> None:
    for kind in (PageRange, GfnRange):
        if a >= b or c >= d:
            return
        one, two = kind(a, b), kind(c, d)  # type: ignore[arg-type]
        common = set(range(a, b)) & set(range(c, d))
        met = one.intersect(two)  # type: ignore[arg-type]
        assert set(range(met.start, met.end) if met else ()) == common
        assert one.overlaps(two) == bool(common)  # type: ignore[arg-type]
        assert [x for x in range(50) if x in one] == list(range(a, b))
        assert len(one) == b - a


@pytest.mark.parametrize(("start", "end"), [(0, 0), (5, 5), (6, 5), (-1, 5), (-2, -1)])
def test_what_is_no_range_cannot_be_made(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="not a range"):
        PageRange(PageIndex(start), PageIndex(end))
    with pytest.raises(ValueError, match="not a range"):
        GfnRange(Gfn(start), Gfn(end))


def test_a_range_contains_numbers_only() -> None:
    assert "1" not in PageRange(PageIndex(0), PageIndex(9))
    gfns: object = GfnRange(Gfn(0), Gfn(9))
    assert PageRange(PageIndex(0), PageIndex(9)) != gfns
