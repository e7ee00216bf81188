"""The secondary page table: a radix tree from gfn to PTE, as EPT is one, in numpy.

Four levels of 512 entries cover 2**36 frames (256 TiB). All tables lie in one array of shape (tables, 512), dtype
uint64, and an entry of an inner table holds the number of the next table where a leaf holds a pfn. Table 0 is all
zeros and stays so: a walk that comes to an absent entry goes on in table 0 and ends at an absent PTE, so that a walk of
any number of gfns is four array look-ups without a branch.

    PTE   bit 0 R   bit 1 W   bit 2 X   bit 8 accessed   bit 9 dirty   bits 12-51 pfn   bit 58 private

(EPT's bits, Intel SDM volume 3, "EPT Paging-Structure Entries"; 58 is one of those left to software.) A gfn has one
PTE, so it cannot be mapped shared and private at once; what remains to be seen to is that the one is the right one.

Tables that become empty are freed at once. Not thread-safe: whoever calls holds the MMU lock (see invalidate.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from memfs.units import PAGE_SHIFT, Gfn, GfnRange, Pfn

PTE_R: Final = 1 << 0
PTE_W: Final = 1 << 1
PTE_X: Final = 1 << 2
PTE_A: Final = 1 << 8
PTE_D: Final = 1 << 9
PTE_PRIVATE: Final = 1 << 58
PTE_RWX: Final = PTE_R | PTE_W | PTE_X

LEVELS: Final = 4
_BITS: Final = 9  # of a gfn, consumed at each level
_ENTRIES: Final = 1 << _BITS
MAX_GFN: Final = 1 << (LEVELS * _BITS)
_PFN_MASK: Final = ((1 << 40) - 1) << PAGE_SHIFT
_NULL, _ROOT = 0, 1

Ptes = npt.NDArray[np.uint64]


def pte_pfn(pte: int) -> Pfn:
    """The frame that a present PTE names."""
    return Pfn((pte & _PFN_MASK) >> PAGE_SHIFT)


def is_private(pte: int) -> bool:
    """Whether a present PTE maps private memory."""
    return bool(pte & PTE_PRIVATE)


class PageTable:
    """Maps gfns to PTEs; 0 is an absent one.

    >>> table = PageTable()
    >>> table.map_range(GfnRange(Gfn(5), Gfn(8)), Pfn(100), PTE_RWX | PTE_PRIVATE)
    >>> [pte_pfn(int(pte)) for pte in table.translate(np.array([5, 7, 8]))]
    [100, 102, 0]
    >>> table.unmap_range(GfnRange(Gfn(0), Gfn(7)))
    2

    Raises ValueError for a gfn or pfn that no table can hold.
    """

    def __init__(self) -> None:
        self._tables: Ptes = np.zeros((16, _ENTRIES), np.uint64)
        self._used = np.zeros(16, np.int32)  # present entries of each table
        self._free: list[int] = list(range(15, _ROOT, -1))
        #: how many leaves are present
        self.mapped = 0

    @property
    def nr_tables(self) -> int:
        """How many tables are in use, the root included."""
        return len(self._tables) - 1 - len(self._free)

    # -- reading ----------------------------------------------------------------------------------------------------

    def translate(self, gfns: npt.NDArray[np.integer]) -> Ptes:
        """The PTEs of many gfns: any integer dtype and shape in, uint64 of the same shape out, 0 where absent."""
        gfns = gfns.astype(np.int64, copy=False)
        if gfns.size and not (gfns.min() >= 0 and gfns.max() < MAX_GFN):
            raise ValueError("a gfn that no table can hold")
        table: npt.NDArray[np.int64] = np.full(gfns.shape, _ROOT)
        for level in range(LEVELS - 1, 0, -1):
            entry = self._tables[table, (gfns >> level * _BITS) & (_ENTRIES - 1)]
            table = (entry >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        ptes: Ptes = self._tables[table, gfns & (_ENTRIES - 1)]
        return ptes

    def lookup(self, gfn: Gfn) -> int:
        """The PTE of one gfn, 0 if absent."""
        table = self._leaf(gfn)
        return int(self._tables[table, gfn & (_ENTRIES - 1)])

    def mapped_ranges(self, gfns: GfnRange) -> Iterator[tuple[GfnRange, Ptes]]:
        """The parts of a range that have leaf tables, with a view of their PTEs (absent ones among them)."""
        for table, part in self._leaves(gfns):
            start = part.start & (_ENTRIES - 1)
            yield part, self._tables[table, start : start + len(part)]

    def count(self, gfns: GfnRange, private: bool | None = None) -> int:
        """How many gfns of a range are mapped; private or shared ones only, unless None."""
        return sum(int(np.count_nonzero(_select(ptes, private))) for _, ptes in self.mapped_ranges(gfns))

    # -- changing ---------------------------------------------------------------------------------------------------

    def map_range(self, gfns: GfnRange, pfn: Pfn, flags: int) -> None:
        """Map neighbouring gfns to neighbouring frames from `pfn` on, replacing what was there.

        `flags` are PTE_* bits other than the pfn, PTE_R among them.
        """
        if gfns.end > MAX_GFN or not 0 <= pfn <= (_PFN_MASK >> PAGE_SHIFT) - len(gfns):
            raise ValueError(f"gfns {gfns} or pfn {pfn:#x} are more than a PTE can hold")
        if not flags & PTE_R:
            raise ValueError("a mapping that cannot be read would count as absent")
        for part in _cut(gfns):
            table = self._make_leaf(part.start)
            start = part.start & (_ENTRIES - 1)
            ptes = self._tables[table, start : start + len(part)]
            new = len(part) - int(np.count_nonzero(ptes))
            first = pfn + (part.start - gfns.start)
            ptes[:] = (np.arange(first, first + len(part), dtype=np.uint64) << np.uint64(PAGE_SHIFT)) | np.uint64(flags)
            self._used[table] += new
            self.mapped += new

    def unmap_range(self, gfns: GfnRange, private: bool | None = None) -> int:
        """Unmap a range; private or shared mappings only, unless None. Returns how many gfns were unmapped."""
        total = 0
        for table, part in list(self._leaves(gfns)):
            start = part.start & (_ENTRIES - 1)
            ptes = self._tables[table, start : start + len(part)]
            gone = _select(ptes, private)
            number = int(np.count_nonzero(gone))
            ptes[gone] = 0
            self._used[table] -= number
            total += number
            if not self._used[table]:
                self._free_leaf(part.start)
        self.mapped -= total
        return total

    def set_flags(self, gfn: Gfn, flags: int) -> None:
        """Add PTE_A or PTE_D to a mapped gfn, as the hardware does."""
        table = self._leaf(gfn)
        assert self._tables[table, gfn & (_ENTRIES - 1)], f"gfn {gfn:#x} is not mapped"
        self._tables[table, gfn & (_ENTRIES - 1)] |= np.uint64(flags)

    # -- tables -----------------------------------------------------------------------------------------------------

    def _leaf(self, gfn: Gfn) -> int:
        """The leaf table of a gfn; the null table if it has none."""
        if not 0 <= gfn < MAX_GFN:
            raise ValueError(f"gfn {gfn:#x} is more than a table can hold")
        table = _ROOT
        for level in range(LEVELS - 1, 0, -1):
            table = int(self._tables[table, (gfn >> level * _BITS) & (_ENTRIES - 1)]) >> PAGE_SHIFT
        return table

    def _leaves(
        self, gfns: GfnRange, level: int = LEVELS - 1, table: int = _ROOT, base: int = 0
    ) -> Iterator[tuple[int, GfnRange]]:
        """The leaf tables under a table that a range touches, each with the part of the range that it holds."""
        if level == 0:
            part = gfns.intersect(GfnRange(Gfn(base), Gfn(base + _ENTRIES)))
            if part is not None:
                yield table, part
            return
        reach = 1 << level * _BITS  # gfns under one entry
        first = max(0, (gfns.start - base) // reach)
        last = min(_ENTRIES, (gfns.end - base + reach - 1) // reach)
        for index in (np.flatnonzero(self._tables[table, first:last]) + first).tolist():
            child = int(self._tables[table, index]) >> PAGE_SHIFT
            yield from self._leaves(gfns, level - 1, child, base + index * reach)

    def _make_leaf(self, gfn: Gfn) -> int:
        """The leaf table of a gfn, made with the tables above it if need be."""
        table = _ROOT
        for level in range(LEVELS - 1, 0, -1):
            index = (gfn >> level * _BITS) & (_ENTRIES - 1)
            child = int(self._tables[table, index]) >> PAGE_SHIFT
            if child == _NULL:
                child = self._new_table()
                self._tables[table, index] = child << PAGE_SHIFT | PTE_RWX
                self._used[table] += 1
            table = child
        return table

    def _free_leaf(self, gfn: Gfn) -> None:
        """Free the empty leaf table of a gfn, and those above it that become empty by that."""
        path = [_ROOT]
        for level in range(LEVELS - 1, 0, -1):
            path.append(int(self._tables[path[-1], (gfn >> level * _BITS) & (_ENTRIES - 1)]) >> PAGE_SHIFT)
        for level, table in enumerate(reversed(path[1:]), start=1):
            if self._used[table]:
                return
            parent = path[-1 - level]
            self._tables[parent, (gfn >> level * _BITS) & (_ENTRIES - 1)] = 0
            self._used[parent] -= 1
            self._free.append(table)

    def _new_table(self) -> int:
        if not self._free:
            old = len(self._tables)
            self._tables = np.concatenate([self._tables, np.zeros_like(self._tables)])
            self._used = np.concatenate([self._used, np.zeros_like(self._used)])
            self._free = list(range(2 * old - 1, old - 1, -1))
        return self._free.pop()

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        assert not self._tables[_NULL].any(), "the null table is not null"
        assert (np.count_nonzero(self._tables, axis=1) == self._used).all(), "present entries are miscounted"
        leaves = list(self._leaves(GfnRange(Gfn(0), Gfn(MAX_GFN))))
        assert sum(int(self._used[table]) for table, _ in leaves) == self.mapped, "leaves are miscounted"
        assert all(self._used[table] for table, _ in leaves), "an empty table was not freed"
        assert not self._tables[self._free].any(), "a free table is not empty"


def _select(ptes: Ptes, private: bool | None) -> npt.NDArray[np.bool_]:
    present: npt.NDArray[np.bool_] = ptes != 0
    if private is not None:
        present &= ((ptes & np.uint64(PTE_PRIVATE)) != 0) == private
    return present


def _cut(gfns: GfnRange) -> Iterator[GfnRange]:
    """Cut a range at leaf table boundaries."""
    start = gfns.start
    while start < gfns.end:
        end = min(gfns.end, (start | (_ENTRIES - 1)) + 1)
        yield GfnRange(start, Gfn(end))
        start = Gfn(end)
