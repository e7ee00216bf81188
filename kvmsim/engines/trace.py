"""The trace engine: a vCPU that repeats a program's memory accesses and checks every byte that comes back.

Each store writes a value that occurs once, each load compares what memory holds with what was last stored there. What
should be there is kept in a shadow of guest memory, one for shared and one for private memory, since both sides of a
page have content of their own. A page that the store takes away is empty when it comes back, so the shadow of that side
is emptied with the notification; any other difference is a byte lost, or one leaked from somewhere else.

Translations are kept in the vCPU's TLB, from which the MMU flushes what it takes away. Between blocks of accesses the
event loop gets a turn, so that notifications are acted upon: a guest does not stop for them.

Nobody else may write to shared memory while a trace runs: that would be found, and called lost.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from kvmsim.exits import HALT, Exit
from kvmsim.memslots import Memslot
from kvmsim.mmu.fault import Access
from kvmsim.mmu.pte import PTE_A, PTE_D, PTE_W, is_private, pte_pfn
from kvmsim.mmu.tlb import Tlb
from kvmsim.store import Notification
from kvmsim.trace_file import Trace
from kvmsim.vcpu import VCPU
from kvmsim.vm import VM
from memfs.guest.extents import data_pages
from memfs.guest.messages import InvalidateBegin
from memfs.units import (
    PAGE_SIZE,
    Gfn,
    GfnRange,
    Gpa,
    gfn_to_gpa,
    gpa_to_gfn,
    offset_in_page,
)

_BLOCK: Final = 2048  # accesses between two turns of the event loop: about 2 ms
_MIXER: Final = 0x9E3779B97F4A7C15  # odd, so that no two stores within 2**64 write the same 8 bytes
_MASK: Final = (1 << 64) - 1


class IntegrityError(Exception):
    """Memory held something else than what was stored there."""


@dataclass(slots=True)
class _Translation:
    """A cached translation of one page, and the shadow of its side."""

    memory: mmap.mmap | memoryview
    offset: int
    private: bool
    dirty: bool  # whether the dirty bit is set, so that a store may use it
    shadow: mmap.mmap


class TraceEngine:
    """Repeats a trace on a VM. `private` are the gfns that the guest means as private; all others it means as shared.

    `repeat_for`: start again from the beginning until so many seconds have passed.
    """

    def __init__(self, vm: VM, trace: Trace, private: Sequence[GfnRange], *, repeat_for: float = 0) -> None:
        records = trace.records
        self._gpas: Final[list[int]] = records["gpa"].tolist()
        self._sizes: Final[list[int]] = records["size"].tolist()
        self._writes: Final[list[bool]] = records["write"].tolist()
        self._private: Final = [
            any(Gfn(gfn) in gfns for gfns in private) for gfn in range(trace.memory_size // PAGE_SIZE)
        ]
        self._vm: Final = vm
        self._position = 0
        self._stored = 0
        self._deadline: Final = trio.current_time() + repeat_for
        self._shadows: Final = {
            side: mmap.mmap(-1, max(trace.memory_size, PAGE_SIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for side in (False, True)
        }
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
            end = min(self._position + _BLOCK, len(self._gpas))
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

    def _run_to(self, end: int, tlb: Tlb[_Translation]) -> Access | None:
        """Make accesses until position `end`, or until one faults: then that. Does not await."""
        gpas, sizes, writes, cached, private = self._gpas, self._sizes, self._writes, tlb.entries, self._private
        start, misses = self._position, tlb.misses
        try:
            for position in range(start, end):
                gpa, size, write = gpas[position], sizes[position], writes[position]
                gfn = gpa_to_gfn(Gpa(gpa))
                hit = cached.get(gfn)
                if hit is None or hit.private != private[gfn] or (write and not hit.dirty):
                    hit = self._walk(tlb, gfn, write=write, private=private[gfn])
                    if hit is None:
                        end = position
                        return Access(gfn, write, private[gfn])
                at = hit.offset + offset_in_page(gpa)
                if write:
                    self._stored += 1
                    value = self._value(size)
                    hit.memory[at : at + size] = value
                    hit.shadow[gpa : gpa + size] = value
                elif hit.memory[at : at + size] != hit.shadow[gpa : gpa + size]:
                    end = position
                    self._fail(hit, Gpa(gpa), at, size)
        finally:
            self._position = end
            self.accesses += end - start
            tlb.hits += end - start - (tlb.misses - misses)
        return None

    def _value(self, size: int) -> bytes:
        eight = (self._stored * _MIXER & _MASK).to_bytes(8, "little")
        return eight[:size] if size <= 8 else (eight * (size // 8 + 1))[:size]

    def _walk(self, tlb: Tlb[_Translation], gfn: Gfn, *, write: bool, private: bool) -> _Translation | None:
        """Translate through the page table, setting accessed and dirty bits; None: a fault."""
        table = self._vm.mmu.table
        pte = table.lookup(gfn)
        if not pte or is_private(pte) != private or (write and not pte & PTE_W):
            return None
        table.set_flags(gfn, PTE_A | (PTE_D if write else 0))
        file, offset = self._vm.mmu.frames.locate(pte_pfn(pte))
        hit = _Translation(file.memory, offset, private, write, self._shadows[private])
        tlb.fill(gfn, hit)
        return hit

    def _fail(self, hit: _Translation, gpa: Gpa, at: int, size: int) -> None:
        found, expected = hit.memory[at : at + size], hit.shadow[gpa : gpa + size]
        side = "private" if hit.private else "shared"
        raise IntegrityError(f"{side} memory at gpa {gpa:#x} holds {found.hex()} instead of {expected.hex()}")

    # -- what should be there ---------------------------------------------------------------------------------------

    def _adopt(self, slot: Memslot) -> None:
        """Content that was there before us is what should be there."""
        for file, private in ((slot.shared, False), (slot.private, True)):
            if file is None:
                continue
            pages = slot.pages_of(slot.gfns)
            for extent in data_pages(file.fd, pages):
                gfns = slot.gfns_of(extent)
                if gfns is not None and gfns.start < self._pages:
                    at = gfn_to_gpa(gfns.start)
                    content = os.pread(file.fd, min(extent.nbytes, self._pages * PAGE_SIZE - at), extent.offset)
                    self._shadows[private][at : at + len(content)] = content

    def _notified(self, message: Notification, slot: Memslot, gfns: GfnRange, private: bool) -> None:
        mine = gfns.intersect(GfnRange(Gfn(0), Gfn(self._pages)))
        if isinstance(message, InvalidateBegin) and mine is not None:
            start = gfn_to_gpa(mine.start)
            self._shadows[private].madvise(mmap.MADV_DONTNEED, start, gfn_to_gpa(mine.end) - start)
