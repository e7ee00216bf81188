"""Many ranges of pages of one file: in ascending order, none empty, none overlapping another or touching it.

Conversions are about hundreds of ranges at once, often of a page each, and both processes work on them with numpy. An
object for each would cost more than what is done with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from memfs.contract.units import PageIndex, PageRange


class PageRanges:
    """An immutable sequence of page ranges. `array` has them as int64, shape (n, 2): start and end of each.

    >>> ranges = PageRanges.of([PageRange(PageIndex(4), PageIndex(6)), PageRange(PageIndex(2), PageIndex(4))])
    >>> ranges
    PageRanges([2, 6))
    >>> len(ranges), ranges.pages
    (1, 4)
    """

    __slots__ = ("array",)

    def __init__(self, array: npt.NDArray[np.int64]) -> None:
        """Take ranges as they are. Raises ValueError unless they are as this class has them."""
        flat = array.reshape(-1)
        if len(flat) and not (flat[0] >= 0 and (flat[1:] > flat[:-1]).all()):
            raise ValueError("not ranges in ascending order that neither overlap nor touch")
        array.flags.writeable = False
        self.array: Final = array

    @classmethod
    def of(cls, ranges: Iterable[PageRange]) -> Self:
        """Return ranges in any order; neighbours become one. Raises ValueError if two overlap."""
        pairs = [(each.start, each.end) for each in ranges]
        return cls.merged(np.array(pairs, np.int64).reshape(-1, 2))

    @classmethod
    def merged(cls, array: npt.NDArray[np.int64]) -> Self:
        """Do the same for int64, shape (n, 2). Raises ValueError also if one is empty or begins below 0."""
        starts, ends = array[array[:, 0].argsort(kind="stable")].T
        if (starts >= ends).any() or (starts < 0).any():
            raise ValueError("an empty range")
        if (starts[1:] < ends[:-1]).any():
            raise ValueError("ranges overlap")
        first = np.concatenate(([True], starts[1:] > ends[:-1]))[: len(starts)]
        last = np.concatenate((first[1:], [True]))[: len(starts)]
        return cls(np.stack((starts[first], ends[last]), axis=1))

    @property
    def pages(self) -> int:
        """How many pages there are in all ranges."""
        return int((self.array[:, 1] - self.array[:, 0]).sum())

    @property
    def end(self) -> PageIndex:
        """Where the last range ends; 0 if there is none."""
        return PageIndex(int(self.array[-1, 1]) if len(self.array) else 0)

    def indexes(self) -> npt.NDArray[np.int64]:
        """Return the index of each page: int64, shape (pages,), ascending."""
        lengths = self.array[:, 1] - self.array[:, 0]
        first = np.cumsum(lengths) - lengths  # where the pages of each range begin in the result
        indexes: npt.NDArray[np.int64] = np.repeat(self.array[:, 0] - first, lengths)
        indexes += np.arange(len(indexes))
        return indexes

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[PageRange]:
        for start, end in self.array.tolist():
            yield PageRange(PageIndex(start), PageIndex(end))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageRanges) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash(self.array.tobytes())

    def __repr__(self) -> str:
        return f"PageRanges({self})"

    def __str__(self) -> str:
        return ",".join(f"[{start}, {end})" for start, end in self.array.tolist())
