"""Setting memslots: what KVM_SET_USER_MEMORY_REGION does once the rules (slots/rules.py) let a change pass.

A slot holds one registration of each of its files, and so does each window of a classic slot on a file behind it; the
last one to go unregisters the file. A file is registered before the slot is there, and unregistered when nothing of it
is mapped any more (RFC patches 04 to 06).

Native code runs on a copy of the slots, in another KVM (engines/native.py). Its vCPUs are stopped while that is changed
as well: the other KVM waits until none of them is inside, and one that waits for a page may be there for ever.
"""

from __future__ import annotations

import errno
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final, Protocol

import trio

from kvmsim.backing import GuestFile
from kvmsim.mmu.mmu import Mmu
from kvmsim.slots.dirty import DirtyLog
from kvmsim.slots.memslots import AddressSpace, Memslot
from kvmsim.slots.rules import Change, check_files, check_reach, check_region, gfn_range
from kvmsim.uapi import KVM_MEM_FD, KVM_MEM_LOG_DIRTY_PAGES, UserspaceMemoryRegion
from kvmsim.vm_type import VmType
from memfs.contract.protocol.messages import FileId
from memfs.contract.units import Gfn, gfn_to_gpa


class SlotCopy(Protocol):
    """What has the slots as well, and runs vCPUs on them."""

    def stopped(self) -> AbstractAsyncContextManager[None]:
        """Have none of its vCPUs execute anything, or wait for memory, within an async with statement.

        Raises OSError(EBUSY) for one that cannot be stopped where it is.
        """

    def replace(self, old: Memslot | None, new: Memslot | None) -> None:
        """Have a slot in the place of another, while the vCPUs are stopped. All or nothing. Raises OSError."""


class Regions:
    """The memory regions of one VM, which become its slots. One is set at a time."""

    def __init__(self, mmu: Mmu, vm_type: VmType) -> None:
        self._mmu: Final = mmu
        self._type: Final = vm_type
        self._lock: Final = trio.Lock()  # setting a slot waits for memfs
        self.copy: SlotCopy | None = None  #: which is kept in step
        self._to_launch: dict[FileId, GuestFile] = {}  # private files, until a vCPU runs

    async def set(self, region: UserspaceMemoryRegion) -> None:
        """Create, move or delete a slot, or change its flags (KVM_SET_USER_MEMORY_REGION). All or nothing.

        Raises OSError with KVM's errnos; EPERM if a file has another owner.
        """
        async with self._lock:
            change = check_region(self._mmu.slots, region)
            await self._mmu.invalidations.wait_idle()  # slots do not change under an invalidation (RFC patch 10)
            old = self._mmu.slots.get(region.slot)
            if change is Change.DELETE:
                assert old is not None
                async with self._stopped():
                    self._copy(old, None)
                    held = self._take_out(old)
                await self.release(held)
                return
            shared, private = await self._register(region, old) if region.flags & KVM_MEM_FD else (None, None)
            held = [file for file in (shared, private) if file is not None]
            try:
                if change in (Change.CREATE, Change.MOVE):
                    check_reach(region, min(gfn_to_gpa(Gfn(self._mmu.table.max_gfn)), self._type.max_gpa))
                new = _slot_of(region, old, shared, private)
                if change is Change.FLAGS_ONLY:
                    held = self._replace(old, new)
                elif change is not Change.NONE:
                    async with self._stopped():
                        self._copy(old, new)
                        held = self._replace(old, new)
            finally:
                await self.release(held)

    def _stopped(self) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self.copy is None else self.copy.stopped()

    def _copy(self, old: Memslot | None, new: Memslot | None) -> None:
        if self.copy is not None:
            self.copy.replace(old, new)

    async def _register(self, region: UserspaceMemoryRegion, old: Memslot | None) -> tuple[GuestFile, GuestFile | None]:
        """Register the files of a region, both or none."""
        registered: list[GuestFile] = []
        try:
            if region.private_fd >= 0 and not self._type.has_private_memory:
                raise OSError(errno.EINVAL, "a VM of this type has no private memory")
            registered.append(shared := await self._mmu.backing.register(region.fd))
            private = None
            if region.private_fd >= 0:
                registered.append(private := await self._mmu.backing.register(region.private_fd))
                if private.page_map is not None:
                    self._to_launch[private.id] = private
            check_files(self._mmu.slots, region, shared, private, old)
        except BaseException:  # trio.Cancelled among them
            await self.release(registered)
            raise
        return shared, private

    def _replace(self, old: Memslot | None, slot: Memslot) -> list[GuestFile]:
        """Insert a slot in the place of its former self. Returns the files to be unregistered then."""
        stays = old is not None and old.gfns == slot.gfns
        held = [] if old is None else self._take_out(old, unmap=not stays)
        self._mmu.add_slot(slot)
        if stays and slot.logs_dirty:
            self._mmu.write_protect(slot.gfns)
        return held

    def _take_out(self, slot: Memslot, *, unmap: bool = True) -> list[GuestFile]:
        """Remove a slot. Returns its files, which are still to be unregistered."""
        held = list(slot.files)
        if slot.is_classic:
            behind = [window.space for window in self._mmu.slots.windows_of(slot)]
            held += [self._mmu.backing.files[space] for space in behind if not isinstance(space, AddressSpace)]
            unmap = True  # its windows on files go and come back with the faults
        self._mmu.slots.remove(slot)
        self._mmu.invalidations.conversion()  # faults that found the slot must look again
        if unmap:
            self._mmu.unmap(slot.gfns)
        return held

    async def release(self, files: list[GuestFile]) -> None:
        """Undo one registration of each file."""
        with trio.CancelScope(shield=True):
            for file in files:
                if file.registrations == 1:
                    self._mmu.frames.forget(file)
                await self._mmu.backing.unregister(file)

    async def launch(self) -> None:
        """Measure the content of private files that have been registered since this was last called."""
        while self._to_launch:
            file_id, file = next(iter(self._to_launch.items()))
            try:
                if file_id in self._mmu.backing.files:
                    await self._mmu.backing.launch(file)  # if that is cancelled, it is still to be done
            except OSError:
                if file_id in self._mmu.backing.files:
                    raise
            self._to_launch.pop(file_id, None)


def _slot_of(
    region: UserspaceMemoryRegion, old: Memslot | None, shared: GuestFile | None, private: GuestFile | None
) -> Memslot:
    gfns = gfn_range(region)
    log: DirtyLog | None = None
    if region.flags & KVM_MEM_LOG_DIRTY_PAGES:
        log = old.dirty if old is not None and old.dirty is not None else DirtyLog(len(gfns))
    return Memslot(region.slot, region.flags, gfns, region.userspace_addr, shared, private, log)
