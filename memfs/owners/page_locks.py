"""The pages of a registration that its owner has locked, between get_lock_pfn and put_unlock_pfn (RFC patch 01).

Locks are counted: two vCPUs may have the same page locked, and it is free when both have unlocked it. The counts are
kept as a step function, the pages at which the count changes and what it is from there on, so locking and unlocking
cost a search and the counts that change. An owner unlocks as soon as it has installed its mapping, so usually those are
a handful; one that does not is refused more locks before it costs the daemon much (MOST_RANGES).
"""

from __future__ import annotations

import bisect
import errno
from typing import Final

import trio

from memfs.contract.units import PageRange

MOST_RANGES: Final = 1 << 14  #: of pages that are locked equally often, in one registration


class PageLocks:
    """The locked pages of one registration."""

    __slots__ = ("_counts", "_edges", "_waiting")

    def __init__(self) -> None:
        self._edges = [0]  # pages, ascending: between two neighbours all are locked equally often
        self._counts = [0]  # how often, from that edge on; neighbours differ, and the last is 0
        self._waiting: Final = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        """How many page locks are held."""
        return sum(
            count * (end - start) for count, start, end in zip(self._counts, self._edges, self._edges[1:], strict=False)
        )

    @property
    def headroom(self) -> int:
        """How many more ranges can be locked in any case."""
        return (2 * MOST_RANGES - len(self._edges)) // 2

    def lock(self, pages: PageRange) -> None:
        """Lock every page of a range once more. Raises OSError(ENOLCK), changing nothing, if there is no space."""
        if self.headroom < 1:
            raise OSError(errno.ENOLCK, f"pages are locked in {MOST_RANGES} ranges already")
        self._add(pages, 1)

    def unlock(self, pages: PageRange) -> None:
        """Undo one lock of every page of a range. Raises OSError(EINVAL), changing nothing, if one is not locked."""
        if not min(self._counts_in(pages)):
            raise OSError(errno.EINVAL, f"not all of pages {pages} are locked")
        self._add(pages, -1)
        self._waiting.unpark_all()

    def clear(self) -> None:
        """Undo all locks."""
        self._edges, self._counts = [0], [0]
        self._waiting.unpark_all()

    def any_of(self, pages: PageRange) -> bool:
        """Return whether a page of a range is locked."""
        return any(self._counts_in(pages))

    async def wait_unlocked(self, pages: PageRange) -> None:
        """Wait until no page of a range is locked."""
        while self.any_of(pages):
            await self._waiting.park()

    def _counts_in(self, pages: PageRange) -> list[int]:
        """Return the counts that pages of a range have, in order."""
        first = bisect.bisect_right(self._edges, pages.start) - 1
        return self._counts[first : bisect.bisect_left(self._edges, pages.end)]

    def _add(self, pages: PageRange, more: int) -> None:
        first, end = self._edge(pages.start), self._edge(pages.end)
        for index in range(first, end):
            self._counts[index] += more
        for index in (end, first):  # in between, neighbours differ as they did
            if index and self._counts[index] == self._counts[index - 1]:
                del self._edges[index], self._counts[index]

    def _edge(self, page: int) -> int:
        """Return the number of the edge at a page, which is created if there is none."""
        index = bisect.bisect_left(self._edges, page)
        if index == len(self._edges) or self._edges[index] != page:
            self._edges.insert(index, page)
            self._counts.insert(index, self._counts[index - 1])
        return index
