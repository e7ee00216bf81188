"""Guests of native code for the tests: a VM on a mounted memfs, with the test guest in its memory, and an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Protocol

import pytest
import trio

from kvmsim.engines.kvm.engine import KvmEngine
from kvmsim.engines.kvm.machine import KvmMachine, open_kvm_machine
from kvmsim.engines.kvm.uapi import Kvm, KvmUnavailable
from kvmsim.engines.kvm.userfaultfd import UserfaultfdUnavailable
from kvmsim.engines.ports import PORT_CONSOLE
from kvmsim.engines.registers import Registers
from kvmsim.exits import HaltExit
from kvmsim.guests.elf import Elf
from kvmsim.guests.loading import load
from kvmsim.side import Side
from kvmsim.uapi import UserspaceMemoryRegion
from kvmsim.vcpu import VCPU
from kvmsim.vm import VM, create_vm
from kvmsim.vm_type import VmType
from kvmsim.vmm.guest_memory import GuestMemory
from kvmsim.vmm.vmm import Vmm, open_memory
from memfs.contract.units import PAGE_SIZE, Gpa

from .conftest import Memfs, memfs_command

SIZE = 16 << 20
AREA = 0x80_0000  #: of the test guest (selftest.c): pages from here on are for the tests
_STACK = 0x70_0000


@dataclass
class NativeGuest:
    """A VM with the test guest in it."""

    vm: VM
    vmm: Vmm
    machine: KvmMachine
    memory: GuestMemory
    elf: Elf
    engines: list[KvmEngine] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)  #: what it printed

    def create(self, what: str, *arguments: int) -> VCPU:
        """A vCPU that does what a letter says (selftest.c), with arguments a, b, c, d."""
        number = len(self.engines)
        engine = KvmEngine(self.machine, number, {PORT_CONSOLE: self.text.extend})
        self.engines.append(engine)
        values = dict(zip(("rdx", "rcx", "r8", "r9"), arguments, strict=False))
        stack = _STACK - number * 0x1_0000
        engine.registers = Registers(rip=self.elf.entry, rsp=stack, rdi=number, rsi=ord(what), **values)
        return self.vm.create_vcpu(number, engine)

    async def run(self, what: str, *arguments: int) -> Registers:
        """Run a vCPU to its end, which must be a good one, and return what is in its registers."""
        vcpu = self.create(what, *arguments)
        exit_ = await self.vmm.run(vcpu)
        registers = self.engines[-1].registers
        assert exit_ == HaltExit(0), f"{exit_}, rbx {registers.rbx:#x}, rcx {registers.rcx:#x}"
        return registers

    async def load_page(self, page: int, side: Side = Side.PRIVATE) -> int:
        """The first word of a page of the area, as the guest would load it from memory of a side."""
        memory = self.memory if side is Side.PRIVATE else GuestMemory(self.vm, self.vmm, side)
        return int.from_bytes(await memory.read(Gpa(AREA + page * PAGE_SIZE), 8), "little")

    def check_windows(self) -> None:
        """See that the guest reaches nothing but what is mapped, also while memory is being converted."""
        self.machine.check(self.vm.mmu.table)


class NewGuest(Protocol):
    """The fixture `native_guest`."""

    def __call__(
        self,
        regions: Callable[[Vmm], Sequence[UserspaceMemoryRegion]] = lambda _: (),
        *,
        pages_a_fault: int = 64,
        on: Memfs | None = None,
    ) -> AbstractAsyncContextManager[NativeGuest]:
        """Make a guest on a memfs, if another is not named; `regions`: what slots there are beside its memory."""


def kvm_or_skip() -> VmType:
    """The type of a VM that this machine's KVM can run; skips the test with the reason where there is none."""
    try:
        kvm = Kvm()
    except KvmUnavailable as error:
        pytest.skip(str(error))
    try:
        return VmType.address_bits(kvm.address_bits)
    finally:
        kvm.close()


@pytest.fixture
def native_guest(memfs: Memfs) -> NewGuest:
    """A context manager: a VM of 16 MiB on two files of a memfs, all of it private, with the test guest loaded."""
    kind = kvm_or_skip()

    @asynccontextmanager
    async def make(
        regions: Callable[[Vmm], Sequence[UserspaceMemoryRegion]] = lambda _: (),
        *,
        pages_a_fault: int = 64,
        on: Memfs | None = None,
    ) -> AsyncIterator[NativeGuest]:
        mounted = on or memfs
        shared, private = mounted.path / "shared", mounted.path / "private"
        mounted.run("touch", "shared")
        mounted.run(*memfs_command("create", "--seals", "guest", private))
        opened = open_memory(str(shared), str(private), SIZE)
        vmm = await trio.to_thread.run_sync(opened.__enter__)
        try:
            elf = Elf.parse(files("kvmsim").joinpath("guests/selftest.elf").read_bytes())
            async with create_vm(str(mounted.socket), vm_type=kind) as vm:
                await vmm.add_memory(vm)
                memory = await load(vm, vmm, elf)
                for region in regions(vmm):
                    await vm.set_user_memory_region(region)
                try:
                    async with open_kvm_machine(vm, pages_a_fault) as machine:
                        yield NativeGuest(vm, vmm, machine, memory, elf)
                        vm.check()
                except UserfaultfdUnavailable as error:
                    pytest.skip(str(error))
                vm.check()
        finally:
            await trio.to_thread.run_sync(opened.__exit__, None, None, None)

    return make
