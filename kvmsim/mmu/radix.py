"""A radix tree from gfn to PTE, as EPT and NPT are one, in numpy: what is in it. page_table.py changes it.

Four levels of 512 entries cover 2**36 frames (256 TiB of guest physical memory), five 2**45. Entries are as in pte.py,
tables as in tables.py. Leaves are 4 KiB, 2 MiB or 1 GiB.

`translate` goes level by level for all gfns at once, in blocks that fit into a cache; absent entries lead through the
null table to an absent PTE without a branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvmsim.arrays import firsts
from kvmsim.mmu.pte import (
    ENTRIES,
    ENTRIES_SHIFT,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    PTE_A,
    PTE_HUGE,
    PTE_R,
    Ptes,
    entry_index,
    level_pages,
    level_shift,
    make_pte,
    pte_pfn,
    pte_pfns,
    select,
)
from kvmsim.mmu.tables import NULL_TABLE, Tables
from kvmsim.side import Side
from memfs.contract.units import PAGE_SHIFT, Gfn, GfnRange

_BLOCK: Final = 8192  # gfns translated at a time: their intermediate arrays stay in the cache


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk of one gfn: the entries met from the root down, and the level of the last (its leaf's, if present)."""

    entries: tuple[int, ...]
    level: int

    @property
    def pte(self) -> int:
        """The leaf; 0 if absent."""
        return self.entries[-1]


@dataclass(frozen=True, slots=True)
class Leaves:
    """Neighbouring leaves in one table. `ptes` is a view, absent ones among them; `gfns` what of the range they map.

    Of a leaf that is larger than 4 KiB, only a part may be in `gfns`.
    """

    level: int
    gfns: GfnRange
    ptes: Ptes

    def part(self, first: int, last: int) -> GfnRange:
        """Return the gfns of some of the leaves, ptes[first:last]."""
        pages = level_pages(self.level)
        start, base = self.gfns.start, self.gfns.start & -pages
        return GfnRange(Gfn(max(start, base + first * pages)), Gfn(min(self.gfns.end, base + last * pages)))


class Radix:
    """The tree, and all that can be asked of it. `levels`: 4 or 5. Raises ValueError for what no table can hold."""

    def __init__(self, levels: int = 4) -> None:
        if levels not in (4, 5):
            raise ValueError("a page table has 4 or 5 levels")
        self.levels: Final = levels
        #: gfns are below this
        self.max_gfn: Final = 1 << (levels * ENTRIES_SHIFT)
        #: how many gfns are mapped
        self.mapped = 0
        #: how many huge leaves there are, by level
        self.huge: Final = {PG_LEVEL_2M: 0, PG_LEVEL_1G: 0}
        self._tables: Final = Tables()
        self._entries: Final = self._tables.entries
        self._words: Final = self._tables.words
        self._used: Final = self._tables.used
        self._root: Final = int(self._tables.allocate(1)[0])

    @property
    def everything(self) -> GfnRange:
        """All gfns."""
        return GfnRange(Gfn(0), Gfn(self.max_gfn))

    @property
    def nr_tables(self) -> int:
        """How many tables are in use, the root included."""
        return len(self._tables)

    @property
    def nbytes(self) -> int:
        """How many bytes of memory the tables take."""
        return self._tables.nbytes

    def translate(self, gfns: npt.NDArray[np.integer]) -> Ptes:
        """Return the leaves of many gfns: any integer dtype and shape in, int64 of the same shape out, 0 where absent.

        Of a huge leaf, the PTE names the gfn's own frame and keeps PTE_HUGE.
        """
        flat = np.ascontiguousarray(gfns, np.int64).ravel()
        if flat.size and not (flat.min() >= 0 and flat.max() < self.max_gfn):
            raise ValueError("a gfn that no table can hold")
        out = np.empty(flat.shape, np.int64)
        index, entry = np.empty((2, min(_BLOCK, flat.size)), np.int64)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            self._translate(block, out[start : start + _BLOCK], index[: block.size], entry[: block.size])
        return out.reshape(gfns.shape)

    def _translate(self, gfns: Ptes, out: Ptes, index: Ptes, entry: Ptes) -> None:
        huge: Ptes | None = None
        entry.fill(make_pte(self._root, 0))
        for level in range(self.levels, 0, -1):
            np.right_shift(gfns, level_shift(level), out=index)
            index &= ENTRIES - 1
            entry >>= PAGE_SHIFT - ENTRIES_SHIFT  # from the number of a table to the index of its first entry
            entry &= -ENTRIES
            index += entry
            target = out if level == PG_LEVEL_4K else entry
            np.take(self._tables.flat, index, out=target, mode="clip")
            if self.huge.get(level):
                is_huge = (entry & PTE_HUGE) != 0
                here = np.where(is_huge, entry + ((gfns & (level_pages(level) - 1)) << PAGE_SHIFT), 0)
                huge = here if huge is None else huge + here
                entry[is_huge] = make_pte(NULL_TABLE, 0)
        if huge is not None:
            out += huge

    def translate_in_order(self, gfns: Ptes) -> Ptes:
        """Translate gfns in ascending order, int64 of shape (n,), by one walk for each 512 of them, which is faster."""
        blocks = gfns >> ENTRIES_SHIFT
        first = firsts(blocks)
        blocks, counts = blocks[first], np.diff(first, append=len(gfns))
        if len(gfns) and not (blocks[0] >= 0 and gfns[-1] < self.max_gfn):
            raise ValueError("a gfn that no table can hold")
        tables = np.full(len(blocks), self._root, np.int64)
        whole = np.zeros(len(blocks), np.int64)  # the PTE of the block's first gfn, where a huge leaf maps all of it
        for level in range(self.levels, PG_LEVEL_4K, -1):
            within = (blocks >> level_shift(level - 1)) & (ENTRIES - 1)
            entries = self._tables.flat[(tables << ENTRIES_SHIFT) + within]
            if self.huge.get(level):
                is_huge = (entries & PTE_HUGE) != 0
                inside = (blocks[is_huge] << ENTRIES_SHIFT) & (level_pages(level) - 1)
                whole[is_huge] = entries[is_huge] + (inside << PAGE_SHIFT)
                entries[is_huge] = make_pte(NULL_TABLE, 0)
            tables = pte_pfns(entries)
        index = np.repeat(tables << ENTRIES_SHIFT, counts)
        index += gfns & (ENTRIES - 1)
        ptes: Ptes = self._tables.flat[index]
        if whole.any():
            from_whole = np.repeat(whole, counts)
            huge = from_whole != 0
            ptes[huge] = from_whole[huge] + ((gfns[huge] & (ENTRIES - 1)) << PAGE_SHIFT)
        return ptes

    def walk(self, gfn: Gfn) -> Walk:
        """Return the entries that a walk of one gfn meets, down to its leaf or the first absent entry."""
        if not 0 <= gfn < self.max_gfn:
            raise ValueError(f"gfn {gfn:#x} is more than a table can hold")
        table, entries = self._root, []
        for level in range(self.levels, 0, -1):
            entry = self._words[table << ENTRIES_SHIFT | entry_index(gfn, level)]
            entries.append(entry)
            if not entry or level == PG_LEVEL_4K or entry & PTE_HUGE:
                break
            table = pte_pfn(entry)
        return Walk(tuple(entries), level)

    def lookup(self, gfn: Gfn) -> int:
        """Return the leaf of one gfn as `translate` does, 0 if absent."""
        walk = self.walk(gfn)
        return walk.pte + ((gfn & (level_pages(walk.level) - 1)) << PAGE_SHIFT) if walk.pte & PTE_HUGE else walk.pte

    def leaves(self, gfns: GfnRange) -> Iterator[Leaves]:
        """Generate the leaves that a range touches, in order. The tree may change meanwhile only through the views."""
        tables = self._tables_to(self._clip(gfns))
        if tables:
            level = self.levels - len(tables) + 1
            yield from self._leaves(tables[-1], level, gfns.start & -level_pages(level + 1), gfns)

    def _tables_to(self, gfns: GfnRange) -> list[int]:
        """Return the tables from the root down that each lead to the whole range; [] if nothing of it is mapped.

        Most ranges are small: then what is said level by level elsewhere happens in the last of these alone.
        """
        table = self._root
        tables = [table]
        for level in range(self.levels, self._level_of(gfns), -1):
            entry = self._words[table << ENTRIES_SHIFT | entry_index(gfns.start, level)]
            if not entry:
                return []
            if entry & PTE_HUGE:
                break
            table = pte_pfn(entry)
            tables.append(table)
        return tables

    def _level_of(self, gfns: GfnRange) -> int:
        """Return the lowest level at which one table covers the whole range.

        It is that of the highest bit in which the first gfn and the last differ, or one more if the range is one entry.
        """
        bits = (gfns.start ^ (gfns.end - 1)).bit_length()
        is_entry = bits % ENTRIES_SHIFT == 0 and len(gfns) == 1 << bits
        return min(-(-bits // ENTRIES_SHIFT) + is_entry, self.levels)

    def _leaves(self, table: int, level: int, base: int, gfns: GfnRange) -> Iterator[Leaves]:
        first, last = entries_of(gfns, base, level)
        if level == PG_LEVEL_4K:
            yield Leaves(level, gfns, self._entries[table, first:last])
            return
        pages, entries = level_pages(level), self._entries[table]
        whole = range(-(-(gfns.start - base) // pages), (gfns.end - base) // pages)
        for start, stop in _stretches(entries, first, last, whole):
            part = gfns.intersect(GfnRange(Gfn(base + start * pages), Gfn(base + stop * pages)))
            assert part is not None
            if entries[start] & PTE_HUGE:
                yield Leaves(level, part, entries[start:stop])
            else:
                yield from self._leaves(pte_pfn(int(entries[start])), level - 1, base + start * pages, part)

    def count(self, gfns: GfnRange, side: Side = Side.BOTH) -> int:
        """Return how many gfns of a range are mapped to memory of a side."""
        return sum(
            int(np.count_nonzero(select(leaves.ptes, side))) * (len(leaves.gfns) // len(leaves.ptes))
            for leaves in self.leaves(gfns)
        )

    def test_age(self, gfns: GfnRange, side: Side = Side.BOTH) -> bool:
        """Return whether memory of a side in a range was accessed since it was last aged (kvm_test_age_gfn)."""
        return any(bool((leaves.ptes[select(leaves.ptes, side)] & PTE_A).any()) for leaves in self.leaves(gfns))

    def _clip(self, gfns: GfnRange) -> GfnRange:
        if gfns.end > self.max_gfn:
            raise ValueError(f"gfns {gfns} are more than a table can hold")
        return gfns

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        assert not self._entries[NULL_TABLE].any(), "the null table is not null"
        free = np.array(self._tables.freed, np.int64)
        assert not self._entries[free].any(), "a free table is not empty"
        tables, reached, mapped = np.array([self._root]), 0, 0
        for level in range(self.levels, 0, -1):
            reached += len(tables)
            entries = self._entries[tables]
            assert (np.count_nonzero(entries, axis=1) == self._used[tables]).all(), "present entries are miscounted"
            assert level == self.levels or self._used[tables].all(), "an empty table was not freed"
            present = entries[entries != 0]
            assert (present & PTE_R).all(), "a present entry cannot be read"
            is_leaf = (present & PTE_HUGE) != 0 if level > PG_LEVEL_4K else np.ones(len(present), np.bool_)
            assert level > PG_LEVEL_4K or not (present & PTE_HUGE).any(), "a 4 KiB leaf that claims to be huge"
            assert level <= PG_LEVEL_1G or not is_leaf.any(), "a leaf that is larger than any"
            frames = pte_pfns(present)
            assert not (frames[is_leaf] % level_pages(level)).any(), "a huge leaf on unaligned frames"
            assert level not in self.huge or self.huge[level] == is_leaf.sum(), "huge leaves are miscounted"
            mapped += int(is_leaf.sum()) * level_pages(level)
            tables = frames[~is_leaf]
            assert len(np.unique(tables)) == len(tables), "a table that is used twice"
        assert mapped == self.mapped, "mapped gfns are miscounted"
        assert reached == len(self._tables), "a table that no walk comes to was not freed"


def entries_of(gfns: GfnRange, base: int, level: int) -> tuple[int, int]:
    """Return the first and last + 1 of the entries through which a range goes, in a table that begins at gfn `base`."""
    pages = level_pages(level)
    return (gfns.start - base) // pages, -(-(gfns.end - base) // pages)


def present(entries: Ptes, first: int, last: int) -> list[int]:
    """Return which entries of a table, in [first, last), are present."""
    if last - first == 1:  # above a small range it is one, level after level, and numpy is made for many
        return [first] if entries[first] else []
    indexes: list[int] = (np.flatnonzero(entries[first:last]) + first).tolist()
    return indexes


def _stretches(entries: Ptes, first: int, last: int, whole: range) -> Iterator[tuple[int, int]]:
    """Generate the present entries in [first, last) singly, but neighbouring huge leaves in `whole` together."""
    indexes = present(entries, first, last)
    together = [bool(entries[index] & PTE_HUGE) and index in whole for index in indexes]
    position = 0
    while position < len(indexes):
        start = position
        position += 1
        while (
            position < len(indexes)
            and together[start]
            and together[position]
            and indexes[position] == indexes[position - 1] + 1
        ):
            position += 1
        yield indexes[start], indexes[position - 1] + 1
