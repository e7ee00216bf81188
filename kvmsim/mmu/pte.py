"""One entry of a secondary page table: a documented 64-bit PTE, laid out as EPT's (Intel SDM volume 3, chapter 29).

    bit 0   R   readable          bit 7       a leaf although not in a table of level 1 ("page size")
    bit 1   W   writable          bit 8   A   accessed      bits 12-51   host frame, or number of the next table
    bit 2   X   executable        bit 9   D   dirty         bit 58       private (one of those left to software)

An entry is present iff R is set; an absent one is 0. Levels are numbered as the kernel does (PG_LEVEL_4K = 1, 2M = 2,
1G = 3): a table of level n holds entries that each cover 512**(n - 1) frames.

That private is one bit of the one entry that a gfn has makes "never mapped shared and private at once" true by
construction. Rejected: a tree for each side, like TDX's shared and secure EPT: then it would be an invariant to keep.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kvmsim.side import Side
from memfs.contract.units import PAGE_SHIFT, Gfn, Pfn

PTE_R: Final = 1 << 0
PTE_W: Final = 1 << 1
PTE_X: Final = 1 << 2
PTE_HUGE: Final = 1 << 7
PTE_A: Final = 1 << 8
PTE_D: Final = 1 << 9
PTE_PRIVATE: Final = 1 << 58
PTE_RWX: Final = PTE_R | PTE_W | PTE_X

PG_LEVEL_4K: Final = 1
PG_LEVEL_2M: Final = 2
PG_LEVEL_1G: Final = 3

ENTRIES_SHIFT: Final = 9
ENTRIES: Final = 1 << ENTRIES_SHIFT  #: in one table
MAX_PFN: Final = 1 << 40
PFN_MASK: Final = (MAX_PFN - 1) << PAGE_SHIFT

Ptes = npt.NDArray[np.int64]  #: bit 63 is never used, so the sign is no matter, and an index needs no conversion


def pte_pfn(pte: int) -> Pfn:
    """Return the frame that a present leaf names; of a huge one, its first."""
    return Pfn((pte & PFN_MASK) >> PAGE_SHIFT)


def make_pte(pfn: int, flags: int) -> int:
    """Return an entry that names a frame, or a table by its number."""
    return pfn << PAGE_SHIFT | flags


def pte_pfns(ptes: Ptes) -> Ptes:
    """Return the frames, or numbers of tables, that entries name; 0 of absent ones. Same shape."""
    pfns: Ptes = (ptes & PFN_MASK) >> PAGE_SHIFT
    return pfns


def make_ptes(pfns: Ptes, flags: int) -> Ptes:
    """Return entries that name frames, or tables by their numbers. Same shape."""
    ptes = pfns << PAGE_SHIFT
    ptes |= flags
    return ptes


def is_private(pte: int) -> bool:
    """Return whether a present PTE maps private memory."""
    return bool(pte & PTE_PRIVATE)


def level_shift(level: int) -> int:
    """Return how far a gfn is shifted to become the index into a table of a level, apart from the mask."""
    return ENTRIES_SHIFT * (level - 1)


def level_pages(level: int) -> int:
    """Return how many frames one entry of a table of a level covers. Also 2**order of a leaf there."""
    return 1 << level_shift(level)


def level_of_order(order: int) -> int:
    """Return the level at which leaves are 2**order frames large. Raises ValueError for an order that no level has."""
    level, rest = divmod(order, ENTRIES_SHIFT)
    if rest or not 0 <= level < PG_LEVEL_1G:
        raise ValueError(f"no leaf has order {order}")
    return level + 1


def order_of_level(level: int) -> int:
    """Return the order of a leaf in a table of a level: 0, 9 or 18."""
    return level_shift(level)


def entry_index(gfn: Gfn, level: int) -> int:
    """Return which entry of its table of a level a gfn goes through."""
    return gfn >> level_shift(level) & (ENTRIES - 1)


def side_of(pte: int) -> Side:
    """Return whether a present PTE maps private or shared memory."""
    return Side.PRIVATE if pte & PTE_PRIVATE else Side.SHARED


def select(ptes: Ptes, side: Side) -> npt.NDArray[np.bool_]:
    """Return which entries are present and map memory of a side. Same shape."""
    wanted = PTE_R | PTE_PRIVATE if side is Side.PRIVATE else PTE_R
    chosen: npt.NDArray[np.bool_] = ptes != 0 if side is Side.BOTH else (ptes & (PTE_R | PTE_PRIVATE)) == wanted
    return chosen
