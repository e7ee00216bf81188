"""What native code costs on the real KVM with kvmsim's memory below it, beside a VM that has plain memory of a tmpfs.

The reference runs the same guest (kvmsim/guests/selftest.c) on one KVM memslot over a mapped file, without userfaultfd,
page tables of ours or an event loop: what a VMM does that knows nothing of private memory. Its memory is allocated when
the guest touches it first; private memory before that, when it becomes private, so there is a row with that as well.
Memory that is there and is only mapped again is a third.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Final

import trio

from bench.harness import BenchError, Row, Run, Sample, alone, compare, measure, memfs, now, placements, tmpfs
from bench.uffd import Unavailable, pages_per_second
from kvmsim.engines.kvm.machine import KvmMachine
from kvmsim.engines.kvm.sregs import MSRS, user_mode
from kvmsim.engines.kvm.uapi import Kvm
from kvmsim.engines.native import Choice, EngineUnavailable, NativeMachine, choose, open_machine
from kvmsim.engines.ports import PORT_HALT
from kvmsim.engines.registers import Registers
from kvmsim.engines.user_mode import tables
from kvmsim.exits import HaltExit, IoExit
from kvmsim.guests.elf import Elf
from kvmsim.guests.loading import load
from kvmsim.side import Side
from kvmsim.vm import VM, create_vm
from kvmsim.vmm.vmm import Vmm, open_memory
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange, Gpa

_SIZE: Final = 32 << 20  # bytes of guest memory
_AREA: Final = 0x80_0000
_PAGES: Final = 4096
_STACK: Final = 0x70_0000
_PORT: Final = 0x80
_EXITS: Final = 4000
_BLOCKS: Final = (1, 16, 64, 512)
_WHERE: Final = "in process"
_TOUCH: Final = GfnRange(Gfn(_AREA // PAGE_SIZE), Gfn(_AREA // PAGE_SIZE + _PAGES))


def rows(run: Run) -> Iterator[Row]:
    """All rows about native code."""
    if not run.wants("native"):
        return
    try:
        choice = choose("kvm")
    except EngineUnavailable as error:
        raise BenchError(str(error)) from error
    elf = Elf.parse(files("kvmsim").joinpath("guests/selftest.elf").read_bytes())
    with tmpfs(run, "size=64m") as reference, memfs(run, "size=128m") as mounted:
        plain = Plain(reference.path / "memory", elf)
        try:
            yield from trio.run(_measure, run, mounted.path, choice, elf, plain)
        finally:
            plain.close()


def _registers(elf: Elf, what: str, *arguments: int) -> Registers:
    values = dict(zip(("rdx", "rcx", "r8", "r9"), arguments, strict=False))
    return Registers(rip=elf.entry, rsp=_STACK, rsi=ord(what), **values)


class Plain:
    """The reference: a VM of the real KVM on one mapped file."""

    def __init__(self, path: Path, elf: Elf) -> None:
        self._elf: Final = elf
        self._kvm: Final = Kvm()
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(fd, 0, _SIZE)
        self._memory: Final = mmap.mmap(fd, _SIZE)
        os.close(fd)
        self._memory[PAGE_SIZE:0x2_0000] = tables(_SIZE, 1 << (self._kvm.address_bits - 1))[PAGE_SIZE:]
        for segment in elf.segments:
            self._memory[segment.address : segment.address + len(segment.data)] = segment.data
        view = ctypes.c_char.from_buffer(self._memory)
        self._kvm.set_memory(0, 0, _SIZE, ctypes.addressof(view), readonly=False)
        del view
        self._vcpu: Final = self._kvm.create_vcpu(0)
        self._vcpu.set_sregs(user_mode(self._vcpu.get_sregs(), has_xsave=self._kvm.has_xsave))
        self._vcpu.set_msrs(MSRS)

    def run(self, what: str, *arguments: int) -> float:
        """Run the guest to its end; return how many seconds that took."""
        self._vcpu.registers = _registers(self._elf, what, *arguments)
        started = now()
        while True:
            self._vcpu.run()
            if self._vcpu.io[1] == PORT_HALT:
                return now() - started

    def touch(self) -> float:
        """Have the guest touch pages that are not there; return microseconds a page."""
        self._memory.madvise(mmap.MADV_REMOVE, _AREA, _PAGES * PAGE_SIZE)
        return self.run("w", _AREA, _PAGES, 1, 1) / _PAGES * 1e6

    def touch_again(self) -> float:
        """Have it touch pages that are there, but mapped nowhere."""
        self._memory.madvise(mmap.MADV_DONTNEED, _AREA, _PAGES * PAGE_SIZE)
        return self.run("w", _AREA, _PAGES, 1, 1) / _PAGES * 1e6

    def exits(self) -> float:
        """Return microseconds for an `out`."""
        return self.run("o", _EXITS) / _EXITS * 1e6

    def close(self) -> None:
        self._vcpu.close()
        self._kvm.close()
        self._memory.close()


class _Guest:
    """The same guest on kvmsim's memory."""

    def __init__(self, vm: VM, vmm: Vmm, machine: NativeMachine, elf: Elf) -> None:
        self._vmm, self._machine, self._elf = vmm, machine, elf
        self._engine: Final = machine.create(0)
        self.allocations: list[float] = []  # microseconds a page, for each `touch`
        self.vcpu: Final = vm.create_vcpu(0, self._engine)

    async def run(self, what: str, *arguments: int) -> float:
        self._engine.registers = _registers(self._elf, what, *arguments)
        started = now()
        exit_ = await self._vmm.run(self.vcpu)
        assert exit_ == HaltExit(0)
        return now() - started

    async def touch(self) -> float:
        """Have the guest touch pages that have just become private; return microseconds a page."""
        await self._vmm.convert(Gpa(_AREA), _PAGES * PAGE_SIZE, Side.SHARED)
        started = now()
        await self._vmm.convert(Gpa(_AREA), _PAGES * PAGE_SIZE, Side.PRIVATE)
        self.allocations.append((now() - started) / _PAGES * 1e6)
        return await self.run("w", _AREA, _PAGES, 1, 1) / _PAGES * 1e6

    async def touch_again(self) -> float:
        assert isinstance(self._machine, KvmMachine)
        self._machine.flush(_TOUCH)
        return await self.run("w", _AREA, _PAGES, 1, 1) / _PAGES * 1e6

    async def exits(self) -> float:
        return await self.run("o", _EXITS) / _EXITS * 1e6

    async def convert(self) -> float:
        pages = _PAGES // 16
        await self._vmm.convert(Gpa(_AREA), pages * PAGE_SIZE, Side.SHARED)
        return await self.run("w", _AREA, pages, 1, 1) / pages * 1e6

    async def instructions(self) -> float:
        """Return how many millions of instructions the emulator does in a second of a guest that spins."""
        from kvmsim.engines.unicorn import SLICE, UnicornEngine  # an optional dependency

        assert isinstance(self._engine, UnicornEngine)
        self._engine.registers = _registers(self._elf, "s")
        with trio.move_on_after(0.2):  # what it converts, and the emulator translates
            await self._vmm.run(self.vcpu)
        before, started = self._engine.slices, now()
        with trio.move_on_after(0.5):
            await self._vmm.run(self.vcpu)
        return (self._engine.slices - before) * SLICE / (now() - started) / 1e6

    async def kick(self) -> float:
        """Return microseconds from a kick of a guest that spins to the end of its run."""
        self._engine.registers = _registers(self._elf, "s")
        spent = 0.0
        for _ in range(50):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._vmm.run, self.vcpu)
                await trio.sleep(0.002)
                started = now()
                self.vcpu.kick()
            spent += now() - started
        return spent / 50 * 1e6


@asynccontextmanager
async def _guest(path: Path, choice: Choice, elf: Elf, block: int) -> AsyncIterator[_Guest]:
    shared, private = path / f"shared-{block}", path / f"private-{block}"

    def create() -> None:
        shared.touch()
        os.close(os.open(private, os.O_CREAT | os.O_RDWR, 0o600))
        os.setxattr(private, "user.memfs.seals", b"guest")

    await trio.to_thread.run_sync(create)
    opened = open_memory(str(shared), str(private), _SIZE)
    vmm = await trio.to_thread.run_sync(opened.__enter__)
    try:
        async with create_vm(f"{path}.sock", vm_type=choice.vm_type) as vm:
            await vmm.add_memory(vm)
            await load(vm, vmm, elf)

            async def nothing(_: IoExit) -> None:
                pass

            vmm.add_port(_PORT, nothing)
            async with open_machine(vm, choice, block) as machine:
                yield _Guest(vm, vmm, machine, elf)
    finally:
        await trio.to_thread.run_sync(opened.__exit__, None, None, None)
        for name in (shared, private):
            await trio.to_thread.run_sync(name.unlink)


async def _repeat(run: Run, plain: Callable[[], float], ours: Callable[[], Awaitable[float]]) -> tuple[Sample, Sample]:
    """Measure both alternately, after one round that does not count."""
    pairs = [(await ours(), plain()) for _ in range(run.repetitions + 1)][1:]
    return Sample([pair[0] for pair in pairs]), Sample([pair[1] for pair in pairs])


async def _measure(run: Run, path: Path, choice: Choice, elf: Elf, plain: Plain) -> list[Row]:
    found = []
    against = "KVM on plain memory of a tmpfs"
    targets = {64: 1 / 1.2, 512: 2.0}
    for block in _BLOCKS:
        async with _guest(path, choice, elf, block) as guest:
            ours, theirs = await _repeat(run, plain.touch, guest.touch)
            name = f"native guest, private page touched first, {block} projected a fault"
            found.append(compare(name, _WHERE, ours, "us/page", against, theirs, at_least=targets.get(block)))
            with_allocation = Sample([sum(each) for each in zip(ours.values, guest.allocations[1:], strict=True)])
            name = f"native guest, private page allocated and touched, {block} projected a fault"
            found.append(compare(name, _WHERE, with_allocation, "us/page", against, theirs))
            ours, theirs = await _repeat(run, plain.touch_again, guest.touch_again)
            name = f"native guest, private page mapped again, {block} projected a fault"
            found.append(compare(name, _WHERE, ours, "us/page", against, theirs))
            if block == 64:
                ours, theirs = await _repeat(run, plain.exits, guest.exits)
                found.append(compare("native guest, out to a port of the VMM's", _WHERE, ours, "us", against, theirs))
                for name, what in (
                    ("native guest, page converted when it is touched", guest.convert),
                    ("native guest, kick of one that spins", guest.kick),
                ):
                    found.append(
                        alone(name, _WHERE, Sample([await what() for _ in range(min(run.repetitions, 3))]), "us")
                    )
    found += await _emulated(run, path, elf)
    try:
        cpu = list(placements().values())[-1][1]
        rates = measure({"uffd": lambda: 1e6 / pages_per_second(_PAGES, cpu)}, run.repetitions)
        found.append(alone("userfaultfd alone, absent page touched", "different CPUs", rates["uffd"], "us/page"))
    except Unavailable:
        pass  # kvm's engine opens it in another way
    return found


async def _emulated(run: Run, path: Path, elf: Elf) -> list[Row]:
    """Measure the emulator on a guest that counts in memory, and say nothing where there is none."""
    try:
        choice = choose("unicorn")
    except EngineUnavailable:
        return []
    async with _guest(path, choice, elf, 64) as guest:
        rates = [await guest.instructions() for _ in range(run.repetitions + 1)][1:]
    return [alone("native guest on unicorn, instructions with memory", _WHERE, Sample(rates), "M/s")]
