"""The engine for native code where there is no KVM: Unicorn, QEMU's code generator as a library.

The package is an optional one (`[unicorn]`; GPL-2.0), so only who wants this engine imports this module. Guest memory
is mapped into the emulator as it is, both files of each slot; its TLB is filled, a page at a time, from kvmsim's page
table, and a flush empties it. So it is a TLB to kvmsim like any other, of which the emulator is the processor.

All of it happens in the event loop, in slices of so many instructions, with a checkpoint after each; nothing depends on
time, so that a run can be repeated. Rejected: a thread, or a slice that a clock ends. To be stopped from another thread
the emulator may do a store and then, when it goes on, do it again.

A store from outside to code that the guest has run is seen after a flush, which also drops what was translated.
Memory-mapped devices cannot be, since a fill that is refused does not say what was to be stored.
"""

from __future__ import annotations

import ctypes
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
import unicorn
from unicorn import unicorn_const as uc
from unicorn import x86_const as x86

from kvmsim.engines.ports import PORT_HALT, PORT_HYPERCALL
from kvmsim.engines.registers import Registers
from kvmsim.engines.slot_files import files_of
from kvmsim.engines.user_mode import PORT_SYSCALL, STUBS_END, leads_to
from kvmsim.exits import ExceptionExit, Exit, HaltExit, HypercallExit, InternalErrorExit, IoExit, MmioExit
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import PTE_A, PTE_D, PTE_W, side_of
from kvmsim.mmu.radix import Radix
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from kvmsim.uapi import KVM_INTERNAL_ERROR_EMULATION
from kvmsim.vcpu import VCPU
from kvmsim.vm import VM
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange, Gpa, gfn_to_gpa, gpa_to_gfn

SLICE: Final = 20_000  #: instructions: half a millisecond
_UNTIL: Final = STUBS_END - 8  # where a run would stop; its page must be there, and at CPL 3 nobody gets to it
_SHARED: Final = 1 << 44  # physical address, in the emulator, of shared memory of gpa 0
_PAGE_FAULT: Final = 14
_INVALID_OPCODE: Final = 6

_GENERAL: Final = [
    getattr(x86, f"UC_X86_REG_{name}")
    for name in (
        *("RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RSP", "RBP"),
        *("R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15", "RIP", "RFLAGS"),
    )
]

#: What `out` to some port does, given the bytes, while the emulator runs
Port = Callable[[bytes], None]


class UnicornMachine:
    """A VM of the emulator. Raises OSError(EINVAL) if a slot does not lie on files."""

    def __init__(self, vm: VM) -> None:
        self.vm: Final = vm
        self._engines: list[UnicornEngine] = []
        for slot in vm.mmu.slots:
            list(files_of(slot))
        vm.keep_in_step(self)

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """Do nothing: what does not await is between two slices."""
        yield

    def replace(self, old: Memslot | None, new: Memslot | None) -> None:
        """Map a slot in the place of another. Raises OSError(EINVAL), changing nothing."""
        if new is not None:
            list(files_of(new))
        for engine in self._engines:
            engine.replace(old, new)

    def create(self, vcpu_id: int, ports: dict[int, Port] | None = None) -> UnicornEngine:
        """Create the engine of a vCPU; `ports` are those that it answers while it runs."""
        del vcpu_id
        engine = UnicornEngine(self.vm, ports)
        self._engines.append(engine)
        self.vm.mmu.tlbs.append(engine)
        return engine

    def project_range(self, gfns: GfnRange) -> None:
        """Do nothing: what the page table maps is found soon enough."""

    def check(self, table: Radix) -> None:
        """Raise AssertionError on the first page that a TLB has and the page table does not."""
        for engine in self._engines:
            engine.check(table)

    def close(self) -> None:
        """Flush no more of it."""
        self.vm.keep_in_step(None)
        for engine in self._engines:
            self.vm.mmu.tlbs.remove(engine)


class UnicornEngine:
    """A vCPU of the emulator: `UnicornMachine.create`."""

    def __init__(self, vm: VM, ports: dict[int, Port] | None = None) -> None:
        self._vm: Final = vm
        self._ports: Final = ports or {}
        self._uc: Final[Any] = unicorn.Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
        self._memory_size = 0
        self._mapped: Final[dict[GfnRange, list[Any]]] = {}  # views: the emulator has bare pointers
        for slot in vm.mmu.slots:
            self.replace(None, slot)
        self._uc.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL)
        self._uc.hook_add(uc.UC_HOOK_TLB_FILL, self._fill)
        self._uc.hook_add(uc.UC_HOOK_INTR, self._interrupt)
        self._uc.hook_add(uc.UC_HOOK_INSN, self._in, aux1=x86.UC_X86_INS_IN)
        self._uc.hook_add(uc.UC_HOOK_INSN, self._out, aux1=x86.UC_X86_INS_OUT)
        self._uc.hook_add(uc.UC_HOOK_INSN, self._syscall, aux1=x86.UC_X86_INS_SYSCALL)
        self._filled: dict[tuple[Gfn, Side], bool] = {}  # what its TLB may hold, and whether for stores
        self._refused: tuple[int, Access | None] | None = None  # the fill that was: address, and what it means
        self._left: Exit | None = None  # with which the last slice ended
        self._exit: Exit | None = None  # which the VMM is answering
        self._failure: BaseException | None = None
        self._rip = 0
        self.slices = 0  #: how many it has done to their end

    def replace(self, old: Memslot | None, new: Memslot | None) -> None:
        """Map a slot in the place of another."""
        if old is not None:
            for base, view in self._mapped.pop(old.gfns):
                self._uc.mem_unmap(base + gfn_to_gpa(old.gfns.start), len(view))
        if new is not None:
            views = self._mapped[new.gfns] = []
            for side, file in files_of(new):
                view = (ctypes.c_char * (len(new.gfns) * PAGE_SIZE)).from_buffer(file.memory, new.pages.offset)
                base = 0 if side is Side.PRIVATE else _SHARED
                at = base + gfn_to_gpa(new.gfns.start)
                self._uc.mem_map_ptr(at, len(view), uc.UC_PROT_ALL, ctypes.addressof(view))
                views.append((base, view))
        self._memory_size = max((gfns.end for gfns in self._mapped), default=0) * PAGE_SIZE

    # -- registers ----------------------------------------------------------------------------------------------------

    @property
    def registers(self) -> Registers:
        """The general registers, a copy; to be set between two runs."""
        now = Registers(*(self._uc.reg_read(number) for number in _GENERAL))
        now.rip = self._rip
        return now

    @registers.setter
    def registers(self, values: Registers) -> None:
        for number, value in zip(_GENERAL, Registers.LAYOUT.unpack(values.pack()), strict=True):
            self._uc.reg_write(number, value)
        self._rip = values.rip

    def set_fs_base(self, address: int) -> None:
        """Set the base of FS."""
        self._uc.reg_write(x86.UC_X86_REG_FS_BASE, address)

    # -- as a TLB -----------------------------------------------------------------------------------------------------

    def flush(self, gfns: GfnRange) -> None:
        """Empty the TLB, and forget what was translated: it may have been of this range."""
        if any(gfn in gfns for gfn, _ in self._filled):
            self._filled.clear()
            self._uc.ctl(uc.UC_CTL_TLB_FLUSH, uc.UC_CTL_IO_WRITE)
            self._uc.ctl_flush_tb()

    def check(self, table: Radix) -> None:
        """Raise AssertionError on the first translation that allows what the page table does not."""
        for (gfn, side), writable in self._filled.items():
            pte = table.lookup(gfn)
            assert pte, f"the emulator has gfn {gfn:#x}, which is not mapped"
            assert side_of(pte) is side, f"the guest sees gfn {gfn:#x} as {side} memory, which it is not"
            assert not writable or pte & PTE_W, f"the guest can store to gfn {gfn:#x}, which is mapped read-only"

    def _fill(self, _uc: Any, address: int, kind: int, entry: Any, _data: Any) -> bool:
        write, fetch = kind == uc.UC_MEM_WRITE, kind == uc.UC_MEM_FETCH
        is_until = fetch and address // PAGE_SIZE == _UNTIL // PAGE_SIZE  # the emulator itself looks at it
        where = (Gpa(address), Side.PRIVATE) if is_until else leads_to(address, self._memory_size)
        access = None if where is None else Access(gpa_to_gfn(where[0]), write, where[1], fetch)
        pte = 0 if access is None else self._vm.mmu.table.lookup(access.gfn)
        if access is None or not pte or side_of(pte) is not access.side or (write and not pte & PTE_W):
            self._refused = (address, access)
            return False
        self._vm.mmu.table.set_flags(access.gfn, PTE_A | PTE_D if write else PTE_A)
        writable = write or bool(pte & PTE_W and pte & PTE_D)
        entry.paddr = gfn_to_gpa(access.gfn) + (_SHARED if access.side is Side.SHARED else 0)
        entry.perms = uc.UC_PROT_ALL if writable else uc.UC_PROT_READ | uc.UC_PROT_EXEC
        self._filled[access.gfn, access.side] = writable
        return True

    # -- running ------------------------------------------------------------------------------------------------------

    async def run(self, vcpu: VCPU) -> Exit:
        """Go on until an exit. Raises what `VM.fault` raises."""
        self._answer()
        while True:
            await trio.lowlevel.checkpoint()
            self._vm.check_alive()
            exit_ = self._slice()
            if exit_ is None and self._refused is not None:
                exit_ = await self._fault(vcpu, *self._refused)
            if exit_ is not None:
                self._exit = exit_
                return exit_

    async def _fault(self, vcpu: VCPU, address: int, access: Access | None) -> Exit | None:
        if access is None:
            return ExceptionExit(_PAGE_FAULT, self._rip, address)
        exit_ = await vcpu.vm.fault(access)
        if isinstance(exit_, MmioExit):
            return InternalErrorExit(KVM_INTERNAL_ERROR_EMULATION, Gpa(exit_.gpa + address % PAGE_SIZE))
        return exit_

    def _slice(self) -> Exit | None:
        """Run some instructions. Returns the exit that they end with, if one; `_refused` says whether one faulted."""
        self._refused, self._left = None, None
        try:
            self._uc.emu_start(self._rip, _UNTIL, count=SLICE)
        except unicorn.UcError as error:
            self._rip = self._uc.reg_read(x86.UC_X86_REG_RIP)
            if self._refused is not None or self._left is not None:
                return self._left
            if error.errno == uc.UC_ERR_INSN_INVALID:
                return ExceptionExit(_INVALID_OPCODE, self._rip)
            return InternalErrorExit(KVM_INTERNAL_ERROR_EMULATION)
        self._rip = self._uc.reg_read(x86.UC_X86_REG_RIP)
        if self._rip == _UNTIL:
            return ExceptionExit(_PAGE_FAULT, self._rip, self._rip)
        self._refused = None  # a fill ahead of what was executed
        self.slices += self._left is None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if isinstance(self._left, ExceptionExit):
            return ExceptionExit(self._left.vector, self._rip)
        return self._left

    def _leave(self, exit_: Exit) -> None:
        self._left = exit_
        self._uc.emu_stop()

    def _interrupt(self, _uc: Any, vector: int, _data: Any) -> None:
        self._leave(ExceptionExit(vector, 0))

    def _syscall(self, _uc: Any, _data: Any) -> None:
        self._leave(IoExit(PORT_SYSCALL, 1, True))

    def _in(self, _uc: Any, port: int, size: int, _data: Any) -> int:
        self._leave(IoExit(port, size, False))
        return 0

    def _out(self, _uc: Any, port: int, size: int, value: int, _data: Any) -> None:
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        if port == PORT_HALT:
            self._leave(HaltExit(data[0]))
        elif port == PORT_HYPERCALL:
            nr, *arguments = (self._uc.reg_read(number) for number in _GENERAL[:4])
            self._leave(HypercallExit(nr, tuple(arguments)))
        elif port in self._ports:
            try:
                self._ports[port](data)
            except BaseException as error:  # not through the emulator's stack
                self._failure = error
                self._uc.emu_stop()
        else:
            self._leave(IoExit(port, size, True, data))

    def _answer(self) -> None:
        """Hand over what the VMM has answered to the last exit."""
        exit_, self._exit = self._exit, None
        match exit_:
            case HypercallExit():
                self._uc.reg_write(x86.UC_X86_REG_RAX, exit_.ret & (1 << 64) - 1)
            case IoExit(is_write=False):
                value = int.from_bytes(exit_.data[: exit_.size].ljust(exit_.size, b"\xff"), "little")
                part = {1: x86.UC_X86_REG_AL, 2: x86.UC_X86_REG_AX, 4: x86.UC_X86_REG_RAX}[exit_.size]
                self._uc.reg_write(part, value)
