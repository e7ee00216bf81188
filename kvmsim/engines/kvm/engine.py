"""A vCPU of the real KVM as an engine: `VCPU.run` runs native code.

The event loop waits for one descriptor, on which its thread says that it is out of KVM_RUN and the machine that it is
parked. What it exits with is a class of exits.py; a page that is not there is none, unless `vm.fault` says so. Such an
exit is returned with the thread still parked: it looks at the page again when it is run again.

A cancellation stops the guest: `run` does not return before the thread is out or parked. Whatever came in between is
still there for the next `run`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from kvmsim.engines.kvm.sregs import MSRS, cr2, with_fs_base
from kvmsim.engines.kvm.thread import Bus, VcpuThread
from kvmsim.engines.kvm.window import ParkedAt
from kvmsim.engines.ports import PORT_HALT, PORT_HYPERCALL
from kvmsim.engines.registers import Registers
from kvmsim.engines.user_mode import EXCEPTION_SIZE, PORT_EXCEPTION, exception_at
from kvmsim.exits import (
    ExceptionExit,
    Exit,
    HaltExit,
    HypercallExit,
    InternalErrorExit,
    IoExit,
    MmioExit,
    ShutdownExit,
)
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.walk import translate
from kvmsim.side import Side
from kvmsim.uapi import (
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR,
    KVM_EXIT_IO,
    KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN,
)
from kvmsim.vcpu import VCPU
from memfs.contract.units import Gpa, gpa_to_gfn, offset_in_page

if TYPE_CHECKING:
    from kvmsim.engines.kvm.machine import KvmMachine

_PAGE_FAULT: Final = 14
_STOPPED_SOON: Final = 0.005  # seconds between two looks at a vCPU that has been kicked
_LEAVES_SOON: Final = 0.0005
_LEAVES_LATEST: Final = 1.0


class KvmEngine:
    """A vCPU of a machine: `KvmMachine.create`. `sregs`: given struct kvm_sregs as it is, what it is to be."""

    def __init__(
        self,
        machine: KvmMachine,
        vcpu_id: int,
        bus: Bus,
        sregs: Callable[[bytearray], bytearray],
        *,
        plain_ports: bool = False,
    ) -> None:
        self._plain_ports: Final = plain_ports
        self.vcpu: Final = machine.kvm.create_vcpu(vcpu_id)
        self._machine: Final = machine
        try:
            self.vcpu.set_sregs(sregs(self.vcpu.get_sregs()))
            self.vcpu.set_msrs(MSRS)
            self._thread: Final = VcpuThread(self.vcpu, f"vcpu-{vcpu_id}", bus)
        except BaseException:
            self.vcpu.close()
            raise
        self._parked: ParkedAt | None = None
        self._is_inside = False  # it was told to enter KVM_RUN, and nobody has looked yet why that returned
        self._exit: Exit | None = None  # which the VMM is answering
        self._is_run = False

    @property
    def thread_id(self) -> int:
        """The native id of its thread."""
        return self._thread.id

    # -- registers ----------------------------------------------------------------------------------------------------

    @property
    def registers(self) -> Registers:
        """The general registers, a copy; to be set between two runs.

        Raises OSError(EBUSY) after a memory error: the vCPU is then in the middle of an instruction.
        """
        self._check_out()
        return self.vcpu.registers

    @registers.setter
    def registers(self, values: Registers) -> None:
        self._check_out()
        self.vcpu.registers = values

    def set_fs_base(self, address: int) -> None:
        """Set the base of FS. Raises OSError(EBUSY) as `registers` does."""
        self._check_out()
        self.vcpu.set_sregs(with_fs_base(self.vcpu.get_sregs(), address))

    def _check_out(self) -> None:
        if not self._thread.is_out:
            raise OSError(errno.EBUSY, "the vCPU is in the middle of an instruction")

    # -- running ------------------------------------------------------------------------------------------------------

    async def run(self, vcpu: VCPU) -> Exit:
        """Go on until an exit. Raises OSError, and what `VM.fault` raises."""
        self._answer()
        self._is_run = True
        try:
            while True:
                exit_: Exit | None = None
                if self._is_inside and self._thread.is_out:
                    exit_ = self._take_result(vcpu)
                elif self._parked is not None:
                    exit_ = await self._fault(vcpu, self._parked)
                elif self._machine.parked_for_others:
                    exit_ = await self._fault_for_another(vcpu, self._machine.parked_for_others[0])
                else:
                    if not self._is_inside:
                        await self._machine.wait_until_allowed()
                        self._is_inside = True
                        self._thread.enter()
                    await self._something()
                if exit_ is not None:
                    self._exit = exit_
                    return exit_
        finally:
            self._is_run = False

    async def _fault(self, vcpu: VCPU, parked: ParkedAt) -> Exit | None:
        if self._machine.project(parked):
            self._machine.wake(parked)
            return None
        exit_ = await vcpu.vm.fault(parked.access)
        # Somebody else may have woken it meanwhile.
        return exit_ if self._parked is parked else None

    async def _fault_for_another(self, vcpu: VCPU, parked: ParkedAt) -> Exit | None:
        if self._machine.project(parked):
            self._machine.wake(parked)
            return None
        exit_ = await vcpu.vm.fault(parked.access)
        if exit_ is None or not any(other is parked for other in self._machine.parked_for_others):
            return None
        with trio.CancelScope(shield=True):
            await self.leave()  # it may execute, and has then exited with something else
        return exit_ if self._thread.result == errno.EINTR else None

    async def _something(self) -> None:
        """Wait until the thread is out or parked. If that is cancelled, stop it first."""
        try:
            await trio.lowlevel.wait_readable(self._thread.happened)
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self._stop()
            raise
        self._thread.take_notice()

    async def _stop(self) -> None:
        self._machine.take_events()
        if not self._is_stopped:
            self._thread.kick()
        while not self._is_stopped:
            with trio.move_on_after(_STOPPED_SOON):
                await trio.lowlevel.wait_readable(self._thread.happened)
            self._thread.take_notice()
            self._machine.take_events()  # the machine's task may have been cancelled as well

    @property
    def _is_stopped(self) -> bool:
        return self._thread.is_out or self._parked is not None

    async def leave(self) -> None:
        """Have its thread out of KVM_RUN, whoever runs it; what it is parked at, it touches again when it is run.

        Raises OSError(EBUSY) if it is parked where KVM itself reads guest memory, and a signal does not get it out.
        """
        with trio.move_on_after(_LEAVES_LATEST):
            while not self._thread.is_out:
                self._thread.kick()
                await trio.sleep(_LEAVES_SOON)
        if not self._thread.is_out:
            raise OSError(
                errno.EBUSY, "a vCPU waits for a page that KVM itself reads: convert it, and run the vCPU first"
            )
        self._parked = None

    # -- called by the machine ----------------------------------------------------------------------------------------

    def parked(self, parked: ParkedAt) -> None:
        """Take notice that the thread is parked; if it is being run and the page is mapped, let it go on."""
        mine = self._parked
        if mine is not None and mine.window is parked.window and mine.access == parked.access:
            return  # a kick has it ask again and again
        self._parked = parked
        is_mapped = False
        if self._is_run and not self._thread.is_out:
            with suppress(OSError):  # `_fault` raises it where `run` can say why
                is_mapped = self._machine.project(parked)
        if is_mapped:
            self._machine.wake(parked)
        else:
            self._thread.notify()

    def woken(self, parked: ParkedAt) -> None:
        """Take notice that those who are parked at a page are about to be woken."""
        mine = self._parked
        if mine is None or not mine.is_at(parked):
            return
        self._parked = None
        if not self._is_run and not self._thread.is_out:
            self._thread.kick()  # it leaves before it has executed anything

    def look(self) -> None:
        """Have `run` look at what there is to do."""
        self._thread.notify()

    def refuse_to_run(self) -> None:
        """Have KVM_RUN return when what it is parked at has gone."""
        self.vcpu.immediate_exit = True

    def close(self) -> None:
        """End its thread; the windows are gone."""
        self._thread.close()
        self.vcpu.close()

    # -- exits --------------------------------------------------------------------------------------------------------

    def _take_result(self, vcpu: VCPU) -> Exit | None:
        """Return what KVM_RUN returned with. None: nothing that concerns anybody."""
        self._is_inside, self._parked = False, None
        if self._thread.failure is not None:
            raise self._thread.failure
        number = self._thread.result
        if number == errno.EINTR:
            return None
        if number == errno.EFAULT:
            raise OSError(number, "the guest touched memory behind the end of its file")
        if number:
            raise OSError(number, "KVM_RUN")
        match self.vcpu.exit_reason:
            case reason if reason == KVM_EXIT_IO:
                return self._io(vcpu)
            case reason if reason == KVM_EXIT_MMIO:
                gpa, data, is_write = self.vcpu.mmio
                shared = self._machine.vm.type.shared_bit
                return MmioExit(Gpa(gpa & ~shared), len(data), is_write, data if is_write else b"")
            case reason if reason == KVM_EXIT_HYPERCALL:
                nr, arguments = self.vcpu.hypercall
                return HypercallExit(nr, arguments)
            case reason if reason == KVM_EXIT_HLT:
                return HaltExit()
            case reason if reason == KVM_EXIT_SHUTDOWN:
                return ShutdownExit()
            case reason if reason == KVM_EXIT_INTR:
                return None
            case reason if reason in (KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY):
                return InternalErrorExit(self.vcpu.suberror)
            case reason:
                raise OSError(errno.EINVAL, f"KVM exited with reason {reason}, which nobody asked for")

    def _io(self, vcpu: VCPU) -> Exit:
        is_write, port, size, data = self.vcpu.io
        if self._plain_ports:
            return IoExit(port, size, is_write, self.vcpu.page[data] if is_write else b"")
        if is_write and port == PORT_HALT:
            return HaltExit(self.vcpu.page[data][0])
        if is_write and port == PORT_HYPERCALL:
            now = self.vcpu.registers
            return HypercallExit(now.rax, (now.rbx, now.rcx, now.rdx))
        if is_write and port == PORT_EXCEPTION:
            return self._exception(vcpu)
        return IoExit(port, size, is_write, self.vcpu.page[data] if is_write else b"")

    def _exception(self, vcpu: VCPU) -> ExceptionExit:
        """Return what the guest has just pushed onto its kernel stack, in private memory. Raises OSError(EFAULT)."""
        rsp = Gpa(self.vcpu.registers.rsp)
        entry = translate(vcpu.vm.mmu, vcpu.tlb, Access(gpa_to_gfn(rsp), False, Side.PRIVATE))
        if entry is None:
            raise OSError(errno.EFAULT, "the host has just taken the stack on which the guest reported an exception")
        at = entry.offset + offset_in_page(rsp)
        vector, rip = exception_at(bytes(entry.memory[at : at + EXCEPTION_SIZE]))
        return ExceptionExit(vector, rip, cr2(self.vcpu.get_sregs()) if vector == _PAGE_FAULT else None)

    def _answer(self) -> None:
        """Hand over what the VMM has answered to the last exit."""
        exit_, self._exit = self._exit, None
        match exit_:
            case HypercallExit() if self.vcpu.exit_reason == KVM_EXIT_HYPERCALL:
                self.vcpu.answer_hypercall(exit_.ret)
            case HypercallExit():
                now = self.vcpu.registers
                now.rax = exit_.ret & (1 << 64) - 1
                self.vcpu.registers = now
            case IoExit(is_write=False):
                where = self.vcpu.io[3]
                length = where.stop - where.start
                self.vcpu.page[where] = exit_.data[:length].ljust(length, b"\xff")
            case MmioExit(is_write=False):
                self.vcpu.answer_mmio(exit_.data[: exit_.size].ljust(exit_.size, b"\xff"))
