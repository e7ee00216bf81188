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
from memfs.contract.units import PageIndex
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


def test_what_is_no_page_map_is_refused() -> None:
    fd = os.memfd_create("other")
    with pytest.raises(ValueError, match="not a page map"):
        PageMapView(fd)
    os.ftruncate(fd, 4096 + MAX_PAGES)
    with pytest.raises(ValueError, match="not a page map"):
        PageMapView(fd)
    os.close(fd)


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
