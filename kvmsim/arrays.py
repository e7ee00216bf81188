"""Arrays of frame numbers: what faults on many gfns at once, the page table and conversions do with them alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from memfs.contract.units import Gfn, GfnRange

Numbers = npt.NDArray[np.int64]
Pairs = npt.NDArray[np.int64]  #: of shape (n, 2): half-open ranges of numbers
Gfns = GfnRange | Pairs  #: one range, for which numpy would take longer than all else, or many
_T = TypeVar("_T", bound=np.generic)


class _Range(Protocol):
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


_MANY: Final = 8  # so many ranges
_SHORT: Final = 64  # of less than so many numbers are worth an array
_NONE: Final = np.empty(0, np.int64)
_SPARSE: Final = 64  # numbers are sorted, and not marked in a table, if their span exceeds this many times their count


def distinct(numbers: npt.NDArray[np.integer[Any]], end: int) -> Numbers:
    """Return numbers in ascending order, each once, as int64. Raises ValueError if one is not in [0, end).

    >>> distinct(np.array([7, 3, 7], np.uint64), 8)
    array([3, 7])
    """
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError("not an array of integers of one dimension")
    if not len(numbers):
        return np.empty(0, np.int64)
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= end:
        raise ValueError(f"{low if low < 0 else high:#x} is not in [0, {end:#x})")
    if high - low >= _SPARSE * len(numbers):
        return np.unique(numbers).astype(np.int64)
    present = np.zeros(high - low + 1, np.bool_)
    present[numbers - numbers.dtype.type(low)] = True
    found: Numbers = np.flatnonzero(present)
    found += low
    return found


def firsts(keys: npt.NDArray[Any]) -> Numbers:
    """Return where each stretch of equal keys begins.

    >>> firsts(np.array([4, 4, 9, 9, 9, 4]))
    array([0, 2, 5])
    """
    if not len(keys):
        return np.empty(0, np.int64)
    changes = np.flatnonzero(keys[1:] != keys[:-1])
    changes += 1
    return np.concatenate((np.zeros(1, np.int64), changes))


def stretches(keys: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Generate the stretches of equal keys, as half-open ranges of positions.

    >>> list(stretches(np.array([4, 4, 9, 9, 9, 4])))
    [(0, 2), (2, 5), (5, 6)]
    """
    return itertools.pairwise([*firsts(keys).tolist(), len(keys)])


def runs(numbers: Numbers) -> Iterator[tuple[int, int]]:
    """Generate the runs of consecutive numbers among ascending ones, as half-open ranges.

    >>> list(runs(np.array([3, 4, 5, 9])))
    [(3, 6), (9, 10)]
    """
    for start, end in stretches(numbers - np.arange(len(numbers))):
        yield int(numbers[start]), int(numbers[end - 1]) + 1


def pairs(ranges: Iterable[_Range]) -> Pairs:
    """Return ranges of numbers as an array."""
    return np.array([(each.start, each.end) for each in ranges], np.int64).reshape(-1, 2)


def each_of(gfns: Gfns) -> Iterator[GfnRange]:
    """Generate ranges of gfns."""
    if isinstance(gfns, GfnRange):
        yield gfns
        return
    for start, end in gfns.tolist():
        yield GfnRange(Gfn(start), Gfn(end))


def expand(ranges: Pairs) -> Numbers:
    """Return each number in ranges, in their order.

    >>> expand(np.array([[3, 6], [9, 10]]))
    array([3, 4, 5, 9])
    """
    lengths = ranges[:, 1] - ranges[:, 0]
    numbers: Numbers = np.repeat(ranges[:, 0] - (np.cumsum(lengths) - lengths), lengths)
    numbers += np.arange(len(numbers))
    return numbers


def divide(gfns: Gfns) -> tuple[list[GfnRange], Numbers]:
    """Return the ranges that are each worth a step, and all gfns of the others, which together are worth an array.

    >>> divide(np.array([[0, 900], *[[number, number + 1] for number in range(1000, 1020, 2)]]))[0]
    [GfnRange(start=0, end=900)]
    """
    if isinstance(gfns, GfnRange):
        return [gfns], _NONE
    if len(gfns) < _MANY:
        return list(each_of(gfns)), _NONE
    is_short = gfns[:, 1] - gfns[:, 0] < _SHORT
    return list(each_of(gfns[~is_short])), expand(gfns[is_short])


def at_numbers(ordered: Numbers, values: npt.NDArray[_T], numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[_T]:
    """Return the values of numbers, given those of all of them in the order of `distinct`. Same shape as `numbers`.

    >>> at_numbers(np.array([3, 7]), np.array([False, True]), np.array([7, 3, 7]))
    array([ True, False,  True])
    """
    if not len(ordered):
        return values[:0]
    low, span = int(ordered[0]), int(ordered[-1]) - int(ordered[0]) + 1
    if span >= _SPARSE * len(numbers):
        return values[np.searchsorted(ordered, numbers)]
    table = np.empty(span, values.dtype)
    table[ordered - low] = values
    return table[numbers - numbers.dtype.type(low)]
