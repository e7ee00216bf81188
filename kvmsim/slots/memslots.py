"""Memslots: which guest frames are served by which host memory, and how they are found from either side.

A slot lies on files of memfs (KVM_MEM_FD, RFC patch 03) or on host virtual addresses (classic). What may happen to the
memory of either is said in pages of some **space** ("useraddr" in RFC patches 08 to 10): a file, or our own address
space. A **window** is the part of a slot that one space serves. The pages in a notification are looked up among the
windows of its space, and come out as gfns; one offset in two files cannot be confused, since each file is a space.

An fd slot has a window on each of its files. A classic slot has one on the address space, and one more on each memfs
file behind its mappings, added when a fault first comes to it.

Slots are found by id, by gfn (binary search) and by space and pages (intervals.py).
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvmsim.arrays import Gfns, Pairs
from kvmsim.backing import GuestFile
from kvmsim.side import Side
from kvmsim.slots.dirty import DirtyLog
from kvmsim.slots.intervals import IntervalIndex
from kvmsim.uapi import KVM_MEM_FD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.messages import FileId
from memfs.contract.units import ByteOffset, Gfn, GfnRange, PageIndex, PageRange, page_floor


class AddressSpace(enum.Enum):
    """The space of classic memory."""

    HVA = "hva"


Space = FileId | AddressSpace


@dataclass(frozen=True, eq=False, slots=True)
class Memslot:
    """A range of guest frames and what is behind it (RFC patch 04). A change makes a new one in its place."""

    id: int
    flags: int
    gfns: GfnRange
    userspace_addr: ByteOffset  #: into both files, or a hva
    shared: GuestFile | None  #: None for a classic slot
    private: GuestFile | None
    dirty: DirtyLog | None = None  #: with KVM_MEM_LOG_DIRTY_PAGES
    shift: int = field(init=False)  #: how much larger the index of the page that serves a gfn is than the gfn

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", page_floor(self.userspace_addr) - self.gfns.start)

    @property
    def readonly(self) -> bool:
        """KVM_MEM_READONLY: stores exit to the VMM."""
        return bool(self.flags & KVM_MEM_READONLY)

    @property
    def logs_dirty(self) -> bool:
        """KVM_MEM_LOG_DIRTY_PAGES: pages that are written are logged."""
        return bool(self.flags & KVM_MEM_LOG_DIRTY_PAGES)

    @property
    def is_classic(self) -> bool:
        """Not KVM_MEM_FD: it lies on host virtual addresses."""
        return not self.flags & KVM_MEM_FD

    @property
    def pages(self) -> PageRange:
        """The pages of either file, or of the address space, that serve it."""
        first = page_floor(self.userspace_addr)
        return PageRange(first, PageIndex(first + len(self.gfns)))

    @property
    def files(self) -> tuple[GuestFile, ...]:
        """What it keeps registered, apart from files behind mappings."""
        return tuple(file for file in (self.shared, self.private) if file is not None)

    def file(self, side: Side) -> GuestFile | None:
        """Return the file that serves one side; None if none does."""
        return self.private if side is Side.PRIVATE else self.shared

    def side(self, gfn: Gfn) -> Side:
        """Return on which side a gfn is: PRIVATE iff its page is allocated in the private file."""
        return Side.of(self.private is not None and self.private.is_private(self.page(gfn)))

    def page(self, gfn: Gfn) -> PageIndex:
        """Return the page of either file, or of the address space, that serves a gfn."""
        return PageIndex(gfn + self.shift)

    def gfns_of(self, pages: PageRange) -> GfnRange | None:
        """Return the gfns that those pages serve, clipped to the slot; None if they serve none here."""
        mine = pages.intersect(self.pages)
        if mine is None:
            return None
        return GfnRange(Gfn(mine.start - self.shift), Gfn(mine.end - self.shift))

    def pages_of(self, gfns: GfnRange) -> PageRange:
        """Return the pages that serve gfns of the slot."""
        shift = self.shift
        return PageRange(PageIndex(gfns.start + shift), PageIndex(gfns.end + shift))

    def windows(self) -> Iterator[Window]:
        """Generate the windows that it has initially."""
        if self.is_classic:
            yield Window(self, AddressSpace.HVA, self.pages, self.gfns.start, Side.SHARED)
        if self.shared is not None:
            yield Window(self, self.shared.id, self.pages, self.gfns.start, Side.SHARED)
        if self.private is not None:
            yield Window(self, self.private.id, self.pages, self.gfns.start, Side.PRIVATE)


@dataclass(frozen=True, eq=False, slots=True)
class Window:
    """Pages of a space serve gfns of a slot from `gfn` on."""

    slot: Memslot
    space: Space
    pages: PageRange
    gfn: Gfn
    side: Side  #: PRIVATE: the space is the slot's private file

    def gfns_of(self, pages: PageRange) -> GfnRange:
        """Return the gfns that pages of the space serve through this window, which they touch."""
        mine, shift = self.pages, self.gfn - self.pages.start
        start, end = max(pages.start, mine.start), min(pages.end, mine.end)
        return GfnRange(Gfn(start + shift), Gfn(end + shift))

    def gfns_of_all(self, ranges: PageRanges) -> Gfns:
        """Return the gfns that ranges of pages of the space serve through this window, which not all need to touch.

        If there is but one range, it touches the window.
        """
        if ranges.only is not None:
            return self.gfns_of(ranges.only)
        mine, shift = self.pages, self.gfn - self.pages.start
        clipped = np.clip(ranges.array, mine.start, mine.end)
        gfns: Pairs = clipped[clipped[:, 0] < clipped[:, 1]] + shift
        return gfns

    def serves(self, gfns: GfnRange) -> bool:
        """Return whether any of those gfns is served through it."""
        return gfns.overlaps(GfnRange(self.gfn, Gfn(self.gfn + len(self.pages))))


class Memslots:
    """The slots of one VM."""

    def __init__(self) -> None:
        self._by_id: dict[int, Memslot] = {}
        self._starts: list[Gfn] = []  # of the slots in _in_order
        self._in_order: list[Memslot] = []  # by gfn
        self._spaces: dict[Space, IntervalIndex[Window]] = {}
        self._windows: dict[int, list[Window]] = {}  # by slot id

    def __len__(self) -> int:
        """Return how many slots there are."""
        return len(self._by_id)

    def __iter__(self) -> Iterator[Memslot]:
        """Iterate over the slots by gfn."""
        return iter(self._in_order)

    def get(self, slot_id: int) -> Memslot | None:
        """Return the slot with an id, if there is one."""
        return self._by_id.get(slot_id)

    def is_current(self, slot: Memslot) -> bool:
        """Return whether a slot still is one, unchanged."""
        return self._by_id.get(slot.id) is slot

    def find(self, gfn: Gfn) -> Memslot | None:
        """Return the slot that a gfn lies in, if any."""
        index = bisect.bisect_right(self._starts, gfn) - 1
        return self._in_order[index] if index >= 0 and gfn in self._in_order[index].gfns else None

    def split(self, gfns: npt.NDArray[np.int64]) -> Iterator[tuple[Memslot | None, slice]]:
        """Generate which parts of an array of gfns, in ascending order, lie in which slot, or between slots (None)."""
        position = 0
        while position < len(gfns):
            index = bisect.bisect_right(self._starts, gfns[position]) - 1
            slot = self._in_order[index] if index >= 0 and gfns[position] < self._in_order[index].gfns.end else None
            if slot is not None:
                end = int(np.searchsorted(gfns, slot.gfns.end))
            elif index + 1 < len(self._starts):
                end = int(np.searchsorted(gfns, self._starts[index + 1]))
            else:
                end = len(gfns)
            yield slot, slice(position, end)
            position = end

    def overlapping(self, gfns: GfnRange, but: Memslot | None = None) -> Memslot | None:
        """Return some slot, other than `but`, that shares a gfn with a range."""
        index = bisect.bisect_left(self._starts, gfns.end) - 1
        while index >= 0 and self._in_order[index].gfns.end > gfns.start:
            if self._in_order[index] is not but:
                return self._in_order[index]
            index -= 1
        return None

    def touching(self, space: Space, pages: PageRange) -> list[tuple[Window, GfnRange]]:
        """Return the windows through which pages of a space serve gfns, and which gfns."""
        index = self._spaces.get(space)
        if index is None:
            return []
        return [(window, window.gfns_of(pages)) for window in index.touching(pages.start, pages.end)]

    def windows_at(self, space: Space, ranges: PageRanges) -> list[Window]:
        """Return the windows that lie on pages of a space between the first and the last of some ranges."""
        index = self._spaces.get(space)
        return index.touching(ranges.start, ranges.end) if index is not None and len(ranges) else []

    def windows_of(self, slot: Memslot) -> list[Window]:
        """Return all windows of a slot."""
        return list(self._windows[slot.id])

    def add(self, slot: Memslot) -> None:
        """Add a slot that the rules have let pass."""
        assert slot.id not in self._by_id
        assert self.overlapping(slot.gfns) is None
        self._by_id[slot.id] = slot
        index = bisect.bisect(self._starts, slot.gfns.start)
        self._starts.insert(index, slot.gfns.start)
        self._in_order.insert(index, slot)
        self._windows[slot.id] = []
        for window in slot.windows():
            self.add_window(window)

    def remove(self, slot: Memslot) -> None:
        """Remove a slot and its windows."""
        for window in self.windows_of(slot):
            self.remove_window(window)
        del self._by_id[slot.id], self._windows[slot.id]
        index = bisect.bisect_left(self._starts, slot.gfns.start)
        assert self._in_order[index] is slot
        del self._starts[index], self._in_order[index]

    def add_window(self, window: Window) -> None:
        """Add a window: one more part of a slot's memory has been traced to its space."""
        self._spaces.setdefault(window.space, IntervalIndex()).add(window.pages.start, window.pages.end, window)
        self._windows[window.slot.id].append(window)

    def remove_window(self, window: Window) -> None:
        """Remove a window: the slot is not served from there any more."""
        index = self._spaces[window.space]
        index.remove(window.pages.start, window.pages.end, window)
        if not len(index):
            del self._spaces[window.space]
        self._windows[window.slot.id] = [each for each in self._windows[window.slot.id] if each is not window]

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        assert self._starts == [slot.gfns.start for slot in self._in_order] == sorted(self._starts)
        assert set(self._in_order) == set(self._by_id.values()), "slots by gfn are not those by id"
        for slot, after in zip(self._in_order, self._in_order[1:], strict=False):
            assert not slot.gfns.overlaps(after.gfns), f"slots {slot.id} and {after.id} overlap"
        windows = [window for each in self._windows.values() for window in each]
        assert sum(map(len, self._spaces.values())) == len(windows), "windows are miscounted"
        assert all(self.is_current(window.slot) for window in windows), "a window of a slot that is gone"
