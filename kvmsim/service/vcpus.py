"""A vCPU as the service has it: what each ioctl on its descriptor does.

It begins to be when it is first run, or its registers are asked for. What it runs is native code, on the real KVM, or
accesses that the VMM has listed (KVMSIM_SET_ACCESSES), which takes no /dev/kvm. It is there as long as its VM.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvmsim import ioctls
from kvmsim.engines.kvm.engine import KvmEngine
from kvmsim.engines.registers import Registers
from kvmsim.exits import Exit, InterruptExit, MemoryErrorExit, MemoryFaultExit
from kvmsim.service.accesses import Accesses, parse_accesses
from kvmsim.service.requests import unpack
from kvmsim.service.run_page import RunPage
from kvmsim.service.target import Target
from kvmsim.service.wire import Answer, Call
from kvmsim.uapi import PreFaultMemory
from kvmsim.vcpu import VCPU
from memfs.contract.units import Gpa

if TYPE_CHECKING:
    from kvmsim.service.machines import ServedVm


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
