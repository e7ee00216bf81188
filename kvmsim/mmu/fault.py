"""A page fault of the secondary MMU (RFC patch 07: kvm_faultin_pfn, for fd-based slots; classic ones beside it).

get_lock_pfn, map, put_unlock_pfn there is GetPfn without a lock and map here: what a page lock is for is done by seq
(invalidate.py), which also covers what was decided before there was a lock, and saves PutPfn, a message for each fault.

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

import trio

from kvmsim.backing import GuestFile, StoreGone
from kvmsim.exits import Exit, InternalErrorExit, MemoryErrorExit, MmioExit
from kvmsim.mmu.mmu import Mmu
from kvmsim.mmu.ownership import OwnershipViolation
from kvmsim.mmu.page_fault import Access, PageFault
from kvmsim.side import Side
from kvmsim.slots.hva import LocalMemory, Mapping, find_mapping, local_pfn, open_mapped_file
from kvmsim.slots.memslots import AddressSpace, Memslot, Window
from kvmsim.uapi import KVM_EXIT_MEM_MAP_PRIVATE, KVM_EXIT_MEM_MAP_SHARED, KVM_INTERNAL_ERROR_EMULATION
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
    Pfn,
    gfn_to_gpa,
)


async def handle_fault(mmu: Mmu, access: Access) -> Exit | None:
    """Make an access possible (None: run the guest again), or return what the VMM must do.

    Raises OSError: EFAULT for a private access to a slot without private memory, or a hva at which nothing is mapped;
    EPERM for a private frame that another gfn owns; what the store said (ENOSPC). StoreGone.
    """
    gfns = GfnRange(access.gfn, Gfn(access.gfn + 1))
    while True:
        if mmu.backing.gone is not None:  # no notification would come for what is mapped now
            raise StoreGone(mmu.backing.gone)
        slot = mmu.slots.find(access.gfn)
        if slot is None and access.fetch:
            return InternalErrorExit(KVM_INTERNAL_ERROR_EMULATION, gfn_to_gpa(access.gfn))
        if slot is None or (access.write and slot.readonly):
            return MmioExit(gfn_to_gpa(access.gfn), PAGE_SIZE, access.write)
        if access.side is Side.PRIVATE and slot.private is None:
            raise OSError(errno.EFAULT, "a private access to a slot without private memory")
        fault = PageFault(gfns, access.write, access.side, slot, mmu.invalidations.sample())
        if access.side is not slot.side(access.gfn):
            wanted = KVM_EXIT_MEM_MAP_PRIVATE if access.side is Side.PRIVATE else KVM_EXIT_MEM_MAP_SHARED
            return MemoryErrorExit(wanted, gfn_to_gpa(access.gfn), PAGE_SIZE)
        if access.write and mmu.make_writable(fault):
            return None
        try:
            if mmu.invalidations.is_active(gfns):  # the store would allocate again what is going
                done = False
            elif slot.is_classic:
                done = await _map_classic(mmu, fault)
            elif access.side is Side.PRIVATE:
                done = map_known(mmu, fault) or await map_gfns(mmu, fault) is not None
            else:
                done = await _map_shared(mmu, fault)
        except OwnershipViolation as violation:
            raise OSError(errno.EPERM, str(violation)) from violation
        if done:
            return None
        mmu.retries += 1
        await mmu.invalidations.wait_idle(gfns)


def map_known(mmu: Mmu, fault: PageFault) -> bool:
    """Map pages of the private file, if all are allocated and their frames are known without asking the store.

    Returns whether they are mapped. Raises OwnershipViolation.
    """
    file = fault.slot.private
    assert file is not None
    reply = file.known(fault.pages)
    return reply is not None and _install(mmu, fault, file, reply)


def map_converted(mmu: Mmu, fault: PageFault) -> bool:
    """Do the same with pages of the shared file, of which the store has just said that they are allocated."""
    file = fault.slot.shared
    assert file is not None
    reply = file.allocated(fault.pages)
    return reply is not None and _install(mmu, fault, file, reply)


async def _map_shared(mmu: Mmu, fault: PageFault) -> bool:
    """Map the page of a shared access, and those around it; False: an invalidation came in between."""
    window = mmu.fault_around.window(fault.slot, fault.gfns.start, mmu.invalidations)
    try:
        return await map_gfns(mmu, fault.with_gfns(window)) is not None
    except OSError:
        if len(window) == 1:
            raise
    # The file has become shorter, or there is not enough space for all of the window.
    return await map_gfns(mmu, fault) is not None


async def map_gfns(mmu: Mmu, fault: PageFault) -> GfnRange | None:
    """Map gfns to one side's memory, allocating on the shared side, if what the fault was decided on still holds.

    Returns the part that was dealt with, from the start on (absent private pages are left unmapped); None if an
    invalidation came in between. Raises OwnershipViolation, and OSError as the store does.
    """
    file = fault.slot.file(fault.side)
    assert file is not None
    reply = await _ask(mmu, fault, file, fault.pages, alloc=fault.side is Side.SHARED)
    # Under the MMU lock: nothing from here to the end of the installation awaits.
    if reply is None or not _install(mmu, fault, file, reply):
        return None
    return GfnRange(fault.gfns.start, Gfn(fault.gfns.start + len(reply.pages)))


async def _ask(mmu: Mmu, fault: PageFault, file: GuestFile, pages: PageRange, *, alloc: bool) -> PfnReply | None:
    """Ask the store for frames; None: the file was unregistered meanwhile, since the slot or a mapping has changed.

    Raises OSError as the store does.
    """
    try:
        return await mmu.backing.get_pfn(file, pages, alloc=alloc)
    except OSError as error:
        is_stale = not mmu.slots.is_current(fault.slot) or mmu.invalidations.seq != fault.seq
        if error.errno == errno.EBADF and is_stale:
            return None
        raise


def _install(mmu: Mmu, fault: PageFault, file: GuestFile, reply: PfnReply) -> bool:
    """Map what the store said about the first pages of a fault, if that still holds. Returns whether it does."""
    gfns = fault.gfns
    if len(reply.pages) != len(gfns):
        gfns = GfnRange(gfns.start, Gfn(gfns.start + len(reply.pages)))
    if not mmu.slots.is_current(fault.slot) or mmu.invalidations.must_retry(fault.seq, gfns):
        return False
    shift = gfns.start - reply.pages.start
    for run in reply.runs:
        if run.pfn is None:
            if len(reply.runs) == 1:
                return False  # the one page that was asked for has gone meanwhile
            continue
        part = gfns
        if len(reply.runs) > 1:
            part = GfnRange(Gfn(run.pages.start + shift), Gfn(run.pages.end + shift))
        if not mmu.is_uniform(fault.slot, part, fault.side):
            return False  # converted, and the notification is still to come
        mmu.frames.add(file, run)
        if len(part) > 1:
            mmu.install(fault, part, run.pfn, ORDER_4K if fault.slot.logs_dirty else run.order)
            continue
        block, order = _largest(mmu, fault, part, run)
        mmu.install(fault, block, Pfn(run.pfn - (part.start - block.start)), order)
    return True


def _largest(mmu: Mmu, fault: PageFault, page: GfnRange, run: PfnRun) -> tuple[GfnRange, int]:
    """Return the largest block around a gfn, given as a range, that one leaf may map, and its order."""
    assert run.pfn is not None
    slot, within, gfn = fault.slot, fault.slot.gfns, page.start
    for order in (ORDER_1G, ORDER_2M):
        pages = 1 << order
        start = gfn & -pages
        if (
            order > run.order
            or (gfn - run.pfn) % pages
            or start < within.start
            or start + pages > within.end
            or slot.logs_dirty
        ):
            continue
        block = GfnRange(Gfn(start), Gfn(start + pages))
        if not mmu.invalidations.is_active(block) and mmu.is_uniform(slot, block, fault.side):
            return block, order
    return page, ORDER_4K


async def _map_classic(mmu: Mmu, fault: PageFault) -> bool:
    """Map one page of a classic slot; False: an invalidation came in between."""
    page = fault.pages.start
    mapping = find_mapping(page)
    if mapping is None or not mapping.readable or (fault.write and not mapping.writable):
        raise OSError(errno.EFAULT, "nothing is mapped at the hva, or not for that access")
    if not mapping.is_memfs:
        frame = local_pfn(page)
        LocalMemory(frame).memory[:1]  # there may be a mapping and no memory: past the end of a file
        mmu.install(fault, fault.gfns, frame, ORDER_4K)
        return True
    file = await _file_behind(mmu, fault.slot, page, mapping)
    if file is None:
        return False
    file_page = mapping.file_page(page)
    reply = await _ask(mmu, fault, file, PageRange(file_page, PageIndex(file_page + 1)), alloc=True)
    return reply is not None and _install(mmu, fault, file, reply)


async def _file_behind(mmu: Mmu, slot: Memslot, page: PageIndex, mapping: Mapping) -> GuestFile | None:
    """Return the file behind a mapping, registered, with a window of the slot on it; None if the slot is gone."""
    for window in mmu.slots.windows_of(slot):
        file = None if window.space is AddressSpace.HVA else mmu.backing.files[window.space]
        if file is not None and file.ino == mapping.ino and mapping.file_page(page) in window.pages:
            return file
    fd = await trio.to_thread.run_sync(open_mapped_file, mapping)
    try:
        file = await mmu.backing.register(fd)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(os.close, fd)  # close(2) asks the filesystem, too
    if not mmu.slots.is_current(slot):
        with trio.CancelScope(shield=True):
            await mmu.backing.unregister(file)
        return None
    pages = mapping.pages.intersect(slot.pages)
    assert pages is not None
    first = mapping.file_page(pages.start)
    gfns = slot.gfns_of(pages)
    assert gfns is not None
    served = PageRange(first, PageIndex(first + len(pages)))
    mmu.add_window(Window(slot, file.id, served, gfns.start, Side.SHARED))
    return file
