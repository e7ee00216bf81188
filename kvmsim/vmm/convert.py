"""Conversions of memory between shared and private, many at a time.

Each conversion is a few system calls that wait for memfs, which waits for KVM, so converting a burst page by page costs
the burst many round trips. Requests that come while others are being worked on are kept; then neighbours of the same
direction become one range, and all callers continue together. A page that is on the wanted side by then is left alone:
another vCPU asked for it first.

    to private   fallocate the range in the private file, then punch it out of the shared one
    to shared    punch it out of the private file; shared pages come with the next faults

In this order a conversion for which there is no space destroys nothing, and no page is paid for twice in the end: once
a page is private no fault, nor the window around one, allocates it in the shared file, and memfs has acted on those
that asked before when it begins to punch (what they asked is ahead of our acknowledgement of the allocation).

Where there is no space for both sides at once, pages change places: first those get private memory that have no content
to lose, from what is left; then those that have, piece by piece, each from what is punched for it. If that fails,
somebody else took the space at that moment, which two system calls cannot exclude; nothing else destroys content.

The **granule** (4 KiB, 64 KiB, 2 MiB) is how far around what was asked for may be converted as well. A conversion
destroys content, so it takes in only neighbours that have none: pages that are in neither file. Rejected: rounding
every request to the granule, which would lose what a guest keeps in the neighbourhood.

Listeners are QEMU's RamDiscardListener: notified of what is populated (shared memory that a device may map from now on)
and what is discarded (before it goes), and of all that is populated already when they register.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import trio

from kvmsim.arrays import runs
from kvmsim.side import Side
from memfs.contract.sparse import data_pages
from memfs.contract.sys.libc import PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, PageIndex, PageRange, bytes_to_pages

GRANULES: Final = (PAGE_SIZE, 16 * PAGE_SIZE, 512 * PAGE_SIZE)  #: bytes


class RamDiscardListener(Protocol):
    """An object that must know which memory the host may touch (QEMU: include/system/memory.h)."""

    def populate(self, pages: PageRange) -> None:
        """Take notice that pages are shared from now on."""

    def discard(self, pages: PageRange) -> None:
        """Stop using pages that will not be shared any more."""


@dataclass(slots=True)
class _Request:
    pages: PageRange
    to: Side
    done: trio.Event = field(default_factory=trio.Event)
    failure: OSError | None = None


class Converter:
    """Converts pages of the two files behind a slot. `Vmm.add_memory` makes one.

    `shared` and `private` are descriptors, `pages` what may be converted. `is_private(page)` says on which side a page
    is: `VM.mmu.slots.get(id).private.is_private`. `granule` is in bytes. Raises ValueError for another granule.
    """

    def __init__(
        self, shared: int, private: int, pages: PageRange, is_private: Callable[[PageIndex], bool], granule: int
    ) -> None:
        if granule not in GRANULES:
            raise ValueError(f"a granule of {granule} bytes; there are {GRANULES}")
        self._shared: Final = shared
        self._private: Final = private
        self._pages: Final = pages
        self._is_private: Final = is_private
        self._granule: Final = bytes_to_pages(granule)  # pages
        self._waiting: list[_Request] = []
        self._working = False
        self._listeners: list[RamDiscardListener] = []
        self._current: PageRange | None = None  # is being converted
        self.ranges = 0  #: how many were converted: system calls, about
        self.extra = 0  #: pages that were not asked for

    def register(self, listener: RamDiscardListener) -> None:
        """Notify a listener from now on, and immediately of all that is populated."""
        self._listeners.append(listener)
        for run in _runs(index for index in _indexes(self._pages) if not self._is_private(index)):
            listener.populate(run)

    def unregister(self, listener: RamDiscardListener) -> None:
        """Stop notifying a listener; all that is populated is discarded for it first."""
        self._listeners.remove(listener)
        for run in _runs(index for index in _indexes(self._pages) if not self._is_private(index)):
            listener.discard(run)

    async def convert(self, pages: PageRange, to: Side) -> None:
        """Convert pages, and return when that is done. Raises OSError: EINVAL beyond the slot, ENOSPC."""
        if pages.intersect(self._pages) != pages:
            raise OSError(errno.EINVAL, "not pages of this memory")
        request = _Request(pages, to)
        self._waiting.append(request)
        if not self._working:
            self._working = True
            try:
                with trio.CancelScope(shield=True):  # others wait for what this task has begun
                    await trio.lowlevel.checkpoint()  # requests of the same moment come along
                    while self._waiting:
                        await self._work()
            finally:
                self._working = False
        await request.done.wait()
        if request.failure is not None:
            raise request.failure

    async def _work(self) -> None:
        """Serve the waiting requests of one direction, from the oldest on to the first of the other."""
        to = self._waiting[0].to
        number = next((i for i, each in enumerate(self._waiting) if each.to is not to), len(self._waiting))
        requests, self._waiting = self._waiting[:number], self._waiting[number:]
        asked: set[PageIndex] = {index for request in requests for index in _indexes(request.pages)}
        failure: OSError | None = None
        try:
            asked = {index for index in asked if Side.of(self._is_private(index)) is not to}
            wanted = asked | (await trio.to_thread.run_sync(self._neighbours, asked) if self._granule > 1 else set())
            self.extra += len(wanted - asked)
            for run in _runs(sorted(wanted)):
                await self._convert(run, to)
        except OSError as error:
            failure = error
        for request in requests:
            request.failure = failure
            request.done.set()

    def is_converting(self, pages: PageRange) -> bool:
        """Return whether pages are part of what is being converted now."""
        return self._current is not None and pages.intersect(self._current) == pages

    async def _convert(self, run: PageRange, to: Side) -> None:
        self.ranges += 1
        self._current = run
        try:
            await self._convert_run(run, to)
        finally:
            self._current = None

    async def _convert_run(self, run: PageRange, to: Side) -> None:
        if to is Side.PRIVATE:
            for listener in self._listeners:
                listener.discard(run)
            try:
                await self._to_private(run)
            except OSError:
                for still in _runs(index for index in _indexes(run) if not self._is_private(index)):
                    self._populate(still)
                raise
        else:
            await _fallocate(self._private, PUNCH_HOLE, run)
            self._populate(run)

    async def _to_private(self, run: PageRange) -> None:
        try:
            await _fallocate(self._private, 0, run)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            await self._change_places(run)
        else:
            await _fallocate(self._shared, PUNCH_HOLE, run)

    async def _change_places(self, run: PageRange) -> None:
        """Make pages private of a range that has no space on both sides at once. Raises OSError(ENOSPC)."""
        full = await trio.to_thread.run_sync(lambda: list(data_pages(self._shared, run)))
        starts = [run.start, *(part.end for part in full)]
        ends = [*(part.start for part in full), run.end]
        allocated: list[PageRange] = []
        try:
            for start, end in zip(starts, ends, strict=True):
                if start < end:
                    part = PageRange(start, end)
                    await _fallocate(self._shared, PUNCH_HOLE, part)  # memory that nothing was written to
                    await _fallocate(self._private, 0, part)
                    allocated.append(part)
        except OSError:
            for part in allocated:
                await _fallocate(self._private, PUNCH_HOLE, part)
            raise
        for part in full:
            await _fallocate(self._shared, PUNCH_HOLE, part)
            await _fallocate(self._private, 0, part)

    def _populate(self, run: PageRange) -> None:
        for listener in self._listeners:
            listener.populate(run)

    def _neighbours(self, asked: Iterable[int]) -> set[PageIndex]:
        """Return pages in the granules of those asked for that are in neither file. Blocking: asks the filesystem."""
        found: set[PageIndex] = set()
        for granule in {index // self._granule for index in asked}:
            start = granule * self._granule
            block = PageRange(PageIndex(start), PageIndex(start + self._granule)).intersect(self._pages)
            assert block is not None
            full = {index for part in data_pages(self._shared, block) for index in _indexes(part)}
            found |= {index for index in _indexes(block) if index not in full and not self._is_private(index)}
        return found


async def _fallocate(fd: int, mode: int, pages: PageRange) -> None:
    await trio.to_thread.run_sync(fallocate, fd, mode, pages.offset, pages.nbytes)


def _indexes(pages: PageRange) -> Iterable[PageIndex]:
    return map(PageIndex, range(pages.start, pages.end))


def _runs(indexes: Iterable[int]) -> Iterator[PageRange]:
    """Generate the runs of ascending page indexes."""
    for start, end in runs(np.fromiter(indexes, np.int64)):
        yield PageRange(PageIndex(start), PageIndex(end))
