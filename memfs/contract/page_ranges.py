"""Many ranges of pages of one file: in ascending order, none empty, none overlapping another or touching it.

Conversions are about hundreds of ranges at once, often of a page each, and both processes work on them with numpy: an
object for each would cost more than what is done with it. As often they are about one range, and then numpy would. So
ranges are kept as an array or as the `only` one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from memfs.contract.units import PageIndex, PageRange

_PAIR: Final = struct.Struct("<qq")
_Indexes = npt.NDArray[np.int64]


class PageRanges:
    """An immutable sequence of page ranges. `only` is the one that there is, None if there are others or none.

    >>> ranges = PageRanges.of([PageRange(PageIndex(4), PageIndex(6)), PageRange(PageIndex(2), PageIndex(4))])
    >>> ranges
    PageRanges([2, 6))
    >>> len(ranges), ranges.pages
    (1, 4)
    """

    __slots__ = ("_array", "only")

    def __init__(self, array: _Indexes) -> None:
        """Take int64 of shape (n, 2), start and end of each. Raises ValueError unless they are as this class has them.

        >>> PageRanges(np.array([[0, 3], [5, 6]]))
        PageRanges([0, 3),[5, 6))
        """
        flat = array.reshape(-1)
        if len(flat) and not (flat[0] >= 0 and (flat[1:] > flat[:-1]).all()):
            raise ValueError("not ranges in ascending order that neither overlap nor touch")
        array.flags.writeable = False
        self._array: _Indexes | None = array
        self.only = PageRange(*map(PageIndex, flat.tolist())) if len(flat) == 2 else None

    @classmethod
    def single(cls, pages: PageRange) -> Self:
        """Return one range."""
        ranges = cls.__new__(cls)
        ranges._array, ranges.only = None, pages
        return ranges

    @classmethod
    def of(cls, ranges: Iterable[PageRange]) -> Self:
        """Return ranges in any order; neighbours become one. Raises ValueError if two overlap."""
        listed = list(ranges)
        if len(listed) == 1:
            return cls.single(listed[0])
        if not listed:
            return cls(np.empty((0, 2), np.int64))
        return cls.merged(np.array([(each.start, each.end) for each in listed], np.int64).reshape(-1, 2))

    @classmethod
    def merged(cls, array: _Indexes) -> Self:
        """Do the same for int64, shape (n, 2). Raises ValueError also if one is empty or begins below 0."""
        starts, ends = array[array[:, 0].argsort(kind="stable")].T
        if (starts >= ends).any() or (starts < 0).any():
            raise ValueError("an empty range")
        if (starts[1:] < ends[:-1]).any():
            raise ValueError("ranges overlap")
        first = np.concatenate(([True], starts[1:] > ends[:-1]))[: len(starts)]
        last = np.concatenate((first[1:], [True]))[: len(starts)]
        return cls(np.stack((starts[first], ends[last]), axis=1))

    @classmethod
    def of_indexes(cls, indexes: _Indexes) -> Self:
        """Return the runs of consecutive indexes: int64, shape (n,), ascending."""
        if not len(indexes):
            return cls(np.empty((0, 2), np.int64))
        gaps = np.flatnonzero(np.diff(indexes) != 1)
        starts = indexes[np.concatenate(([0], gaps + 1))]
        ends = indexes[np.concatenate((gaps, [len(indexes) - 1]))] + 1
        return cls(np.stack((starts, ends), axis=1))

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Self:
        """Return ranges from what `pack` has returned. Raises ValueError."""
        if len(data) == _PAIR.size:
            start, end = _PAIR.unpack(data)
            return cls.single(PageRange(start, end))
        return cls(np.frombuffer(data, "<i8").reshape(-1, 2))

    def pack(self) -> bytes:
        """Return them as they travel: i64 start, i64 end, little-endian, of each."""
        if self.only is not None:
            return _PAIR.pack(self.only.start, self.only.end)
        return self.array.astype("<i8", copy=False).tobytes()

    @property
    def array(self) -> _Indexes:
        """Start and end of each: int64, shape (n, 2), read-only."""
        if self._array is None:
            assert self.only is not None
            self._array = np.array([[self.only.start, self.only.end]], np.int64)
            self._array.flags.writeable = False
        return self._array

    @property
    def pages(self) -> int:
        """How many pages there are in all ranges."""
        if self.only is not None:
            return len(self.only)
        return int((self.array[:, 1] - self.array[:, 0]).sum())

    @property
    def start(self) -> PageIndex:
        """Where the first range begins; 0 if there is none."""
        if self.only is not None:
            return self.only.start
        return PageIndex(int(self.array[0, 0]) if len(self.array) else 0)

    @property
    def end(self) -> PageIndex:
        """Where the last range ends; 0 if there is none."""
        if self.only is not None:
            return self.only.end
        return PageIndex(int(self.array[-1, 1]) if len(self.array) else 0)

    def pairs(self) -> list[tuple[int, int]]:
        """Return start and end of each."""
        if self.only is not None:
            return [(self.only.start, self.only.end)]
        pairs: list[tuple[int, int]] = self.array.tolist()
        return pairs

    def indexes(self) -> _Indexes:
        """Return the index of each page: int64, shape (pages,), ascending."""
        lengths = self.array[:, 1] - self.array[:, 0]
        first = np.cumsum(lengths) - lengths  # where the pages of each range begin in the result
        indexes: _Indexes = np.repeat(self.array[:, 0] - first, lengths)
        indexes += np.arange(len(indexes))
        return indexes

    def before(self, end: PageIndex) -> PageRanges:
        """Return what of them lies before a page."""
        if end >= self.end:
            return self
        starts, ends = self.array[: np.searchsorted(self.array[:, 0], end)].T
        return PageRanges(np.stack((starts, np.minimum(ends, end)), axis=1))

    def without(self, others: PageRanges) -> PageRanges:
        """Return the pages that are not in others."""
        if not len(others):
            return self
        indexes = self.indexes()
        return PageRanges.of_indexes(indexes[~np.isin(indexes, others.indexes())])

    def chunks(self, pages: int) -> Iterator[PageRanges]:
        """Return them in chunks of so many pages, of which the last may have fewer.

        >>> list(PageRanges(np.array([[0, 3], [5, 6]])).chunks(2))
        [PageRanges([0, 2)), PageRanges([2, 3),[5, 6))]
        """
        if self.pages <= pages:
            yield self
            return
        chunk: list[tuple[int, int]] = []
        left = pages
        for start, end in self.pairs():
            while start < end:
                part = min(end, start + left)
                chunk.append((start, part))
                left -= part - start
                start = part
                if not left:
                    yield PageRanges(np.array(chunk, np.int64))
                    chunk, left = [], pages
        if chunk:
            yield PageRanges(np.array(chunk, np.int64))

    def __len__(self) -> int:
        return 1 if self.only is not None else len(self.array)

    def __iter__(self) -> Iterator[PageRange]:
        for start, end in self.pairs():
            yield PageRange(PageIndex(start), PageIndex(end))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageRanges) and self.pairs() == other.pairs()

    def __hash__(self) -> int:
        return hash(self.pack())

    def __repr__(self) -> str:
        return f"PageRanges({self})"

    def __str__(self) -> str:
        return ",".join(map(str, self))


NO_PAGES: Final = PageRanges.of(())
