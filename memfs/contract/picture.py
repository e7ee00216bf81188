"""Guest memory as a picture: cells in rows, each a page or many, as text, SVG or PNG.

What a cell shows: which side its pages are on, whether they make up whole blocks of 2 MiB (which one entry of a page
table can map), and whether the guest's owner has locked any of them. A cell whose pages are not all alike is mixed. In
text each state has a character of its own, so that no colour is needed; the colours are those of Okabe and Ito, which
people with any kind of colour blindness tell apart.

PNG takes Pillow (the extra `[plot]`); SVG and text take nothing.
"""

from __future__ import annotations

import enum
import io
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import Final

import numpy as np
import numpy.typing as npt

from memfs.contract.runs import NO_RUNS, Runs, count, covered, merged, whole_blocks, within, without
from memfs.contract.sizes import format_size, shown_bytes
from memfs.contract.terminal import printable
from memfs.contract.units import ORDER_2M, PageIndex, PageRange, page_offset, pages_to_bytes

#: what a name of a file with a picture in it ends in
FORMATS: Final = (".png", ".svg")
COLUMNS: Final = 64
ROWS: Final = 16
_HUGE: Final = 1 << ORDER_2M
_CELL: Final = 12  # pixels
_MARGIN: Final = 12
_OFFSETS: Final = 84  # pixels for the offset at which a row begins
_LINE: Final = 20


class State(enum.IntEnum):
    """What is said of a cell."""

    PRIVATE = 0
    PRIVATE_HUGE = 1
    SHARED = 2
    SHARED_HUGE = 3
    ABSENT = 4
    MIXED = 5
    LOCKED = 6


@dataclass(frozen=True, slots=True)
class Look:
    """How a state is shown: by which words, which character, which letter where there is ASCII only, which colour."""

    words: str
    character: str
    ascii: str
    colour: str


LOOKS: Final = {
    State.PRIVATE: Look("private", "▓", "#", "#e69f00"),
    State.PRIVATE_HUGE: Look("private huge", "█", "H", "#d55e00"),
    State.SHARED: Look("shared", "░", "-", "#56b4e9"),
    State.SHARED_HUGE: Look("shared huge", "▒", "=", "#0072b2"),
    State.ABSENT: Look("absent", "·", ".", "#d9d9d9"),
    State.MIXED: Look("mixed", "◪", "+", "#009e73"),
    State.LOCKED: Look("locked", "◆", "L", "#000000"),
}


@dataclass(frozen=True, slots=True)
class Memory:
    """What there is of some pages: runs that do not touch. What is private counts as that, though it be shared, too."""

    pages: PageRange
    private: Runs
    shared: Runs
    huge: Runs  #: what of both lies in whole blocks of 2 MiB on one side
    locked: Runs

    @classmethod
    def of(cls, pages: PageRange, private: Runs, shared: Runs, locked: Runs = NO_RUNS) -> Memory:
        """Return what runs say of pages; runs may touch, and go beyond, where whole blocks of 2 MiB may end."""
        private = merged(private)
        shared = without(shared, private)
        blocks = np.concatenate([whole_blocks(each, _HUGE) for each in (private, shared)])
        huge = merged(blocks[blocks[:, 0].argsort()])
        here = np.array([[pages.start, pages.end]], np.int64)
        return cls(pages, *(within(each, here) for each in (private, shared, huge, locked)))

    @property
    def totals(self) -> dict[str, int]:
        """How many pages there are of each kind; those in whole blocks of 2 MiB, and locked ones, a second time."""
        private, shared = count(self.private), count(self.shared)
        of_both = {"private": private, "shared": shared, "absent": len(self.pages) - private - shared}
        return {**of_both, "huge": count(self.huge), "locked": count(self.locked)}

    def picture(self, columns: int = COLUMNS, rows: int = ROWS) -> Picture:
        """Return a picture of it, of at most so many rows of so many cells."""
        pages_per_cell = 1
        while pages_per_cell * columns * rows < len(self.pages):
            pages_per_cell *= 2
        cells = -(-len(self.pages) // pages_per_cell)
        edges = np.minimum(self.pages.start + np.arange(cells + 1, dtype=np.int64) * pages_per_cell, self.pages.end)
        sizes = np.diff(edges)
        states = np.full(cells, State.MIXED, np.uint8)
        states[(covered(self.private, edges) == 0) & (covered(self.shared, edges) == 0)] = State.ABSENT
        for runs, small, huge in (
            (self.private, State.PRIVATE, State.PRIVATE_HUGE),
            (self.shared, State.SHARED, State.SHARED_HUGE),
        ):
            on_side = covered(runs, edges) == sizes
            states[on_side] = small
            states[on_side & (covered(self.huge, edges) == sizes)] = huge
        states[covered(self.locked, edges) > 0] = State.LOCKED
        return Picture(self.pages, pages_per_cell, columns, states, self.totals)


@dataclass(frozen=True, slots=True)
class Picture:
    """Cells, uint8 of shape (n,), a `State` each; `totals` is `Memory.totals`."""

    pages: PageRange
    pages_per_cell: int
    columns: int
    cells: npt.NDArray[np.uint8]
    totals: dict[str, int]

    @property
    def summary(self) -> str:
        """How much there is of each kind, and what a cell is."""
        sizes = ", ".join(f"{shown_bytes(pages_to_bytes(pages))} {kind}" for kind, pages in self.totals.items())
        return f"{sizes}; a cell is {format_size(pages_to_bytes(self.pages_per_cell))}"

    @property
    def shown(self) -> list[State]:
        """The states that are in it, in the order in which a legend has them."""
        there = np.unique(self.cells)
        return [state for state in State if state in there]

    def rows(self) -> Iterator[tuple[str, list[State]]]:
        """Return rows: the offset at which they begin, and their cells."""
        for at in range(0, len(self.cells), self.columns):
            page = PageIndex(self.pages.start + at * self.pages_per_cell)
            yield format_size(page_offset(page)), [State(each) for each in self.cells[at : at + self.columns].tolist()]

    def lines(self, *, ascii_only: bool = False) -> list[list[tuple[str, str]]]:
        """Return lines for a terminal, each of pieces of text with the colour that they have, or none."""

        def drawn(state: State) -> str:
            return LOOKS[state].ascii if ascii_only else LOOKS[state].character

        lines = []
        rows = list(self.rows())
        width = max((len(offset) for offset, _ in rows), default=0)
        for offset, cells in rows:
            pieces = [(f"{offset:>{width}} ", "")]
            for state in cells:
                if pieces[-1][1] == LOOKS[state].colour:
                    pieces[-1] = (pieces[-1][0] + drawn(state), LOOKS[state].colour)
                else:
                    pieces.append((drawn(state), LOOKS[state].colour))
            lines.append(pieces)
        legend = [(f"{drawn(state)} {LOOKS[state].words} ", LOOKS[state].colour) for state in self.shown]
        return [*lines, [("  ", ""), *legend], [("  " + self.summary, "")]]

    def text(self, *, ascii_only: bool = False) -> str:
        """Return it as text without colours."""
        return "\n".join("".join(piece for piece, _ in line).rstrip() for line in self.lines(ascii_only=ascii_only))

    def svg(self, title: str) -> str:
        """Return it as SVG, with a legend."""
        width, height = self._extent()
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            f'font-size="12"><title>{escape(printable(title))}</title><rect width="100%" height="100%" fill="#ffffff"/>'
        ]
        for x, y, words in self._words(title):
            parts.append(f'<text x="{x}" y="{y + 10}">{escape(words)}</text>')
        for x, y, across, state in self._boxes():
            parts.append(f'<rect x="{x}" y="{y}" width="{across}" height="{_CELL - 1}" fill="{LOOKS[state].colour}"/>')
        return "\n".join([*parts, "</svg>", ""])

    def png(self, title: str) -> bytes:
        """Return it as PNG, with a legend. Raises ImportError where there is no Pillow."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", self._extent(), "#ffffff")
        draw = ImageDraw.Draw(image)
        for x, y, words in self._words(title):
            draw.text((x, y), words, fill="#000000")
        for x, y, across, state in self._boxes():
            draw.rectangle((x, y, x + across - 1, y + _CELL - 2), fill=LOOKS[state].colour)
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        return file.getvalue()

    def file(self, title: str, path: str) -> bytes:
        """Return it in the format that a name says, which `check_format` has seen."""
        return self.png(title) if path.endswith(".png") else self.svg(title).encode()

    def _extent(self) -> tuple[int, int]:
        """Return width and height, in pixels."""
        rows = -(-len(self.cells) // self.columns)
        return _OFFSETS + self.columns * _CELL + 2 * _MARGIN, 2 * _MARGIN + rows * _CELL + 4 * _LINE

    def _words(self, title: str) -> Iterator[tuple[int, int, str]]:
        yield _MARGIN, _MARGIN, printable(title).encode("latin-1", "replace").decode("latin-1")
        y = _MARGIN + _LINE
        for offset, _ in self.rows():
            yield _MARGIN, y, offset
            y += _CELL
        yield _MARGIN, y + _LINE // 2 + _LINE, self.summary
        for x, state in self._legend():
            yield x + _CELL + 4, y + _LINE // 2, LOOKS[state].words

    def _boxes(self) -> Iterator[tuple[int, int, int, State]]:
        """Return x, y and width, in pixels, of neighbours of one state, and of what explains them."""
        y = _MARGIN + _LINE
        for _, cells in self.rows():
            start = 0
            for end in range(1, len(cells) + 1):
                if end == len(cells) or cells[end] is not cells[start]:
                    yield _MARGIN + _OFFSETS + start * _CELL, y, (end - start) * _CELL - 1, cells[start]
                    start = end
            y += _CELL
        for x, state in self._legend():
            yield x, y + _LINE // 2, _CELL - 1, state

    def _legend(self) -> Iterator[tuple[int, State]]:
        x = _MARGIN
        for state in self.shown:
            yield x, state
            x += _CELL + 20 + 7 * len(LOOKS[state].words)


def check_format(path: str) -> str:
    """Return the name of a file that is to have a picture in it. Raises ValueError: none can be written under it."""
    if not path.endswith(FORMATS):
        raise ValueError(f"{path}: not a name that ends in .png or .svg")
    if path.endswith(".png") and find_spec("PIL") is None:
        raise ValueError(
            f"{path}: PNG takes Pillow, which is not installed (pip install 'memfs-kvmsim[plot]'; "
            "Debian: python3-pil); .svg takes nothing"
        )
    return path
