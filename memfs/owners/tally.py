"""What became of notifications, by kind: how many, of how many pages, and how long owners took. For `memfs metrics`.

A histogram of fixed bounds, since those of several mounts and times can be added, as quantiles cannot. It counts what
has ended in whatever way: an owner that is cut off took so long, too.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Any, Final

#: seconds, three to a power of ten, from a busy-polled answer to the longest that is usually waited for
BOUNDS: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


class Tally:
    """Notifications of one kind that have ended."""

    __slots__ = ("_buckets", "count", "longest", "pages", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.pages = 0
        self.seconds = 0.0
        self.longest = 0.0  #: seconds
        self._buckets: Final = [0] * (len(BOUNDS) + 1)  # each of its own, not of those below

    def add(self, pages: int, seconds: float) -> None:
        """Count one that was of so many pages, and took so long."""
        self.count += 1
        self.pages += pages
        self.seconds += seconds
        self.longest = max(self.longest, seconds)
        self._buckets[bisect_left(BOUNDS, seconds)] += 1

    def describe(self) -> dict[str, Any]:
        """Return it for `memfs stat`; `buckets` has by the bound, in seconds, how many took no longer than that."""
        buckets = dict(zip(map(str, BOUNDS), accumulate(self._buckets), strict=False))
        seconds = {"seconds": round(self.seconds, 6), "longest": round(self.longest, 6)}
        return {"count": self.count, "pages": self.pages, **seconds, "buckets": buckets}

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        assert sum(self._buckets) == self.count, f"{self.count} notifications, {sum(self._buckets)} in buckets"
