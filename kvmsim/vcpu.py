"""A virtual CPU: runs an engine until the VMM has to do something (KVM_RUN)."""

from __future__ import annotations

import errno
from collections import Counter
from typing import Final, Protocol

import trio

from kvmsim.exits import INTERRUPTED, Exit
from kvmsim.mmu.mmu import Mmu
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.prefault import prefault
from kvmsim.mmu.tlb import Tlb
from kvmsim.uapi import PreFaultMemory
from kvmsim.vm_type import VmType
from memfs.contract.units import GfnRange, Gpa, gpa_to_gfn, is_page_aligned, pages_to_bytes


class VirtualMachine(Protocol):
    """The part of a VM that a vCPU and its engine need (vm.py)."""

    @property
    def type(self) -> VmType:
        """How its guest says that it means private memory."""

    @property
    def mmu(self) -> Mmu:
        """Its secondary MMU."""

    def check_alive(self) -> None:
        """Raise StoreGone if its memory is gone."""

    async def catch_up(self) -> None:
        """Act on all that memfs has said by now. Raises StoreGone if it has cut the VM off."""

    async def launch(self) -> None:
        """Make the initial content of its private memory final."""

    def decode(self, gpa: Gpa, *, write: bool, encrypted: bool = False, fetch: bool = False) -> Access:
        """Return what an access of the guest means."""

    async def fault(self, access: Access) -> Exit | None:
        """Make an access possible, or return what the VMM must do."""


class Engine(Protocol):
    """The code that a vCPU executes.

    `ProgramEngine` is one for guests written in Python. Another one asks `vcpu.vm.decode` what an access means, and has
    `vcpu.vm.fault` map the memory; it returns the exit that this gives, if any, and makes the access again when it is
    called next.
    """

    async def run(self, vcpu: VCPU) -> Exit:
        """Continue where it stopped, until something has to be done outside; it is then called again.

        It may be cancelled wherever it awaits; then it is to go on from there when it is called again.
        """


class VCPU:
    """A vCPU of a VM. Use `VM.create_vcpu`."""

    def __init__(self, vm: VirtualMachine, vcpu_id: int, engine: Engine) -> None:
        self.id: Final = vcpu_id
        self.vm: Final = vm
        self.tlb: Final = Tlb()
        self._engine: Final = engine
        self.exits: Counter[str] = Counter()  #: by name
        self._running: trio.CancelScope | None = None
        self._is_kicked = False

    async def run(self) -> Exit:
        """Run until an exit (KVM_RUN).

        Raises OSError(EFAULT, ENOSPC), and what the engine raises; StoreGone, whatever came of that, if memfs is gone.
        """
        self.vm.check_alive()
        exit_: Exit | None = None
        if not self._is_kicked:
            try:
                with trio.CancelScope() as self._running:
                    await self.vm.launch()
                    exit_ = await self._engine.run(self)
            except Exception:
                await self.vm.catch_up()  # if memfs has taken the memory meanwhile, that is why
                raise
            finally:
                self._running = None
        if exit_ is None:
            self._is_kicked, exit_ = False, INTERRUPTED
        self.exits[exit_.name] += 1
        return exit_

    def kick(self) -> None:
        """Have `run` return soon with an InterruptExit, even while it waits for memfs (a signal to the vCPU's thread).

        One that does not run, or has just exited, does so the next time (immediate_exit).
        """
        self._is_kicked = True
        if self._running is not None:
            self._running.cancel()

    async def pre_fault_memory(self, memory: PreFaultMemory) -> None:
        """Map a range as if the vCPU had read each of its pages (KVM_PRE_FAULT_MEMORY, Linux 6.11).

        `memory` is brought up to date as it goes on, so that after an error or a cancellation it says what is left; as
        in KVM, an error is raised only if there was nothing before it. Raises OSError: EINVAL for flags, a range that
        is empty, not page-aligned or wraps, or a gpa with the shared bit; ENOENT without a memslot; EFAULT if nothing
        is mapped at a hva; ENOSPC. StoreGone if memfs is gone.
        """
        gpa, size = memory.gpa, memory.size
        if memory.flags or not (is_page_aligned(gpa) and is_page_aligned(size)):
            raise OSError(errno.EINVAL, "flags, or a range that is not page-aligned")
        if gpa < 0 or size <= 0 or gpa + size >= 1 << 64 or gpa & self.vm.type.shared_bit:
            raise OSError(errno.EINVAL, "a range that is empty or wraps, or that is an alias")
        self.vm.check_alive()
        await self.vm.launch()
        while memory.size:
            try:
                pages = await prefault(self.vm.mmu, GfnRange(gpa_to_gfn(memory.gpa), gpa_to_gfn(Gpa(gpa + size))))
            except OSError:
                if memory.size == size:
                    raise
                return
            memory.gpa = Gpa(memory.gpa + pages_to_bytes(pages))
            memory.size -= pages_to_bytes(pages)
            await trio.lowlevel.checkpoint()
