"""A page fault of the secondary MMU (RFC patch 07: kvm_faultin_pfn, for fd-based slots; classic ones beside it).

Private or shared is decided by one thing: whether the page is allocated in the private file. If the guest meant the
other, the VMM is asked to convert (KVM_EXIT_MEMORY_ERROR); otherwise the frame is taken from the file of that side and
mapped, unless an invalidation says that what was learned may be untrue by now (invalidate.py).

A private page that is allocated needs no question to the store: the page map says that it is there, and where it is
follows from any page of the same gibibyte. Nor does it need the page's lock. The store begins an invalidation before it
frees a page and frees it only when we have acted on that, and we act on it where faults are handled, too, one after the
other. So either the beginning comes first, and then the page is being invalidated and the fault waits, or the fault
does, and then the beginning finds the page mapped and unmaps it.

How large the mapping may be is decided last, under the MMU lock, of what is true then: the store's order for the page,
gfn and frame aligned alike, the slot's bounds, one side throughout, no invalidation of any page of it in progress.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

import trio

from kvmsim.backing import StoreFile, StoreGone
from kvmsim.exits import Exit, MemoryErrorExit, MmioExit
from kvmsim.mmu.mmu import Mmu
from kvmsim.mmu.ownership import OwnershipViolation
from kvmsim.side import Side
from kvmsim.slots.hva import Mapping, find_mapping, local_pfn, open_mapped_file
from kvmsim.slots.memslots import AddressSpace, Memslot, Window
from kvmsim.uapi import KVM_EXIT_MEM_MAP_PRIVATE, KVM_EXIT_MEM_MAP_SHARED
from memfs.contract.protocol.messages import PfnReply, PfnRun
from memfs.contract.units import (
    ORDER_1G,
    ORDER_2M,
    ORDER_4K,
    PAGE_SIZE,
    Gfn,
    GfnRange,
    PageIndex,
    PageRange,
    gfn_to_gpa,
)


@dataclass(frozen=True, slots=True)
class Access:
    """What the guest tried. `side`: which memory it meant (PRIVATE if TDX's shared bit is clear, SNP's C-bit set)."""

    gfn: Gfn
    write: bool
    side: Side


async def handle_fault(mmu: Mmu, access: Access) -> Exit | None:
    """Make an access possible (None: run the guest again), or say what the VMM must do.

    Raises OSError: EFAULT for a private access to a slot without private memory, or a hva at which nothing is mapped;
    EPERM for a private frame that belongs to somebody else; what the store said (ENOSPC). StoreGone.
    """
    gfns = GfnRange(access.gfn, Gfn(access.gfn + 1))
    while True:
        if mmu.store.gone is not None:  # nobody would tell us when what is mapped now goes away
            raise StoreGone(mmu.store.gone)
        slot = mmu.slots.find(access.gfn)
        if slot is None or (access.write and slot.readonly):
            return MmioExit(gfn_to_gpa(access.gfn), PAGE_SIZE, access.write)
        if access.side is Side.PRIVATE and slot.private is None:
            raise OSError(errno.EFAULT, "a private access to a slot without private memory")
        seq = mmu.invalidations.sample()
        if access.side is not slot.side(access.gfn):
            wanted = KVM_EXIT_MEM_MAP_PRIVATE if access.side is Side.PRIVATE else KVM_EXIT_MEM_MAP_SHARED
            return MemoryErrorExit(wanted, gfn_to_gpa(access.gfn), PAGE_SIZE)
        if access.write and mmu.make_writable(slot, access.gfn, access.side):
            return None
        try:
            if slot.is_classic:
                done = await _map_classic(mmu, slot, access, seq)
            elif access.side is Side.PRIVATE:
                done = await _map_private(mmu, slot, access, seq)
            else:
                done = await _map_shared(mmu, slot, access, seq)
        except OwnershipViolation as violation:
            raise OSError(errno.EPERM, str(violation)) from violation
        if done:
            return None
        mmu.retries += 1
        await mmu.invalidations.wait_idle(gfns)


async def _map_private(mmu: Mmu, slot: Memslot, access: Access, seq: int) -> bool:
    """Map the page of a private access; False: it has gone, or something came in between."""
    gfns = GfnRange(access.gfn, Gfn(access.gfn + 1))
    if map_known(mmu, slot, gfns, write=access.write):
        return True
    return await map_gfns(mmu, slot, gfns, side=Side.PRIVATE, seq=seq, write=access.write) is not None


def map_known(mmu: Mmu, slot: Memslot, gfns: GfnRange, *, write: bool = False) -> bool:
    """Map gfns of a slot whose pages are all private, if it is known where they are. Raises OwnershipViolation."""
    assert slot.private is not None
    reply = slot.private.known(slot.pages_of(gfns))
    seq = mmu.invalidations.sample()
    return reply is not None and _install(mmu, slot, slot.private, reply, gfns, side=Side.PRIVATE, write=write, seq=seq)


async def _map_shared(mmu: Mmu, slot: Memslot, access: Access, seq: int) -> bool:
    """Map the page of a shared access, and those around it; False: something came in between."""
    window = mmu.fault_around.window(slot, access.gfn, mmu.invalidations)
    try:
        return await map_gfns(mmu, slot, window, side=Side.SHARED, seq=seq, write=access.write) is not None
    except OSError:
        if len(window) == 1:
            raise
    # The file has become shorter, or there is no room for all.
    single = GfnRange(access.gfn, Gfn(access.gfn + 1))
    return await map_gfns(mmu, slot, single, side=Side.SHARED, seq=seq, write=access.write) is not None


async def map_gfns(
    mmu: Mmu, slot: Memslot, gfns: GfnRange, *, side: Side, seq: int, write: bool = False
) -> GfnRange | None:
    """Map gfns of a slot to one side's memory, allocating on the shared side, if what was decided at `seq` still holds.

    Returns the part that was dealt with, from the start on (absent private pages are left unmapped); None if an
    invalidation came in between. Raises OwnershipViolation, and OSError as the store does.
    """
    file = slot.file(side)
    assert file is not None
    reply = await mmu.store.get_pfn(file, slot.pages_of(gfns), alloc=side is Side.SHARED)
    # Under the MMU lock: nothing from here to the end of the installation awaits.
    installed = _install(mmu, slot, file, reply, gfns, side=side, write=write, seq=seq)
    return GfnRange(gfns.start, Gfn(gfns.start + len(reply.pages))) if installed else None


def _install(
    mmu: Mmu,
    slot: Memslot,
    file: StoreFile,
    reply: PfnReply,
    gfns: GfnRange,
    *,
    side: Side,
    write: bool,
    seq: int,
) -> bool:
    """Map what the store said about the first pages of `gfns`, if that still holds."""
    gfns = GfnRange(gfns.start, Gfn(gfns.start + len(reply.pages)))
    if not mmu.slots.is_current(slot) or mmu.invalidations.must_retry(seq, gfns):
        return False
    shift = gfns.start - reply.pages.start
    for run in reply.runs:
        if run.pfn is None:
            if len(reply.runs) == 1:
                return False  # the one page that was asked for has gone meanwhile
            continue
        part = GfnRange(Gfn(run.pages.start + shift), Gfn(run.pages.end + shift))
        if not mmu.is_uniform(slot, part, side):
            return False  # converted, and the store has not come to telling us
        mmu.frames.learn(file, run)
        if len(part) > 1:
            order = ORDER_4K if slot.logs_dirty else run.order
            mmu.install(slot, part, run.pfn, side=side, write=write, order=order)
            continue
        block, order = _largest(mmu, slot, part.start, run, side)
        pfn = type(run.pfn)(run.pfn - (part.start - block.start))
        mmu.install(slot, block, pfn, side=side, write=write, order=order)
    return True


def _largest(mmu: Mmu, slot: Memslot, gfn: Gfn, run: PfnRun, side: Side) -> tuple[GfnRange, int]:
    """The largest block around a gfn that one leaf may map."""
    assert run.pfn is not None
    for order in (ORDER_1G, ORDER_2M):
        pages = 1 << order
        start = gfn & -pages
        block = GfnRange(Gfn(start), Gfn(start + pages))
        if (
            order <= run.order
            and not slot.logs_dirty
            and (gfn - run.pfn) % pages == 0
            and slot.gfns.intersect(block) == block
            and not mmu.invalidations.is_active(block)
            and mmu.is_uniform(slot, block, side)
        ):
            return block, order
    return GfnRange(gfn, Gfn(gfn + 1)), ORDER_4K


async def _map_classic(mmu: Mmu, slot: Memslot, access: Access, seq: int) -> bool:
    """Map one page of a classic slot; False: an invalidation came in between."""
    gfns, page = GfnRange(access.gfn, Gfn(access.gfn + 1)), slot.page(access.gfn)
    mapping = find_mapping(page)
    if mapping is None or not mapping.readable or (access.write and not mapping.writable):
        raise OSError(errno.EFAULT, "nothing is mapped at the hva, or not for that access")
    if not mapping.is_memfs:
        mmu.install(slot, gfns, local_pfn(page), side=Side.SHARED, write=access.write, order=ORDER_4K)
        return True
    file = await _file_behind(mmu, slot, page, mapping)
    if file is None:
        return False
    file_page = mapping.file_page(page)
    reply = await mmu.store.get_pfn(file, PageRange(file_page, PageIndex(file_page + 1)), alloc=True)
    return _install(mmu, slot, file, reply, gfns, side=Side.SHARED, write=access.write, seq=seq)


async def _file_behind(mmu: Mmu, slot: Memslot, page: PageIndex, mapping: Mapping) -> StoreFile | None:
    """The file behind a mapping, registered, with a window of the slot on it. None: the slot has gone meanwhile."""
    for window in mmu.slots.windows_of(slot):
        file = None if window.space is AddressSpace.HVA else mmu.store.files[window.space]
        if file is not None and file.ino == mapping.ino and mapping.file_page(page) in window.pages:
            return file
    fd = await trio.to_thread.run_sync(open_mapped_file, mapping)
    try:
        file = await mmu.store.register(fd)
    finally:
        await trio.to_thread.run_sync(os.close, fd)  # close(2) asks the filesystem, too
    if not mmu.slots.is_current(slot):
        with trio.CancelScope(shield=True):
            await mmu.store.unregister(file)
        return None
    pages = mapping.pages.intersect(slot.pages)
    assert pages is not None
    first = mapping.file_page(pages.start)
    gfns = slot.gfns_of(pages)
    assert gfns is not None
    served = PageRange(first, PageIndex(first + len(pages)))
    mmu.slots.add_window(Window(slot, file.id, served, gfns.start, Side.SHARED))
    return file
