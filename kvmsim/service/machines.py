"""A VM as the service has it: what each ioctl on its descriptor does.

A VM connects to the memfs of the first file that it gets, and so has no state of ours before. It is there for as long
as a descriptor of the VM or of a vCPU is open, in a task of its own; what ends that task ends this VM, and no other.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import numpy as np
import trio

from kvmsim import ioctls
from kvmsim.backing import socket_of
from kvmsim.engines.kvm.machine import KvmMachine, open_kvm_machine
from kvmsim.service.capabilities import check_extension
from kvmsim.service.descriptors import close_in_thread
from kvmsim.service.guest_memory import Conversions, make_guest_memfd
from kvmsim.service.requests import region2_of, region_of, unpack
from kvmsim.service.target import Target
from kvmsim.service.vcpus import ServedVcpu
from kvmsim.service.wire import Answer, Call
from kvmsim.slots.dirty import Bitmap
from kvmsim.uapi import KVM_MAX_VCPU_ID, UserspaceMemoryRegion
from kvmsim.vm import VM, create_vm
from kvmsim.vm_type import VmType

log = logging.getLogger(__name__)


class ServedVm(Target):
    """A VM. `vm_type`: the one that native code is run on here; `directory`: where guest_memfds are made."""

    def __init__(self, name: str, vm_type: VmType, directory: str | None) -> None:
        self._name: Final = name
        self._directory: Final = directory
        self._conversions: Final = Conversions()
        self.is_mainlines = False  #: its VMM speaks mainline's interface: it gets KVM_EXIT_MEMORY_FAULT
        self._type: Final = vm_type
        self._references = 0
        self._socket: str | None = None  # memfs's
        self._begun = trio.Event()
        self._ready = trio.Event()
        self._native = trio.Event()
        self._native_ready = trio.Event()
        self._closed = trio.Event()
        self._failure: Exception | None = None
        self._vm: VM | None = None
        self._machine: KvmMachine | None = None
        self._running: dict[trio.CancelScope, None] = {}
        self._vcpu_ids: set[int] = set()
        self.handlers = {
            ioctls.KVM_CHECK_EXTENSION: self._check_extension,
            ioctls.KVM_SET_USER_MEMORY_REGION: self._set_region,
            ioctls.KVM_SET_USER_MEMORY_REGION2: self._set_region2,
            ioctls.KVM_SET_MEMORY_ATTRIBUTES: self._set_attributes,
            ioctls.KVM_CLEAR_DIRTY_LOG: self._clear_dirty_log,
            ioctls.KVM_ENABLE_CAP: self._enable_capability,
            ioctls.KVMSIM_SHARED_BIT: self._shared_bit,
        }

    # -- its life -----------------------------------------------------------------------------------------------------

    def opened(self) -> None:
        """Take notice of one descriptor more, of the VM or of a vCPU."""
        self._references += 1

    def closed(self) -> None:
        """Take notice of one descriptor less; the last one ends the VM."""
        self._references -= 1
        if not self._references:
            for event in (self._closed, self._begun, self._native):
                event.set()

    async def live(self) -> None:
        """Be there until the last descriptor is closed. Raises nothing: what ends it is what its VMM gets."""
        try:
            await self._begun.wait()
            if self._socket is not None:
                async with create_vm(self._socket, name=self._name, vm_type=self._type) as self._vm:
                    self._ready.set()
                    await self._native.wait()
                    if not self._closed.is_set():
                        async with open_kvm_machine(self._vm) as self._machine:
                            await self._live_natively()
        except Exception as error:
            self._failure = error
            log.warning("%s ended: %s", self._name, error)
        finally:
            self._ready.set()
            self._native_ready.set()
            await close_in_thread(self._conversions.take_all())

    async def _live_natively(self) -> None:
        self._native_ready.set()
        try:
            await self._closed.wait()
        finally:  # threads end with the machine, so nobody may wait for one then
            with trio.CancelScope(shield=True):
                while self._running:
                    for scope in self._running:
                        scope.cancel()
                    await trio.sleep(0.001)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a vCPU as running within a with statement. Raises OSError(EIO) if the VM ends meanwhile."""
        with trio.CancelScope() as scope:
            self._running[scope] = None
            try:
                yield
            finally:
                del self._running[scope]
        if scope.cancelled_caught:
            raise OSError(errno.EIO, f"the VM has ended: {self._failure}")

    @property
    def vm(self) -> VM:
        """The VM of ours. Raises OSError: ENXIO while it has no memory, EIO when it has ended."""
        if self._failure is not None:
            raise OSError(errno.EIO, f"the VM has ended: {self._failure}")
        if self._vm is None:
            raise OSError(errno.ENXIO, "the VM has no memory yet (KVM_SET_USER_MEMORY_REGION)")
        return self._vm

    async def machine(self) -> KvmMachine:
        """Return the real KVM's side of it. Raises OSError: as `vm`, and EIO if this machine has no such KVM."""
        assert self.vm
        self._native.set()
        await self._native_ready.wait()
        assert self.vm
        assert self._machine is not None
        return self._machine

    # -- ioctls -------------------------------------------------------------------------------------------------------

    async def handle(self, call: Call, fds: tuple[int, ...]) -> tuple[Answer, tuple[int, ...], Target | None]:
        """Answer a call."""
        if call.number == ioctls.KVM_CREATE_VCPU:
            if call.argument >= KVM_MAX_VCPU_ID:
                raise OSError(errno.EINVAL, f"vCPU ids are below {KVM_MAX_VCPU_ID}")
            if call.argument in self._vcpu_ids:
                raise OSError(errno.EEXIST, f"there is a vCPU {call.argument}")
            vcpu = ServedVcpu(self, call.argument)
            try:
                page = os.dup(vcpu.page.fd)
            except OSError:
                vcpu.page.close()
                raise
            self._vcpu_ids.add(call.argument)
            return Answer(), (page,), vcpu
        if call.number == ioctls.KVM_CREATE_GUEST_MEMFD:
            make = partial(make_guest_memfd, self._directory, *unpack(ioctls.GUEST_MEMFD, call))
            fd = await trio.to_thread.run_sync(make, limiter=_one_thread())
            return Answer(), (fd,), None
        if call.number == ioctls.KVM_GET_DIRTY_LOG:
            slot, *_ = unpack(ioctls.DIRTY_LOG, call)
            fd = await trio.to_thread.run_sync(_memfd, self.vm.get_dirty_log(slot), limiter=_one_thread())
            return Answer(), (fd,), None
        return await super().handle(call, fds)

    async def _check_extension(self, call: Call, _: tuple[int, ...]) -> Answer:
        return check_extension(call, makes_guest_memfds=self._directory is not None)

    async def _shared_bit(self, _: Call, __: tuple[int, ...]) -> Answer:
        return Answer(self._type.shared_bit.bit_length() - 1)

    async def _set_region(self, call: Call, fds: tuple[int, ...]) -> Answer:
        await self._set(region_of(call, fds))
        return Answer()

    async def _set_region2(self, call: Call, fds: tuple[int, ...]) -> Answer:
        region = region2_of(call, fds)
        await self._set(region)
        self.is_mainlines |= region.private_fd >= 0
        return Answer()

    async def _set(self, region: UserspaceMemoryRegion) -> None:
        """Set a memslot. Raises OSError as `VM.set_user_memory_region`; EOPNOTSUPP for files that are on no memfs."""
        if self._socket is None and region.fd >= 0:
            path = await trio.to_thread.run_sync(socket_of, region.fd, abandon_on_cancel=True, limiter=_one_thread())
            self._socket = path
            self._begun.set()
            await self._ready.wait()
        if self._socket is None:
            raise OSError(errno.EINVAL, f"no slot {region.slot} to delete")
        vm, kept = self.vm, tuple[int, ...]()
        before = vm.mmu.slots.get(region.slot)
        try:
            if region.private_fd >= 0:
                kept = (os.dup(region.fd),)
                kept = (*kept, os.dup(region.private_fd))
            await vm.set_user_memory_region(region)
            slot = vm.mmu.slots.get(region.slot)
            if len(kept) == 2 and slot is not None:
                self._conversions.add(slot, kept)
                kept = ()
        finally:
            gone = () if before is None or vm.mmu.slots.is_current(before) else self._conversions.drop(before)
            await close_in_thread((*kept, *gone))

    async def _set_attributes(self, call: Call, _: tuple[int, ...]) -> Answer:
        gpa, size, attributes, flags = unpack(ioctls.MEMORY_ATTRIBUTES, call)
        await self._conversions.set_attributes(self.vm.mmu.slots, gpa, size, attributes, flags)
        return Answer()

    async def _clear_dirty_log(self, call: Call, _: tuple[int, ...]) -> Answer:
        slot, pages, first, _pointer = unpack(ioctls.CLEAR_DIRTY_LOG, call, exact=False)
        bitmap = np.frombuffer(call.payload[ioctls.CLEAR_DIRTY_LOG.size :], np.uint8)
        self.vm.clear_dirty_log(slot, first, pages, bitmap)
        return Answer()

    async def _enable_capability(self, call: Call, _: tuple[int, ...]) -> Answer:
        number, flags, value, *_rest = unpack(ioctls.CAPABILITY, call)
        if number != ioctls.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 or flags or value > 1:
            raise OSError(errno.EINVAL, "a capability that cannot be enabled here")
        self.vm.manual_dirty_log_protect = bool(value)
        return Answer()


def _memfd(data: Bitmap) -> int:
    fd = os.memfd_create("dirty_log", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, data.data, 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def _one_thread() -> trio.CapacityLimiter:
    return trio.CapacityLimiter(1)  # a file may be on a filesystem that never answers: then only its VMM waits
