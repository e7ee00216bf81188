"""The page map against a plain array, also where it is sparse; and what an owner can do with the descriptor."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.contract.page_map import ABSENT, ALLOCATED, MAX_PAGES, MapFiles, MapMemfds, PageMap, PageMaps, PageMapView
from memfs.contract.page_ranges import PageRanges
from memfs.contract.sys.libc import fallocate
from memfs.contract.units import PAGE_SIZE, PageIndex
from tests.helpers import pages, raises

SPAN = 3 << 16  # pages of the model: more than it takes for the map to look for extents
BASES = [0, 12345, MAX_PAGES - SPAN]


@pytest.fixture
def page_map() -> Iterator[PageMap]:
    page_map = MapMemfds().open("test")
    yield page_map
    page_map.close()


spans = st.tuples(st.integers(0, SPAN - 1), st.integers(1, SPAN)).map(lambda s: (s[0], min(SPAN, s[0] + s[1])))


@given(st.sampled_from(BASES), st.lists(st.tuples(spans, st.booleans()), max_size=8), spans)
def test_it_says_what_an_array_says(
    base: int, changes: list[tuple[tuple[int, int], bool]], asked: tuple[int, int]
) -> None:
    page_map, model = MapMemfds().open("test"), np.zeros(SPAN, np.uint8)
    for (start, end), allocated in changes:
        page_map.set(pages(base + start, base + end), ALLOCATED if allocated else ABSENT)
        model[start:end] = allocated
    start, end = asked
    window = pages(base + start, base + end)
    assert page_map.count(window) == np.count_nonzero(model[start:end])
    for state in (ALLOCATED, ABSENT):
        runs = list(page_map.runs(window, state))
        rebuilt = np.full(end - start, 1 - state, np.uint8)
        for run in runs:
            rebuilt[run.start - base - start : run.end - base - start] = state
        assert (rebuilt == model[start:end]).all()
        assert all(one.end < two.start for one, two in pairwise(runs)), "runs are not maximal"
    assert page_map.seq == 2 * len(changes)
    page_map.close()


def test_owner_sees_the_same_and_cannot_change_it(page_map: PageMap) -> None:
    view = PageMapView(page_map.fd)
    page_map.set(pages(7, 9), ALLOCATED)
    assert [view.is_allocated(PageIndex(at)) for at in (6, 7, 8, 9)] == [False, True, True, False]
    with pytest.raises(ValueError, match="read-only"):
        view.pages[7] = ABSENT
    for attempt in (
        lambda: mmap.mmap(page_map.fd, 4096),
        lambda: os.pwrite(page_map.fd, b"\0", 4096),
        lambda: os.ftruncate(page_map.fd, 0),
        lambda: os.ftruncate(page_map.fd, 1 << 40),
        lambda: fcntl.fcntl(page_map.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ):
        with pytest.raises(PermissionError):
            attempt()
    again = os.open(f"/proc/self/fd/{page_map.fd}", os.O_RDWR)  # as anybody may who has the descriptor
    with pytest.raises(PermissionError):
        mmap.mmap(again, 4096)
    os.close(again)
    assert view.is_allocated(PageIndex(7))
    view.close()


def test_a_map_costs_what_was_touched(page_map: PageMap) -> None:
    page_map.set(pages(MAX_PAGES - 1, MAX_PAGES), ALLOCATED)
    assert os.fstat(page_map.fd).st_blocks * 512 == 2 * 4096  # the header, and one page of map
    assert page_map.count(pages(0, MAX_PAGES)) == 1
    page_map.set(pages(0, MAX_PAGES), ABSENT)
    assert page_map.count(pages(0, MAX_PAGES)) == 0
    assert os.fstat(page_map.fd).st_blocks * 512 == 2 * 4096


def test_to_look_at_holes_costs_nothing(page_map: PageMap) -> None:
    """The kernel allocates a hole that is read through a mapping, and whoever asks would not pay for that."""
    page_map.set(pages(0, 2), ALLOCATED)
    before = page_map.nbytes
    for number in range(10):
        first = number * (100 << 12)
        small = [pages(first, first + 1), pages(first + (3 << 12), first + (4 << 12))]
        asked = [*small, pages(first + (9 << 20), MAX_PAGES)]
        allocated = 1 if number == 0 else 0
        for ranges in (PageRanges.of(small), PageRanges.of(asked), *map(PageRanges.single, asked)):
            there = allocated if ranges.array[0, 0] == first else 0
            full = there and int(ranges.array[0, 1]) == first + 1
            assert page_map.count_all(ranges) == there
            assert page_map.select(ranges, ALLOCATED).pages == there
            assert page_map.select(ranges, ABSENT).pages == ranges.pages - there
            assert page_map.with_any(ranges, ALLOCATED)[1] == there
            assert len(page_map.with_any(ranges, ABSENT)[0]) == len(ranges) - full
        for each in asked:
            assert sum(map(len, page_map.runs(each))) == page_map.count(each)
    assert page_map.nbytes == before


@given(
    st.lists(st.integers(0, SPAN // 8 - 1), max_size=20),
    st.lists(st.integers(0, SPAN - 1), min_size=1, max_size=40),
)
def test_it_says_of_many_ranges_what_an_array_says(allocated: list[int], asked: list[int]) -> None:
    """In a map that has holes."""
    page_map, model = MapMemfds().open("test"), np.zeros(SPAN, np.uint8)
    for block in allocated:
        page_map.set(pages(8 * block, 8 * block + 8), ALLOCATED)
        model[8 * block : 8 * block + 8] = ALLOCATED
    ranges = PageRanges.of_indexes(np.unique(np.array(asked)))
    assert page_map.count_all(ranges) == np.count_nonzero(model[ranges.indexes()])
    for state in (ALLOCATED, ABSENT):
        wanted = ranges.indexes()[model[ranges.indexes()] == state]
        assert page_map.select(ranges, state) == PageRanges.of_indexes(wanted)
        with_any = [each for each in ranges if (model[each.slice] == state).any()]
        found, count = page_map.with_any(ranges, state)
        assert (list(found), count) == (with_any, int(np.count_nonzero(model[ranges.indexes()] == state)))
    page_map.close()


def test_what_is_no_page_map_is_refused() -> None:
    fd = os.memfd_create("other")
    with pytest.raises(ValueError, match="not a page map"):
        PageMapView(fd)
    os.ftruncate(fd, 4096 + MAX_PAGES)
    with pytest.raises(ValueError, match="not a page map"):
        PageMapView(fd)
    os.close(fd)


@pytest.fixture
def kept(tmpfs: Path) -> Iterator[PageMap]:
    """A map of those that can be punched."""
    root = os.open(tmpfs, os.O_PATH)
    page_map = MapFiles(root, root).open("map")
    yield page_map
    page_map.close()
    os.close(root)


OF_MAP = 4096  # pages that a page of map says something of


def test_a_page_of_map_goes_when_nothing_in_it_is_allocated(kept: PageMap) -> None:
    start = kept.nbytes
    for number in range(200):  # here and there
        one = pages(number * OF_MAP + 7, number * OF_MAP + 8)
        kept.set(one, ALLOCATED)
        kept.set(one, ABSENT)
        assert kept.nbytes <= start + 2 * PAGE_SIZE
    kept.set(pages(5, 100 * OF_MAP + 5), ALLOCATED)
    kept.set(pages(OF_MAP + 1, 99 * OF_MAP), ABSENT)  # at once; what is left is at the ends
    assert kept.nbytes <= start + 6 * PAGE_SIZE
    assert kept.count(pages(0, MAX_PAGES)) == OF_MAP + 1 - 5 + OF_MAP + 5
    kept.set(pages(0, 100 * OF_MAP + 5), ABSENT)
    assert kept.count(pages(0, MAX_PAGES)) == 0
    assert kept.nbytes <= start + 3 * PAGE_SIZE


def test_what_ranges_of_a_list_cover_goes_at_once(kept: PageMap) -> None:
    ranges = PageRanges(np.array([(5, 10 * OF_MAP), (20 * OF_MAP + 1, 40 * OF_MAP)]))
    kept.set_all(ranges, ALLOCATED)
    kept.set_all(ranges, ABSENT)
    assert (kept.count(pages(0, MAX_PAGES)), kept.nbytes) == (0, 2 * PAGE_SIZE)


def test_a_page_of_map_stays_while_something_in_it_is_allocated(kept: PageMap) -> None:
    for number in range(20):
        kept.set(pages(number * OF_MAP, number * OF_MAP + 2), ALLOCATED)
    for number in range(20):
        kept.set(pages(number * OF_MAP, number * OF_MAP + 1), ABSENT)
    assert [(run.start, run.end) for run in kept.runs(pages(0, MAX_PAGES))] == [
        (number * OF_MAP + 1, number * OF_MAP + 2) for number in range(20)
    ]


def test_of_a_list_a_few_pages_of_map_go_with_each_change(kept: PageMap, monkeypatch: pytest.MonkeyPatch) -> None:
    start, calls = kept.nbytes, 0

    def counted(*arguments: int) -> None:
        nonlocal calls
        calls += 1
        fallocate(*arguments)

    monkeypatch.setattr("memfs.contract.page_map.fallocate", counted)
    ranges = PageRanges(np.array([(number * OF_MAP, number * OF_MAP + 1) for number in range(100)]))
    kept.set_all(ranges, ALLOCATED)
    kept.set_all(ranges, ABSENT)
    assert 0 < calls <= 10
    for number in range(100):
        calls = 0
        kept.set(pages((200 + number % 2) * OF_MAP, (200 + number % 2) * OF_MAP + 1), ABSENT)
        assert calls <= 10
    assert kept.nbytes <= start + 3 * PAGE_SIZE


@pytest.mark.parametrize("place", ["file", "memfd"])
def test_page_converted_again_and_again_costs_no_system_call(
    kept: PageMap, page_map: PageMap, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def refused(*_: int) -> None:
        raise AssertionError("fallocate")

    monkeypatch.setattr("memfs.contract.page_map.fallocate", refused)
    one = kept if place == "file" else page_map
    for number in (5, 6, 5, 7):
        one.set(pages(number, number + 1), ALLOCATED)
        one.set(pages(number, number + 1), ABSENT)


@pytest.fixture(params=["files", "memfds"])
def make_maps(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[int], PageMaps]]:
    root = os.open(tmp_path, os.O_PATH)
    yield lambda most: MapFiles(root, root, most) if request.param == "files" else MapMemfds(most)
    os.close(root)


def test_no_more_maps_than_there_is_address_space_for(make_maps: Callable[[int], PageMaps]) -> None:
    maps = make_maps(2)
    first, second = maps.open("first"), maps.open("second")
    before = len(os.listdir("/proc/self/fd"))
    with raises(errno.ENOSPC):
        maps.open("third")
    assert len(os.listdir("/proc/self/fd")) == before
    maps.close(second)
    maps.close(maps.open("third"))
    maps.close(first)


def test_a_map_that_is_kept_shows_the_same_when_it_is_opened_again(make_maps: Callable[[int], PageMaps]) -> None:
    maps = make_maps(2)
    page_map = maps.open("map")
    page_map.set(pages(3, 5), ALLOCATED)
    maps.close(page_map)
    page_map = maps.open("map")
    assert list(page_map.runs(pages(0, MAX_PAGES))) == ([pages(3, 5)] if maps.are_kept else [])
    maps.close(page_map)
    maps.remove("map")
    maps.remove("map")
    page_map = maps.open("map")
    assert page_map.count(pages(0, MAX_PAGES)) == 0
    maps.close(page_map)


def test_an_owner_opens_a_map_for_reading(make_maps: Callable[[int], PageMaps]) -> None:
    maps = make_maps(1)
    page_map = maps.open("map")
    page_map.set(pages(3, 5), ALLOCATED)
    fd = maps.open_for_owner("map", page_map)
    view = PageMapView(fd)
    assert list(view.runs(pages(0, MAX_PAGES))) == [pages(3, 5)]
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 4096)
    view.close()
    os.close(fd)
    maps.close(page_map)


@pytest.mark.parametrize("step", ["size", "header"])
def test_a_map_whose_making_was_cut_short_is_an_empty_one(step: str) -> None:
    fd = os.memfd_create("map")
    if step == "header":
        os.ftruncate(fd, 4096 + MAX_PAGES)
    page_map = PageMap(fd)
    assert page_map.count(pages(0, MAX_PAGES)) == 0
    page_map.close()
    PageMapView(fd).close()
    os.close(fd)


def test_a_change_that_was_cut_short_is_ended() -> None:
    fd = os.memfd_create("map")
    PageMap(fd).close()
    os.pwrite(fd, b"\x03", 16)
    page_map = PageMap(fd)
    assert page_map.seq == 3
    for _ in range(2):
        page_map.settle()
        assert page_map.seq == 4
    page_map.close()
    os.close(fd)
