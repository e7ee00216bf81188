"""The pages of a registration that its owner has locked, between get_lock_pfn and put_unlock_pfn (RFC patch 01).

Locks are counted: two vCPUs may have the same page locked, and it is free when both have unlocked it. The counts are
kept as a step function, the pages at which the count changes and what it is from there on, so locking and unlocking
cost a search and the counts that change. An owner unlocks as soon as it has installed its mapping, so usually those are
a handful; one that does not is refused more locks before it costs the daemon much (MOST_RANGES).
"""

from __future__ import annotations

import bisect
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final

import trio

from memfs.contract.units import PageIndex, PageRange

MOST_RANGES: Final = 1 << 11  #: of pages that are locked equally often, in one registration: a millisecond to unlock


class PageLocks:
    """The locked pages of one registration. `changed` hears of each edge that comes, goes or gets another count."""

    __slots__ = ("_changed", "_counts", "_edges", "_held", "_waiting")

    def __init__(self, changed: Callable[[int], None] = lambda edge: None) -> None:
        self._changed: Final = changed
        self._edges = [0]  # pages, ascending: between two neighbours all are locked equally often
        self._counts = [0]  # how often, from that edge on; neighbours differ, and the last is 0
        self._held = 0  # page locks
        self._waiting: Final = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        """How many page locks are held."""
        return self._held

    @property
    def edges(self) -> Mapping[int, int]:
        """How often pages are locked, from a page on up to the next that is named; none before the first."""
        counts = dict(zip(self._edges, self._counts, strict=True))
        if not counts[0]:
            del counts[0]
        return counts

    def count_at(self, edge: int) -> int | None:
        """Return what `edges` has of a page; None if it does not name it."""
        at = bisect.bisect_left(self._edges, edge)
        is_edge = at < len(self._edges) and self._edges[at] == edge and (at or self._counts[0])
        return self._counts[at] if is_edge else None

    def restore(self, edges: Mapping[int, int]) -> None:
        """Lock what `edges` said. Nothing is locked yet."""
        both = sorted(({0: 0} | dict(edges)).items())
        self._edges, self._counts = [edge for edge, _ in both], [count for _, count in both]
        lengths = [end - start for start, end in pairwise(self._edges)]
        self._held = sum(length * count for length, count in zip(lengths, self._counts, strict=False))

    @property
    def headroom(self) -> int:
        """How many more ranges can be locked in any case."""
        return (2 * MOST_RANGES - len(self._edges)) // 2

    def lock(self, *ranges: PageRange) -> None:
        """Lock every page of some ranges, ascending and disjoint, once more.

        Raises OSError(ENOLCK), changing nothing, if there is no space.
        """
        if self.headroom < len(ranges):
            raise OSError(errno.ENOLCK, f"pages are locked in {MOST_RANGES} ranges already")
        if ranges:
            self._add(ranges, 1)

    def unlock(self, pages: PageRange) -> None:
        """Undo one lock of every page of a range. Raises OSError(EINVAL), changing nothing, if one is not locked."""
        if not min(self._counts_in(pages)):
            raise OSError(errno.EINVAL, f"not all of pages {pages} are locked")
        self._add((pages,), -1)
        self._waiting.unpark_all()

    def clear(self) -> None:
        """Undo all locks."""
        self._edges, self._counts, self._held = [0], [0], 0
        self._waiting.unpark_all()

    def any_of(self, pages: PageRange) -> bool:
        """Return whether a page of a range is locked."""
        return any(self._counts_in(pages))

    def first_of(self, pages: PageRange) -> PageRange | None:
        """Return the first run of locked pages in a range; None if none of them is locked."""
        first = bisect.bisect_right(self._edges, pages.start) - 1
        last = bisect.bisect_left(self._edges, pages.end)
        start: int | None = None
        for edge, count in zip(self._edges[first:last], self._counts[first:last], strict=True):
            if count and start is None:
                start = max(edge, pages.start)
            elif not count and start is not None:
                return PageRange(PageIndex(start), PageIndex(edge))
        return None if start is None else PageRange(PageIndex(start), pages.end)

    def runs(self) -> Iterator[PageRange]:
        """Return the runs of locked pages, in order."""
        start: int | None = None
        for edge, count in zip(self._edges, self._counts, strict=True):
            if count and start is None:
                start = edge
            elif not count and start is not None:
                yield PageRange(PageIndex(start), PageIndex(edge))
                start = None

    async def wait_unlocked(self, pages: PageRange) -> None:
        """Wait until no page of a range is locked."""
        while self.any_of(pages):
            await self._waiting.park()

    def _counts_in(self, pages: PageRange) -> list[int]:
        """Return the counts that pages of a range have, in order."""
        first = bisect.bisect_right(self._edges, pages.start) - 1
        return self._counts[first : bisect.bisect_left(self._edges, pages.end)]

    def _add(self, ranges: Sequence[PageRange], more: int) -> None:
        """Change the counts of some ranges, ascending and disjoint, in one pass over what lies between them."""
        start, end = ranges[0].start, ranges[-1].end
        first, last = bisect.bisect_left(self._edges, start), bisect.bisect_left(self._edges, end)
        count = self._counts[bisect.bisect_right(self._edges, start) - 1]  # as it was, from a place on
        count_after = self._counts[bisect.bisect_right(self._edges, end) - 1]
        counts: dict[int, int] = dict(zip(self._edges[first:last], self._counts[first:last], strict=True))
        changes: dict[int, int] = {each.end: 0 for each in ranges}
        changes.update((each.start, more) for each in ranges)
        edges_now: list[int] = []
        counts_now: list[int] = []
        before: int | None = self._counts[first - 1] if first else None
        change = 0
        for edge in sorted({*counts, *changes} - {end}):
            count, change = counts.get(edge, count), changes.get(edge, change)
            if count + change != before:
                before = count + change
                edges_now.append(edge)
                counts_now.append(before)
        if last < len(self._edges) and self._edges[last] == end:
            last += 1
        if count_after != before:
            edges_now.append(end)
            counts_now.append(count_after)
        before_it = set(zip(self._edges[first:last], self._counts[first:last], strict=True))
        for edge, _ in before_it ^ set(zip(edges_now, counts_now, strict=True)):
            self._changed(edge)
        self._edges[first:last], self._counts[first:last] = edges_now, counts_now
        self._held += more * sum(map(len, ranges))
