"""ConvertBegin and ConvertEnd: one invalidation of both sides, and what has become private is mapped."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kvmsim.exits import MemoryErrorExit
from kvmsim.mmu.page_fault import Access
from kvmsim.side import Side
from kvmsim.uapi import KVM_EXIT_MEM_MAP_PRIVATE, KVM_EXIT_MEM_MAP_SHARED
from kvmsim.vm import VM
from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.messages import NO_FILE, ConvertBegin, ConvertEnd
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange, Gpa
from tests.helpers import one, pages

from .conftest import NewVm, ScriptedStore, region

RANGES = PageRanges.of([one(3), pages(8, 10)])
CHANGED = [3, 8, 9]


def mapped(vm: VM, side: Side) -> list[int]:
    return [gfn for gfn in range(16) if vm.mmu.table.count(GfnRange(Gfn(gfn), Gfn(gfn + 1)), side)]


async def touch(vm: VM, gfns: list[int], side: Side) -> None:
    for gfn in gfns:
        assert await vm.fault(Access(Gfn(gfn), write=True, side=side)) is None


async def converting(
    vm: VM, store: ScriptedStore, files: tuple[int, int], *, to_private: bool, done: PageRanges = RANGES
) -> None:
    """Say what a store says; between the two messages, faults on the gfns wait and others do not."""
    shared, private = (store.by_fd(fd).id for fd in files)
    await store.notify(ConvertBegin(shared, private, to_private, RANGES))
    left = Side.of(not to_private)
    assert not set(mapped(vm, left)) & set(CHANGED)
    outcome: list[object] = []

    async def fault() -> None:
        outcome.append(await vm.fault(Access(Gfn(8), write=False, side=left)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fault)
        await wait_all_tasks_blocked()
        if not to_private:
            assert outcome == [], "it would have what is about to go"
        for run in done:
            (store.allocate if to_private else store.free)(files[1], run)
        await store.notify(ConvertEnd(shared, private, to_private, done))
    wanted = KVM_EXIT_MEM_MAP_SHARED if left is Side.SHARED else KVM_EXIT_MEM_MAP_PRIVATE
    is_done = any(8 in run for run in done)
    assert outcome == [MemoryErrorExit(wanted, Gpa(8 * PAGE_SIZE), PAGE_SIZE) if is_done else None]
    assert not vm.mmu.invalidations.in_progress
    vm.check()


@pytest.mark.parametrize("eager", [True, False])
async def test_to_private(new_vm: NewVm, eager: bool) -> None:
    async with new_vm(map_on_fallocate=eager) as (vm, store):
        shared, private = store.file(), store.file(guest=True)
        await vm.set_user_memory_region(region(shared, private))
        await touch(vm, list(range(16)), Side.SHARED)
        await converting(vm, store, (shared, private), to_private=True)
        await wait_all_tasks_blocked()
        assert mapped(vm, Side.PRIVATE) == (CHANGED if eager else [])
        assert mapped(vm, Side.SHARED) == [gfn for gfn in range(16) if gfn not in CHANGED]
        assert vm.backing.counters.convert == 1


async def test_to_shared(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared, private = store.file(), store.file(guest=True)
        store.allocate(private, pages(0, 16))
        await vm.set_user_memory_region(region(shared, private))
        await touch(vm, list(range(16)), Side.PRIVATE)
        await converting(vm, store, (shared, private), to_private=False)
        assert mapped(vm, Side.PRIVATE) == [gfn for gfn in range(16) if gfn not in CHANGED]
        await touch(vm, CHANGED, Side.SHARED)


@pytest.mark.parametrize("done", [PageRanges.of([one(3)]), PageRanges.of([])], ids=["a part", "nothing"])
@pytest.mark.parametrize("to_private", [True, False])
async def test_conversion_that_was_not_finished(new_vm: NewVm, done: PageRanges, to_private: bool) -> None:
    """What it has not come to is where it was."""
    async with new_vm() as (vm, store):
        shared, private = store.file(), store.file(guest=True)
        if not to_private:
            store.allocate(private, pages(0, 16))
        await vm.set_user_memory_region(region(shared, private))
        await touch(vm, CHANGED, Side.of(not to_private))
        await converting(vm, store, (shared, private), to_private=to_private, done=done)
        await wait_all_tasks_blocked()
        rest = [gfn for gfn in CHANGED if not any(gfn in run for run in done)]
        await touch(vm, rest, Side.of(not to_private))
        vm.check()


@pytest.mark.parametrize("known", ["both", "shared", "private"])
async def test_new_slot_takes_over_a_conversion(new_vm: NewVm, known: str) -> None:
    """It began while the slot was being registered, or the owner has only one of the files."""
    async with new_vm() as (vm, store), trio.open_nursery() as nursery:
        shared, private = store.file(), store.file(guest=True)
        store.allocate(private, pages(0, 64))
        ids = (
            store.by_fd(shared).id if known != "private" else NO_FILE,
            store.by_fd(private).id if known != "shared" else NO_FILE,
        )

        async def begin(_: object) -> None:
            await store.notify(ConvertBegin(*ids, False, RANGES))

        store.before_registered = begin
        await vm.set_user_memory_region(region(shared, private))
        outcome: list[object] = []

        async def fault() -> None:
            outcome.append(await vm.fault(Access(Gfn(9), write=False, side=Side.PRIVATE)))

        nursery.start_soon(fault)
        assert await vm.fault(Access(Gfn(10), write=False, side=Side.PRIVATE)) is None
        await wait_all_tasks_blocked()
        assert outcome == []
        for run in RANGES:
            store.free(private, run)
        await store.notify(ConvertEnd(*ids, False, RANGES))
        await wait_all_tasks_blocked()
        assert outcome == [MemoryErrorExit(KVM_EXIT_MEM_MAP_PRIVATE, Gpa(9 * PAGE_SIZE), PAGE_SIZE)]
