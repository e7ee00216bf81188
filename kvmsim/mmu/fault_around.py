"""How much a fault on absent shared memory asks for: the pages around it, too, since a round trip is dear.

As the kernel's fault-around (do_fault_around()) and readahead: an aligned window around the page, and twice the window
before if the fault is where that ended, up to 2 MiB. Unlike the kernel's it allocates, so that a guest that touches one
page here and one there gets more memory than it uses; with a window of one page it does not.

A window holds nothing that has to be decided page by page: it ends with the slot and its file, and before private
pages. It is one page where dirty pages are logged, and while something in it is being invalidated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from memfs.contract.units import ORDER_2M, ByteOffset, Gfn, GfnRange, page_ceil

if TYPE_CHECKING:
    from kvmsim.mmu.invalidate import InvalidationState
    from kvmsim.slots.memslots import Memslot

DEFAULT_PAGES: Final = 16
LARGEST_WINDOW: Final = 1 << ORDER_2M  #: pages


class FaultAround:
    """Windows of at least `pages` pages, a power of two. Raises ValueError for another number."""

    def __init__(self, pages: int = DEFAULT_PAGES) -> None:
        if not 1 <= pages <= LARGEST_WINDOW or pages & (pages - 1):
            raise ValueError(f"fault-around is a power of two of pages, at most {LARGEST_WINDOW}")
        self.pages: Final = pages
        self._last = pages
        self._expected = -1  # where a sequential guest faults next

    def window(self, slot: Memslot, gfn: Gfn, invalidations: InvalidationState) -> GfnRange:
        """Return the gfns to ask for when one faults, that one among them."""
        single = GfnRange(gfn, Gfn(gfn + 1))
        if self.pages == 1 or slot.logs_dirty:
            return single
        is_sequential = gfn == self._expected
        size = min(2 * self._last, LARGEST_WINDOW) if is_sequential else self.pages
        start = gfn if is_sequential else gfn & -size
        window = self._clip(slot, GfnRange(Gfn(start), Gfn(start + size)), gfn)
        if invalidations.is_active(window):
            return single
        self._last, self._expected = size, window.end
        return window

    def _clip(self, slot: Memslot, window: GfnRange, gfn: Gfn) -> GfnRange:
        start, end = max(window.start, slot.gfns.start), min(window.end, slot.gfns.end)
        assert slot.shared is not None
        last_page = page_ceil(ByteOffset(slot.shared.size))
        end = min(end, max(Gfn(slot.gfns.start + last_page - slot.pages.start), Gfn(gfn + 1)))
        if slot.private is not None and slot.private.page_map is not None:
            first = slot.page(start)
            private = slot.private.page_map.pages[first : first + end - start].nonzero()[0]
            before, after = private[private < gfn - start], private[private > gfn - start]
            if len(after):
                end = Gfn(start + int(after[0]))
            if len(before):
                start = Gfn(start + int(before[-1]) + 1)
        return GfnRange(start, end)
