"""A page fault of the secondary MMU on a slot that lies on files (RFC patch 07: kvm_faultin_pfn for fd-based slots).

Private or shared is decided by one thing: whether the page is allocated in the private file. If the guest meant the
other, the VMM is asked to convert (KVM_EXIT_MEMORY_ERROR); otherwise the frame is taken from the file of that side and
mapped, unless an invalidation says that what was learned may be untrue by now (invalidate.py).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from kvmsim.exits import Exit, MemoryErrorExit, MmioExit
from kvmsim.memslots import Memslot, Memslots
from kvmsim.mmu.frames import FrameMap
from kvmsim.mmu.invalidate import InvalidationState
from kvmsim.mmu.page_table import PageTable
from kvmsim.mmu.pte import PTE_PRIVATE, PTE_R, PTE_RWX, PTE_X
from kvmsim.store import Store, StoreFile
from kvmsim.uapi import KVM_EXIT_MEM_MAP_PRIVATE, KVM_EXIT_MEM_MAP_SHARED
from memfs.guest.messages import PfnReply
from memfs.units import PAGE_SIZE, Gfn, GfnRange, gfn_to_gpa


@dataclass(frozen=True, slots=True)
class Access:
    """What the guest tried. `private`: it meant private memory (TDX: shared bit clear; SNP: C-bit set)."""

    gfn: Gfn
    write: bool
    private: bool


@dataclass(slots=True)
class Mmu:
    """The parts of a VM that a fault and a notification work on."""

    store: Store
    slots: Memslots
    table: PageTable
    frames: FrameMap
    invalidations: InvalidationState
    retries: int = 0  #: faults that had to start again


async def handle_fault(mmu: Mmu, access: Access) -> Exit | None:
    """Make an access possible (None: run the guest again), or say what the VMM must do.

    Raises OSError: EFAULT for a private access to a slot without private memory; what the store said (ENOSPC).
    """
    while True:
        slot = mmu.slots.find(access.gfn)
        if slot is None or (access.write and slot.readonly):
            return MmioExit(gfn_to_gpa(access.gfn), PAGE_SIZE, access.write)
        if access.private and slot.private is None:
            raise OSError(errno.EFAULT, "a private access to a slot without private memory")
        seq = mmu.invalidations.sample()
        allocated = slot.private is not None and slot.private.is_private(slot.page(access.gfn))
        if access.private != allocated:
            wanted = KVM_EXIT_MEM_MAP_PRIVATE if access.private else KVM_EXIT_MEM_MAP_SHARED
            return MemoryErrorExit(wanted, gfn_to_gpa(access.gfn), PAGE_SIZE)
        gfns = GfnRange(access.gfn, Gfn(access.gfn + 1))
        if await map_gfns(mmu, slot, gfns, private=access.private, seq=seq, dirty=access.write) is not None:
            return None
        mmu.retries += 1
        await mmu.invalidations.wait_idle(gfns)


async def map_gfns(
    mmu: Mmu, slot: Memslot, gfns: GfnRange, *, private: bool, seq: int, dirty: bool = False
) -> GfnRange | None:
    """Map gfns of a slot to one side's memory, allocating on the shared side, if what was decided at `seq` still holds.

    Returns the part that was dealt with, from the start on (absent private pages are left unmapped); None if an
    invalidation came in between.
    """
    file = slot.private if private else slot.shared
    assert file is not None
    reply = await mmu.store.get_pfn(file, slot.pages_of(gfns), alloc=not private)
    # Under the MMU lock: nothing from here to the end of the installation awaits.
    installed = _install(mmu, slot, file, reply, private=private, seq=seq)
    await mmu.store.put_pfn(file, reply, dirty=dirty)
    return slot.gfns_of(reply.pages) if installed else None


def _install(mmu: Mmu, slot: Memslot, file: StoreFile, reply: PfnReply, *, private: bool, seq: int) -> bool:
    gfns = slot.gfns_of(reply.pages)
    if gfns is None or mmu.slots.get(slot.id) is not slot or mmu.invalidations.must_retry(seq, gfns):
        return False
    flags = (PTE_R | PTE_X) if slot.readonly else PTE_RWX
    for run in reply.runs:
        part = slot.gfns_of(run.pages)
        if run.pfn is None or part is None:
            if len(reply.runs) == 1:
                return False  # the one page that was asked for has gone meanwhile
            continue
        mmu.frames.learn(file, run)
        mmu.table.map_range(part, run.pfn, flags | (PTE_PRIVATE if private else 0))
    return True
