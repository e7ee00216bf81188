"""Frame numbers: neighbours stay neighbours, nothing is given out twice, and orders are what the definition says."""

from __future__ import annotations

import errno
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from memfs.contract.frame_numbers import EXTENT_PAGES, MAX_EXTENTS, by_order, cut_at
from memfs.contract.units import PageIndex, PageRange
from memfs.owners.frame_allocator import FileFrames, FrameAllocator
from tests.helpers import pages, raises

indexes = st.integers(0, 1 << 40).map(PageIndex)


@given(st.lists(indexes, min_size=1, max_size=20))
def test_frames_are_contiguous_and_aligned_as_pages_are(asked: list[PageIndex]) -> None:
    frames = FileFrames(FrameAllocator())
    for index in asked:
        pfn = frames.pfn(index)
        assert pfn % EXTENT_PAGES == index % EXTENT_PAGES
        assert pfn >= EXTENT_PAGES, "frame 0 is never used"
        assert frames.pfn(index) == pfn
        first = PageIndex(index - index % EXTENT_PAGES)
        assert frames.pfn(first) == pfn - (index - first)


@given(st.lists(st.tuples(st.integers(0, 2), indexes), max_size=30))
def test_one_frame_is_one_page_of_one_file(asked: list[tuple[int, PageIndex]]) -> None:
    allocator = FrameAllocator()
    files = [FileFrames(allocator) for _ in range(3)]
    pages_by_pfn: dict[int, tuple[int, PageIndex]] = {}
    for which, index in asked:
        assert pages_by_pfn.setdefault(files[which].pfn(index), (which, index)) == (which, index)
    assert allocator.allocated == len({(which, index // EXTENT_PAGES) for which, index in asked})
    for frames in files:
        frames.close()
        frames.close()
    assert allocator.allocated == 0


def test_extent_is_used_again_only_after_it_was_given_back() -> None:
    allocator = FrameAllocator()
    first, second = FileFrames(allocator), FileFrames(allocator)
    mine = first.pfn(PageIndex(0))
    assert second.pfn(PageIndex(0)) != mine
    first.close()
    assert second.pfn(PageIndex(EXTENT_PAGES)) == mine, "the lowest free one comes first"


def test_numbers_run_out_and_nothing_is_taken() -> None:
    allocator = FrameAllocator()
    allocator._next = MAX_EXTENTS - 1
    frames = FileFrames(allocator)
    last = frames.pfn(PageIndex(0))
    assert (last + EXTENT_PAGES) << 12 == 1 << 52, "physical addresses have 52 bits"
    before = allocator.allocated
    with raises(errno.ENOMEM):
        frames.pfn(PageIndex(EXTENT_PAGES))
    assert allocator.allocated == before
    frames.close()
    assert FileFrames(allocator).pfn(PageIndex(5)) == last + 5


@given(
    st.integers(0, 3 << 18),
    st.integers(1, 3 << 18),
    st.sets(st.integers(0, 6 << 9), max_size=4),
    st.integers(0, 6 << 18),
)
def test_orders_are_what_the_definition_says(start: int, length: int, holes: set[int], end_of_file: int) -> None:
    """Holes are in blocks of 2 MiB, of which each spoils its gibibyte, and nothing is allocated after the file."""
    asked = pages(start, start + length)
    absent = {block << 9 for block in holes if block << 9 not in asked and (block << 9) // 512 * 512 + 511 < start}

    asked_about = 0

    def is_whole(block: PageRange) -> bool:
        nonlocal asked_about
        asked_about += 1
        return block.end <= max(end_of_file, asked.end) and not any(page in block for page in absent)

    pieces = list(by_order(asked, is_whole))
    assert asked_about <= 4 * len(list(cut_at(asked, 18))), "blocks within what is allocated are not asked about"
    position = start
    previous = None
    for piece, order in pieces:
        assert piece.start == position
        position = piece.end
        assert piece.start >> 18 == (piece.end - 1) >> 18, "pieces lie in one extent"
        assert previous != (piece.start >> 18, order), "neighbours of one order are one piece"
        previous = (piece.start >> 18, order)
        for page in (piece.start, (piece.start + piece.end) // 2, piece.end - 1):
            whole = [o for o in (18, 9, 0) if is_whole(pages(page >> o << o, (page >> o << o) + (1 << o))) or o == 0]
            assert order == whole[0]
    assert position == asked.end


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 14), st.sampled_from([9, 18]))
def test_cuts_are_at_multiples_only(start: int, length: int, order: int) -> None:
    parts = list(cut_at(pages(start, start + length), order))
    assert (parts[0].start, parts[-1].end) == (start, start + length)
    for one, two in pairwise(parts):
        assert one.end == two.start
        assert one.end % (1 << order) == 0
    assert all(part.start >> order == (part.end - 1) >> order for part in parts)
