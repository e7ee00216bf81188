"""Bytes, pages and frames, as types that do not mix.

The RFC shifted page indexes by PAGE_SHIFT a second time and ended ranges inclusively in one place and
exclusively in another. Here a number says what it counts: byte offsets, page indexes within a file, guest
physical addresses, guest frame numbers and host frame numbers are distinct types for the type checker (and
plain ints at run time), every range is half-open, and code that needs a page index from a byte offset calls a
function here. Whole arrays of numbers (kvmsim's page tables and plans) have no such types, and are shifted in place.

A huge page is named by its order, as in the kernel: order 0 is 4 KiB, 9 is 2 MiB, 18 is 1 GiB on x86-64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Generic, NewType, Self, TypeVar, cast

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT

SECTORS_PER_PAGE: Final = PAGE_SIZE // 512  #: st_blocks counts 512 bytes

ORDER_4K: Final = 0
ORDER_2M: Final = 9
ORDER_1G: Final = 18

MAX_OFFSET: Final = (1 << 63) - 1  # loff_t: the largest byte offset a file can have (s_maxbytes of tmpfs)

ByteOffset = NewType("ByteOffset", int)  #: bytes from the start of a file
PageIndex = NewType("PageIndex", int)  #: pages from the start of a file (the kernel's pgoff_t)
Gpa = NewType("Gpa", int)  #: guest physical address, bytes
Gfn = NewType("Gfn", int)  #: guest frame number, pages
Pfn = NewType("Pfn", int)  #: host frame number, pages


_Index = TypeVar("_Index", bound=int)


@dataclass(frozen=True, slots=True)
class _Range(Generic[_Index]):
    """A half-open range [start, end); never empty, never negative.

    Raises ValueError for a range that is empty or starts below zero: nothing that takes a range has to ask.
    """

    start: _Index
    end: _Index

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"not a range: [{self.start}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and self.start <= index < self.end

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"

    def overlaps(self, other: Self) -> bool:
        """Return whether the two ranges have something in common."""
        return self.start < other.end and other.start < self.end

    def intersect(self, other: Self) -> Self | None:
        """Return what is in both ranges; None if nothing is."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return type(self)(start, end) if start < end else None

    def chunks(self, size: int) -> Iterator[Self]:
        """Return the range in chunks of `size`, of which the last may be shorter."""
        for start in range(self.start, self.end, size):
            yield type(self)(cast("_Index", start), cast("_Index", min(start + size, self.end)))


@dataclass(frozen=True, slots=True)
class GfnRange(_Range[Gfn]):
    """A half-open range of guest frame numbers."""


@dataclass(frozen=True, slots=True)
class PageRange(_Range[PageIndex]):
    """A half-open range of page indexes in one file.

    >>> PageRange.covering(ByteOffset(4095), 2)
    PageRange(start=0, end=2)
    >>> PageRange.inside(ByteOffset(4095), 2) is None
    True
    """

    @property
    def offset(self) -> ByteOffset:
        """Where the range begins, in bytes."""
        return ByteOffset(self.start << PAGE_SHIFT)

    @property
    def nbytes(self) -> int:
        """How long the range is, in bytes."""
        return len(self) << PAGE_SHIFT

    @property
    def slice(self) -> slice:
        """The range as an index into an array with one element a page."""
        return slice(self.start, self.end)

    def rounded(self, size: int) -> PageRange:
        """Return the aligned blocks of `size` pages that the range touches.

        >>> PageRange(PageIndex(3), PageIndex(9)).rounded(4)
        PageRange(start=0, end=12)
        """
        return PageRange(PageIndex(self.start // size * size), PageIndex(-(-self.end // size) * size))

    @classmethod
    def covering(cls, offset: ByteOffset, length: int) -> PageRange:
        """Return every page that [offset, offset + length) bytes touch: what an allocation needs. length > 0."""
        return cls(page_floor(offset), page_ceil(ByteOffset(offset + length)))

    @classmethod
    def inside(cls, offset: ByteOffset, length: int) -> PageRange | None:
        """Return only the pages wholly in [offset, offset + length) bytes: what a punched hole frees."""
        start, end = page_ceil(offset), page_floor(ByteOffset(offset + length))
        return cls(start, end) if start < end else None


def page_floor(offset: ByteOffset) -> PageIndex:
    """Return the page that holds byte `offset`."""
    return PageIndex(offset >> PAGE_SHIFT)


def page_ceil(offset: ByteOffset) -> PageIndex:
    """Return the first page that begins at or after byte `offset`; also the number of pages that a size takes."""
    return PageIndex((offset + PAGE_SIZE - 1) >> PAGE_SHIFT)


def page_offset(index: PageIndex) -> ByteOffset:
    """Return where page `index` begins in its file, in bytes."""
    return ByteOffset(index << PAGE_SHIFT)


def is_page_aligned(number: int) -> bool:
    """Return whether a number of bytes (an offset, a length, an address) is a multiple of PAGE_SIZE."""
    return number & (PAGE_SIZE - 1) == 0


def gpa_to_gfn(gpa: Gpa) -> Gfn:
    """Return the guest frame that holds guest physical address `gpa`."""
    return Gfn(gpa >> PAGE_SHIFT)


def gfn_to_gpa(gfn: Gfn) -> Gpa:
    """Return the guest physical address at which frame `gfn` begins."""
    return Gpa(gfn << PAGE_SHIFT)


def offset_in_page(address: int) -> int:
    """Return the byte within its page that an address or offset names: 0 .. PAGE_SIZE - 1."""
    return address & (PAGE_SIZE - 1)


def order_of(nbytes: int) -> int:
    """Return the order of a page of `nbytes` bytes, a power of two."""
    return nbytes.bit_length() - 1 - PAGE_SHIFT


def bytes_to_pages(nbytes: int) -> int:
    """Return how many whole pages `nbytes` bytes are, rounded down."""
    return nbytes >> PAGE_SHIFT


def pages_to_bytes(pages: int) -> int:
    """Return how many bytes `pages` pages are."""
    return pages << PAGE_SHIFT
