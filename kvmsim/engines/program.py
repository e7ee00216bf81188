"""An engine for guests that are written in Python: a generator that yields what the guest does.

    def guest():
        yield Store(Gpa(0x1000), b"hello", encrypted=True)
        yield convert(Gpa(0x1000), 1, Side.SHARED)
        assert (yield Load(Gpa(0x1000), 5)) == bytes(5)

A trace says what a program did; this says what a guest does about what it finds, which tests of conversions need. An
access goes through TLB, page table and fault path like any other, a page at a time, and is made again after an exit.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final

import trio

from kvmsim.exits import HALT, Exit, HypercallExit, MmioExit
from kvmsim.mmu.walk import translate
from kvmsim.side import Side
from kvmsim.uapi import KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED
from kvmsim.vcpu import VCPU
from memfs.contract.units import PAGE_SIZE, Gpa, gfn_to_gpa, offset_in_page

STEPS: Final = 16  #: between two checkpoints: half a millisecond


@dataclass(frozen=True, slots=True)
class Load:
    """Read `size` bytes; they are the value of the yield. `encrypted`: the C-bit of an SNP guest's page table."""

    gpa: Gpa
    size: int
    encrypted: bool = False


@dataclass(frozen=True, slots=True)
class Store:
    """Write bytes."""

    gpa: Gpa
    data: bytes
    encrypted: bool = False


@dataclass(frozen=True, slots=True)
class Hypercall:
    """Call the hypervisor; the value of the yield is what it returned."""

    nr: int
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fetch `size` bytes of instructions; they are the value of the yield. `encrypted` as for `Load`."""

    gpa: Gpa
    size: int
    encrypted: bool = False


Operation = Load | Store | Fetch | Hypercall
Program = Generator[Operation, Any, None]


def convert(gpa: Gpa, pages: int, to: Side) -> Hypercall:
    """Return the hypercall that asks for a conversion (KVM_HC_MAP_GPA_RANGE)."""
    return Hypercall(KVM_HC_MAP_GPA_RANGE, (gpa, pages, KVM_MAP_GPA_RANGE_ENCRYPTED if to is Side.PRIVATE else 0))


class ProgramEngine:
    """Runs one program."""

    def __init__(self, program: Program) -> None:
        self._program: Final = program
        self._operation: Operation | None = None
        self._exit: Exit | None = None  # which the VMM is answering
        self._done = bytearray()  # of the current load or store
        self._value: Any = None  # of the operation before the next
        self._steps = 0  # since the last checkpoint

    async def run(self, vcpu: VCPU) -> Exit:
        """Go on until an exit. Raises what the program raises."""
        if isinstance(self._exit, HypercallExit):
            self._value, self._operation = self._exit.ret, None
        elif isinstance(self._exit, MmioExit):
            self._value = self._after_mmio(self._exit)
        self._exit = None
        while True:
            if self._operation is None:
                try:
                    self._operation = self._program.send(self._value)
                except StopIteration:
                    return HALT
                self._value = None
                self._done.clear()
            exit_ = await self._step(vcpu, self._operation)
            if not isinstance(self._operation, Hypercall) and len(self._done) == _size(self._operation):
                self._value = None if isinstance(self._operation, Store) else bytes(self._done)
                self._operation = None
            self._steps += 1
            if self._steps >= STEPS:  # a guest that does nothing but exit comes here, too
                self._steps = 0
                await trio.lowlevel.checkpoint()  # if that is cancelled, it exits the next time
            if exit_ is not None:
                self._exit = exit_
                return exit_

    async def _step(self, vcpu: VCPU, operation: Operation) -> Exit | None:
        """Do the next page of an operation. Returns the exit that it needs, if any."""
        if isinstance(operation, Hypercall):
            return HypercallExit(operation.nr, operation.args)
        gpa = Gpa(operation.gpa + len(self._done))
        size = min(_size(operation) - len(self._done), PAGE_SIZE - offset_in_page(gpa))
        write = isinstance(operation, Store)
        fetch = isinstance(operation, Fetch)
        access = vcpu.vm.decode(gpa, write=write, encrypted=operation.encrypted, fetch=fetch)
        entry = translate(vcpu.vm.mmu, vcpu.tlb, access)
        if entry is None:
            exit_ = await vcpu.vm.fault(access)
            if isinstance(exit_, MmioExit):  # a device gets the bytes, not the page
                data = operation.data[len(self._done) : len(self._done) + size] if isinstance(operation, Store) else b""
                return MmioExit(Gpa(gfn_to_gpa(access.gfn) + offset_in_page(gpa)), size, write, data)
            return exit_
        at = entry.offset + offset_in_page(gpa)
        if isinstance(operation, Store):
            entry.memory[at : at + size] = operation.data[len(self._done) : len(self._done) + size]
        self._done += bytes(entry.memory[at : at + size])
        return None

    def _after_mmio(self, exit_: MmioExit) -> bytes | None:
        """Complete the part of an access that a device has answered. Returns the value, if that is all of it."""
        assert self._operation is not None
        assert not isinstance(self._operation, Hypercall)
        self._done += exit_.data[: exit_.size].ljust(exit_.size, b"\xff")  # as a bus on which nobody answers
        if len(self._done) < _size(self._operation):
            return None
        is_store, self._operation = isinstance(self._operation, Store), None
        return None if is_store else bytes(self._done)


def _size(operation: Load | Store | Fetch) -> int:
    return len(operation.data) if isinstance(operation, Store) else operation.size
