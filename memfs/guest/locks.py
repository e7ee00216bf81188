"""Which pages of a registration are locked by its owner, between get_lock_pfn and put_unlock_pfn (RFC patch 01).

Locks are counted: two vCPUs may have the same page locked, and it is free when both have let go. They are kept as
ranges, a handful at any time, since an owner unlocks as soon as it has installed its mapping.
"""

from __future__ import annotations

import errno

import trio

from memfs.units import PageRange


class PageLocks:
    """The locked pages of one registration."""

    def __init__(self) -> None:
        self._held: list[PageRange] = []  # one element a lock; overlap means locked more than once
        self._released = trio.Event()  # replaced each time it is set

    def __len__(self) -> int:
        """How many page locks are held."""
        return sum(map(len, self._held))

    def lock(self, pages: PageRange) -> None:
        """Lock every page of a range once more."""
        self._held.append(pages)

    def unlock(self, pages: PageRange) -> None:
        """Undo one lock of every page of a range. Raises OSError(EINVAL), changing nothing, if one is not locked."""
        wanted, kept = [pages], []
        for held in self._held:
            left = [held]
            while (common := _first_common(left, wanted)) is not None:
                left = [rest for each in left for rest in _without(each, common)]
                wanted = [rest for each in wanted for rest in _without(each, common)]
            kept += left
        if wanted:
            raise OSError(errno.EINVAL, f"pages {wanted[0]} are not locked")
        self._held = kept
        self._wake()

    def clear(self) -> None:
        """Undo all locks."""
        self._held.clear()
        self._wake()

    async def wait_unlocked(self, pages: PageRange) -> None:
        """Wait until no page of a range is locked."""
        while any(held.overlaps(pages) for held in self._held):
            await self._released.wait()

    def _wake(self) -> None:
        self._released.set()
        self._released = trio.Event()


def _first_common(some: list[PageRange], others: list[PageRange]) -> PageRange | None:
    """Pages that are in a range of each list; None if there are none."""
    return next((both for one in some for other in others if (both := one.intersect(other))), None)


def _without(whole: PageRange, gone: PageRange) -> list[PageRange]:
    """What is left of a range when another is taken from it."""
    if not whole.overlaps(gone):
        return [whole]
    left = []
    if whole.start < gone.start:
        left.append(PageRange(whole.start, gone.start))
    if gone.end < whole.end:
        left.append(PageRange(gone.end, whole.end))
    return left
