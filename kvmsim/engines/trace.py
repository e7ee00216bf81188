"""The trace engine: a vCPU that repeats a program's memory accesses and checks every byte that comes back.

Each store writes a value that occurs once, each load compares what memory holds with what was last stored there. What
should be there is kept in a shadow of guest memory, one for shared and one for private memory, since both sides of a
page have content of their own. A page that the store takes away is empty when it comes back, so the shadow of that side
is emptied with the notification; any other difference is a byte lost, or one leaked from somewhere else.

Translations are kept in the vCPU's TLB, from which the MMU flushes what it unmaps. Between blocks of accesses there is
a checkpoint, so that notifications are acted upon: a guest does not stop for them.

A block in which every access hits the TLB is run as a whole (plan.py). Where one misses, or a byte is wrong, accesses
are made one at a time until that is behind; what comes of it is the same either way, and a test compares it.

Nobody else may write to shared memory while a trace runs: that would be found, and called lost.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Final

import numpy as np
import trio

from kvmsim.backing import Notification
from kvmsim.engines.plan import Plan, stored_value
from kvmsim.engines.trace_file import Trace
from kvmsim.exits import HALT, Exit
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.tlb import Tlb, TlbEntry
from kvmsim.mmu.walk import walk
from kvmsim.side import Side
from kvmsim.slots.hva import LocalMemory
from kvmsim.slots.memslots import Memslot
from kvmsim.vcpu import VCPU
from kvmsim.vm import VM
from memfs.contract.protocol.messages import ConvertEnd, InvalidateBegin
from memfs.contract.sparse import data_pages
from memfs.contract.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    Gfn,
    GfnRange,
    Gpa,
    gfn_to_gpa,
    gpa_to_gfn,
    offset_in_page,
)

BLOCK: Final = 4096  #: accesses between two checkpoints: 4 ms one at a time, and 0.1 ms as a whole
_WORTH_IT: Final = 192  # accesses; to prepare so many as a whole takes as long as to make them one at a time
_PLANS: Final = 512 << 20  # bytes that may be spent on keeping plans for the next pass


class IntegrityError(Exception):
    """Memory held something else than what was stored there."""


def _make_shadow(size: int) -> mmap.mmap:
    """Return `size` bytes of zeros. A copy of guest memory is no more for our core dumps than that memory itself."""
    shadow = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    shadow.madvise(mmap.MADV_DONTDUMP)
    return shadow


class TraceEngine:
    """Repeats a trace on a VM. `private` are the gfns that the guest means as private; all others it means as shared.

    `repeat_for`: start again from the beginning until so many seconds have passed. `block`: accesses between two
    checkpoints.
    """

    def __init__(
        self, vm: VM, trace: Trace, private: Sequence[GfnRange], *, repeat_for: float = 0, block: int = BLOCK
    ) -> None:
        self._gpas: Final = trace.records["gpa"].astype(np.int64)
        self._sizes: Final = trace.records["size"].astype(np.int64)
        self._writes: Final = np.ascontiguousarray(trace.records["write"])
        self._sides: Final = [
            Side.of(any(Gfn(gfn) in gfns for gfns in private)) for gfn in range(trace.memory_size // PAGE_SIZE)
        ]
        self._block: Final = block
        self._plans: dict[int, Plan] = {}  # of whole blocks, by their first access
        self._plan_bytes = 0
        self._worth_it: Final = min(_WORTH_IT, max(1, block // 4))
        self._steps = 1  # how many to make one at a time before looking again; twice as many each time
        self._vm: Final = vm
        self._position = 0
        self._stored = 0
        self._deadline: Final = trio.current_time() + repeat_for
        self._shadows: Final = {side: _make_shadow(max(trace.memory_size, PAGE_SIZE)) for side in Side}
        self._shadow_bytes: Final = {side: np.frombuffer(shadow, np.uint8) for side, shadow in self._shadows.items()}
        self._pages: Final = max(trace.memory_size // PAGE_SIZE, 1)
        self.accesses = 0  #: how many were made
        self.passes = 0  #: how often the trace was finished
        for slot in vm.mmu.slots:
            self._adopt(slot)
        vm.listeners.append(self._notified)

    @property
    def progress(self) -> float:
        """How much of the current pass is done: 0 to 1."""
        return self._position / len(self._gpas)

    async def run(self, vcpu: VCPU) -> Exit:
        """Go on until an exit. Raises IntegrityError on the first byte that is wrong."""
        vm = self._vm
        while True:
            end = min(self._position // self._block * self._block + self._block, len(self._gpas))
            while self._position < end:
                missing = self._run_to(end, vcpu.tlb)
                if missing is not None:
                    exit_ = await vm.fault(missing)
                    if exit_ is not None:
                        return exit_
            if self._position == len(self._gpas):
                self.passes += 1
                if trio.current_time() >= self._deadline:
                    return HALT
                self._position = 0
            await trio.lowlevel.checkpoint()
            vm.check_alive()

    def _run_to(self, end: int, tlb: Tlb) -> Access | None:
        """Make accesses until position `end`. Returns the one that faults, if one does. Does not await."""
        while self._position < end:
            ahead = self._hits_ahead(end, tlb)
            if ahead >= min(self._worth_it, end - self._position) and self._run_whole(self._position + ahead, tlb):
                self._steps = 1
                continue
            # What misses, and what is behind it, since misses come in clusters.
            missing = self._run_singly(min(self._position + self._steps, end), tlb)
            if missing is not None:
                return missing
            self._steps = min(2 * self._steps, self._block)
        return None

    def _hits_ahead(self, end: int, tlb: Tlb) -> int:
        """Return how many accesses from here on, of a block that ends at `end`, hit the TLB."""
        start = self._position
        plan = self._plan(end)
        if plan.is_placed(tlb.version):
            return end - start
        first = plan.pages[0][0]
        misses = np.zeros(plan.pages[-1][0] - first + 1, np.uint8)  # 1: stores do, 3: loads do as well
        for gfn, write in plan.pages:
            if tlb.lookup(gfn, self._sides[gfn], write) is None:
                misses[gfn - first] = 3 if tlb.lookup(gfn, self._sides[gfn], False) is None else 1
        found = misses[(self._gpas[start:end] >> PAGE_SHIFT) - first] & np.where(self._writes[start:end], 1, 2) != 0
        return int(found.argmax()) if found.any() else end - start

    def _run_whole(self, end: int, tlb: Tlb) -> bool:
        """Make accesses until position `end` as a whole, all of which hit. Returns False if a byte is wrong."""
        start = self._position
        is_block = start % self._block == 0 and (end - start == self._block or end == len(self._gpas))
        plan = self._plan(end) if is_block else self._make_plan(start, end)
        if not plan.is_placed(tlb.version):
            found = (tlb.lookup(gfn, self._sides[gfn], write) for gfn, write in plan.pages)
            entries = [entry for entry in found if entry is not None]
            assert len(entries) == len(plan.pages), "all of these hit"
            if any(isinstance(entry.memory, LocalMemory) for entry in entries):  # it is no array
                return False
            plan.place(tlb.version, entries, self._shadow_bytes)
        if not plan.run(self._stored):
            return False
        self._position = end
        self._stored += plan.stores
        self.accesses += plan.accesses
        tlb.hits += plan.accesses
        return True

    def _plan(self, end: int) -> Plan:
        """Return the plan of the block that ends at `end`."""
        start = (end - 1) // self._block * self._block
        plan = self._plans.get(start)
        if plan is None:
            plan = self._make_plan(start, end)
            if self._plan_bytes + plan.nbytes <= _PLANS:
                self._plans[start] = plan
                self._plan_bytes += plan.nbytes
        return plan

    def _make_plan(self, start: int, end: int) -> Plan:
        return Plan.make(self._gpas[start:end], self._sizes[start:end], self._writes[start:end])

    def _run_singly(self, end: int, tlb: Tlb) -> Access | None:
        """Do what `_run_to` does, one access at a time. Raises IntegrityError."""
        start, misses = self._position, tlb.misses
        columns = (column[start:end].tolist() for column in (self._gpas, self._sizes, self._writes))
        position, sides, shadows, lookup = start, self._sides, self._shadows, tlb.lookup
        try:
            for gpa, size, write in zip(*columns, strict=True):
                gfn = gpa_to_gfn(Gpa(gpa))
                side = sides[gfn]
                hit = lookup(gfn, side, write)
                if hit is None:
                    access = Access(gfn, write, side)
                    hit = walk(self._vm.mmu, tlb, access)
                    if hit is None:
                        return access
                at, shadow = hit.offset + offset_in_page(gpa), shadows[side]
                if write:
                    self._stored += 1
                    value = stored_value(self._stored, size)
                    hit.memory[at : at + size] = value
                    shadow[gpa : gpa + size] = value
                elif hit.memory[at : at + size] != shadow[gpa : gpa + size]:
                    self._fail(hit, Gpa(gpa), at, size)
                position += 1
        finally:
            self._position = position
            self.accesses += position - start
            tlb.hits += position - start - (tlb.misses - misses)
        return None

    def _fail(self, hit: TlbEntry, gpa: Gpa, at: int, size: int) -> None:
        found, expected = hit.memory[at : at + size], self._shadows[hit.side][gpa : gpa + size]
        raise IntegrityError(f"{hit.side} memory at gpa {gpa:#x} holds {found.hex()} instead of {expected.hex()}")

    # -- what should be there ---------------------------------------------------------------------------------------

    def _adopt(self, slot: Memslot) -> None:
        """Take content that a slot has already for what should be there."""
        for side in Side:
            file, pages = slot.file(side), slot.pages
            if file is None:
                continue
            extents = data_pages(file.fd, pages) if file.page_map is None else file.page_map.runs(pages)
            for extent in extents:
                gfns = slot.gfns_of(extent)
                if gfns is not None and gfns.start < self._pages:
                    at = gfn_to_gpa(gfns.start)
                    content = os.pread(file.fd, min(extent.nbytes, self._pages * PAGE_SIZE - at), extent.offset)
                    self._shadows[side][at : at + len(content)] = content

    def _notified(self, message: Notification, slot: Memslot, gfns: GfnRange, side: Side) -> None:
        mine = gfns.intersect(GfnRange(Gfn(0), Gfn(self._pages)))
        if isinstance(message, InvalidateBegin | ConvertEnd) and mine is not None:  # what is converted arrives zeroed
            start = gfn_to_gpa(mine.start)
            self._shadows[side].madvise(mmap.MADV_DONTNEED, start, gfn_to_gpa(mine.end) - start)
