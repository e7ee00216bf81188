"""The secondary page table: the tree of radix.py, and how it is changed.

A `Radix` is the tree to those that read it, a `PageTable` the same tree to those that change it, as a Sequence is to a
MutableSequence. Rejected: a page table that has a tree. All that is read would go through one more call, a look-up
takes 2 us, and what a change must keep true (counts, free tables) would be said in one class and owned by another.

A huge leaf that is changed in part is split into the table of smaller ones that say the same, and whatever maps a whole
huge page again takes the place of such a table, so nothing here ever depends on how memory was mapped, only on what is.

Everything is done to ranges. The tree is descended once a range and never once a gfn: what lies under one table of
level 2 (1 GiB) is read and written as one array.

Tables that become empty are freed immediately. Not thread-safe: callers hold the MMU lock (see invalidate.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvmsim.arrays import Numbers, firsts
from kvmsim.mmu.pte import (
    ENTRIES,
    ENTRIES_SHIFT,
    MAX_PFN,
    PFN_MASK,
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
    level_of_order,
    level_pages,
    level_shift,
    make_pte,
    make_ptes,
    pte_pfn,
    pte_pfns,
    select,
    side_of,
)
from kvmsim.mmu.radix import Radix, entries_of, present
from kvmsim.side import Side
from memfs.contract.units import PAGE_SHIFT, Gfn, GfnRange, Pfn


class PageTable(Radix):
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
        largest = level_of_order(order)
        table, level = self._root, self._level_of(gfns)
        for above in range(self.levels, level, -1):
            table = self._descend(table, above, entry_index(gfns.start, above))
        self._map(table, level, gfns.start & -level_pages(level + 1), gfns, pfn, flags, largest)

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
        self._tables.flat[index] = make_ptes(pfns, flags)
        self._used[tables] += counts.astype(np.int32)
        self.mapped += len(gfns)

    def _leaf_tables(self, blocks: Ptes) -> Numbers:
        """Return the tables of 4 KiB leaves that blocks of 512 gfns (by gfn / 512) lie in, allocating absent ones."""
        tables = np.full(len(blocks), self._root, np.int64)
        for level in range(self.levels, PG_LEVEL_4K, -1):
            within = (blocks >> level_shift(level - 1)) & (ENTRIES - 1)
            at = (tables << ENTRIES_SHIFT) + within
            entries = self._tables.flat[at]
            if level == PG_LEVEL_2M:  # each block has an entry of its own here
                absent = np.flatnonzero(entries == 0)
                entries[absent] = make_ptes(self._tables.allocate(len(absent)), PTE_RWX)
                self._tables.flat[at[absent]] = entries[absent]
                np.add.at(self._used, tables[absent], 1)
            for position in np.flatnonzero((entries == 0) | ((entries & PTE_HUGE) != 0)).tolist():
                entries[position] = make_pte(self._descend(int(tables[position]), level, int(within[position])), 0)
            tables = pte_pfns(entries)
        return tables

    def _map(self, table: int, level: int, base: int, gfns: GfnRange, pfn: int, flags: int, largest: int) -> None:
        first, last = entries_of(gfns, base, level)
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
        pages = level_pages(level)
        if last - first == 1:
            at = table << ENTRIES_SHIFT | first
            new = int(not self._words[at])
            self._words[at] = make_pte(pfn, flags)
        else:
            ptes = self._entries[table, first:last]
            new = last - first - int(np.count_nonzero(ptes))
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
        entries[absent] = make_ptes(self._tables.allocate(number), PTE_RWX)
        self._used[table] += number
        children = pte_pfns(entries)
        self.mapped += len(whole) * ENTRIES - int(self._used[children].sum())
        ptes = _run(pfn, flags, len(whole) * ENTRIES, 1).reshape(len(whole), ENTRIES)
        if children[-1] - children[0] == len(whole) - 1 and (np.diff(children) == 1).all():
            self._entries[int(children[0]) : int(children[-1]) + 1] = ptes
        else:
            self._entries[children] = ptes
        self._used[children] = ENTRIES

    def _descend(self, table: int, level: int, index: int) -> int:
        """Return the table under an entry: allocated if absent, split from a huge leaf if it is one."""
        at = table << ENTRIES_SHIFT | index
        entry = self._words[at]
        if entry & PTE_HUGE:
            return self._split(table, level, index)
        if entry:
            return pte_pfn(entry)
        child = self._tables.allocate_one()
        self._words[at] = make_pte(child, PTE_RWX)
        self._used[table] += 1
        return child

    def _split(self, table: int, level: int, index: int) -> int:
        """Put a table of smaller leaves, which say the same, in the place of a huge one."""
        entry = int(self._entries[table, index])
        child = int(self._tables.allocate(1)[0])
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

    def _split_at(self, gfn: Gfn) -> None:
        """Have no huge leaf lie across the beginning of a gfn."""
        table = self._root
        for level in range(self.levels, PG_LEVEL_4K, -1):
            index = entry_index(gfn, level)
            if gfn % level_pages(level) == 0 or not self._entries[table, index]:
                return
            table = self._descend(table, level, index)

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
        self._tables.free(np.array([child], np.int64))
        self._entries[table, index] = first | marks | PTE_HUGE
        self.huge[level] += 1
        return True

    # -- unmapping --------------------------------------------------------------------------------------------------

    def unmap_range(self, gfns: GfnRange, side: Side = Side.BOTH) -> int:
        """Unmap what a range maps of a side. Returns how many gfns were unmapped."""
        before = self.mapped
        tables = self._tables_to(self._clip(gfns))
        if tables:
            level = self.levels - len(tables) + 1
            self._unmap(tables[-1], level, gfns.start & -level_pages(level + 1), gfns, side)
            self._free_empty(tables, gfns.start)
        return before - self.mapped

    def unmap_pages(self, gfns: Numbers, side: Side = Side.BOTH) -> Ptes:
        """Unmap what single gfns map of a side: int64 of shape (n,), in order and each once. Returns their former PTEs.

        Of what is not unmapped that is 0.
        """
        ptes = self.translate_in_order(gfns)
        ptes[~select(ptes, side)] = 0
        gone = np.flatnonzero(ptes)
        huge = gone[(ptes[gone] & PTE_HUGE) != 0]
        for gfn in gfns[huge].tolist():  # a huge leaf is split
            self.unmap_range(GfnRange(Gfn(gfn), Gfn(gfn + 1)), side)
        gone = gone[(ptes[gone] & PTE_HUGE) == 0]
        blocks = gfns[gone] >> ENTRIES_SHIFT
        first = firsts(blocks)
        counts = np.diff(first, append=len(gone))
        tables = self._leaf_tables(blocks[first])
        self._tables.flat[np.repeat(tables << ENTRIES_SHIFT, counts) + (gfns[gone] & (ENTRIES - 1))] = 0
        self._used[tables] -= counts.astype(np.int32)
        self.mapped -= len(gone)
        for gfn in gfns[gone][first[self._used[tables] == 0]].tolist():
            self._free_empty(self._tables_to(GfnRange(Gfn(gfn), Gfn(gfn + 1))), Gfn(gfn))
        return ptes

    def _free_empty(self, tables: list[int], gfn: Gfn) -> None:
        """Free the tables that lead from the root to a gfn, from the last one up, as far as they are empty."""
        level = self.levels - len(tables) + 1
        while len(tables) > 1 and not self._used[tables[-1]]:
            tables.pop()
            level += 1
            self._free_child(tables[-1], entry_index(gfn, level))

    def _unmap(self, table: int, level: int, base: int, gfns: GfnRange, side: Side) -> None:
        first, last = entries_of(gfns, base, level)
        if level == PG_LEVEL_4K:
            if last - first == 1:
                at = table << ENTRIES_SHIFT | first
                pte = self._words[at]
                number = int(pte != 0 and (side is Side.BOTH or side_of(pte) is side))
                if number:
                    self._words[at] = 0
            else:
                ptes = self._entries[table, first:last]
                gone = select(ptes, side)
                number = int(np.count_nonzero(gone))
                ptes[gone] = 0
            self._used[table] -= number
            self.mapped -= number
            return
        pages = level_pages(level)
        whole = range(-(-(gfns.start - base) // pages), (gfns.end - base) // pages)
        at_once = level == PG_LEVEL_2M and len(whole) > 1
        if at_once:
            self._unmap_whole(table, whole, side)
        for index in present(self._entries[table], first, last):
            entry, start = int(self._entries[table, index]), base + index * pages
            part = gfns.intersect(GfnRange(Gfn(start), Gfn(start + pages)))
            assert part is not None
            if entry & PTE_HUGE and side is not Side.BOTH and side_of(entry) is not side:
                continue
            if len(part) == pages and (entry & PTE_HUGE or side is Side.BOTH):
                self._drop_one(table, level, index)
            elif not at_once or index not in whole:
                child = self._descend(table, level, index)
                self._unmap(child, level - 1, start, part, side)
                if not self._used[child]:
                    self._free_child(table, index)

    def _free_child(self, table: int, index: int) -> None:
        """Free the table under an entry, which has become empty."""
        at = table << ENTRIES_SHIFT | index
        self._tables.free_one(pte_pfn(self._words[at]))
        self._words[at] = 0
        self._used[table] -= 1

    def _unmap_whole(self, table: int, whole: range, side: Side) -> None:
        """Unmap what is under neighbouring entries of a table of level 2."""
        if side is Side.BOTH:
            self._drop(table, PG_LEVEL_2M, whole.start, whole.stop)
            return
        entries = self._entries[table, whole.start : whole.stop]
        is_huge = (entries & PTE_HUGE) != 0
        self._drop_huge(table, PG_LEVEL_2M, entries, is_huge & select(entries, side))
        indexes = np.flatnonzero((entries != 0) & ~is_huge)
        children = pte_pfns(entries[indexes])
        ptes = self._entries[children]
        gone = select(ptes, side)
        numbers = np.count_nonzero(gone, axis=1)
        ptes[gone] = 0
        self._entries[children] = ptes
        self._used[children] -= numbers.astype(np.int32)
        self.mapped -= int(numbers.sum())
        self._free_if_empty(table, indexes + whole.start)

    def _drop(self, table: int, level: int, first: int, last: int) -> None:
        """Empty neighbouring entries of a table, with all that is under them."""
        if last - first == 1:
            self._drop_one(table, level, first)
            return
        entries = self._entries[table, first:last]
        self._drop_huge(table, level, entries, (entries & PTE_HUGE) != 0)
        present = entries != 0
        children = pte_pfns(entries[present])
        if level == PG_LEVEL_2M:
            self.mapped -= int(self._used[children].sum())
        else:
            for child in children.tolist():
                self._drop(child, level - 1, 0, ENTRIES)
        self._tables.free(children)
        entries[present] = 0
        self._used[table] -= len(children)

    def _drop_one(self, table: int, level: int, index: int) -> None:
        """Empty one entry of a table above level 1, with all that is under it."""
        at = table << ENTRIES_SHIFT | index
        entry = self._words[at]
        if not entry:
            return
        if entry & PTE_HUGE:
            self.mapped -= level_pages(level)
            self.huge[level] -= 1
        else:
            child = pte_pfn(entry)
            if level == PG_LEVEL_2M:
                self.mapped -= int(self._used[child])
            else:
                self._drop(child, level - 1, 0, ENTRIES)
            self._tables.free(np.array([child], np.int64))
        self._words[at] = 0
        self._used[table] -= 1

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
        children = pte_pfns(self._entries[table, indexes])
        empty = self._used[children] == 0
        if empty.any():
            self._tables.free(children[empty])
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
        self._split_at(gfns.start)
        self._split_at(gfns.end)
        for leaves in self.leaves(gfns):
            wanted = np.where(leaves.ptes != 0, leaves.ptes & ~clear | add, 0)
            different = int(np.count_nonzero(wanted != leaves.ptes))
            if different:
                leaves.ptes[:] = wanted
                changed += different * level_pages(leaves.level)
        return changed

    def write_protect(self, gfns: GfnRange) -> int:
        """Make a range read-only, so that the next store to each page faults. Returns how many gfns were writable."""
        return self.protect_range(gfns, clear=PTE_W)

    def age(self, gfns: GfnRange, side: Side = Side.BOTH) -> bool:
        """Do what `test_age` does, and clear the accessed bits (kvm_age_gfn). Huge leaves are aged whole, as in KVM."""
        young = False
        for leaves in self.leaves(gfns):
            chosen = select(leaves.ptes, side)
            if (leaves.ptes[chosen] & PTE_A).any():
                leaves.ptes[chosen] &= ~PTE_A
                young = True
        return young


def _run(pfn: int, flags: int, count: int, pages: int) -> Ptes:
    """Return PTEs of neighbouring frames, `pages` apart."""
    step = pages << PAGE_SHIFT
    first = make_pte(pfn, flags)
    ptes: Ptes = np.arange(first, first + count * step, step, dtype=np.int64)
    return ptes
