"""Which of many intervals touch a range: an index that answers in the time of what it finds, whatever there is besides.

A notification names a few pages of a file, behind which thousands of slots may lie, some of them overlapping; looking
at each slot was one of the RFC's defects. The kernel keeps an augmented red-black tree (interval_tree_generic.h).
In Python a tree is slow where a sorted list and bisect are fast, so intervals are sorted into classes by size, the
powers of two, each a list ordered by start. An interval of a class that touches [start, end) begins before `end` and
less than the class's size before `start`, so two binary searches a class bound what has to be looked at, and most of
that is an answer. There are as many classes as there are magnitudes of size, which is few.

Rejected: one list with a running maximum of ends (one large interval makes every query linear).
"""

from __future__ import annotations

import bisect
from typing import Generic, TypeVar

_T = TypeVar("_T")


class IntervalIndex(Generic[_T]):
    """Values by half-open intervals of integers. Several may have the same interval.

    >>> index = IntervalIndex[str]()
    >>> index.add(0, 100, "large"); index.add(7, 8, "small"); index.add(9, 12, "later")
    >>> sorted(index.touching(5, 8))
    ['large', 'small']
    """

    def __init__(self) -> None:
        self._classes: dict[int, tuple[list[int], list[tuple[int, _T]]]] = {}  # starts; ends and values
        self._count = 0

    def __len__(self) -> int:
        """Return how many intervals there are."""
        return self._count

    def add(self, start: int, end: int, value: _T) -> None:
        """Add an interval, start < end."""
        starts, rest = self._classes.setdefault((end - start).bit_length(), ([], []))
        position = bisect.bisect(starts, start)
        starts.insert(position, start)
        rest.insert(position, (end, value))
        self._count += 1

    def remove(self, start: int, end: int, value: _T) -> None:
        """Remove what was added so; `value` is compared by identity. Raises KeyError if it was not."""
        size = (end - start).bit_length()
        starts, rest = self._classes.get(size, ([], []))
        for position in range(bisect.bisect_left(starts, start), bisect.bisect(starts, start)):
            if rest[position][0] == end and rest[position][1] is value:
                del starts[position], rest[position]
                self._count -= 1
                if not starts:
                    del self._classes[size]
                return
        raise KeyError((start, end))

    def touching(self, start: int, end: int) -> list[_T]:
        """Return the values whose intervals overlap with [start, end)."""
        found = list[_T]()
        for size, (starts, rest) in self._classes.items():
            low = bisect.bisect(starts, start - (1 << size))
            high = bisect.bisect_left(starts, end)
            for its_end, value in rest[low:high]:  # most often one
                if its_end > start:
                    found.append(value)
        return found
