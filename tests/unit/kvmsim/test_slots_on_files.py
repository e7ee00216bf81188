"""Slots that lie on files: what may be changed about one without private memory, and what private memory forbids."""

from __future__ import annotations

import errno

import numpy as np
import trio

from kvmsim.engines.program import Hypercall, Load, Program, ProgramEngine, Store
from kvmsim.exits import HALT, HypercallExit, MmioExit
from kvmsim.mmu.page_fault import Access
from kvmsim.side import Side
from kvmsim.uapi import KVM_MEM_FD, KVM_MEM_LOG_DIRTY_PAGES
from kvmsim.vm_type import VmType
from memfs.contract.protocol.messages import InvalidateBegin, InvalidateEnd
from memfs.contract.units import PAGE_SIZE, Gfn, Gpa
from tests.helpers import one, raises

from .conftest import PAGES, NewVm, region

LOGGED = KVM_MEM_FD | KVM_MEM_LOG_DIRTY_PAGES


def write(gfn: int) -> Access:
    return Access(Gfn(gfn), True, Side.SHARED)


async def test_slot_without_private_memory_can_be_moved(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared = store.file()
        await vm.set_user_memory_region(region(shared))
        await vm.set_user_memory_region(region(store.file(), slot=1, gpa=1 << 30))
        assert await vm.fault(write(3)) is None
        with raises(errno.EEXIST):
            await vm.set_user_memory_region(region(shared, gpa=1 << 30))
        assert vm.mmu.table.lookup(Gfn(3))
        await vm.set_user_memory_region(region(shared, gpa=1 << 31))
        assert vm.mmu.table.mapped == 0
        assert isinstance(await vm.fault(write(3)), MmioExit)
        assert await vm.fault(write((1 << 19) + 3)) is None
        assert store.by_fd(shared).registered == 1


async def test_store_to_a_page_that_was_loaded_since_the_log_was_taken_is_in_the_next(new_vm: NewVm) -> None:
    def program() -> Program:
        yield Store(Gpa(0), b"first")
        yield Hypercall(0, ())
        assert (yield Load(Gpa(0), 5)) == b"first"  # caches a PTE that is marked as dirty, and read-only
        yield Store(Gpa(0), b"again")

    async with new_vm() as (vm, store):
        await vm.set_user_memory_region(region(store.file(), flags=LOGGED))
        vcpu = vm.create_vcpu(0, ProgramEngine(program()))
        assert isinstance(await vcpu.run(), HypercallExit)
        assert vm.get_dirty_log(0)[0] == 1
        assert await vcpu.run() == HALT
        assert vm.get_dirty_log(0)[0] == 1


async def test_dirty_log_of_a_slot_on_files(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared = store.file()
        await vm.set_user_memory_region(region(shared))
        with raises(errno.ENOENT):
            vm.get_dirty_log(0)
        await vm.set_user_memory_region(region(shared, flags=LOGGED))
        await vm.fault(Access(Gfn(2), False, Side.SHARED))
        await vm.fault(write(5))
        await vm.fault(write(9))
        bits = np.unpackbits(vm.get_dirty_log(0), bitorder="little")[:PAGES]
        assert np.flatnonzero(bits).tolist() == [5, 9]
        assert not vm.get_dirty_log(0).any(), "they count as clean from then on"
        await vm.set_user_memory_region(region(shared))
        with raises(errno.ENOENT):
            vm.get_dirty_log(0)


async def test_private_memory_is_bound_to_one_slot(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        private = store.file(guest=True)
        half = PAGES // 2 * PAGE_SIZE
        first, second = store.file(), store.file()
        await vm.set_user_memory_region(region(first, private, size=half))
        overlapping = {"slot": 1, "gpa": 1 << 30, "offset": half - PAGE_SIZE, "size": half}
        with raises(errno.EINVAL):
            await vm.set_user_memory_region(region(second, private, **overlapping))
        assert [store.by_fd(fd).registered for fd in (first, second, private)] == [1, 0, 1]
        await vm.set_user_memory_region(region(second, private, slot=1, gpa=1 << 30, offset=half, size=half))
        assert len(vm.mmu.slots) == 2


async def test_vm_of_the_default_type_has_no_private_memory(new_vm: NewVm) -> None:
    async with new_vm(vm_type=VmType.DEFAULT) as (vm, store):
        shared, private = store.file(), store.file(guest=True)
        with raises(errno.EINVAL):
            await vm.set_user_memory_region(region(shared, private))
        assert [store.by_fd(fd).registered for fd in (shared, private)] == [0, 0]
        await vm.set_user_memory_region(region(shared))
        assert await vm.fault(write(1)) is None


async def test_notification_for_a_slot_that_moved_finds_it(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared = store.file()
        await vm.set_user_memory_region(region(shared))
        await vm.set_user_memory_region(region(shared, gpa=1 << 31))
        await vm.fault(write((1 << 19) + 3))
        assert vm.mmu.table.mapped == 1
        with trio.fail_after(5):
            await store.notify(InvalidateBegin(store.by_fd(shared).id, one(3)))
            assert vm.mmu.table.mapped == 0
            await store.notify(InvalidateEnd(store.by_fd(shared).id, one(3)))
