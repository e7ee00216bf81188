"""A Linux kernel in sealed private memory, with interrupt controllers and a timer of KVM's, and a serial console.

All of its memory is private: an ordinary kernel knows nothing of a shared bit, and does not need to. On the I/O bus is
the serial port; at all other ports nobody answers, apart from the keyboard controller's, by which it resets the
machine. That happens in the vCPU's thread, since a kernel that probes its hardware asks ten thousand times.

Where KVM is PVM, code at CPL 0 is emulated, and not all of it can be; so it is refused there.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

from kvmsim.engines.kvm.machine import KvmMachine
from kvmsim.engines.kvm.sregs import boot_mode
from kvmsim.engines.kvm.uapi import KvmUnavailable
from kvmsim.engines.registers import Registers
from kvmsim.exits import HaltExit, InternalErrorExit, IoExit, MmioExit, ShutdownExit
from kvmsim.guests.bzimage import BOOT_PARAMS, CODE, DATA, GDT, PML4, BootImage
from kvmsim.guests.console import Console
from kvmsim.guests.linux.kernel import ProgramDied
from kvmsim.guests.uart import IRQ, PORTS
from kvmsim.vm import VM
from kvmsim.vmm.guest_memory import GuestMemory
from kvmsim.vmm.vmm import Vmm
from memfs.contract.units import Gpa

_KEYBOARD_PORT, _RESET = 0x64, 0xFE
_CLEAN_FLAGS: Final = 2  # RFLAGS: interrupts are off


def check_kvm_boots() -> None:
    """Raise KvmUnavailable if this machine's KVM cannot run a kernel."""
    if Path("/sys/module/kvm_pvm").exists():
        raise KvmUnavailable(
            "a kernel cannot be booted here: this machine's KVM is PVM, which emulates code at CPL 0 and knows not all "
            "of it; it takes one with SVM or VMX (kvm_amd, kvm_intel)"
        )


class LinuxBoot:
    """A kernel in the memory of a VM, whose console is standard input and output."""

    def __init__(self, vm: VM, vmm: Vmm, machine: KvmMachine, image: BootImage) -> None:
        self._vm: Final = vm
        self._vmm: Final = vmm
        self._image: Final = image
        machine.kvm.create_irqchip()
        self._console: Final = Console(partial(machine.kvm.set_irq, IRQ))
        sregs = partial(boot_mode, page_table=PML4, gdt=GDT, code=CODE, data=DATA)
        self._engine: Final = machine.create_with(0, self._on_bus, sregs)

    def _on_bus(self, port: int, size: int, data: bytes | None) -> bytes | None:
        if port in PORTS:
            if data is None:
                return bytes((self._console.uart.read(port),))
            for value in data:
                self._console.uart.write(port, value)
            return b""
        if port == _KEYBOARD_PORT and data is not None and data[0] == _RESET:
            return None
        return b"\xff" * size

    async def load(self) -> None:
        """Store the kernel in guest memory. Raises OSError as `GuestMemory.write` does."""
        memory = GuestMemory(self._vm, self._vmm)
        for gpa, content in self._image.pieces:
            await memory.write(Gpa(gpa), content)

    async def run(self) -> int:
        """Run it until it resets the machine; return 0. Raises ProgramDied, and what `VCPU.run` raises."""
        self._engine.registers = Registers(rip=self._image.entry, rsi=BOOT_PARAMS, rflags=_CLEAN_FLAGS)
        vcpu = self._vm.create_vcpu(0, self._engine)
        async with self._console.served():
            while True:
                exit_ = await vcpu.run()
                match exit_:
                    case IoExit() | HaltExit():
                        return 0
                    case MmioExit():
                        exit_.data = b"\xff" * exit_.size
                    case ShutdownExit() | InternalErrorExit():
                        where = self._engine.registers
                        raise ProgramDied(f"the kernel died: {exit_.name.lower().replace('_', ' ')}, {where}")
                    case _:
                        await self._vmm.answer(exit_)
