"""A virtual machine: memslots over files of memfs, the secondary page table, and what notifications do to it.

One VM is one connection to memfs, that is, one owner (RFC patch 01). All of it runs in one trio thread. The MMU lock is
that nothing under it awaits; the slots lock is a real one, because setting a slot talks to memfs.

What a notification does is done before it is acknowledged, in `_notified`, without awaiting:

    InvalidateBegin  raise in_progress, drop the mappings of that side
    InvalidateEnd    bump seq, lower in_progress
    Fallocate        of private memory: drop the shared mappings, bump seq. Dropping is mandatory. Mapping the private
                     pages at once (RFC v2) is the policy `map_on_fallocate`; it needs frames, so it is left to a task
                     that runs after the acknowledgement under the rules for faults. Mainline never does it.

Lifetimes: a slot holds a registration of each of its files; the files live as long as some slot has them; the VM ends
with the connection, and then nothing is mapped any more.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from kvmsim.exits import Exit
from kvmsim.memslots import Memslot, Memslots, check_files, check_region, first_page, gfn_range
from kvmsim.mmu.fault import Access, Mmu, handle_fault, map_gfns
from kvmsim.mmu.frames import FrameMap
from kvmsim.mmu.invalidate import InvalidationState
from kvmsim.mmu.page_table import PageTable
from kvmsim.mmu.pte import is_private, level_pages
from kvmsim.store import Notification, Store, StoreFile, StoreGone, connect
from kvmsim.uapi import KVM_MAX_VCPU_ID, UserspaceMemoryRegion
from kvmsim.vcpu import VCPU, Engine
from memfs.guest.messages import Fallocate, InvalidateBegin, InvalidateEnd
from memfs.units import Gfn, GfnRange

#: Told of each notification, slot by slot, after it has been acted upon; `private`: it is about private memory
Listener = Callable[[Notification, Memslot, GfnRange, bool], None]


class VM:
    """A virtual machine. Use `create_vm`."""

    def __init__(self, store: Store, nursery: trio.Nursery, *, map_on_fallocate: bool) -> None:
        self.map_on_fallocate: Final = map_on_fallocate
        self.mmu: Final = Mmu(store, Memslots(), PageTable(), FrameMap(), InvalidationState())
        self.vcpus: dict[int, VCPU] = {}
        self.listeners: list[Listener] = []
        self.tlb_flushes = 0  #: bumped whenever a mapping goes away; whoever caches translations compares it
        self.faults: Counter[str] = Counter()  #: by kind: private, shared
        self._store: Final = store
        self._slots_lock: Final = trio.Lock()
        self._nursery: Final = nursery

    # -- memslots ---------------------------------------------------------------------------------------------------

    async def set_user_memory_region(self, region: UserspaceMemoryRegion) -> None:
        """KVM_SET_USER_MEMORY_REGION: create a slot, or delete it (memory_size 0). All or nothing.

        Raises OSError with KVM's errnos; EPERM if a file has another owner.
        """
        async with self._slots_lock:
            check_region(self.mmu.slots, region)
            await self.mmu.invalidations.wait_idle()  # slots do not change under an invalidation (RFC patch 10)
            if region.memory_size == 0:
                slot = self.mmu.slots.get(region.slot)
                assert slot is not None
                await self._delete(slot)
            else:
                await self._create(region)

    async def _create(self, region: UserspaceMemoryRegion) -> None:
        registered: list[StoreFile] = []
        try:
            registered.append(shared := await self._store.register(region.fd))
            private = None
            if region.private_fd >= 0:
                registered.append(private := await self._store.register(region.private_fd))
            if shared is private:
                raise OSError(errno.EINVAL, "fd and private_fd are one file")
            check_files(region, shared, private)
        except OSError:
            with trio.CancelScope(shield=True):
                for file in registered:
                    await self._unregister(file)
            raise
        self.mmu.slots.add(Memslot(region.slot, region.flags, gfn_range(region), first_page(region), shared, private))

    async def _delete(self, slot: Memslot) -> None:
        self.mmu.slots.remove(slot)
        self.mmu.invalidations.conversion()  # faults that found the slot must look again
        self.mmu.table.unmap_range(slot.gfns)
        self.tlb_flushes += 1
        with trio.CancelScope(shield=True):
            for file in filter(None, (slot.shared, slot.private)):
                await self._unregister(file)

    async def _unregister(self, file: StoreFile) -> None:
        if file.registrations == 1:
            self.mmu.frames.forget(file)
        await self._store.unregister(file)

    # -- running ----------------------------------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int, engine: Engine) -> VCPU:
        """KVM_CREATE_VCPU. Raises OSError: EEXIST for an id in use, EINVAL from KVM_MAX_VCPU_ID on."""
        if not 0 <= vcpu_id < KVM_MAX_VCPU_ID:
            raise OSError(errno.EINVAL, f"vCPU ids are below {KVM_MAX_VCPU_ID}")
        if vcpu_id in self.vcpus:
            raise OSError(errno.EEXIST, f"there is a vCPU {vcpu_id}")
        vcpu = self.vcpus[vcpu_id] = VCPU(self, vcpu_id, engine)
        return vcpu

    async def fault(self, access: Access) -> Exit | None:
        """Handle a fault of a vCPU. Raises OSError as `handle_fault` says, StoreGone if memfs is."""
        self.faults["private" if access.private else "shared"] += 1
        return await handle_fault(self.mmu, access)

    def check_alive(self) -> None:
        """Raise StoreGone if the connection to memfs, and with it all memory, is gone."""
        if self._store.gone is not None:
            raise StoreGone(self._store.gone)

    @property
    def store(self) -> Store:
        """The connection to memfs."""
        return self._store

    # -- notifications ----------------------------------------------------------------------------------------------

    def _notified(self, message: Notification) -> None:
        touched = [
            (slot, gfns, slot.private is not None and slot.private.id == message.file)
            for slot in self.mmu.slots.of_file(message.file)
            if (gfns := slot.gfns_of(message.pages)) is not None
        ]
        key = (message.file, message.pages)
        if isinstance(message, InvalidateBegin):
            self.mmu.invalidations.begin(key, [gfns for _, gfns, _ in touched])
        elif isinstance(message, InvalidateEnd):
            self.mmu.invalidations.end(key)
        for slot, gfns, private in touched:
            if isinstance(message, InvalidateBegin):
                self._unmap(gfns, private=private)
            elif isinstance(message, Fallocate) and private:
                self._unmap(gfns, private=False)
                self.mmu.invalidations.conversion()
                if self.map_on_fallocate:
                    self._nursery.start_soon(self._map_private, slot, gfns)
            for listener in self.listeners:
                listener(message, slot, gfns, private)

    def _unmap(self, gfns: GfnRange, *, private: bool) -> None:
        """Drop one side's mappings."""
        if self.mmu.table.unmap_range(gfns, private):
            self.tlb_flushes += 1

    async def _map_private(self, slot: Memslot, gfns: GfnRange) -> None:
        """Map what was allocated. A mere optimisation: whatever comes in between, a fault will do it later."""
        rest: GfnRange | None = gfns
        try:
            while rest is not None:
                seq = self.mmu.invalidations.sample()
                done = await map_gfns(self.mmu, slot, rest, private=True, seq=seq)
                if done is None:
                    return
                rest = GfnRange(done.end, rest.end) if done.end < rest.end else None
        except (OSError, StoreGone):
            return

    def lost_store(self) -> None:
        """memfs is gone: nothing may be mapped any more."""
        self.mmu.table.unmap_range(self.mmu.table.everything)
        self.tlb_flushes += 1
        self.mmu.invalidations.abandon()

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        self.mmu.table.check()
        for leaves in self.mmu.table.leaves(self.mmu.table.everything):
            for position in leaves.ptes.nonzero()[0].tolist():
                gfn = Gfn(leaves.gfns.start + position * level_pages(leaves.level))
                pte = int(leaves.ptes[position])
                slot = self.mmu.slots.find(gfn)
                assert slot is not None, f"gfn {gfn:#x} is mapped outside of all slots"
                allocated = slot.private is not None and slot.private.is_private(slot.page(gfn))
                assert is_private(pte) <= allocated, f"gfn {gfn:#x} is mapped private and not allocated"


@asynccontextmanager
async def create_vm(socket_path: str, *, name: str = "vm", map_on_fallocate: bool = True) -> AsyncIterator[VM]:
    """Create a VM on the memfs that listens on a socket; it ends with the block.

    Raises OSError if nobody listens there.
    """
    vm: VM | None = None
    failure: Exception | None = None

    def notified(message: Notification) -> None:
        assert vm is not None, "notified before anything was registered"
        vm._notified(message)

    async with connect(socket_path, name, notified) as store:
        async with trio.open_nursery() as nursery:
            vm = VM(store, nursery, map_on_fallocate=map_on_fallocate)
            nursery.start_soon(_watch, vm)
            try:
                yield vm
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel()
        vm.lost_store()
        if failure is not None:
            raise failure


async def _watch(vm: VM) -> None:
    """Unmap everything when memfs goes away."""
    await vm.store.ended.wait()
    vm.lost_store()
