"""The protocol between faults and invalidations: mmu_invalidate_seq and mmu_invalidate_in_progress of kvm_main.c.

Theory of operation
===================

A fault asks the store for a frame and installs it. Meanwhile the store may take the page away again, and its
notification may be handled between the fault's question and its installation. The RFC's first version relied on the
page lock for that, which does not help with what was decided *before* the lock (which side the page is on).

    invalidation    begin:  in_progress += 1, widen the active range, unmap         | under the
                    (the store frees the pages)                                     | MMU lock
                    end:    seq += 1, then in_progress -= 1, wake who waits         |

    fault           seq = sample()
                    decide shared or private, get the frame (both take time)
                    under the MMU lock: if must_retry(seq, gfn): start again, else install

`must_retry` is true if an invalidation of the gfn is in progress (its pages are not gone yet, so the frame just got may
be one of them) or if one ended since the sample. That end bumps seq *before* it lowers in_progress is what leaves no
gap between the two. Invalidations elsewhere do not disturb a fault while they run; once ended, they cost it one retry.

A page that becomes private is a change for those who have it mapped shared, so `conversion` bumps seq, too: a fault
that looked before sees after that it looked too early. A conversion that is one operation (ConvertBegin, ConvertEnd) is
an invalidation of the gfns on both sides.

The pages that a fault asks about are not locked in the store (GetPfn without `lock`). An answer may be stale when it
comes: then the punch that made it so sent its begin after the question, so after the sample, and either it is in
progress, or its end has bumped seq, or the begin is still to come and unmaps what is installed before.

The MMU lock is the event loop: nothing here, nor what is called "under the MMU lock", awaits. Rejected: an asyncio-like
lock (every checkpoint in between would be a bug that the lock hides), and blocking faults while any invalidation runs
(a slow store would stop the guest).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import trio

from kvmsim.arrays import Gfns, each_of, pairs
from memfs.contract.units import GfnRange, PageRange

#: pages of a space (a file, or the VMM's address space: slots/memslots.py)
Concerned = tuple[Hashable, Iterable[PageRange]]


@dataclass(slots=True)
class _Active:
    """An invalidation in progress."""

    gfns: list[Gfns]
    concerned: tuple[Concerned, ...]


class InvalidationState:
    """seq, in_progress and the active range of one VM."""

    def __init__(self) -> None:
        self.seq = 0
        self._active: dict[Hashable, _Active] = {}
        self._ended = trio.Event()  # replaced each time it is set

    @property
    def in_progress(self) -> int:
        """How many invalidations have begun and not ended."""
        return len(self._active)

    def sample(self) -> int:
        """Return what a fault must remember before it decides anything."""
        return self.seq

    def begin(self, key: Hashable, gfns: Iterable[Gfns], *concerned: Concerned) -> None:
        """Begin: pages that serve these gfns are about to go; the caller unmaps them before it does anything else.

        `key` names the invalidation until its end: which gfns it concerns may look different by then, since slots come
        and go. `concerned` are the pages.
        """
        assert key not in self._active, f"{key} has begun already"
        self._active[key] = _Active(list(gfns), concerned)

    def take_over(self, gfns_of: Callable[[Hashable, PageRange], Iterable[GfnRange]]) -> None:
        """Have what is in progress concern new gfns, too, of which nothing is mapped yet: a slot has been added.

        `gfns_of` says which, given a space and pages of it. Waiting until nothing is in progress would not do: an
        invalidation may begin while the files of the slot are being registered.
        """
        for active in self._active.values():
            for space, ranges in active.concerned:
                active.gfns.append(pairs(part for pages in ranges for part in gfns_of(space, pages)))

    def end(self, key: Hashable) -> None:
        """End: the pages are gone."""
        self.seq += 1
        del self._active[key]
        self._wake()

    def conversion(self) -> None:
        """Note that pages changed sides without going away; the caller has dropped the mappings of the other side."""
        self.seq += 1

    def must_retry(self, seq: int, gfns: GfnRange) -> bool:
        """Return whether what a fault on these gfns learned since it sampled `seq` may be untrue by now."""
        return seq != self.seq or self.is_active(gfns)

    async def wait_idle(self, gfns: GfnRange | None = None) -> None:
        """Wait until no invalidation of a range (None: any) is in progress."""
        while self._active if gfns is None else self.is_active(gfns):
            await self._ended.wait()

    def abandon(self) -> None:
        """End all invalidations: the store is gone, and will not end what it began."""
        self._active.clear()
        self.seq += 1
        self._wake()

    def active(self, gfns: GfnRange) -> list[GfnRange]:
        """Return what is being invalidated and overlaps a range."""
        found = list[GfnRange]()
        for each in (each for active in self._active.values() for each in active.gfns):
            if not isinstance(each, GfnRange):
                found += each_of(each[(each[:, 0] < gfns.end) & (each[:, 1] > gfns.start)])
            elif each.overlaps(gfns):
                found.append(each)
        return found

    def is_active(self, gfns: GfnRange) -> bool:
        """Return whether an invalidation of something in a range is in progress."""
        return bool(self._active) and bool(self.active(gfns))

    def _wake(self) -> None:
        self._ended.set()
        self._ended = trio.Event()
