"""Mapping memory before the guest touches it: each side as it is, nothing accessed, and what is left when it stops."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kvmsim.mmu.pte import PTE_A, PTE_D, is_private
from kvmsim.uapi import KVM_MEM_FD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, PreFaultMemory
from kvmsim.vcpu import VCPU
from kvmsim.vm import VM
from kvmsim.vm_type import VmType
from memfs.contract.protocol.messages import GetPfn, InvalidateBegin, InvalidateEnd
from memfs.contract.units import PAGE_SIZE, Gfn, Gpa
from tests.helpers import one, raises

from .conftest import PAGES, NewVm, ScriptedStore, region


def memory(gfn: int, count: int, flags: int = 0) -> PreFaultMemory:
    return PreFaultMemory(Gpa(gfn * PAGE_SIZE), count * PAGE_SIZE, flags)


async def with_memory(vm: VM, store: ScriptedStore, **changes: int) -> tuple[VCPU, int, int]:
    """A vCPU, and a slot of which every third page is private."""
    shared, private = store.file(), store.file(guest=True)
    for index in range(0, PAGES, 3):
        store.allocate(private, one(index))
    await vm.set_user_memory_region(region(shared, private, **changes))
    return vm.create_vcpu(0, SimpleNamespace()), shared, private


async def test_every_page_is_mapped_on_its_side_and_counts_as_untouched(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        vcpu, _, _ = await with_memory(vm, store)
        left = memory(0, PAGES)
        await vcpu.pre_fault_memory(left)
        assert (left.gpa, left.size) == (PAGES * PAGE_SIZE, 0)
        ptes = vm.mmu.table.translate(np.arange(PAGES)).tolist()
        assert [is_private(pte) for pte in ptes] == [index % 3 == 0 for index in range(PAGES)]
        assert all(ptes)
        assert not any(pte & (PTE_A | PTE_D) for pte in ptes)
        asked = [message for message in store.requests if isinstance(message, GetPfn)]
        assert sum(not message.alloc for message in asked) == 1, "private frames follow from the first"
        again = len(store.requests)
        await vcpu.pre_fault_memory(memory(0, PAGES))
        assert len(store.requests) == again


@pytest.mark.parametrize("flags", [KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES])
async def test_reading_is_enough(new_vm: NewVm, flags: int) -> None:
    async with new_vm() as (vm, store):
        await vm.set_user_memory_region(region(store.file(), flags=KVM_MEM_FD | flags))
        await vm.create_vcpu(0, SimpleNamespace()).pre_fault_memory(memory(3, 5))
        assert vm.mmu.table.mapped == 5
        if flags == KVM_MEM_LOG_DIRTY_PAGES:
            assert not vm.get_dirty_log(0).any()


async def test_where_slots_end_is_said_only_if_nothing_came_before(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        vcpu, _, _ = await with_memory(vm, store, gpa=PAGE_SIZE * 8)
        left = memory(8 + PAGES - 2, 4)
        await vcpu.pre_fault_memory(left)
        assert left == memory(8 + PAGES, 2)
        with raises(errno.ENOENT):
            await vcpu.pre_fault_memory(left)
        assert left == memory(8 + PAGES, 2)
        with raises(errno.ENOENT):
            await vcpu.pre_fault_memory(memory(7, 2))
        assert vm.mmu.table.mapped == 2


async def test_full_store_is_said_with_what_is_left(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        vcpu, _, _ = await with_memory(vm, store)
        store.refuse[GetPfn] = errno.ENOSPC
        left = memory(1, 8)
        with raises(errno.ENOSPC):
            await vcpu.pre_fault_memory(left)
        assert left == memory(1, 8)
        del store.refuse[GetPfn]
        await vcpu.pre_fault_memory(memory(0, 1))
        store.refuse[GetPfn] = errno.ENOSPC
        left = memory(0, 8)
        await vcpu.pre_fault_memory(left)
        assert left == memory(1, 7)


REFUSED = {
    "nothing": PreFaultMemory(Gpa(0), 0),
    "unaligned gpa": PreFaultMemory(Gpa(100), PAGE_SIZE),
    "unaligned size": PreFaultMemory(Gpa(0), 100),
    "a flag": PreFaultMemory(Gpa(0), PAGE_SIZE, 1),
    "wraps": PreFaultMemory(Gpa(PAGE_SIZE), (1 << 64) - PAGE_SIZE),
    "with the shared bit": PreFaultMemory(Gpa(1 << 47), PAGE_SIZE),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refused_range_changes_nothing(new_vm: NewVm, name: str) -> None:
    async with new_vm(vm_type=VmType.TDX_48) as (vm, store):
        vcpu, _, _ = await with_memory(vm, store)
        wanted = REFUSED[name]
        left, messages = PreFaultMemory(wanted.gpa, wanted.size, wanted.flags), len(store.requests)
        with raises(errno.EINVAL):
            await vcpu.pre_fault_memory(left)
        assert (left, vm.mmu.table.mapped, len(store.requests)) == (wanted, 0, messages)


async def test_cancelled_it_says_what_is_left_and_an_invalidation_is_waited_for(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        vcpu, _, private = await with_memory(vm, store)
        await vcpu.pre_fault_memory(memory(0, 1))
        file = store.by_fd(private).id
        await store.notify(InvalidateBegin(file, one(6)))
        left = memory(0, PAGES)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.pre_fault_memory, left)
                await wait_all_tasks_blocked()
                assert left == memory(6, PAGES - 6)
                scope.cancel()
        assert scope.cancelled_caught
        assert not vm.mmu.table.lookup(Gfn(6))
        store.free(private, one(6))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.pre_fault_memory, left)
            await wait_all_tasks_blocked()
            await store.notify(InvalidateEnd(file, one(6)))
        assert left.size == 0
        assert not is_private(vm.mmu.table.lookup(Gfn(6))), "it has become shared meanwhile"
