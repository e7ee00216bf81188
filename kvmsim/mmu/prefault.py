"""Mapping guest memory before the guest touches it (KVM_PRE_FAULT_MEMORY; kvm_arch_vcpu_pre_fault_memory()).

Every page is mapped as if the guest had read it, on the side that it is on: it is never asked to be converted, and
shared memory that is absent is allocated. Nothing is marked as accessed. What can be is mapped in arrays (batch.py);
where that stops, one fault finds out why.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Final

import numpy as np

from kvmsim.exits import MmioExit
from kvmsim.mmu.batch import fault_in_private, fault_in_shared
from kvmsim.mmu.fault import handle_fault
from kvmsim.mmu.mmu import Mmu
from kvmsim.mmu.ownership import OwnershipViolation
from kvmsim.mmu.page_fault import Access
from kvmsim.slots.memslots import Memslot
from memfs.contract.page_map import ALLOCATED
from memfs.contract.units import Gfn, GfnRange

_AT_ONCE: Final = 1 << 12  # pages: a checkpoint in between, and not too much to do again when interrupted


async def prefault(mmu: Mmu, gfns: GfnRange) -> int:
    """Map the first gfns of a range. Returns how many, at least one.

    Raises OSError: ENOENT if there is no memslot, and as `handle_fault` does. StoreGone.
    """
    slot = mmu.slots.find(gfns.start)
    if slot is None:
        raise OSError(errno.ENOENT, f"no memslot at gfn {gfns.start:#x}")
    part = next(GfnRange(gfns.start, min(gfns.end, slot.gfns.end)).chunks(_AT_ONCE))
    wanted = np.arange(part.start, part.end)
    if not slot.is_classic:
        private = np.zeros(len(part), np.bool_)
        if slot.private is not None and slot.private.page_map is not None:
            private = slot.private.page_map.pages[slot.pages_of(part).slice] == ALLOCATED
        with suppress(OSError, OwnershipViolation):  # it may be about any of them; one fault says about which
            fault_in_private(mmu, wanted[private])
            await fault_in_shared(mmu, wanted[~private])
    unmapped = np.flatnonzero(mmu.table.translate(wanted) == 0)
    mapped = int(unmapped[0]) if len(unmapped) else len(part)
    if not mapped:
        await _prefault_one(mmu, slot, part.start)
    return max(mapped, 1)


async def _prefault_one(mmu: Mmu, slot: Memslot, gfn: Gfn) -> None:
    while True:
        exit_ = await handle_fault(mmu, Access(gfn, False, slot.side(gfn)))
        if exit_ is None:
            return
        if isinstance(exit_, MmioExit) or not mmu.slots.is_current(slot):
            raise OSError(errno.ENOENT, f"the memslot at gfn {gfn:#x} has gone")
        # Otherwise the page has changed sides since.
