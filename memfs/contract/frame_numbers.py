"""Frame numbers: what get_pfn replies. memfs has no physical memory, so it allots numbers, as firmware does addresses.

A frame number must name one page of one file, for as long as somebody may have it mapped, and huge mappings need
neighbouring, aligned frames. So numbers are allotted in extents of 1 GiB (2**18 frames): all pages of the same aligned
gibibyte of a file lie in one extent, each at the same place in it. Pages are then contiguous and aligned in frames as
far as they are in the file.

A physical address has 52 bits at most, so there are 2**22 extents; frame 0 is never used. An extent belongs to one
registration and is free again when that ends, when nothing of its owner's can be mapped any more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Final

from memfs.contract.units import ORDER_1G, ORDER_2M, ORDER_4K, PAGE_SHIFT, PageIndex, PageRange

EXTENT_PAGES: Final = 1 << ORDER_1G
MAX_EXTENTS: Final = 1 << (52 - PAGE_SHIFT - ORDER_1G)


def by_order(pages: PageRange, is_whole: Callable[[PageRange], bool]) -> Iterator[tuple[PageRange, int]]:
    """Cut a range of allocated pages into parts that each lie in one extent and have one largest order.

    That order is the largest of 18, 9 and 0 for which each page's aligned block of 2**order pages is wholly allocated;
    `is_whole` says so of a block.
    """
    if pages.start >> ORDER_2M == pages.end - 1 >> ORDER_2M:  # as most are where memory is fragmented
        orders = (order for order in (ORDER_1G, ORDER_2M) if is_whole(_block(pages.start, order)))
        yield pages, next(orders, ORDER_4K)
        return
    for extent in cut_at(pages, ORDER_1G):
        if is_whole(_block(extent.start, ORDER_1G)):
            yield extent, ORDER_1G
            continue
        parts_by_order = (
            (part, ORDER_2M if is_whole(_block(part.start, ORDER_2M)) else ORDER_4K) for part in _whole_between(extent)
        )
        for order, group in itertools.groupby(parts_by_order, key=lambda each: each[1]):
            parts = [part for part, _ in group]
            yield PageRange(parts[0].start, parts[-1].end), order


def cut_at(pages: PageRange, order: int) -> Iterator[PageRange]:
    """Cut a range at every multiple of 2**order pages."""
    block = 1 << order
    edges = [pages.start, *range((pages.start // block + 1) * block, pages.end, block), pages.end]
    return (PageRange(PageIndex(start), PageIndex(end)) for start, end in itertools.pairwise(edges))


def _whole_between(pages: PageRange) -> Iterator[PageRange]:
    """Cut a range into the aligned blocks of 2 MiB that lie in it, as one, and what is before and behind them."""
    block = 1 << ORDER_2M
    inner = {-(-pages.start // block) * block, pages.end // block * block}
    edges = sorted({pages.start, pages.end, *(edge for edge in inner if edge in pages)})
    return (PageRange(PageIndex(start), PageIndex(end)) for start, end in itertools.pairwise(edges))


def _block(index: PageIndex, order: int) -> PageRange:
    """Return the aligned block of 2**order pages around a page."""
    start = index >> order << order
    return PageRange(PageIndex(start), PageIndex(start + (1 << order)))
