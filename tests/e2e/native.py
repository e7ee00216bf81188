"""Guests of native code for the tests: a VM on a mounted memfs, with the test guest in its memory, and an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Protocol

import pytest
import trio

from kvmsim.engines.kvm.machine import KvmMachine
from kvmsim.engines.native import Choice, EngineUnavailable, NativeEngine, NativeMachine, choose, open_machine
from kvmsim.engines.ports import PORT_CONSOLE
from kvmsim.engines.registers import Registers
from kvmsim.exits import HaltExit
from kvmsim.guests.elf import Elf
from kvmsim.guests.loading import load
from kvmsim.side import Side
from kvmsim.uapi import KVM_MEM_FD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, UserspaceMemoryRegion
from kvmsim.vcpu import VCPU
from kvmsim.vm import VM, create_vm
from kvmsim.vmm.guest_memory import GuestMemory
from kvmsim.vmm.vmm import Vmm, open_memory
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gpa

from .conftest import Memfs, memfs_command

SIZE = 16 << 20
AREA = 0x80_0000  #: of the test guest (selftest.c): pages from here on are for the tests
AREA_GFN = AREA // PAGE_SIZE
PAGES = (SIZE - AREA) // PAGE_SIZE
_STACK = 0x70_0000


@dataclass
class NativeGuest:
    """A VM with the test guest in it."""

    vm: VM
    vmm: Vmm
    machine: NativeMachine
    memory: GuestMemory
    elf: Elf
    private: str  #: names of its files
    shared: str
    engines: list[NativeEngine] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)  #: what it printed

    def create(self, what: str, *arguments: int) -> VCPU:
        """A vCPU that does what a letter says (selftest.c), with arguments a, b, c, d."""
        number = len(self.engines)
        engine = self.machine.create(number, {PORT_CONSOLE: self.text.extend})
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

    async def to_shared(self, first: int, pages: int) -> None:
        """Take private pages of the area away."""
        await self.vmm.convert(Gpa(AREA + first * PAGE_SIZE), pages * PAGE_SIZE, Side.SHARED)

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


def choice_or_skip(name: str) -> Choice:
    """An engine; skips the test with the reason where there is none."""
    try:
        return choose(name)
    except EngineUnavailable as error:
        pytest.skip(str(error))


def machine_of(guest: NativeGuest) -> KvmMachine:
    """The machine of a guest that the real KVM runs."""
    assert isinstance(guest.machine, KvmMachine)
    return guest.machine


def beside(vmm: Vmm) -> Sequence[UserspaceMemoryRegion]:
    """Slots of shared memory behind the guest's: one of which dirty pages are logged, one that is read-only."""
    return [
        UserspaceMemoryRegion(
            *(number, KVM_MEM_FD | flag, Gpa(SIZE + at), 1 << 20, ByteOffset(at), vmm.shared),
        )
        for number, (flag, at) in enumerate(((KVM_MEM_LOG_DIRTY_PAGES, 0), (KVM_MEM_READONLY, 1 << 20)), start=10)
    ]


def _new_guest(memfs: Memfs, choice: Choice) -> NewGuest:
    @asynccontextmanager
    async def make(
        regions: Callable[[Vmm], Sequence[UserspaceMemoryRegion]] = lambda _: (),
        *,
        pages_a_fault: int = 64,
        on: Memfs | None = None,
    ) -> AsyncIterator[NativeGuest]:
        mounted = on or memfs
        shared, private = (mounted.path / f"{name}-{choice.name}" for name in ("shared", "private"))
        mounted.run("touch", shared)
        mounted.run(*memfs_command("create", "--seals", "guest", private))
        opened = open_memory(str(shared), str(private), SIZE)
        vmm = await trio.to_thread.run_sync(opened.__enter__)
        try:
            elf = Elf.parse(files("kvmsim").joinpath("guests/selftest.elf").read_bytes())
            async with create_vm(str(mounted.socket), vm_type=choice.vm_type) as vm:
                await vmm.add_memory(vm)
                memory = await load(vm, vmm, elf)
                for region in regions(vmm):
                    await vm.set_user_memory_region(region)
                async with open_machine(vm, choice, pages_a_fault) as machine:
                    yield NativeGuest(vm, vmm, machine, memory, elf, private.name, shared.name)
                    vm.check()
                vm.check()
        finally:
            await trio.to_thread.run_sync(opened.__exit__, None, None, None)

    return make


@pytest.fixture
def kvm_guest(memfs: Memfs) -> NewGuest:
    """A context manager: a VM of 16 MiB on two files of a memfs, all of it private, with the test guest loaded."""
    return _new_guest(memfs, choice_or_skip("kvm"))


@pytest.fixture
def unicorn_guest(memfs: Memfs) -> NewGuest:
    """The same on the emulator."""
    return _new_guest(memfs, choice_or_skip("unicorn"))


@pytest.fixture(params=["kvm", "unicorn"])
def native_guest(request: pytest.FixtureRequest, memfs: Memfs) -> NewGuest:
    """The same on each engine."""
    return _new_guest(memfs, choice_or_skip(request.param))
