"""The secondary page table: a radix tree from gfn to PTE, as EPT and NPT are one, in numpy.

Four levels of 512 entries cover 2**36 frames (256 TiB of guest physical memory), five 2**45. Entries are as in pte.py,
tables as in tables.py. Leaves are 4 KiB, 2 MiB or 1 GiB. A huge leaf that is changed in part is split into the table of
smaller ones that say the same, and whatever maps a whole huge page again takes the place of such a table, so nothing
here ever depends on how memory was mapped, only on what is.

Everything is done to ranges. The tree is descended once a range and never once a gfn: what lies under one table of
level 2 (1 GiB) is read and written as one array. `translate` goes the other way, level by level for all gfns at once,
in blocks that fit into a cache; absent entries lead through the null table to an absent PTE without a branch.

Tables that become empty are freed at once. Not thread-safe: whoever calls holds the MMU lock (see invalidate.py).
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
    MAX_PFN,
    PFN_MASK,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    PTE_A,
    PTE_D,
    PTE_HUGE,
    PTE_R,
    PTE_RWX,
    PTE_W,
    Ptes,
    entry_index,
    is_private,
    level_of_order,
    level_pages,
    level_shift,
    make_pte,
    pte_pfn,
    select,
)
from kvmsim.mmu.tables import NULL_TABLE, Numbers, Tables
from memfs.units import PAGE_SHIFT, Gfn, GfnRange, Pfn

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


class PageTable:
    """Maps gfns to PTEs; 0 is an absent one.

    >>> table = PageTable()
    >>> table.map_range(GfnRange(Gfn(5), Gfn(8)), Pfn(100), PTE_RWX)
    >>> [pte_pfn(pte) for pte in table.translate(np.array([5, 7, 8])).tolist()]
    [100, 102, 0]
    >>> table.unmap_range(GfnRange(Gfn(0), Gfn(7)))
    2
    >>> table.mapped, table.nr_tables
    (1, 4)

    `levels`: 4 or 5. Raises ValueError for what no table can hold.
    """

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
        self._used: Final = self._tables.used
        self._root: Final = int(self._tables.make(1)[0])

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
        """How much memory they take."""
        return self._tables.nbytes

    # -- reading ----------------------------------------------------------------------------------------------------

    def translate(self, gfns: npt.NDArray[np.integer]) -> Ptes:
        """The leaves of many gfns: any integer dtype and shape in, int64 of the same shape out, 0 where absent.

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
        """`translate` for gfns in ascending order, shape (n,), int64: walks once for each 512, and is faster so."""
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
            tables = (entries & PFN_MASK) >> PAGE_SHIFT
        index = np.repeat(tables << ENTRIES_SHIFT, counts)
        index += gfns & (ENTRIES - 1)
        ptes: Ptes = self._tables.flat[index]
        if whole.any():
            from_whole = np.repeat(whole, counts)
            huge = from_whole != 0
            ptes[huge] = from_whole[huge] + ((gfns[huge] & (ENTRIES - 1)) << PAGE_SHIFT)
        return ptes

    def walk(self, gfn: Gfn) -> Walk:
        """The entries that a walk of one gfn meets, down to its leaf or the first absent entry."""
        if not 0 <= gfn < self.max_gfn:
            raise ValueError(f"gfn {gfn:#x} is more than a table can hold")
        table, entries = self._root, []
        for level in range(self.levels, 0, -1):
            entry = int(self._entries[table, entry_index(gfn, level)])
            entries.append(entry)
            if not entry or level == PG_LEVEL_4K or entry & PTE_HUGE:
                break
            table = pte_pfn(entry)
        return Walk(tuple(entries), level)

    def lookup(self, gfn: Gfn) -> int:
        """The leaf of one gfn as `translate` gives it, 0 if absent."""
        walk = self.walk(gfn)
        return walk.pte + ((gfn & (level_pages(walk.level) - 1)) << PAGE_SHIFT) if walk.pte & PTE_HUGE else walk.pte

    def leaves(self, gfns: GfnRange, *, split: bool = False) -> Iterator[Leaves]:
        """The leaves that a range touches, in order. With `split`, huge ones that it covers in part are split first.

        The page table must not be changed otherwise while this goes on, except through the views.
        """
        yield from self._leaves(self._root, self.levels, 0, self._clip(gfns), split)

    def _leaves(self, table: int, level: int, base: int, gfns: GfnRange, split: bool) -> Iterator[Leaves]:
        first, last = _entries_of(gfns, base, level)
        if level == PG_LEVEL_4K:
            yield Leaves(level, gfns, self._entries[table, first:last])
            return
        pages, entries = level_pages(level), self._entries[table]
        whole = range(-(-(gfns.start - base) // pages), (gfns.end - base) // pages)
        for start, stop in _stretches(entries, first, last, whole):
            part = gfns.intersect(GfnRange(Gfn(base + start * pages), Gfn(base + stop * pages)))
            assert part is not None
            if entries[start] & PTE_HUGE and (start in whole or not split):
                yield Leaves(level, part, entries[start:stop])
            else:
                yield from self._leaves(
                    self._descend(table, level, start), level - 1, base + start * pages, part, split
                )

    def count(self, gfns: GfnRange, private: bool | None = None) -> int:
        """How many gfns of a range are mapped; private or shared ones only, unless None."""
        return sum(
            int(np.count_nonzero(select(leaves.ptes, private))) * (len(leaves.gfns) // len(leaves.ptes))
            for leaves in self.leaves(gfns)
        )

    # -- mapping ----------------------------------------------------------------------------------------------------

    def map_range(self, gfns: GfnRange, pfn: Pfn, flags: int, order: int = 0) -> None:
        """Map neighbouring gfns to neighbouring frames from `pfn` on, replacing what was there.

        `flags` are PTE_* bits other than the frame and PTE_HUGE, PTE_R among them. `order`: the largest leaf that may
        be used (0, 9 or 18), which is where gfns and frames are aligned alike.
        """
        if gfns.end > self.max_gfn or not 0 <= pfn <= MAX_PFN - len(gfns):
            raise ValueError(f"gfns {gfns} or pfn {pfn:#x} are more than a PTE can hold")
        if not flags & PTE_R or flags & (PFN_MASK | PTE_HUGE) or flags < 0:
            raise ValueError("flags that make no leaf: it must be readable, and its frame is said otherwise")
        self._map(self._root, self.levels, 0, gfns, pfn, flags, level_of_order(order))

    def map_pages(self, gfns: Ptes, pfns: Ptes, flags: int) -> None:
        """Map single gfns, which must be absent, in order and each once, to frames: int64 of shape (n,).

        Raises ValueError, changing nothing that is mapped, if one of them is mapped.
        """
        blocks = gfns >> ENTRIES_SHIFT
        first = firsts(blocks)
        counts = np.diff(first, append=len(gfns))
        tables = self._leaf_tables(blocks[first])
        index = np.repeat(tables << ENTRIES_SHIFT, counts)
        index += gfns & (ENTRIES - 1)
        if self._tables.flat[index].any():
            raise ValueError("one of these gfns is mapped")
        ptes = pfns << PAGE_SHIFT
        ptes |= flags
        self._tables.flat[index] = ptes
        self._used[tables] += counts.astype(np.int32)
        self.mapped += len(gfns)

    def _leaf_tables(self, blocks: Ptes) -> Numbers:
        """The tables of 4 KiB leaves that blocks of 512 gfns lie in, by gfn / 512; made where there are none."""
        tables = np.full(len(blocks), self._root, np.int64)
        for level in range(self.levels, PG_LEVEL_4K, -1):
            within = (blocks >> level_shift(level - 1)) & (ENTRIES - 1)
            at = (tables << ENTRIES_SHIFT) + within
            entries = self._tables.flat[at]
            if level == PG_LEVEL_2M:  # each block has an entry of its own here
                absent = np.flatnonzero(entries == 0)
                entries[absent] = (self._tables.make(len(absent)) << PAGE_SHIFT) | PTE_RWX
                self._tables.flat[at[absent]] = entries[absent]
                np.add.at(self._used, tables[absent], 1)
            for position in np.flatnonzero((entries == 0) | ((entries & PTE_HUGE) != 0)).tolist():
                entries[position] = make_pte(self._descend(int(tables[position]), level, int(within[position])), 0)
            tables = (entries & PFN_MASK) >> PAGE_SHIFT
        return tables

    def _map(self, table: int, level: int, base: int, gfns: GfnRange, pfn: int, flags: int, largest: int) -> None:
        first, last = _entries_of(gfns, base, level)
        if level == PG_LEVEL_4K:
            self._write(table, level, first, last, pfn, flags)
            return
        pages = level_pages(level)
        whole = range(-(-(gfns.start - base) // pages), (gfns.end - base) // pages)
        if level <= largest and (pfn - gfns.start) % pages == 0:
            if whole:
                self._drop(table, level, whole.start, whole.stop)
                first_pfn = pfn + base + whole.start * pages - gfns.start
                self._write(table, level, whole.start, whole.stop, first_pfn, flags | PTE_HUGE)
        elif level == PG_LEVEL_2M:
            if whole:
                self._map_whole(table, whole, pfn + base + whole.start * pages - gfns.start, flags)
        else:
            whole = range(0)
        for index in range(first, last):
            if index not in whole:
                start = base + index * pages
                part = gfns.intersect(GfnRange(Gfn(start), Gfn(start + pages)))
                assert part is not None
                child = self._descend(table, level, index)
                self._map(child, level - 1, start, part, pfn + part.start - gfns.start, flags, largest)

    def _write(self, table: int, level: int, first: int, last: int, pfn: int, flags: int) -> None:
        """Write leaves into one table, over leaves or absent entries."""
        ptes = self._entries[table, first:last]
        new = last - first - int(np.count_nonzero(ptes))
        pages = level_pages(level)
        ptes[:] = _run(pfn, flags, last - first, pages)
        self._used[table] += new
        self.mapped += new * pages
        if level > PG_LEVEL_4K:
            self.huge[level] += new

    def _map_whole(self, table: int, whole: range, pfn: int, flags: int) -> None:
        """Fill all the 4 KiB leaves under neighbouring entries of a table of level 2."""
        entries = self._entries[table, whole.start : whole.stop]
        self._drop_huge(table, PG_LEVEL_2M, entries, (entries & PTE_HUGE) != 0)
        absent = entries == 0
        number = int(np.count_nonzero(absent))
        entries[absent] = (self._tables.make(number) << PAGE_SHIFT) | PTE_RWX
        self._used[table] += number
        children = (entries & PFN_MASK) >> PAGE_SHIFT
        self.mapped += len(whole) * ENTRIES - int(self._used[children].sum())
        ptes = _run(pfn, flags, len(whole) * ENTRIES, 1).reshape(len(whole), ENTRIES)
        if children[-1] - children[0] == len(whole) - 1 and (np.diff(children) == 1).all():
            self._entries[int(children[0]) : int(children[-1]) + 1] = ptes
        else:
            self._entries[children] = ptes
        self._used[children] = ENTRIES

    def _descend(self, table: int, level: int, index: int) -> int:
        """The table under an entry: made if absent, split from a huge leaf if it is one."""
        entry = int(self._entries[table, index])
        if entry & PTE_HUGE:
            return self._split(table, level, index)
        if entry:
            return pte_pfn(entry)
        child = int(self._tables.make(1)[0])
        self._entries[table, index] = make_pte(child, PTE_RWX)
        self._used[table] += 1
        return child

    def _split(self, table: int, level: int, index: int) -> int:
        """Put a table of smaller leaves, which say the same, in the place of a huge one."""
        entry = int(self._entries[table, index])
        child = int(self._tables.make(1)[0])
        flags = entry & ~PFN_MASK
        if level == PG_LEVEL_2M:
            flags &= ~PTE_HUGE
        else:
            self.huge[level - 1] += ENTRIES
        self._entries[child] = _run(pte_pfn(entry), flags, ENTRIES, level_pages(level - 1))
        self._used[child] = ENTRIES
        self.huge[level] -= 1
        self._entries[table, index] = make_pte(child, PTE_RWX)
        return child

    def collapse(self, gfn: Gfn, order: int) -> bool:
        """Put one leaf of 2**order pages in the place of the smaller ones around a gfn, if they say the same.

        They do if all are there, in neighbouring aligned frames, with the same flags apart from accessed and dirty,
        which become true if one was. Returns whether there is such a leaf now.
        """
        level = level_of_order(order)
        table, above = self._root, self.levels
        while above > level:
            entry = int(self._entries[table, entry_index(gfn, above)])
            if not entry or entry & PTE_HUGE:
                return bool(entry)
            table, above = pte_pfn(entry), above - 1
        index = entry_index(gfn, level)
        entry = int(self._entries[table, index])
        if level == PG_LEVEL_4K or not entry or entry & PTE_HUGE:
            return bool(entry)
        child, pages = pte_pfn(entry), level_pages(level - 1)
        if level - 1 > PG_LEVEL_4K:
            start = gfn & -level_pages(level)
            if not all(self.collapse(Gfn(start + number * pages), order - ENTRIES_SHIFT) for number in range(ENTRIES)):
                return False
        ptes = self._entries[child]
        first, marks = int(ptes[0]) & ~(PTE_A | PTE_D), int(np.bitwise_or.reduce(ptes)) & (PTE_A | PTE_D)
        same = (ptes & ~(PTE_A | PTE_D)) == _run(pte_pfn(first), first & ~PFN_MASK, ENTRIES, pages)
        if not first or pte_pfn(first) % level_pages(level) or not same.all():
            return False
        if level - 1 > PG_LEVEL_4K:
            self.huge[level - 1] -= ENTRIES
        self._tables.give_back(np.array([child], np.int64))
        self._entries[table, index] = first | marks | PTE_HUGE
        self.huge[level] += 1
        return True

    # -- unmapping --------------------------------------------------------------------------------------------------

    def unmap_range(self, gfns: GfnRange, private: bool | None = None) -> int:
        """Unmap a range; private or shared mappings only, unless None. Returns how many gfns were unmapped."""
        before = self.mapped
        self._unmap(self._root, self.levels, 0, self._clip(gfns), private)
        return before - self.mapped

    def _unmap(self, table: int, level: int, base: int, gfns: GfnRange, private: bool | None) -> None:
        first, last = _entries_of(gfns, base, level)
        if level == PG_LEVEL_4K:
            ptes = self._entries[table, first:last]
            gone = select(ptes, private)
            number = int(np.count_nonzero(gone))
            ptes[gone] = 0
            self._used[table] -= number
            self.mapped -= number
            return
        pages = level_pages(level)
        whole = range(-(-(gfns.start - base) // pages), (gfns.end - base) // pages)
        if level == PG_LEVEL_2M and whole:
            self._unmap_whole(table, whole, private)
        for index in (np.flatnonzero(self._entries[table, first:last]) + first).tolist():
            entry, start = int(self._entries[table, index]), base + index * pages
            part = gfns.intersect(GfnRange(Gfn(start), Gfn(start + pages)))
            assert part is not None
            if entry & PTE_HUGE and private is not None and is_private(entry) != private:
                continue
            if len(part) == pages and (entry & PTE_HUGE or private is None):
                self._drop(table, level, index, index + 1)
            elif level != PG_LEVEL_2M or index not in whole:
                child = self._descend(table, level, index)
                self._unmap(child, level - 1, start, part, private)
                self._free_if_empty(table, np.array([index]))

    def _unmap_whole(self, table: int, whole: range, private: bool | None) -> None:
        """Unmap what is under neighbouring entries of a table of level 2."""
        if private is None:
            self._drop(table, PG_LEVEL_2M, whole.start, whole.stop)
            return
        entries = self._entries[table, whole.start : whole.stop]
        is_huge = (entries & PTE_HUGE) != 0
        self._drop_huge(table, PG_LEVEL_2M, entries, is_huge & select(entries, private))
        indexes = np.flatnonzero((entries != 0) & ~is_huge)
        children = (entries[indexes] & PFN_MASK) >> PAGE_SHIFT
        ptes = self._entries[children]
        gone = select(ptes, private)
        numbers = np.count_nonzero(gone, axis=1)
        ptes[gone] = 0
        self._entries[children] = ptes
        self._used[children] -= numbers.astype(np.int32)
        self.mapped -= int(numbers.sum())
        self._free_if_empty(table, indexes + whole.start)

    def _drop(self, table: int, level: int, first: int, last: int) -> None:
        """Empty neighbouring entries of a table, with all that is under them."""
        entries = self._entries[table, first:last]
        self._drop_huge(table, level, entries, (entries & PTE_HUGE) != 0)
        present = entries != 0
        children = (entries[present] & PFN_MASK) >> PAGE_SHIFT
        if level == PG_LEVEL_2M:
            self.mapped -= int(self._used[children].sum())
        else:
            for child in children.tolist():
                self._drop(child, level - 1, 0, ENTRIES)
        self._tables.give_back(children)
        entries[present] = 0
        self._used[table] -= len(children)

    def _drop_huge(self, table: int, level: int, entries: Ptes, gone: npt.NDArray[np.bool_]) -> None:
        """Empty huge leaves among neighbouring entries of a table."""
        number = int(np.count_nonzero(gone))
        if number:
            entries[gone] = 0
            self._used[table] -= number
            self.mapped -= number * level_pages(level)
            self.huge[level] -= number

    def _free_if_empty(self, table: int, indexes: Numbers) -> None:
        """Free those of the tables under entries that have become empty."""
        children = (self._entries[table, indexes] & PFN_MASK) >> PAGE_SHIFT
        empty = self._used[children] == 0
        if empty.any():
            self._tables.give_back(children[empty])
            self._entries[table, indexes[empty]] = 0
            self._used[table] -= int(np.count_nonzero(empty))

    # -- flags ------------------------------------------------------------------------------------------------------

    def set_flags(self, gfn: Gfn, flags: int) -> None:
        """Add flags to the leaf of a mapped gfn, as the hardware does with PTE_A and PTE_D."""
        table = self._root
        for level in range(self.levels, 0, -1):
            index = entry_index(gfn, level)
            entry = int(self._entries[table, index])
            assert entry, f"gfn {gfn:#x} is not mapped"
            if level == PG_LEVEL_4K or entry & PTE_HUGE:
                self._entries[table, index] = entry | flags
                return
            table = pte_pfn(entry)

    def protect_range(self, gfns: GfnRange, *, clear: int = 0, add: int = 0) -> int:
        """Clear and add flags of all leaves in a range, splitting huge ones that it covers in part.

        `clear` must not have PTE_R in it. Returns how many gfns are mapped differently now.
        """
        if (clear | add) & (PFN_MASK | PTE_HUGE) or clear & PTE_R:
            raise ValueError("flags that cannot be changed: only R of a leaf that goes away, and its frame")
        changed = 0
        for leaves in self.leaves(gfns, split=True):
            wanted = np.where(leaves.ptes != 0, leaves.ptes & ~clear | add, 0)
            different = int(np.count_nonzero(wanted != leaves.ptes))
            if different:
                leaves.ptes[:] = wanted
                changed += different * level_pages(leaves.level)
        return changed

    def write_protect(self, gfns: GfnRange) -> int:
        """Take writability away, so that the next store to each page faults. Returns how many gfns had it."""
        return self.protect_range(gfns, clear=PTE_W)

    def test_age(self, gfns: GfnRange) -> bool:
        """Whether anything in a range was accessed since it was last aged (kvm_test_age_gfn)."""
        return any(bool((leaves.ptes & PTE_A).any()) for leaves in self.leaves(gfns))

    def age(self, gfns: GfnRange) -> bool:
        """`test_age`, and clear the accessed bits (kvm_age_gfn). Huge leaves are aged whole, as in KVM."""
        young = False
        for leaves in self.leaves(gfns):
            if (leaves.ptes & PTE_A).any():
                leaves.ptes[:] &= ~PTE_A
                young = True
        return young

    # -- soundness --------------------------------------------------------------------------------------------------

    def _clip(self, gfns: GfnRange) -> GfnRange:
        if gfns.end > self.max_gfn:
            raise ValueError(f"gfns {gfns} are more than a table can hold")
        return gfns

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        assert not self._entries[NULL_TABLE].any(), "the null table is not null"
        free = np.array(self._tables.free, np.int64)
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
            frames = (present & PFN_MASK) >> PAGE_SHIFT
            assert not (frames[is_leaf] % level_pages(level)).any(), "a huge leaf on unaligned frames"
            assert level not in self.huge or self.huge[level] == is_leaf.sum(), "huge leaves are miscounted"
            mapped += int(is_leaf.sum()) * level_pages(level)
            tables = frames[~is_leaf]
            assert len(np.unique(tables)) == len(tables), "a table that is used twice"
        assert mapped == self.mapped, "mapped gfns are miscounted"
        assert reached == len(self._tables), "a table that no walk comes to was not freed"


def _entries_of(gfns: GfnRange, base: int, level: int) -> tuple[int, int]:
    """The entries of a table that begins at gfn `base` through which a range inside it goes."""
    pages = level_pages(level)
    return (gfns.start - base) // pages, -(-(gfns.end - base) // pages)


def _stretches(entries: Ptes, first: int, last: int, whole: range) -> Iterator[tuple[int, int]]:
    """The present entries from `first` to `last`: each by itself, but neighbouring huge leaves in `whole` together."""
    indexes = (np.flatnonzero(entries[first:last]) + first).tolist()
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


def _run(pfn: int, flags: int, count: int, pages: int) -> Ptes:
    """PTEs of neighbouring frames, `pages` apart."""
    step = pages << PAGE_SHIFT
    first = make_pte(pfn, flags)
    ptes: Ptes = np.arange(first, first + count * step, step, dtype=np.int64)
    return ptes
