"""Slots, faults and notifications of a VM, with each race held open at the step where it could go wrong."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kvmsim.backing import GuestFile, StoreGone
from kvmsim.exits import MemoryErrorExit, MmioExit
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import PTE_W, is_private, pte_pfn
from kvmsim.side import Side
from kvmsim.uapi import (
    KVM_EXIT_MEM_MAP_PRIVATE,
    KVM_EXIT_MEM_MAP_SHARED,
    KVM_MEM_FD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
)
from kvmsim.vm import VM
from memfs.contract.protocol.messages import Fallocate, GetPfn, InvalidateBegin, InvalidateEnd, Register
from memfs.contract.units import PAGE_SIZE, Gfn, Gpa, PageIndex, PageRange
from tests.helpers import one, raises

from .conftest import PAGES, NewVm, ScriptedStore, region


def access(gfn: int, *, write: bool = False, private: bool = False) -> Access:
    return Access(Gfn(gfn), write, Side.of(private))


async def with_slot(vm: VM, store: ScriptedStore, **changes: int) -> tuple[int, int]:
    shared, private = store.file(), store.file(guest=True)
    await vm.set_user_memory_region(region(shared, private, **changes))
    return shared, private


# -- faults ----------------------------------------------------------------------------------------------


async def test_shared_fault_maps_the_page_of_the_shared_file(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared, _ = await with_slot(vm, store)
        assert await vm.fault(access(5, write=True)) is None
        pte = vm.mmu.table.lookup(Gfn(5))
        assert not is_private(pte)
        assert pte & PTE_W
        file, offset = vm.mmu.frames.locate(pte_pfn(pte))
        assert isinstance(file, GuestFile)
        assert (file.id, offset) == (store.by_fd(shared).id, 5 * PAGE_SIZE)


async def test_private_fault_on_an_absent_page_asks_to_convert(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        await with_slot(vm, store)
        assert await vm.fault(access(5, private=True)) == MemoryErrorExit(
            KVM_EXIT_MEM_MAP_PRIVATE, Gpa(5 * PAGE_SIZE), PAGE_SIZE
        )
        assert vm.mmu.table.mapped == 0


async def test_shared_fault_on_a_private_page_asks_to_convert(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        _, private = await with_slot(vm, store)
        store.allocate(private, one(5))
        assert await vm.fault(access(5)) == MemoryErrorExit(KVM_EXIT_MEM_MAP_SHARED, Gpa(5 * PAGE_SIZE), PAGE_SIZE)
        assert await vm.fault(access(5, private=True)) is None
        assert is_private(vm.mmu.table.lookup(Gfn(5)))


async def test_fault_outside_of_slots_is_mmio(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        await with_slot(vm, store)
        assert await vm.fault(access(PAGES, write=True)) == MmioExit(Gpa(PAGES * PAGE_SIZE), PAGE_SIZE, True)


async def test_write_to_a_readonly_slot_is_mmio(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        await vm.set_user_memory_region(region(store.file(), flags=KVM_MEM_FD | KVM_MEM_READONLY))
        assert await vm.fault(access(1, write=True)) == MmioExit(Gpa(PAGE_SIZE), PAGE_SIZE, True)
        assert await vm.fault(access(1)) is None
        assert not vm.mmu.table.lookup(Gfn(1)) & PTE_W


async def test_private_access_without_private_memory_is_efault(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        await vm.set_user_memory_region(region(store.file()))
        with raises(errno.EFAULT):
            await vm.fault(access(1, private=True))
        assert vm.mmu.table.mapped == 0


async def test_offset_into_the_files_counts(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared = store.file()
        await vm.set_user_memory_region(region(shared, gpa=32 * PAGE_SIZE, size=8 * PAGE_SIZE, offset=4 * PAGE_SIZE))
        assert await vm.fault(access(33)) is None
        _, offset = vm.mmu.frames.locate(pte_pfn(vm.mmu.table.lookup(Gfn(33))))
        assert offset == 5 * PAGE_SIZE


# -- races -----------------------------------------------------------------------------------------------


async def test_fault_waits_for_an_invalidation_that_began_while_it_looked(
    new_vm: NewVm, autojump_clock: object
) -> None:
    async with new_vm(map_on_fallocate=False) as (vm, store), trio.open_nursery() as nursery:
        _, private = await with_slot(vm, store)
        file = store.by_fd(private).id
        store.allocate(private, one(7))
        store.held = trio.Event()
        outcome: list[object] = []

        async def fault() -> None:
            outcome.append(await vm.fault(access(7, private=True)))

        nursery.start_soon(fault)
        await wait_all_tasks_blocked()
        await store.notify(InvalidateBegin(file, one(7)))  # the frame is on its way, and about to be freed
        store.held.set()
        await wait_all_tasks_blocked()
        assert outcome == []
        assert vm.mmu.table.mapped == 0
        store.free(private, one(7))
        await store.notify(InvalidateEnd(file, one(7)))
        await wait_all_tasks_blocked()
        assert outcome == [MemoryErrorExit(KVM_EXIT_MEM_MAP_PRIVATE, Gpa(7 * PAGE_SIZE), PAGE_SIZE)]
        assert vm.mmu.retries == 1


async def test_fault_starts_again_after_an_invalidation_that_came_and_went(new_vm: NewVm) -> None:
    async with new_vm(map_on_fallocate=False) as (vm, store), trio.open_nursery() as nursery:
        _, private = await with_slot(vm, store)
        file = store.by_fd(private).id
        store.allocate(private, one(7))
        store.held = trio.Event()
        outcome: list[object] = []

        async def fault() -> None:
            outcome.append(await vm.fault(access(7, private=True)))

        nursery.start_soon(fault)
        await wait_all_tasks_blocked()
        await store.notify(InvalidateBegin(file, one(7)))
        store.free(private, one(7))
        await store.notify(InvalidateEnd(file, one(7)))
        store.held.set()
        await wait_all_tasks_blocked()
        assert outcome == [MemoryErrorExit(KVM_EXIT_MEM_MAP_PRIVATE, Gpa(7 * PAGE_SIZE), PAGE_SIZE)]
        assert vm.mmu.table.mapped == 0


async def test_shared_fault_that_decided_before_a_conversion_does_not_map(new_vm: NewVm) -> None:
    async with new_vm(map_on_fallocate=False) as (vm, store), trio.open_nursery() as nursery:
        _, private = await with_slot(vm, store)
        store.held = trio.Event()
        outcome: list[object] = []

        async def fault() -> None:
            outcome.append(await vm.fault(access(7)))

        nursery.start_soon(fault)
        await wait_all_tasks_blocked()
        store.allocate(private, one(7))
        await store.notify(Fallocate(store.by_fd(private).id, one(7)))
        store.held.set()
        await wait_all_tasks_blocked()
        assert outcome == [MemoryErrorExit(KVM_EXIT_MEM_MAP_SHARED, Gpa(7 * PAGE_SIZE), PAGE_SIZE)]
        assert vm.mmu.table.mapped == 0


# -- notifications ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [True, False])
async def test_fallocate_drops_shared_mappings_and_maps_private_ones_as_told(new_vm: NewVm, eager: bool) -> None:
    async with new_vm(map_on_fallocate=eager) as (vm, store):
        _, private = await with_slot(vm, store)
        for gfn in range(4):
            await vm.fault(access(gfn))
        pages = PageRange(PageIndex(1), PageIndex(3))
        store.allocate(private, pages)
        await store.notify(Fallocate(store.by_fd(private).id, pages))
        await wait_all_tasks_blocked()
        kinds = [is_private(pte) if (pte := vm.mmu.table.lookup(Gfn(gfn))) else None for gfn in range(4)]
        assert kinds == ([False, True, True, False] if eager else [False, None, None, False])


async def test_invalidation_of_one_side_leaves_the_other_alone(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared, private = await with_slot(vm, store)
        store.allocate(private, one(1))
        await vm.fault(access(0))
        await vm.fault(access(1, private=True))
        whole = PageRange(PageIndex(0), PageIndex(PAGES))
        await store.notify(InvalidateBegin(store.by_fd(shared).id, whole))
        assert [bool(vm.mmu.table.lookup(Gfn(gfn))) for gfn in (0, 1)] == [False, True]
        await store.notify(InvalidateEnd(store.by_fd(shared).id, whole))


async def test_same_file_range_in_two_slots_is_unmapped_in_both(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared = store.file()
        for slot in range(2):
            await vm.set_user_memory_region(region(shared, slot=slot, gpa=slot << 30))
            await vm.fault(access((slot << 18) + 3))
        assert vm.mmu.table.mapped == 2
        await store.notify(InvalidateBegin(store.by_fd(shared).id, one(3)))
        assert vm.mmu.table.mapped == 0
        await store.notify(InvalidateEnd(store.by_fd(shared).id, one(3)))


async def test_store_that_goes_away_takes_all_memory_with_it(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        await with_slot(vm, store)
        await vm.fault(access(1))
        assert store.peer is not None
        store.peer.close()
        await wait_all_tasks_blocked()
        assert vm.mmu.table.mapped == 0
        with pytest.raises(StoreGone):
            vm.check_alive()
        with pytest.raises(StoreGone):
            await vm.fault(access(2))


# -- memslots --------------------------------------------------------------------------------------------

REFUSED = {
    "unknown flag": ({"flags": KVM_MEM_FD | 1 << 7}, errno.EINVAL),
    "classic slot in the place of one on files": ({"flags": 0, "offset": 1 << 30}, errno.EINVAL),
    "private and READONLY": ({"flags": KVM_MEM_FD | KVM_MEM_READONLY}, errno.EINVAL),
    "private and LOG_DIRTY_PAGES": ({"flags": KVM_MEM_FD | KVM_MEM_LOG_DIRTY_PAGES}, errno.EINVAL),
    "unaligned size": ({"slot": 1, "gpa": 1 << 30, "size": 100}, errno.EINVAL),
    "unaligned gpa": ({"slot": 1, "gpa": 100}, errno.EINVAL),
    "unaligned offset": ({"slot": 1, "gpa": 1 << 30, "offset": 100}, errno.EINVAL),
    "slot id": ({"slot": 32764, "gpa": 1 << 30}, errno.EINVAL),
    "gpa wraps": ({"slot": 1, "gpa": (1 << 64) - PAGE_SIZE}, errno.EINVAL),
    "too many pages": ({"slot": 1, "gpa": 1 << 45, "size": 1 << 43}, errno.EINVAL),
    "delete an absent slot": ({"slot": 1, "size": 0}, errno.EINVAL),
    "change a slot": ({"gpa": 1 << 30}, errno.EINVAL),
    "the same again": ({}, errno.EINVAL),
    "overlap": ({"slot": 1, "gpa": (PAGES - 1) * PAGE_SIZE}, errno.EEXIST),
    "gpa above 2^52": ({"slot": 1, "gpa": 1 << 52}, errno.EINVAL),
    "past the end of the file": ({"slot": 1, "gpa": 1 << 30, "offset": PAGE_SIZE}, errno.EINVAL),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refused_region_changes_nothing(new_vm: NewVm, name: str) -> None:
    changes, number = REFUSED[name]
    async with new_vm() as (vm, store):
        shared, private = await with_slot(vm, store)
        before = list(vm.mmu.slots)
        with raises(number):
            await vm.set_user_memory_region(region(shared, private, **changes))
        assert list(vm.mmu.slots) == before
        assert [store.by_fd(fd).registered for fd in (shared, private)] == [1, 1]


async def test_first_file_is_let_go_of_when_the_second_is_refused(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared, not_sealed = store.file(), store.file()
        with raises(errno.EINVAL):
            await vm.set_user_memory_region(region(shared, not_sealed))
        assert [store.by_fd(fd).registered for fd in (shared, not_sealed)] == [0, 0]
        assert len(vm.mmu.slots) == 0


async def test_files_in_the_wrong_place_are_refused(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        sealed = store.file(guest=True)
        for fds in ((sealed, -1), (sealed, sealed)):
            with raises(errno.EINVAL):
                await vm.set_user_memory_region(region(*fds))
        assert store.by_fd(sealed).registered == 0


async def test_errno_of_the_store_is_the_caller_s(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        store.refuse[Register] = errno.EPERM
        with raises(errno.EPERM):
            await vm.set_user_memory_region(region(store.file()))
        assert len(vm.mmu.slots) == 0


async def test_deleted_slot_unmaps_and_unregisters(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared, private = await with_slot(vm, store)
        await vm.fault(access(1))
        await vm.set_user_memory_region(region(-1, size=0))
        assert vm.mmu.table.mapped == 0
        assert [store.by_fd(fd).registered for fd in (shared, private)] == [0, 0]
        assert await vm.fault(access(1)) == MmioExit(Gpa(PAGE_SIZE), PAGE_SIZE, False)
        await vm.set_user_memory_region(region(shared, private))  # and it may be made again


async def test_slot_deleted_under_a_fault_is_not_mapped(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store), trio.open_nursery() as nursery:
        await with_slot(vm, store)
        store.held = trio.Event()
        outcome: list[object] = []

        async def fault() -> None:
            outcome.append(await vm.fault(access(1)))

        nursery.start_soon(fault)
        await wait_all_tasks_blocked()
        await vm.set_user_memory_region(region(-1, size=0))
        store.held.set()
        await wait_all_tasks_blocked()
        assert outcome == [MmioExit(Gpa(PAGE_SIZE), PAGE_SIZE, False)]
        assert vm.mmu.table.mapped == 0


async def test_slots_wait_for_an_invalidation(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store), trio.open_nursery() as nursery:
        shared, _ = await with_slot(vm, store)
        file = store.by_fd(shared).id
        await store.notify(InvalidateBegin(file, one(1)))
        nursery.start_soon(vm.set_user_memory_region, region(-1, size=0))
        await wait_all_tasks_blocked()
        assert len(vm.mmu.slots) == 1
        await store.notify(InvalidateEnd(file, one(1)))
        await wait_all_tasks_blocked()
        assert len(vm.mmu.slots) == 0


async def test_vcpu_ids(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        engine: Any = object()
        vm.create_vcpu(0, engine)
        for number, expected in ((0, errno.EEXIST), (4096, errno.EINVAL), (-1, errno.EINVAL)):
            with raises(expected):
                vm.create_vcpu(number, engine)
        assert list(vm.vcpus) == [0]
        del store


async def test_fault_on_an_allocated_private_page_asks_nobody(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared, private = store.file(), store.file(guest=True)
        await vm.set_user_memory_region(region(shared, private))
        store.allocate(private, PageRange(PageIndex(0), PageIndex(8)))
        assert await vm.fault(Access(Gfn(0), False, Side.PRIVATE)) is None  # learns where the gibibyte is
        await wait_all_tasks_blocked()
        before = len(store.requests)
        for gfn in range(1, 8):
            assert await vm.fault(Access(Gfn(gfn), True, Side.PRIVATE)) is None
            assert pte_pfn(vm.mmu.table.lookup(Gfn(gfn))) == (store.by_fd(private).id << 18) + gfn
        assert isinstance(await vm.fault(Access(Gfn(8), False, Side.PRIVATE)), MemoryErrorExit)
        await wait_all_tasks_blocked()
        assert len(store.requests) == before


async def test_fault_around_asks_for_a_window_of_one_side(new_vm: NewVm) -> None:
    async with new_vm(fault_around=8) as (vm, store):
        shared, private = store.file(), store.file(guest=True)
        await vm.set_user_memory_region(region(shared, private))
        store.allocate(private, one(3))
        assert await vm.fault(Access(Gfn(5), True, Side.SHARED)) is None
        await wait_all_tasks_blocked()
        asked = [message for message in store.requests if isinstance(message, GetPfn)]
        assert [message.pages for message in asked] == [PageRange(PageIndex(4), PageIndex(8))]
        assert vm.mmu.table.mapped == 4
        # From where it ended on, twice as much.
        assert await vm.fault(Access(Gfn(8), True, Side.SHARED)) is None
        await wait_all_tasks_blocked()
        asked = [message for message in store.requests if isinstance(message, GetPfn)]
        assert asked[-1].pages == PageRange(PageIndex(8), PageIndex(24))
