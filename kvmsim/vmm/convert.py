"""Conversions of memory between shared and private, many at a time.

A conversion is a call that waits for memfs, which waits for KVM, so it is made in a thread of its own (file_calls.py),
and converting a burst page by page would cost the burst many round trips. Requests that come while others are being
worked on are kept; then those of one direction are converted together, neighbours as one range, and all callers
continue together. What is on the wanted side by then is not asked for: another vCPU was first.

It is one operation on both files (memfs/contract/conversion.py): one notification, all or nothing, and in between no
page is on both sides or on neither. Pages that are on the wanted side already are left alone there, so a range is asked
for as the guest asked for it. Where memfs refuses that, the files are converted one after the other (by_fallocate.py).

Without space nothing is taken along that nobody asked for (around.py), and each request is tried by itself, so that it
fails only for what it asked.

Huge pages of hugetlbfs cannot be split: of a private file on such, a request for a part of one is a request for all of
it if the rest has nothing to lose, and otherwise it is refused. (Where shared memory lies on huge pages of a tmpfs, all
of such a page counts as content once some of it was written.)

Listeners are QEMU's RamDiscardListener: notified of what is populated (shared memory that a device may map from now on)
and what is discarded (before it goes), and of all that is populated already when they register.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import trio

from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from kvmsim.vmm import by_fallocate
from kvmsim.vmm.around import Around, merged, without
from kvmsim.vmm.file_calls import FileCalls
from memfs.contract.conversion import MAX_RANGES, Key, convert, key_of
from memfs.contract.page_map import ABSENT, PageMapView
from memfs.contract.sizes import format_size
from memfs.contract.sparse import data_pages
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageRange, bytes_to_pages, page_ceil


class RamDiscardListener(Protocol):
    """An object that must know which memory the host may touch (QEMU: include/system/memory.h)."""

    def populate(self, pages: PageRange) -> None:
        """Take notice that pages are shared from now on."""

    def discard(self, pages: PageRange) -> None:
        """Stop using pages that will not be shared any more."""


@dataclass(slots=True, eq=False)
class _Request:
    pages: PageRange
    to: Side
    turn: trio.Event = field(default_factory=trio.Event)  #: it is done, or is to be worked on by who asked
    is_done: bool = False
    failure: OSError | None = None


class Converter:
    """Converts memory of a slot. `Vmm.adopt` makes one.

    `shared`, `private`: descriptors of the slot's files, through the mount. `granule`: see `Around`, in bytes.
    """

    def __init__(self, slot: Memslot, shared: int, private: int, granule: int, calls: FileCalls) -> None:
        assert slot.private is not None
        assert slot.private.page_map is not None
        self._pages: Final = slot.pages
        self._page_map: Final[PageMapView] = slot.private.page_map
        self._granule: Final = slot.private.granule  # bytes
        self._slot: Final = slot
        self._around: Final = Around(slot, granule)
        self._shared: Final = shared
        self._private: Final = private
        self._key: Key | None = None
        self._is_one_call = True  # as far as is known
        self._calls: Final = calls
        self._waiting: list[_Request] = []
        self._is_working = False  # or somebody is about to
        self._listeners: list[RamDiscardListener] = []
        self._current: Sequence[PageRange] = ()  # are being converted
        self.ranges = 0  #: how many were converted
        self.extra = 0  #: pages that were not asked for

    def register(self, listener: RamDiscardListener) -> None:
        """Notify a listener from now on, and immediately of all that is populated."""
        self._listeners.append(listener)
        for run in self._page_map.runs(self._pages, ABSENT):
            listener.populate(run)

    def unregister(self, listener: RamDiscardListener) -> None:
        """Stop notifying a listener; all that is populated is discarded for it first."""
        self._listeners.remove(listener)
        for run in self._page_map.runs(self._pages, ABSENT):
            listener.discard(run)

    async def convert(self, pages: PageRange, to: Side) -> None:
        """Convert pages, and return when that is done.

        Raises OSError: ENOSPC; EINVAL beyond the slot, and for a part of a huge page of which the rest has content.
        """
        if pages.intersect(self._pages) != pages:
            raise OSError(errno.EINVAL, "not pages of this memory")
        pages = self._in_huge_pages(pages, to)
        request = _Request(pages, to)
        self._waiting.append(request)
        if self._is_working:
            try:
                await request.turn.wait()
            except trio.Cancelled:
                if request in self._waiting:
                    self._waiting.remove(request)
                raise
        if not request.is_done:
            await self._take_turn()
        if request.failure is not None:
            raise request.failure

    def _in_huge_pages(self, pages: PageRange, to: Side) -> PageRange:
        """Return the huge pages around pages, if the file has such. Raises OSError(EINVAL)."""
        if self._granule == PAGE_SIZE:
            return pages
        whole, size = pages.rounded(bytes_to_pages(self._granule)), format_size(self._granule)
        if whole.intersect(self._pages) != whole:
            raise OSError(
                errno.EINVAL, f"pages {pages} are a part of a huge page of {size} that goes beyond the memslot"
            )
        for rest in without(whole, [pages]):
            in_use = self._page_map.runs(rest) if to is Side.SHARED else self._shared_content(rest)
            if next(in_use, None) is not None:
                raise OSError(
                    errno.EINVAL,
                    f"pages {pages} are a part of a huge page of {size}, which is converted whole, and pages {rest} of "
                    "it are in use",
                )
        return whole

    def _shared_content(self, pages: PageRange) -> Iterator[PageRange]:
        """Return which pages of the shared side have content that a conversion to private would destroy."""
        assert self._slot.shared is not None
        for run in self._page_map.runs(pages, ABSENT):
            yield from data_pages(self._slot.shared.fd, run)

    async def _take_turn(self) -> None:
        """Work on the oldest requests, that of this task among them; then the oldest of those that wait has a turn."""
        self._is_working = True
        try:
            with trio.CancelScope(shield=True):  # others wait for what this task has begun
                await self._work()
        finally:
            self._is_working = bool(self._waiting)
            if self._waiting:
                self._waiting[0].turn.set()

    async def _work(self) -> None:
        """Serve the waiting requests of one direction, from the oldest on to the first of the other."""
        to = self._waiting[0].to
        number = next((i for i, each in enumerate(self._waiting) if each.to is not to), len(self._waiting))
        requests, self._waiting = self._waiting[:number], self._waiting[number:]
        try:
            await self._serve(requests, to)
        finally:
            for request in requests:
                request.is_done = True
                request.turn.set()

    async def _serve(self, requests: Sequence[_Request], to: Side) -> None:
        asked = merged(request.pages for request in requests if not self._is_on(request.pages, to))
        extra = self._around.empty_neighbours(asked[0]) if to is Side.PRIVATE and len(asked) == 1 else []
        try:
            await self._convert(merged([*asked, *extra]), to)
            self.extra += sum(map(len, extra))
        except OSError as error:
            if error.errno != errno.ENOSPC or (len(requests) == 1 and not extra):
                for request in requests:
                    request.failure = error
                return
            for request in requests:
                try:
                    await self._convert([request.pages], to)
                except OSError as own:
                    request.failure = own

    def _is_on(self, pages: PageRange, side: Side) -> bool:
        """Return whether all of a range is on a side."""
        return self._page_map.count(pages) == (len(pages) if side is Side.PRIVATE else 0)

    def is_converting(self, pages: PageRange) -> bool:
        """Return whether pages are part of what is being converted now."""
        return any(pages.intersect(run) == pages for run in self._current)

    async def _convert(self, runs: Sequence[PageRange], to: Side) -> None:
        """Convert ranges of pages. Raises OSError."""
        if not runs:
            await trio.lowlevel.checkpoint()
            return
        self.ranges += len(runs)
        self._current = runs
        if to is Side.PRIVATE:
            self._notify_listeners(runs, populated=False)
        try:
            for start in range(0, len(runs), MAX_RANGES):
                await self._calls.call(partial(self._call, runs[start : start + MAX_RANGES], to))
        except OSError:
            self._notify_listeners(runs, populated=True)
            raise
        else:
            if to is Side.SHARED:
                self._notify_listeners(runs, populated=True)
        finally:
            self._current = ()

    def _call(self, runs: Sequence[PageRange], to: Side) -> None:
        """Convert ranges, in the thread. Raises OSError with the path of a file."""
        try:
            self._make_call(runs, to)
        except OSError as error:
            if error.filename:
                raise
            grows = self._private if to is Side.PRIVATE else self._shared
            raise OSError(error.errno, error.strerror, _path_of(grows)) from error

    def _make_call(self, runs: Sequence[PageRange], to: Side) -> None:
        """Make the call; again if a signal ended it, which leaves a rest."""
        if self._key is None:
            self._key = key_of(self._shared)
        while self._is_one_call:
            try:
                convert(self._private, self._key, runs, to_private=to is Side.PRIVATE)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL:
                    self._check_end(runs)
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._is_one_call = False
            else:
                return
        self._check_end(runs)
        by_files = by_fallocate.to_private if to is Side.PRIVATE else by_fallocate.to_shared
        by_files(self._shared, self._private, runs)

    def _check_end(self, runs: Sequence[PageRange]) -> None:
        fd = min(self._shared, self._private, key=lambda each: os.fstat(each).st_size)
        if runs[-1].end > page_ceil(ByteOffset(os.fstat(fd).st_size)):
            why = f"pages {runs[-1]} lie past the end of the file, which somebody has truncated"
            raise OSError(errno.EINVAL, why, _path_of(fd))

    def _notify_listeners(self, runs: Sequence[PageRange], *, populated: bool) -> None:
        """Notify listeners of what is shared."""
        for listener in self._listeners:
            notify = listener.populate if populated else listener.discard
            for run in runs:
                for part in self._page_map.runs(run, ABSENT):
                    notify(part)


def _path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")
