"""A virtual machine: memslots, the secondary page table, and what notifications do to it.

One VM is one connection to memfs, that is, one owner (RFC patch 01). All of it runs in one trio thread. The MMU lock is
that nothing under it awaits; setting a slot waits for memfs, under a lock of its own (regions.py).

What a notification does is done before it is acknowledged, in `_notified`, without awaiting:

    InvalidateBegin  raise in_progress, drop the mappings of that side
    InvalidateEnd    bump seq, lower in_progress
    Fallocate        of private memory: drop the shared mappings, bump seq. Dropping is mandatory. Mapping what came
                     immediately (RFC v2) is the policy `map_on_fallocate` (mmu/allocated.py). Mainline never does it.
    ConvertBegin     raise in_progress for both sides' gfns, drop the mappings of the side that pages leave
    ConvertEnd       bump seq, lower in_progress; what is on the other side now may be mapped, as on Fallocate

If memfs is killed and another one goes on in its place, so does the connection, after a moment (protocol/client.py).
Until then vCPUs run: nothing is freed without memfs, so what is mapped stays mapped, and private pages that the page
map shows are mapped without asking. What has to be asked waits, and so do faults on what was being invalidated.

Lifetimes: a slot holds a registration of each of its files; the files live as long as some slot has them; the VM ends
with the connection, and then nothing is mapped any more.
"""

from __future__ import annotations

import dataclasses
import errno
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import trio

from kvmsim.arrays import Gfns, each_of, pairs, runs
from kvmsim.backing import Backing, Notification, StoreGone, connect
from kvmsim.exits import Exit
from kvmsim.mmu.allocated import map_allocated, map_asking
from kvmsim.mmu.batch import fault_in_private, fault_in_shared
from kvmsim.mmu.fault import handle_fault
from kvmsim.mmu.fault_around import DEFAULT_PAGES, FaultAround
from kvmsim.mmu.mmu import Mmu
from kvmsim.mmu.ownership import OwnershipTable
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.page_table import PageTable
from kvmsim.mmu.pte import level_pages, pte_pfn, side_of
from kvmsim.regions import Regions, SlotCopy
from kvmsim.side import Side
from kvmsim.slots.dirty import Bitmap, DirtyLog, pages_in
from kvmsim.slots.memslots import AddressSpace, Memslot, Space
from kvmsim.uapi import (
    KVM_MAX_VCPU_ID,
    KVM_USER_MEM_SLOTS,
    UserspaceMemoryRegion,
)
from kvmsim.vcpu import VCPU, Engine
from kvmsim.vm_type import VmType
from memfs.contract.aio.nurseries import open_flat_nursery
from memfs.contract.protocol.messages import ConvertBegin, ConvertEnd, Fallocate, InvalidateBegin, InvalidateEnd
from memfs.contract.units import Gfn, GfnRange, Gpa, PageIndex, PageRange, gpa_to_gfn

#: Called with each notification, slot by slot, after it has been acted upon, and the side of memory that it is about
Listener = Callable[[Notification, Memslot, GfnRange, Side], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfig:
    """The options of a VM. Creating it raises ValueError for `levels` or `fault_around` that cannot be."""

    name: str = "vm"  #: by which memfs knows it
    vm_type: VmType = VmType.SNP
    levels: int = 5  #: of its page table: 4, for 2**48 bytes of guest physical memory, or 5, for all that KVM can have
    map_on_fallocate: bool = True  #: map private memory when it is allocated (RFC v2), and not only when it is used
    fault_around: int = DEFAULT_PAGES  #: pages that a fault on absent shared memory asks for (mmu/fault_around.py)
    ownership: OwnershipTable | None = None  #: of private frames; VMs of one process on one memfs share it


class VM:
    """A virtual machine. Use `create_vm`.

    A function that is added to `listeners` is called with each notification that a slot got (`Listener`). `faults`
    counts faults by side; `closed` says that memfs, and with it all memory, is gone.
    """

    def __init__(self, backing: Backing, nursery: trio.Nursery, config: VmConfig | None = None) -> None:
        self.config: Final = config or VmConfig()
        ownership = self.config.ownership or OwnershipTable()
        self.mmu: Final = Mmu(
            backing,
            PageTable(self.config.levels),
            ownership,
            ownership.new_vm(),
            fault_around=FaultAround(self.config.fault_around),
        )
        self.vcpus: dict[int, VCPU] = {}
        self.listeners: list[Listener] = []
        self.faults: Counter[Side] = Counter()
        self.closed = False  #: it has lost its memory, and does not run again
        self.manual_dirty_log_protect = False  #: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
        self._regions: Final = Regions(self.mmu, self.config.vm_type)
        self._nursery: Final = nursery

    # -- memslots ---------------------------------------------------------------------------------------------------

    async def set_user_memory_region(self, region: UserspaceMemoryRegion) -> None:
        """Create, move or delete a slot, or change its flags (KVM_SET_USER_MEMORY_REGION). All or nothing.

        Raises OSError with KVM's errnos; EPERM if a file has another owner.
        """
        await self._regions.set(region)

    def keep_in_step(self, copy: SlotCopy | None) -> None:
        """Have all slots elsewhere as well from now on; None: no more. Raises OSError(EBUSY) if somebody has them."""
        if copy is not None and self._regions.copy is not None:
            raise OSError(errno.EBUSY, "this VM runs native code already")
        self._regions.copy = copy

    def _slot_with_log(self, slot_id: int) -> tuple[Memslot, DirtyLog]:
        if not 0 <= slot_id < KVM_USER_MEM_SLOTS:
            raise OSError(errno.EINVAL, f"slot ids are below {KVM_USER_MEM_SLOTS}")
        slot = self.mmu.slots.get(slot_id)
        if slot is None or slot.dirty is None:
            raise OSError(errno.ENOENT, f"slot {slot_id} keeps no dirty log")
        return slot, slot.dirty

    def get_dirty_log(self, slot_id: int) -> Bitmap:
        """Return which pages were written (KVM_GET_DIRTY_LOG): dtype uint8, a bit a page, least significant first.

        Unless `manual_dirty_log_protect`, they count as clean from now on. Raises OSError: EINVAL for an id that no
        slot can have, ENOENT without such a slot or log.
        """
        slot, log = self._slot_with_log(slot_id)
        if self.manual_dirty_log_protect:
            return log.bitmap()
        taken = log.take()
        self._protect(slot, taken)
        return taken

    def clear_dirty_log(self, slot_id: int, first_page: int, num_pages: int, bitmap: Bitmap) -> None:
        """Count pages whose bits are set as clean from now on (KVM_CLEAR_DIRTY_LOG).

        `bitmap` begins with `first_page`. Raises OSError as `get_dirty_log` and `DirtyLog.clear` do.
        """
        slot, log = self._slot_with_log(slot_id)
        self._protect(slot, log.clear(first_page, num_pages, bitmap))

    def _protect(self, slot: Memslot, bits: Bitmap) -> None:
        for start, end in runs(pages_in(bits)):
            self.mmu.write_protect(GfnRange(Gfn(slot.gfns.start + start), Gfn(slot.gfns.start + end)))

    # -- what an mmu_notifier would do ------------------------------------------------------------------------------

    def invalidate_hva(self, addresses: PageRange) -> None:
        """Unmap classic memory at pages of our address space that are going away or changing (mmu_notifier).

        To be called before they do; no vCPU may run from here to the change. Which files are mapped there is looked up
        again when the guest comes back.
        """
        for window, gfns in self.mmu.slots.touching(AddressSpace.HVA, addresses):
            self.mmu.unmap(gfns)
            for other in self.mmu.slots.windows_of(window.slot):
                if isinstance(other.space, AddressSpace) or not other.serves(gfns):
                    continue
                self.mmu.slots.remove_window(other)
                self._nursery.start_soon(self._regions.release, [self.backing.files[other.space]])
        self.mmu.invalidations.conversion()

    def age(self, gfns: GfnRange, side: Side = Side.BOTH) -> bool:
        """Return whether memory of a side was accessed since this was last asked (kvm_age_gfn)."""
        young = self.mmu.table.age(gfns, side)
        if young:
            self.mmu.flush_tlbs(gfns)  # what a TLB holds would be used without marking it as accessed
        return young

    def test_age(self, gfns: GfnRange, side: Side = Side.BOTH) -> bool:
        """Return the same without resetting it (kvm_test_age_gfn)."""
        return self.mmu.table.test_age(gfns, side)

    def age_pages(self, space: Space, pages: PageRange) -> bool:
        """Do what `age` does for pages of a file, or of our address space, in all slots (kvm_age_hva; RFC patch 09)."""
        touched = self.mmu.slots.touching(space, pages)
        return sum(self.age(gfns, window.side) for window, gfns in touched) > 0  # all of them are aged

    def test_age_pages(self, space: Space, pages: PageRange) -> bool:
        """Return the same without resetting it (kvm_test_age_hva)."""
        return any(self.test_age(gfns, window.side) for window, gfns in self.mmu.slots.touching(space, pages))

    # -- running ----------------------------------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int, engine: Engine) -> VCPU:
        """Create a vCPU (KVM_CREATE_VCPU). Raises OSError: EEXIST for an id in use, EINVAL from KVM_MAX_VCPU_ID on."""
        if not 0 <= vcpu_id < KVM_MAX_VCPU_ID:
            raise OSError(errno.EINVAL, f"vCPU ids are below {KVM_MAX_VCPU_ID}")
        if vcpu_id in self.vcpus:
            raise OSError(errno.EEXIST, f"there is a vCPU {vcpu_id}")
        vcpu = self.vcpus[vcpu_id] = VCPU(self, vcpu_id, engine)
        self.mmu.tlbs.append(vcpu.tlb)
        return vcpu

    def decode(self, gpa: Gpa, *, write: bool, encrypted: bool = False, fetch: bool = False) -> Access:
        """Return what an access of the guest means, by the VM's type. Raises OSError as `VmType.decode` does."""
        address, side = self.type.decode(gpa, encrypted=encrypted, fetch=fetch)
        return Access(gpa_to_gfn(address), write, side, fetch)

    async def fault(self, access: Access) -> Exit | None:
        """Handle a fault of a vCPU. Raises OSError as `handle_fault` says, StoreGone if memfs is."""
        self.faults[access.side] += 1
        return await handle_fault(self.mmu, access)

    def fault_in(self, gfns: npt.NDArray[np.int64], *, write: bool = False) -> npt.NDArray[np.bool_]:
        """Map many private pages that are allocated, without asking memfs: `fault_in_private` says which and what."""
        self.check_alive()
        before = self.mmu.table.mapped
        served = fault_in_private(self.mmu, gfns, write=write)
        self.faults[Side.PRIVATE] += self.mmu.table.mapped - before
        return served

    async def fault_in_shared(self, gfns: npt.NDArray[np.int64], *, write: bool = False) -> npt.NDArray[np.bool_]:
        """Map many shared pages, asking memfs for ranges, several at a time: `fault_in_shared` says which and what."""
        self.check_alive()
        before = self.mmu.table.mapped
        served = await fault_in_shared(self.mmu, gfns, write=write)
        self.faults[Side.SHARED] += self.mmu.table.mapped - before
        return served

    async def launch(self) -> None:
        """Measure what private files were populated with, which is final from now on.

        Called when a vCPU runs (KVM_TDX_FINALIZE_VM, KVM_SEV_SNP_LAUNCH_FINISH); for slots that come later, then.
        `GuestFile.measurement` has the measurements.
        """
        await self._regions.launch()

    def check_alive(self) -> None:
        """Raise StoreGone if the connection to memfs, and with it all memory, is gone."""
        if self.backing.gone is not None:
            raise StoreGone(self.backing.gone)

    async def catch_up(self) -> None:
        """Wait until all that memfs has said by now has been acted upon. Raises StoreGone if it has cut us off.

        It takes memory from who is cut off without waiting, so that comes before any conclusion from what memory holds.
        """
        self.check_alive()
        for file in self.backing.files.values():  # an answer of any kind comes after what was said before
            with suppress(OSError):
                await self.backing.get_pfn(file, PageRange(PageIndex(0), PageIndex(1)), alloc=False)
            return

    @property
    def type(self) -> VmType:
        """How its guest says that it means private memory."""
        return self.config.vm_type

    @property
    def backing(self) -> Backing:
        """The connection to memfs."""
        return self.mmu.backing

    # -- notifications ----------------------------------------------------------------------------------------------

    def _notified(self, message: Notification) -> None:
        if self.closed:  # it was on its way
            return
        if isinstance(message, ConvertBegin | ConvertEnd):
            self._converting(message)
            return
        touched = self.mmu.slots.touching(message.file, message.pages)
        key = (message.file, message.pages)
        if isinstance(message, InvalidateBegin):
            self.mmu.invalidations.begin(key, [gfns for _, gfns in touched], (message.file, (message.pages,)))
        elif isinstance(message, InvalidateEnd):
            self.mmu.invalidations.end(key)
        for window, gfns in touched:
            if isinstance(message, InvalidateBegin):
                self.mmu.unmap(gfns, window.side)
            elif isinstance(message, Fallocate) and window.side is Side.PRIVATE:
                self.mmu.unmap(gfns, Side.SHARED)
                self.mmu.invalidations.conversion()
                self._allocated(window.slot, window.side, gfns)
            for listener in self.listeners:
                listener(message, window.slot, gfns, window.side)

    def _converting(self, message: ConvertBegin | ConvertEnd) -> None:
        """Act as on InvalidateBegin of the file that pages leave and Fallocate of the other, as one invalidation."""
        slots, ranges, key = self.mmu.slots, message.ranges, (message.shared, message.private)
        left, other = key if message.to_private else (message.private, message.shared)
        coming = slots.windows_at(other, ranges)
        leaving = slots.windows_at(left, ranges) if isinstance(message, ConvertBegin) or self.listeners else []
        if isinstance(message, ConvertBegin):
            # Of a slot on both files one window says all: which gfns, and that what leaves is unmapped.
            rest = [window for window in coming if all(file.id != left for file in window.slot.files)]
            self.mmu.invalidations.begin(
                key, [window.gfns_of_all(ranges) for window in (*leaving, *rest)], (left, ranges), (other, ranges)
            )
            for window in leaving:
                self.mmu.unmap_ranges(window.gfns_of_all(ranges), window.side)
            for window in rest:
                if window.side is Side.PRIVATE:
                    self.mmu.unmap_ranges(window.gfns_of_all(ranges), Side.SHARED)
        else:
            self.mmu.invalidations.end(key)
            for window in coming:
                if not window.slot.is_classic:
                    self._allocated(window.slot, window.side, window.gfns_of_all(ranges))
        for listener in self.listeners:
            for window in (*leaving, *coming):
                for gfns in each_of(window.gfns_of_all(ranges)):
                    listener(message, window.slot, gfns, window.side)

    def _resumed(self) -> None:
        """Unmap what is mapped as shared and is private: with the memfs that was killed, its Fallocate may be lost."""
        for slot in self.mmu.slots:
            if slot.private is not None and slot.private.page_map is not None:
                private = [slot.gfns_of(run) for run in slot.private.page_map.runs(slot.pages)]
                self.mmu.unmap_ranges(pairs(gfns for gfns in private if gfns is not None), Side.SHARED)
        self.mmu.invalidations.conversion()

    def _allocated(self, slot: Memslot, side: Side, gfns: Gfns) -> None:
        """Map memory that has been allocated, if that is the policy."""
        if self.config.map_on_fallocate and not map_allocated(self.mmu, slot, side, gfns):
            self._nursery.start_soon(map_asking, self.mmu, slot, gfns)

    def close(self) -> None:
        """Unmap all memory, for good: the connection to memfs has ended."""
        self.closed = True
        self.mmu.unmap(self.mmu.table.everything)
        self.mmu.invalidations.abandon()

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        self.mmu.table.check()
        self.mmu.slots.check()
        for translations in self.mmu.tlbs:
            translations.check(self.mmu.table)
        for leaves in self.mmu.table.leaves(self.mmu.table.everything):
            pages = level_pages(leaves.level)
            for position in leaves.ptes.nonzero()[0].tolist():
                pte, start = int(leaves.ptes[position]), leaves.gfns.start + position * pages
                block, side = GfnRange(Gfn(start), Gfn(start + pages)), side_of(pte)
                slot = self.mmu.slots.find(block.start)
                assert slot is not None, f"gfn {start:#x} is mapped outside of all slots"
                assert slot.gfns.intersect(block) == block, f"a leaf at gfn {start:#x} goes beyond its slot"
                assert self.mmu.is_uniform(slot, block, side), f"gfn {start:#x} is mapped from the wrong side"
                owns = side is Side.SHARED or self.mmu.ownership.owner(pte_pfn(pte)) == (self.mmu.vm, start)
                assert owns, f"gfn {start:#x} maps a frame that is not its own"


@asynccontextmanager
async def create_vm(socket_path: str, config: VmConfig | None = None, **changes: Any) -> AsyncIterator[VM]:
    """Create a VM on the memfs that listens on a socket; it ends with the block.

    `changes` are to `config`, by the names of its fields. Raises OSError if nobody listens there.
    """
    config = dataclasses.replace(config or VmConfig(), **changes)
    vm: VM | None = None

    def notified(message: Notification) -> None:
        assert vm is not None, "notified before anything was registered"
        vm._notified(message)

    def resumed() -> None:
        if vm is not None:
            vm._resumed()

    async with connect(socket_path, config.name, notified, resumed) as backing, open_flat_nursery() as nursery:
        vm = VM(backing, nursery, config)
        nursery.start_soon(_watch, vm)
        try:
            yield vm
        finally:
            vm.close()
            nursery.cancel_scope.cancel()


async def _watch(vm: VM) -> None:
    """Unmap everything when memfs goes away."""
    await vm.backing.ended.wait()
    vm.close()
