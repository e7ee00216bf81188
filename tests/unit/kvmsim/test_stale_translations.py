"""What a TLB, a fault or a slot knew before a change is not used after it: each rule by what breaks without it."""

from __future__ import annotations

import os

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kvmsim.engines.program import Hypercall, Program, ProgramEngine, Store
from kvmsim.engines.trace import TraceEngine
from kvmsim.engines.trace_file import RECORD, Trace
from kvmsim.exits import HALT, Exit, HypercallExit, MemoryErrorExit
from kvmsim.mmu import fault as mmu_fault
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import pte_pfn
from kvmsim.mmu.tlb import Tlb
from kvmsim.mmu.walk import translate
from kvmsim.side import Side
from kvmsim.slots.hva import Mapping
from kvmsim.slots.memslots import AddressSpace
from kvmsim.uapi import KVM_MEM_FD, KVM_MEM_LOG_DIRTY_PAGES
from kvmsim.vcpu import VCPU
from kvmsim.vm import VM
from memfs.contract.protocol.messages import GetPfn, InvalidateBegin, InvalidateEnd
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gfn, Gpa, PageIndex
from tests.helpers import one, pages, until_async

from .conftest import PAGES, NewVm, ScriptedStore, region

LOGGED = KVM_MEM_FD | KVM_MEM_LOG_DIRTY_PAGES


async def test_store_after_the_log_was_taken_is_in_the_next(new_vm: NewVm) -> None:
    """Write protection flushes the TLB."""

    def program() -> Program:
        for _ in range(3):
            yield Store(Gpa(PAGE_SIZE), b"x")
            yield Hypercall(0, ())

    async with new_vm() as (vm, store):
        await vm.set_user_memory_region(region(store.file(), flags=LOGGED))
        vcpu = vm.create_vcpu(0, ProgramEngine(program()))
        for _ in range(3):
            assert isinstance(await vcpu.run(), HypercallExit)
            assert vm.get_dirty_log(0)[0] == 2
        vm.manual_dirty_log_protect = True
        assert vm.get_dirty_log(0)[0] == 0


async def test_store_after_a_load_was_mapped_late_is_in_the_log(new_vm: NewVm) -> None:
    """What is mapped over another mapping, with less right, flushes the TLB."""
    load, store_to = (Access(Gfn(1), write=write, side=Side.SHARED) for write in (False, True))
    async with new_vm() as (vm, store):
        await vm.set_user_memory_region(region(store.file(), flags=LOGGED))
        vm.mmu.tlbs.append(tlb := Tlb())
        store.held = late = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.fault, load)
            await wait_all_tasks_blocked()
            store.held = trio.Event()
            store.held.set()
            assert await vm.fault(store_to) is None
            assert translate(vm.mmu, tlb, store_to) is not None
            late.set()
        assert vm.get_dirty_log(0)[0] == 2
        assert translate(vm.mmu, tlb, store_to) is None, "it would not be logged"


async def test_logs_are_the_same_whatever_runs_on_the_vcpu(new_vm: NewVm) -> None:
    """Load, store, log, load, store, log: by a trace, one access at a time and in blocks."""
    records = np.zeros(400, RECORD)
    records["gpa"], records["size"] = np.arange(400) % 4 * PAGE_SIZE, 8
    records["write"] = np.arange(400) % 8 >= 4  # load from each page, then store to each

    class Repeating:
        async def run(self, vcpu: VCPU) -> Exit:
            assert isinstance(vcpu.vm, VM)
            return await TraceEngine(vcpu.vm, Trace(records, "test"), [], block=block).run(vcpu)

    for block in (1, 4, 400):
        async with new_vm() as (vm, store):
            await vm.set_user_memory_region(region(store.file(), flags=LOGGED))
            vcpu = vm.create_vcpu(0, Repeating())
            for _ in range(3):
                assert await vcpu.run() == HALT
                assert vm.get_dirty_log(0)[0] == 0b1111, f"in blocks of {block}"


@pytest.mark.parametrize("side", [Side.PRIVATE, Side.SHARED])
async def test_memory_that_was_freed_is_not_reached_through_the_tlb(new_vm: NewVm, side: Side) -> None:
    is_private = side is Side.PRIVATE

    def program() -> Program:
        yield Store(Gpa(PAGE_SIZE), b"x", encrypted=is_private)
        yield Hypercall(0, ())
        yield Store(Gpa(PAGE_SIZE), b"y", encrypted=is_private)

    async with new_vm() as (vm, store):
        shared, private = store.file(), store.file(guest=True)
        await vm.set_user_memory_region(region(shared, private))
        if is_private:
            store.allocate(private, one(1))
        vcpu = vm.create_vcpu(0, ProgramEngine(program()))
        assert isinstance(await vcpu.run(), HypercallExit)
        file = store.by_fd(private if is_private else shared).id
        faults = vm.faults[side]
        await store.notify(InvalidateBegin(file, one(1)))
        assert vcpu.tlb.entries == {}
        if is_private:
            store.free(private, one(1))
        await store.notify(InvalidateEnd(file, one(1)))
        exit_ = await vcpu.run()
        assert isinstance(exit_, MemoryErrorExit) if is_private else exit_ == HALT
        assert vm.faults[side] == faults + 1


async def test_deleted_slot_is_not_reached_through_the_tlb(new_vm: NewVm) -> None:
    def program() -> Program:
        yield Store(Gpa(0), b"x")
        yield Hypercall(0, ())
        yield Store(Gpa(0), b"y")

    async with new_vm() as (vm, store):
        shared = store.file()
        await vm.set_user_memory_region(region(shared))
        vcpu = vm.create_vcpu(0, ProgramEngine(program()))
        await vcpu.run()
        await vm.set_user_memory_region(region(-1, size=0))
        assert vcpu.tlb.entries == {}
        assert (await vcpu.run()).name == "MMIO"
        assert os.pread(shared, 1, 0) == b"x"


# -- classic memory over files of a memfs ----------------------------------------------------------------

HVA = PageIndex(1 << 24)


class MappedFile:
    """What /proc/self/maps and /proc/self/fd would say: a file of the scripted store, mapped at HVA."""

    def __init__(self, store: ScriptedStore) -> None:
        self.fd = store.file()

    def find(self, page: PageIndex) -> Mapping:
        span = pages(HVA, HVA + PAGES)
        assert page in span
        return Mapping(span, True, True, True, ByteOffset(0), "0:1", os.fstat(self.fd).st_ino)

    def open(self, _: Mapping) -> int:
        return os.dup(self.fd)


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[MappedFile]:
    """The last one is what is mapped now."""
    files: list[MappedFile] = []
    monkeypatch.setattr(Mapping, "is_memfs", True)
    monkeypatch.setattr(mmu_fault, "find_mapping", lambda page: files[-1].find(page))
    monkeypatch.setattr(mmu_fault, "open_mapped_file", lambda mapping: files[-1].open(mapping))
    return files


@pytest.mark.parametrize("is_held_elsewhere", [False, True])
async def test_fault_on_classic_memory_sees_what_was_mapped_there_meanwhile(
    new_vm: NewVm, mapped: list[MappedFile], is_held_elsewhere: bool
) -> None:
    """The frame of a file that is mapped there no more is not installed, registered or not."""
    async with new_vm() as (vm, store), trio.open_nursery() as nursery:
        mapped.append(MappedFile(store))
        await vm.set_user_memory_region(region(-1, flags=0, offset=HVA * PAGE_SIZE))
        if is_held_elsewhere:
            await vm.set_user_memory_region(region(mapped[0].fd, slot=1, gpa=1 << 30))
        store.held = trio.Event()
        nursery.start_soon(vm.fault, Access(Gfn(5), True, Side.SHARED))
        await until_async(lambda: any(isinstance(request, GetPfn) for request in store.requests))
        vm.invalidate_hva(pages(HVA, HVA + PAGES))
        await wait_all_tasks_blocked()
        mapped.append(MappedFile(store))
        store.held.set()
        await until_async(lambda: vm.mmu.table.mapped > 0)
        file, _ = vm.mmu.frames.locate(pte_pfn(vm.mmu.table.lookup(Gfn(5))))
        assert getattr(file, "id", None) == store.by_fd(mapped[1].fd).id
        assert vm.mmu.retries == 1


async def test_file_that_is_mapped_there_no_more_is_let_go_of(new_vm: NewVm, mapped: list[MappedFile]) -> None:
    async with new_vm() as (vm, store):
        mapped.append(MappedFile(store))
        await vm.set_user_memory_region(region(-1, flags=0, offset=HVA * PAGE_SIZE))
        assert await vm.fault(Access(Gfn(5), True, Side.SHARED)) is None
        assert store.by_fd(mapped[0].fd).registered == 1
        vm.invalidate_hva(one(HVA + 7))
        await wait_all_tasks_blocked()
        slot = vm.mmu.slots.get(0)
        assert slot is not None
        assert [window.space for window in vm.mmu.slots.windows_of(slot)] == [AddressSpace.HVA]
        assert store.by_fd(mapped[0].fd).registered == 0
        assert vm.backing.files == {}


async def test_window_on_a_file_takes_over_an_invalidation_in_progress(new_vm: NewVm, mapped: list[MappedFile]) -> None:
    async with new_vm() as (vm, store), trio.open_nursery() as nursery:
        mapped.append(MappedFile(store))
        await vm.set_user_memory_region(region(-1, flags=0, offset=HVA * PAGE_SIZE))
        await vm.set_user_memory_region(region(mapped[0].fd, slot=1, gpa=1 << 30))
        file = store.by_fd(mapped[0].fd).id
        await store.notify(InvalidateBegin(file, one(5)))
        nursery.start_soon(vm.fault, Access(Gfn(5), True, Side.SHARED))
        await until_async(lambda: vm.mmu.retries == 1)
        assert vm.mmu.table.mapped == 0
        await store.notify(InvalidateEnd(file, one(5)))
        await until_async(lambda: vm.mmu.table.mapped == 1)
