"""Many ranges at once: in order, apart from each other, and the same pages as the ranges they were made of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.contract.page_ranges import PageRanges
from memfs.contract.units import PageRange
from tests.helpers import pages

some: st.SearchStrategy[list[PageRange]] = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 6)).map(lambda each: pages(each[0], sum(each)))
)


@given(some)
def test_ranges_are_the_pages_that_they_are_made_of(ranges: list[PageRange]) -> None:
    listed = [index for each in ranges for index in range(each.start, each.end)]
    if len(set(listed)) < len(listed):
        with pytest.raises(ValueError, match="overlap"):
            PageRanges.of(ranges)
        return
    found = PageRanges.of(ranges)
    assert found.indexes().tolist() == sorted(listed)
    assert found.pages == len(listed)
    assert found.end == max(listed, default=-1) + 1
    assert list(found) == [pages(start, end) for start, end in found.array.tolist()]
    assert all(one.end < other.start for one, other in zip(found, list(found)[1:], strict=False)), "they touch"
    assert PageRanges(found.array) == found
    assert hash(PageRanges(found.array)) == hash(found)


@pytest.mark.parametrize("wrong", [(2, 2), (3, 2), (-1, 2), (1, 3, 2, 5), (1, 3, 3, 5), (4, 5, 1, 2)])
def test_what_is_not_in_order_is_refused(wrong: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="range"):
        PageRanges(np.array(wrong, np.int64).reshape(-1, 2))


def test_nobody_changes_them() -> None:
    found = PageRanges.of([pages(1, 2)])
    with pytest.raises(ValueError, match="read-only"):
        found.array[0, 0] = 0
