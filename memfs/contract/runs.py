"""Runs of pages as arrays: int64, shape (n, 2), each a start and an end; in ascending order, and none overlaps another.

For views of memory, which may be a TiB: unlike those of `PageRanges`, which conversions use, these operations cost what
there is of runs, however many pages those have. Runs may touch, and arguments are not checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Runs: TypeAlias = npt.NDArray[np.int64]

NO_RUNS: Final[Runs] = np.empty((0, 2), np.int64)


def runs_of(pairs: Iterable[tuple[int, int]]) -> Runs:
    """Return runs from their starts and ends."""
    return np.array(list(pairs), np.int64).reshape(-1, 2)


def count(runs: Runs) -> int:
    """Return how many pages there are in all runs."""
    return int((runs[:, 1] - runs[:, 0]).sum())


def covered(runs: Runs, edges: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return how many pages of each interval between two neighbours of `edges`, ascending, are in runs.

    >>> covered(runs_of([(1, 3), (5, 9)]), np.array([0, 2, 4, 8]))
    array([1, 1, 3])
    """
    if not len(runs):
        return np.zeros(max(0, len(edges) - 1), np.int64)
    starts, ends = runs.T
    before = np.concatenate(([0], np.cumsum(ends - starts)))
    number = np.searchsorted(starts, edges, side="right")  # of runs that begin at or before an edge
    beyond = np.where(number > 0, np.maximum(0, ends[number - 1] - edges), 0)
    return np.diff(before[number] - beyond)


def merged(runs: Runs) -> Runs:
    """Return the same pages in runs that do not touch.

    >>> merged(runs_of([(1, 3), (3, 4), (6, 7)])).tolist()
    [[1, 4], [6, 7]]
    """
    if len(runs) < 2:
        return runs
    gaps = runs[1:, 0] > runs[:-1, 1]
    starts, ends = np.concatenate(([True], gaps)), np.concatenate((gaps, [True]))
    return np.stack((runs[starts, 0], runs[ends, 1]), axis=1)


def within(runs: Runs, others: Runs) -> Runs:
    """Return the pages of runs that are in others, too.

    >>> within(runs_of([(0, 8)]), runs_of([(2, 3), (6, 9)])).tolist()
    [[2, 3], [6, 8]]
    """
    return _select(runs, others, is_in_others=True)


def without(runs: Runs, others: Runs) -> Runs:
    """Return the pages of runs that are not in others.

    >>> without(runs_of([(0, 8)]), runs_of([(2, 3), (6, 9)])).tolist()
    [[0, 2], [3, 6]]
    """
    return _select(runs, others, is_in_others=False)


def whole_blocks(runs: Runs, pages: int) -> Runs:
    """Return the aligned blocks of so many pages that lie wholly in one run, which must not touch another.

    >>> whole_blocks(runs_of([(1, 9), (10, 12)]), 4).tolist()
    [[4, 8]]
    """
    starts, ends = -(-runs[:, 0] // pages) * pages, runs[:, 1] // pages * pages
    return np.stack((starts, ends), axis=1)[starts < ends]


def _select(runs: Runs, others: Runs, *, is_in_others: bool) -> Runs:
    if not len(runs):
        return NO_RUNS
    edges = np.unique(np.concatenate((runs.reshape(-1), others.reshape(-1))))
    selected = (covered(runs, edges) > 0) & ((covered(others, edges) > 0) == is_in_others)
    return merged(np.stack((edges[:-1], edges[1:]), axis=1)[selected])
