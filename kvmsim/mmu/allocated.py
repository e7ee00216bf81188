"""Mapping memory that was allocated just now, before the guest touches it (RFC v2: notify_fallocate() maps).

The store says which pages have come, so nothing is to be decided, and where they are follows from any page of the same
gibibyte. So it is done where the notification is acted upon, under the MMU lock, and the guest does not fault. A guest
that converts a page does so to touch it.

Of a gibibyte in which no frame is known yet, one has to be asked for. That is left to a task, which runs under the
rules for faults, and only for private memory: shared memory that has gone meanwhile would be allocated by asking.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from kvmsim.arrays import Gfns, Numbers, divide, each_of, firsts
from kvmsim.backing import StoreGone
from kvmsim.mmu.batch import fault_in_private
from kvmsim.mmu.fault import map_converted, map_gfns, map_known
from kvmsim.mmu.mmu import Mmu
from kvmsim.mmu.ownership import OwnershipViolation
from kvmsim.mmu.page_fault import PageFault
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from memfs.contract.page_map import ABSENT
from memfs.contract.protocol.messages import PfnRun
from memfs.contract.units import ORDER_1G, GfnRange, PageIndex, PageRange, Pfn


def map_allocated(mmu: Mmu, slot: Memslot, side: Side, gfns: Gfns) -> bool:
    """Map ranges of gfns that lie on memory of a side which the store has just said is allocated.

    Called under the MMU lock. Returns whether that is all that can be done: False if frames could be asked for.
    """
    steps, pages = divide(gfns)
    is_done = True
    with suppress(OwnershipViolation):
        for each in steps:
            fault = _fault(mmu, slot, side, each)
            if side is Side.SHARED:
                map_converted(mmu, fault)
            else:
                is_done &= map_known(mmu, fault)
        if len(pages) and side is Side.PRIVATE:
            is_done &= bool(fault_in_private(mmu, pages).all())
        elif len(pages) and not slot.logs_dirty:
            _map_shared(mmu, slot, pages)
    return is_done


async def map_asking(mmu: Mmu, slot: Memslot, gfns: Gfns) -> None:
    """Do the same with private memory, asking for frames. What comes in between is left to faults."""
    with suppress(OSError, StoreGone, OwnershipViolation):
        for each in each_of(gfns):
            rest: GfnRange | None = each
            while rest is not None:
                fault = _fault(mmu, slot, Side.PRIVATE, rest)
                done = rest if map_known(mmu, fault) else await map_gfns(mmu, fault)
                if done is None:
                    return
                rest = GfnRange(done.end, rest.end) if done.end < rest.end else None


def _fault(mmu: Mmu, slot: Memslot, side: Side, gfns: GfnRange) -> PageFault:
    """Return a fault as if the guest had read memory that was just allocated."""
    return PageFault(gfns, False, side, slot, mmu.invalidations.sample())


def _map_shared(mmu: Mmu, slot: Memslot, gfns: Numbers) -> None:
    """Map single gfns, those that are absent and shared, and not being invalidated."""
    file = slot.shared
    assert file is not None
    pages = gfns + slot.shift
    pfns = file.frames_of(pages)
    can = (pfns >= 0) & (mmu.table.translate_in_order(gfns) == 0)
    if slot.private is not None and slot.private.page_map is not None:
        can &= slot.private.page_map.states(pages) == ABSENT
    for going in mmu.invalidations.active(slot.gfns):
        can[np.searchsorted(gfns, going.start) : np.searchsorted(gfns, going.end)] = False
    gfns, pages, pfns = gfns[can], pages[can], pfns[can]
    for at in firsts(pages >> ORDER_1G).tolist():
        page = PageIndex(int(pages[at]))
        mmu.frames.add(file, PfnRun(PageRange(page, PageIndex(page + 1)), Pfn(int(pfns[at]))))
    mmu.install_pages(slot, Side.SHARED, gfns, pfns)
