"""A VM and its vCPUs as the service has them: what each ioctl on their descriptors does.

A VM connects to the memfs of the first file that it gets, and so has no state of ours before; a vCPU begins to be when
it is first run, or its registers are asked for. What it runs is native code, on the real KVM, or accesses that the VMM
has listed (KVMSIM_SET_ACCESSES), which takes no /dev/kvm.

It is there for as long as a descriptor of the VM or of a vCPU is open, in a task of its own; what ends that task ends
this VM, and no other.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import numpy as np
import trio

from kvmsim import ioctls
from kvmsim.backing import socket_of
from kvmsim.engines.kvm.engine import KvmEngine
from kvmsim.engines.kvm.machine import KvmMachine, open_kvm_machine
from kvmsim.engines.registers import Registers
from kvmsim.exits import Exit, InterruptExit, MemoryErrorExit, MemoryFaultExit
from kvmsim.service.accesses import Accesses, parse_accesses
from kvmsim.service.descriptors import close_in_thread
from kvmsim.service.guest_memory import Conversions, make_guest_memfd
from kvmsim.service.requests import region2_of, region_of, unpack
from kvmsim.service.run_page import RunPage
from kvmsim.service.wire import Answer, Call
from kvmsim.slots.dirty import Bitmap
from kvmsim.uapi import (
    KVM_MAX_VCPU_ID,
    KVM_USER_MEM_SLOTS,
    PreFaultMemory,
    UserspaceMemoryRegion,
)
from kvmsim.vcpu import VCPU
from kvmsim.vm import VM, create_vm
from kvmsim.vm_type import VmType
from memfs.contract.units import Gpa

log = logging.getLogger(__name__)

Handler = Callable[[Call, tuple[int, ...]], Awaitable[Answer]]

_CAPABILITIES: Final = {
    ioctls.KVM_CAP_USER_MEMORY: 1,
    ioctls.KVM_CAP_NR_VCPUS: 64,
    ioctls.KVM_CAP_MAX_VCPUS: KVM_MAX_VCPU_ID,
    ioctls.KVM_CAP_MAX_VCPU_ID: KVM_MAX_VCPU_ID,
    ioctls.KVM_CAP_NR_MEMSLOTS: KVM_USER_MEM_SLOTS,
    ioctls.KVM_CAP_READONLY_MEM: 1,
    ioctls.KVM_CAP_IMMEDIATE_EXIT: 1,
    ioctls.KVM_CAP_SYNC_REGS: 1,
    ioctls.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 1,
    ioctls.KVM_CAP_PRE_FAULT_MEMORY: 1,
    ioctls.KVM_CAP_USER_MEMORY2: 1,
    ioctls.KVM_CAP_MEMORY_FAULT_INFO: 1,
    ioctls.KVM_CAP_MEMORY_ATTRIBUTES: ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE,
}


class Target:
    """What a descriptor stands for: it answers calls, one at a time for each descriptor."""

    handlers: dict[int, Handler]

    async def handle(self, call: Call, fds: tuple[int, ...]) -> tuple[Answer, tuple[int, ...], Target | None]:
        """Answer a call. Returns descriptors to go along, and what another one is to stand for. Raises OSError."""
        handler = self.handlers.get(call.number)
        if handler is None:
            raise OSError(errno.ENOTTY, f"ioctl {call.number:#x} is none that there is here")
        return await handler(call, fds), (), None

    def opened(self) -> None:
        """Take notice of one descriptor more."""

    def closed(self) -> None:
        """Take notice of one descriptor less."""

    def interrupt(self) -> None:
        """Have KVM_RUN return."""


def capability(number: int) -> int:
    """Return what KVM_CHECK_EXTENSION says of a capability; 0: it is not here."""
    return _CAPABILITIES.get(number, 0)


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
            self._vcpu_ids.add(call.argument)
            return Answer(), (os.dup(vcpu.page.fd),), vcpu
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
        if call.argument == ioctls.KVM_CAP_GUEST_MEMFD:
            return Answer(self._directory is not None)
        return Answer(capability(call.argument))

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
            await close_in_thread((*kept, *self._conversions.drop(vm.mmu.slots)))

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


class ServedVcpu(Target):
    """A vCPU, and its struct kvm_run."""

    def __init__(self, vm: ServedVm, number: int) -> None:
        self._served: Final = vm
        self._number: Final = number
        self.page: Final = RunPage()
        self._vcpu: VCPU | None = None
        self._engine: KvmEngine | None = None  # of native code
        self._accesses: Accesses | None = None
        self._exit: Exit | None = None
        self._is_running = False
        self._is_interrupted = False
        self._references = 0
        self.handlers = {
            ioctls.KVM_RUN: self._run,
            ioctls.KVM_GET_REGS: self._get_registers,
            ioctls.KVM_SET_REGS: self._set_registers,
            ioctls.KVM_GET_SREGS: self._get_sregs,
            ioctls.KVM_SET_SREGS: self._set_sregs,
            ioctls.KVM_PRE_FAULT_MEMORY: self._pre_fault,
            ioctls.KVMSIM_SET_ACCESSES: self._set_accesses,
            ioctls.KVMSIM_GET_VALUES: self._get_values,
        }

    def opened(self) -> None:
        """Take notice of one descriptor more; it keeps the VM, too."""
        self._references += 1
        self._served.opened()

    def closed(self) -> None:
        """Take notice of one descriptor less."""
        self._references -= 1
        if not self._references:
            self.page.close()
        self._served.closed()

    def interrupt(self) -> None:
        """Have KVM_RUN return with EINTR, if it runs."""
        self._is_interrupted = True
        if self._vcpu is not None and self._is_running:
            self._vcpu.kick()

    async def _native(self) -> KvmEngine:
        """Return its engine of the real KVM. Raises OSError: as `ServedVm.machine`, EBUSY if it makes accesses."""
        if self._accesses is not None:
            raise OSError(errno.EBUSY, "this vCPU makes accesses, and has no registers")
        if self._engine is None:
            machine = await self._served.machine()
            engine = machine.create_with(self._number, lambda *_: None, lambda sregs: sregs, plain_ports=True)
            self._vcpu = self._served.vm.create_vcpu(self._number, engine)
            self._engine = engine
        return self._engine

    async def _run(self, _: Call, __: tuple[int, ...]) -> Answer:
        self._is_interrupted = False
        if self._vcpu is None:
            await self._native()
        assert self._vcpu is not None
        self.page.answer(self._exit)
        self._exit = None
        if self._engine is not None and (registers := self.page.registers_to_set()) is not None:
            await self._engine.leave()
            self._engine.registers = registers
        if self.page.immediate_exit or self._is_interrupted:
            raise InterruptedError(errno.EINTR, "interrupted before it has run")
        self._is_running = True
        try:
            with self._served.running():
                exit_ = await self._vcpu.run()
        finally:
            self._is_running = False
        shown: Exit | MemoryFaultExit = exit_
        if isinstance(exit_, MemoryErrorExit) and self._served.is_mainlines:
            shown = exit_.memory_fault
        self.page.put(shown)
        if isinstance(exit_, InterruptExit):
            raise InterruptedError(errno.EINTR, "interrupted")
        self._exit = exit_
        if self._engine is not None and self.page.wants_registers:
            await self._engine.leave()
            self.page.put_registers(self._engine.registers)
        if isinstance(shown, MemoryFaultExit):
            raise OSError(errno.EFAULT, "KVM_EXIT_MEMORY_FAULT")
        return Answer()

    async def _get_registers(self, _: Call, __: tuple[int, ...]) -> Answer:
        engine = await self._native()
        await engine.leave()
        return Answer(payload=engine.registers.pack())

    async def _set_registers(self, call: Call, _: tuple[int, ...]) -> Answer:
        unpack(Registers.LAYOUT, call)
        engine = await self._native()
        await engine.leave()
        engine.registers = Registers.unpack(call.payload)
        return Answer()

    async def _get_sregs(self, _: Call, __: tuple[int, ...]) -> Answer:
        engine = await self._native()
        await engine.leave()
        return Answer(payload=bytes(engine.vcpu.get_sregs()))

    async def _set_sregs(self, call: Call, _: tuple[int, ...]) -> Answer:
        engine = await self._native()
        await engine.leave()
        if len(call.payload) != len(engine.vcpu.get_sregs()):
            raise OSError(errno.EINVAL, "this is no struct kvm_sregs")
        engine.vcpu.set_sregs(call.payload)
        return Answer()

    async def _pre_fault(self, call: Call, _: tuple[int, ...]) -> Answer:
        gpa, size, flags = unpack(ioctls.PRE_FAULT, call)
        memory = PreFaultMemory(Gpa(gpa), size, flags)
        if self._vcpu is None:
            await self._native()
        assert self._vcpu is not None
        with self._served.running():
            await self._vcpu.pre_fault_memory(memory)
        return Answer(payload=ioctls.PRE_FAULT.pack(memory.gpa, memory.size, memory.flags))

    # -- accesses -----------------------------------------------------------------------------------------------------

    async def _set_accesses(self, call: Call, _: tuple[int, ...]) -> Answer:
        if self._engine is not None:
            raise OSError(errno.EBUSY, "this vCPU runs native code")
        accesses = parse_accesses(call.payload)
        if self._accesses is None:
            engine = Accesses()
            self._vcpu = self._served.vm.create_vcpu(self._number, engine)
            self._accesses = engine
        self._exit = None
        self._accesses.set(accesses)
        return Answer()

    async def _get_values(self, _: Call, __: tuple[int, ...]) -> Answer:
        values = [] if self._accesses is None else self._accesses.values
        return Answer(len(values), b"".join(map(ioctls.VALUE.pack, values)))


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
