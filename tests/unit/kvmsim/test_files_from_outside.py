"""What is done to files from outside while a guest lies on them: an exit, or an error in words, never a signal."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import numpy as np

from kvmsim.engines.program import Hypercall, Load, Program, ProgramEngine, Store
from kvmsim.engines.trace import TraceEngine
from kvmsim.engines.trace_file import RECORD, Trace
from kvmsim.exits import HALT, HypercallExit
from kvmsim.mmu.page_fault import Access
from kvmsim.side import Side
from kvmsim.uapi import UserspaceMemoryRegion
from memfs.contract.protocol.messages import GetPfn, InvalidateBegin, InvalidateEnd
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gfn, Gpa
from tests.helpers import one, pages, raises

from .conftest import PAGES, NewVm, region

WHOLE = pages(0, PAGES)


def private(gfn: int) -> Access:
    return Access(Gfn(gfn), False, Side.PRIVATE)


async def test_page_that_is_allocated_past_the_end_is_not_mapped(new_vm: NewVm) -> None:
    """`truncate -s 0` and `fallocate -n`: the page map says allocated, and to touch the memory is a SIGBUS."""
    async with new_vm() as (vm, store):
        shared, guest = store.file(), store.file(guest=True)
        await vm.set_user_memory_region(region(shared, guest))
        store.allocate(guest, WHOLE)
        assert await vm.fault(private(0)) is None  # from now on it is known where the frames are
        file = store.by_fd(guest).id
        await store.notify(InvalidateBegin(file, WHOLE))
        store.free(guest, WHOLE)
        os.ftruncate(guest, 0)
        await store.notify(InvalidateEnd(file, WHOLE))
        store.allocate(guest, WHOLE)
        store.refuse[GetPfn] = errno.EINVAL
        with raises(errno.EINVAL):
            await vm.fault(private(3))
        assert not vm.fault_in(np.arange(PAGES)).any()
        assert vm.mmu.table.mapped == 0
        # It grows again over what is allocated.
        os.ftruncate(guest, 10 * PAGE_SIZE)
        assert await vm.fault(private(3)) is None
        assert np.flatnonzero(vm.fault_in(np.arange(PAGES))).tolist() == list(range(10))
        await store.notify(InvalidateBegin(file, pages(10, PAGES)))
        await store.notify(InvalidateEnd(file, pages(10, PAGES)))


async def test_no_huge_page_reaches_past_the_end(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared, guest = store.file(512), store.file(512, guest=True)
        await vm.set_user_memory_region(region(shared, guest, size=512 * PAGE_SIZE))
        file = store.by_fd(guest).id
        store.allocate(guest, pages(0, 512))
        assert await vm.fault(private(0)) is None
        await store.notify(InvalidateBegin(file, pages(0, 512)))
        os.ftruncate(guest, 100 * PAGE_SIZE)
        await store.notify(InvalidateEnd(file, pages(0, 512)))
        assert await vm.fault(private(0)) is None
        assert vm.mmu.table.mapped == 1
        assert vm.fault_in(np.arange(512)).sum() == 100
        assert vm.mmu.table.mapped == 100


async def test_file_that_grew_is_mapped_as_far_as_it_goes_now(new_vm: NewVm) -> None:
    """Hot-plugged memory: a second slot on the same files, which were enlarged for it."""

    def program() -> Program:
        yield Store(Gpa(1 << 30), b"plugged")
        assert (yield Load(Gpa(1 << 30), 7)) == b"plugged"
        yield Store(Gpa(PAGES * PAGE_SIZE - 4), b"last")
        assert (yield Load(Gpa(PAGES * PAGE_SIZE - 4), 4)) == b"last"

    async with new_vm() as (vm, store):
        shared, guest = store.file(), store.file(guest=True)
        await vm.set_user_memory_region(region(shared, guest))
        for fd in (shared, guest):
            os.ftruncate(fd, 2 * PAGES * PAGE_SIZE)
        await vm.set_user_memory_region(region(shared, guest, slot=1, gpa=1 << 30, offset=PAGES * PAGE_SIZE))
        assert await vm.create_vcpu(0, ProgramEngine(program())).run() == HALT


async def test_file_that_was_shorter_for_a_while_keeps_what_earlier_slots_map(new_vm: NewVm) -> None:
    def program() -> Program:
        yield Store(Gpa((PAGES - 1) * PAGE_SIZE), b"there")

    async with new_vm() as (vm, store):
        shared, size = store.file(), PAGES * PAGE_SIZE
        await vm.set_user_memory_region(region(shared))
        for short in (0, PAGE_SIZE):
            os.ftruncate(shared, short)
            with raises(errno.EINVAL):
                await vm.set_user_memory_region(region(shared, slot=1, gpa=1 << 30))
        os.ftruncate(shared, size)
        assert await vm.create_vcpu(0, ProgramEngine(program())).run() == HALT
        assert os.pread(shared, 5, size - PAGE_SIZE) == b"there"


def classic(memory: mmap.mmap, gpa: int = 0) -> UserspaceMemoryRegion:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return UserspaceMemoryRegion(0, 0, Gpa(gpa), len(memory), ByteOffset(address))


async def test_classic_memory_whose_file_was_truncated_is_efault(new_vm: NewVm, tmp_path: Path) -> None:
    def program() -> Program:
        yield Store(Gpa(PAGE_SIZE), b"there")
        yield Hypercall(0, ())
        yield Load(Gpa(PAGE_SIZE), 5)

    fd = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4 * PAGE_SIZE)
    with mmap.mmap(fd, 4 * PAGE_SIZE) as memory:
        async with new_vm() as (vm, _):
            await vm.set_user_memory_region(classic(memory))
            vcpu = vm.create_vcpu(0, ProgramEngine(program()))
            assert isinstance(await vcpu.run(), HypercallExit)
            assert memory[PAGE_SIZE : PAGE_SIZE + 5] == b"there"
            os.ftruncate(fd, PAGE_SIZE)
            with raises(errno.EFAULT):
                await vcpu.run()  # by what the TLB has
            with raises(errno.EFAULT):
                await vm.fault(Access(Gfn(2), True, Side.SHARED))
            await vm.set_user_memory_region(UserspaceMemoryRegion(0, 0, Gpa(0), 0, ByteOffset(0)))
    os.close(fd)


async def test_trace_runs_on_classic_memory(new_vm: NewVm) -> None:
    records = np.zeros(4000, RECORD)
    records["gpa"], records["size"], records["write"] = np.arange(4000) % 500 * 8, 8, np.arange(4000) % 3 == 0
    with mmap.mmap(-1, 4 * PAGE_SIZE) as memory:
        async with new_vm() as (vm, _):
            await vm.set_user_memory_region(classic(memory))
            engine = TraceEngine(vm, Trace(records, "test"), [])
            assert await vm.create_vcpu(0, engine).run() == HALT
            assert engine.accesses == 4000
            assert any(memory[:4000])
            await vm.set_user_memory_region(UserspaceMemoryRegion(0, 0, Gpa(0), 0, ByteOffset(0)))


async def test_shared_page_past_the_end_is_an_error_with_a_sentence(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared = store.file()
        await vm.set_user_memory_region(region(shared))
        file = store.by_fd(shared).id
        await vm.fault(Access(Gfn(1), True, Side.SHARED))
        await store.notify(InvalidateBegin(file, one(1)))
        os.ftruncate(shared, 0)
        await store.notify(InvalidateEnd(file, one(1)))
        store.refuse[GetPfn] = errno.EINVAL
        with raises(errno.EINVAL):
            await vm.fault(Access(Gfn(1), True, Side.SHARED))
