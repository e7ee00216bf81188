"""Many faults at once: what `fault.py` does for one page, in arrays.

An engine that knows what it will touch, or a VMM that prefaults, has thousands of gfns to map, of which nothing needs a
decision: their pages are on the side that is meant, in a slot, and no invalidation concerns them. Private ones that are
allocated are mapped here under the MMU lock and without a message to the store (the argument is fault.py's); shared
ones are asked for in ranges, several at a time. Whatever is different is left for a fault of its own.

As there, a page is mapped with the largest leaf that all pages of are private. So first the aligned 2 MiB blocks around
the gfns are looked at; neighbouring ones that are whole are mapped as one range, which finds its 1 GiB leaves itself.
What is left goes into the page table one entry each.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvmsim.arrays import at_numbers, distinct, firsts, runs
from kvmsim.mmu.fault import map_gfns
from kvmsim.mmu.mmu import Mmu
from kvmsim.mmu.page_fault import PageFault
from kvmsim.mmu.pte import PTE_PRIVATE, PTE_R, PTE_W, Ptes
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from memfs.contract.aio.nurseries import open_flat_nursery
from memfs.contract.frame_numbers import cut_at
from memfs.contract.page_map import ABSENT
from memfs.contract.protocol.messages import PfnRun
from memfs.contract.units import ORDER_1G, ORDER_2M, ByteOffset, Gfn, GfnRange, PageIndex, PageRange, Pfn, page_ceil

Gfns = npt.NDArray[np.int64]

_BLOCK = 1 << ORDER_2M
_ASK_AT_ONCE = 16  # ranges of shared pages, so that neither the store nor we sleep while the other works
_MOST_ASKED = 1 << 11  # pages: two milliseconds of the store's
_AT_ONCE = 1 << 15  # pages that are mapped singly: what comes up on the way stays in the cache


def fault_in_private(mmu: Mmu, gfns: Gfns, *, write: bool = False) -> npt.NDArray[np.bool_]:
    """Map the private pages of `gfns`, int64 of shape (n,), in any order and as often as they like.

    Returns which of them are mapped private afterwards (with `write`, writable), bool of shape (n,). What is not: pages
    that are absent, gfns that are mapped shared, lie in no slot or are being invalidated, and those whose frames are
    not known yet. Raises OwnershipViolation.
    """
    ordered = distinct(gfns, mmu.table.max_gfn)
    ptes = mmu.table.translate_in_order(ordered)
    served = _served(ptes, write)
    absent = np.flatnonzero(ptes == 0)
    for slot, part in mmu.slots.split(ordered[absent]):
        if slot is not None and slot.private is not None:
            here = absent[part]
            served[here] = _map(mmu, slot, ordered[here], write)
    return at_numbers(ordered, served, gfns)


async def fault_in_shared(mmu: Mmu, gfns: Gfns, *, write: bool = False) -> npt.NDArray[np.bool_]:
    """Map the shared pages of `gfns`, int64 of shape (n,), and the windows around them, allocating what is absent.

    Returns which of them are mapped shared afterwards, as `fault_in_private` does. Not mapped: gfns whose pages are
    private, that lie in no slot or a classic one, that are being invalidated, or whose dirty pages are logged. Raises
    OSError as the store does (ENOSPC), and StoreGone; then some may have been mapped.
    """
    absent = distinct(gfns, mmu.table.max_gfn)
    absent = absent[mmu.table.translate_in_order(absent) == 0]
    parts = _shared_parts(mmu, absent)

    async def ask() -> None:
        for slot, part in parts:
            if not mmu.invalidations.is_active(part) and mmu.slots.is_current(slot):
                await map_gfns(mmu, PageFault(part, write, Side.SHARED, slot, mmu.invalidations.sample()))

    async with open_flat_nursery() as nursery:
        for _ in range(_ASK_AT_ONCE):
            nursery.start_soon(ask)
    ptes = mmu.table.translate(gfns)
    wanted = PTE_R | (PTE_W if write else 0)
    served: npt.NDArray[np.bool_] = (ptes & (wanted | PTE_PRIVATE)) == wanted
    return served


def _shared_parts(mmu: Mmu, absent: Gfns) -> Iterator[tuple[Memslot, GfnRange]]:
    """Generate what to ask for: the windows around gfns, neighbours together, without private pages, not too long."""
    while absent.size:
        slot = mmu.slots.find(Gfn(int(absent[0])))
        end = int(absent[0]) + 1 if slot is None else slot.gfns.end
        here, absent = np.split(absent, [np.searchsorted(absent, end)])
        if slot is None or slot.shared is None or slot.logs_dirty:
            continue
        size = mmu.fault_around.pages
        for first, last in runs(here[firsts(here // size)] // size):
            asked = GfnRange(Gfn(first * size), Gfn(last * size)).intersect(slot.gfns)
            pages = slot.pages_of(asked) if asked is not None else None
            pages = pages.intersect(PageRange(PageIndex(0), page_ceil(ByteOffset(slot.shared.size)))) if pages else None
            if pages is None:
                continue
            page_map = slot.private.page_map if slot.private is not None else None
            for shared in [pages] if page_map is None else page_map.runs(pages, ABSENT):
                for part in shared.chunks(_MOST_ASKED):
                    gfns = slot.gfns_of(part)
                    assert gfns is not None
                    yield slot, gfns


def _served(ptes: Ptes, write: bool) -> npt.NDArray[np.bool_]:
    wanted = PTE_PRIVATE | (PTE_W if write else 0)
    served: npt.NDArray[np.bool_] = (ptes & wanted) == wanted
    return served


def _map(mmu: Mmu, slot: Memslot, gfns: Gfns, write: bool) -> npt.NDArray[np.bool_]:
    """Map gfns of one slot, which are in order and absent. Returns which are served by that, bool of shape (n,)."""
    file = slot.private
    assert file is not None
    fault = PageFault(slot.gfns, write, Side.PRIVATE, slot, mmu.invalidations.sample())
    active = mmu.invalidations.active(slot.gfns)
    pfns = file.pfns_of(gfns + slot.shift)
    can = pfns >= 0
    for going in active:
        can[np.searchsorted(gfns, going.start) : np.searchsorted(gfns, going.end)] = False
    served = can if not (write and slot.readonly) else np.zeros(len(gfns), np.bool_)
    if not can.all():
        gfns, pfns = gfns[can], pfns[can]
    blocks = gfns >> ORDER_2M
    first = firsts(blocks)
    whole = _whole(slot, blocks[first], active)
    for start, end in runs(whole):
        neighbours = GfnRange(Gfn(start << ORDER_2M), Gfn(end << ORDER_2M))
        for pages in cut_at(slot.pages_of(neighbours), ORDER_1G):
            pfn = file.pfn_of(pages.start)
            part = slot.gfns_of(pages)
            assert pfn is not None
            assert part is not None
            mmu.frames.add(file, PfnRun(pages, pfn))
            mmu.install(fault, part, pfn, file.largest_order)
    if len(whole):
        alone = np.repeat(~np.isin(blocks[first], whole), np.diff(first, append=gfns.size))
        gfns, pfns = gfns[alone], pfns[alone]
    for at in firsts(pfns >> ORDER_1G).tolist():
        page = PageIndex(int(gfns[at]) + slot.shift)
        mmu.frames.add(file, PfnRun(PageRange(page, PageIndex(page + 1)), Pfn(int(pfns[at]))))
    for start in range(0, len(gfns), _AT_ONCE):
        mmu.install_pages(slot, Side.PRIVATE, gfns[start : start + _AT_ONCE], pfns[start : start + _AT_ONCE])
    return served


def _whole(slot: Memslot, blocks: Gfns, active: list[GfnRange]) -> Gfns:
    """Return the aligned 2 MiB blocks (by gfn / 512) that one leaf may map: private, in the slot, not invalidated."""
    if slot.shift % _BLOCK or slot.private is None or slot.private.page_map is None:
        return blocks[:0]
    first, last = -(-slot.gfns.start // _BLOCK), slot.gfns.end // _BLOCK
    blocks = blocks[(blocks >= first) & (blocks < last)]
    for going in active:
        blocks = blocks[((blocks + 1) * _BLOCK <= going.start) | (blocks * _BLOCK >= going.end)]
    if not blocks.size:
        return blocks
    numbers = blocks + (slot.shift >> ORDER_2M)
    whole = slot.private.page_map.whole_blocks(numbers)
    if not slot.private.reaches(PageIndex((int(numbers[-1]) + 1) * _BLOCK)):
        whole &= [slot.private.reaches(PageIndex((number + 1) * _BLOCK)) for number in numbers.tolist()]
    return blocks[whole]
