"""Pictures of guest memory: each cell against a look at each of its pages, and what is written about them."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfs.contract.picture import LOOKS, Memory, State
from memfs.contract.runs import NO_RUNS, runs_of
from memfs.contract.units import ORDER_2M, PageIndex, PageRange
from tests.helpers import pages

BLOCK = 1 << ORDER_2M
HUGE = 8 * BLOCK
points = st.integers(0, HUGE)


def memory(*, private: list[tuple[int, int]], shared: list[tuple[int, int]], of: PageRange | None = None) -> Memory:
    return Memory.of(of or pages(0, HUGE), runs_of(private), runs_of(shared), runs_of([(5, 6)]))


@settings(max_examples=50)
@given(st.tuples(points, points).map(sorted), st.tuples(points, points).map(sorted), st.integers(0, 11))
def test_cell_is_what_all_its_pages_are(private: list[int], shared: list[int], order: int) -> None:
    sides = np.full(HUGE, State.ABSENT, np.uint8)
    sides[shared[0] : shared[1]] = State.SHARED
    sides[private[0] : private[1]] = State.PRIVATE  # whatever the shared file has there as well
    for start in range(0, HUGE, BLOCK):
        for small, huge in ((State.PRIVATE, State.PRIVATE_HUGE), (State.SHARED, State.SHARED_HUGE)):
            if (sides[start : start + BLOCK] == small).all():
                sides[start : start + BLOCK] = huge
    cells = HUGE >> order
    drawn = memory(private=[tuple(private)] if private[0] < private[1] else [], shared=[tuple(shared)])  # type: ignore[list-item]
    picture = drawn.picture(columns=cells, rows=1)
    assert picture.pages_per_cell == 1 << order
    for number, cell in enumerate(picture.cells.tolist()):
        there = set(sides[number << order : (number + 1) << order].tolist())
        side = {State(each) for each in there}
        if number == 5 >> order:
            assert cell is State.LOCKED or cell == State.LOCKED
        elif len(side) == 1:
            assert State(cell) in side
        elif side == {State.PRIVATE, State.PRIVATE_HUGE}:
            assert cell == State.PRIVATE
        elif side == {State.SHARED, State.SHARED_HUGE}:
            assert cell == State.SHARED
        else:
            assert cell == State.MIXED


def test_tebibyte_and_a_page_are_pictures() -> None:
    of = PageRange(PageIndex(0), PageIndex(1 << 28))
    large = Memory.of(of, runs_of([(0, 1 << 27)]), runs_of([(1 << 27, (1 << 27) + 1)])).picture()
    assert (len(large.cells), large.pages_per_cell) == (1024, 1 << 18)
    assert large.totals == {"private": 1 << 27, "shared": 1, "absent": (1 << 27) - 1, "huge": 1 << 27, "locked": 0}
    assert large.text().splitlines()[8].startswith("512G ◪·")
    small = Memory.of(pages(7, 8), NO_RUNS, runs_of([(0, 9)])).picture()
    assert small.text().splitlines()[0] == "28K ░"


def test_characters_and_colours_differ() -> None:
    for kind in ("character", "ascii", "colour", "words"):
        assert len({getattr(look, kind) for look in LOOKS.values()}) == len(LOOKS)
    picture = memory(private=[(0, 100)], shared=[]).picture()
    assert picture.text(ascii_only=True).isascii()
    assert all(len(line) <= 80 for line in picture.text().splitlines())


@pytest.mark.parametrize("title", ["<script>alert(1)</script>&", "a\x1b]0;x\x07\nb", "\udcff"])
def test_titles_say_nothing_but_themselves(title: str) -> None:
    picture = memory(private=[(0, BLOCK)], shared=[(BLOCK, BLOCK + 3)]).picture()
    svg = picture.svg(title)
    names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
    assert names == {"svg", "title", "rect", "text"}
    assert all(character.isprintable() or character == "\n" for character in svg)
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    with pillow.open(io.BytesIO(picture.png(title))) as image:
        colours = {colour for _, colour in image.getcolors(1 << 16)}
    assert {tuple(bytes.fromhex(LOOKS[state].colour[1:])) for state in picture.shown} <= colours
