"""Runs of pages against plain arrays with one element a page."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from memfs.contract.runs import Runs, count, covered, merged, runs_of, whole_blocks, within, without

SPAN = 40


@st.composite
def some_runs(draw: st.DrawFn) -> Runs:
    """Draw runs, some of which touch."""
    edges = sorted(draw(st.lists(st.integers(0, SPAN), max_size=12)))
    pairs = [(start, end) for start, end in pairwise(edges) if start < end]
    return runs_of(each for each in pairs if draw(st.booleans()))


def pages_of(runs: Runs) -> npt.NDArray[np.bool_]:
    pages = np.zeros(SPAN, bool)
    for start, end in runs.tolist():
        pages[start:end] = True
    return pages


@given(some_runs(), some_runs(), st.integers(1, 7))
def test_runs_are_sets_of_pages(one: Runs, other: Runs, size: int) -> None:
    a, b = pages_of(one), pages_of(other)
    assert count(one) == a.sum()
    assert (pages_of(merged(one)) == a).all()
    assert all(end < start for (_, end), (start, _) in pairwise(merged(one).tolist()))
    assert (pages_of(within(one, other)) == (a & b)).all()
    assert (pages_of(without(one, other)) == (a & ~b)).all()
    edges = np.append(np.arange(0, SPAN, size), SPAN)
    assert covered(one, edges).tolist() == [a[start:end].sum() for start, end in pairwise(edges.tolist())]
    whole = np.zeros(SPAN, bool)
    for start in range(0, SPAN - size + 1, size):
        whole[start : start + size] = a[start : start + size].all()
    assert (pages_of(whole_blocks(merged(one), size)) == whole).all()
