"""ConvertBegin and ConvertEnd: one invalidation of both sides, and what has become private is mapped."""

from __future__ import annotations

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kvmsim.engines.program import Load, Program, ProgramEngine
from kvmsim.exits import MemoryErrorExit
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import side_of
from kvmsim.mmu.walk import translate
from kvmsim.side import Side
from kvmsim.slots.memslots import Window
from kvmsim.uapi import KVM_EXIT_MEM_MAP_PRIVATE, KVM_EXIT_MEM_MAP_SHARED
from kvmsim.vm import VM
from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.messages import NO_FILE, ConvertBegin, ConvertEnd, GetPfn, InvalidateBegin, InvalidateEnd
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


async def test_slot_on_only_one_of_the_files_is_concerned(new_vm: NewVm) -> None:
    """Its own shared memory is another file's, and what has become private must not be mapped from there."""
    async with new_vm() as (vm, store):
        shared, private = store.file(), store.file(guest=True)
        await vm.set_user_memory_region(region(shared, private))
        await touch(vm, list(range(16)), Side.SHARED)
        number = store.by_fd(private).id
        await store.notify(ConvertBegin(NO_FILE, number, True, RANGES))
        assert mapped(vm, Side.SHARED) == [gfn for gfn in range(16) if gfn not in CHANGED]
        assert [vm.mmu.invalidations.is_active(GfnRange(Gfn(gfn), Gfn(gfn + 1))) for gfn in (3, 4, 9)] == [
            True,
            False,
            True,
        ]
        for run in RANGES:
            store.allocate(private, run)
        await store.notify(ConvertEnd(NO_FILE, number, True, RANGES))
        assert not vm.mmu.invalidations.in_progress


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


@pytest.mark.parametrize("ranges", [[(3, 4)], [(2 * page, 2 * page + 1) for page in range(20)] + [(100, 300)]])
@pytest.mark.parametrize("has_others", [False, True])
async def test_what_was_converted_is_mapped_without_a_question(
    new_vm: NewVm, ranges: list[tuple[int, int]], has_others: bool
) -> None:
    """One range or many, and nothing else changes; a TLB knows nothing of what was there before."""
    everything = pages(0, 512)
    converted = PageRanges.of(pages(*each) for each in ranges)
    changed, others = set(converted.indexes().tolist()), [page for page in range(512) if page % 3 == 1]
    others = [page for page in others if page not in changed] if has_others else []
    async with new_vm() as (vm, store):
        shared, private = store.file(512), store.file(512, guest=True)
        ids = store.by_fd(shared).id, store.by_fd(private).id
        store.allocate(private, everything)
        await vm.set_user_memory_region(region(shared, private, size=512 * PAGE_SIZE))
        await touch(vm, [511], Side.PRIVATE)  # tells where the gibibyte is
        vm.mmu.unmap(vm.mmu.table.everything)
        store.free(private, everything)
        tlb = vm.create_vcpu(0, ProgramEngine(idle())).tlb
        for gfn in sorted(changed | set(others)):
            await touch(vm, [gfn], Side.SHARED)
            assert translate(vm.mmu, tlb, Access(Gfn(gfn), write=True, side=Side.SHARED))
        asked = sum(isinstance(message, GetPfn) for message in store.requests)
        for to in (Side.PRIVATE, Side.SHARED):
            await store.notify(ConvertBegin(*ids, to is Side.PRIVATE, converted))
            assert vm.mmu.table.mapped == len(others)
            for run in converted:
                (store.allocate if to is Side.PRIVATE else store.free)(private, run)
            await store.notify(ConvertEnd(*ids, to is Side.PRIVATE, converted))
            assert not any(tlb.lookup(Gfn(gfn), Side.SHARED, False) for gfn in changed)
            ptes = vm.mmu.table.translate(np.arange(512))
            assert {gfn for gfn in range(512) if ptes[gfn] and side_of(int(ptes[gfn])) is to} == changed | (
                set(others) if to is Side.SHARED else set()
            )
            assert vm.mmu.table.mapped == len(changed) + len(others)
            assert vm.mmu.ownership.owned == (len(changed) if to is Side.PRIVATE else 0)
            vm.check()
        await wait_all_tasks_blocked()
        assert sum(isinstance(message, GetPfn) for message in store.requests) == asked


async def test_what_is_going_again_is_not_mapped(new_vm: NewVm) -> None:
    """A punch of the shared file has begun before the conversion that allocates there ends."""
    async with new_vm() as (vm, store):
        shared, private = store.file(), store.file(guest=True)
        store.allocate(private, pages(0, 64))
        await vm.set_user_memory_region(region(shared, private))
        await touch(vm, [20, 21], Side.PRIVATE)
        ids = store.by_fd(shared).id, store.by_fd(private).id
        scattered = PageRanges.of(one(page) for page in range(0, 40, 2))
        store.free(private, pages(50, 51))
        await touch(vm, [50], Side.SHARED)  # tells where the gibibyte is
        await store.notify(ConvertBegin(*ids, False, scattered))
        for run in scattered:
            store.free(private, run)
        await store.notify(InvalidateBegin(ids[0], pages(8, 16)))
        await store.notify(ConvertEnd(*ids, False, scattered))
        assert mapped(vm, Side.SHARED) == [0, 2, 4, 6]
        await store.notify(InvalidateEnd(ids[0], pages(8, 16)))
        vm.check()


async def test_classic_memory_behind_which_the_shared_file_lies_is_left_to_faults(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared, private = store.file(), store.file(guest=True)
        await vm.set_user_memory_region(region(shared, private))
        await vm.set_user_memory_region(region(-1, slot=1, flags=0, gpa=1 << 30, offset=1 << 20))
        classic, ids = vm.mmu.slots.get(1), (store.by_fd(shared).id, store.by_fd(private).id)
        assert classic is not None
        vm.mmu.add_window(Window(classic, ids[0], pages(0, 64), classic.gfns.start, Side.SHARED))
        await touch(vm, [9], Side.SHARED)
        await converting(vm, store, (shared, private), to_private=True)
        await converting(vm, store, (shared, private), to_private=False)
        assert mapped(vm, Side.SHARED) == CHANGED


def idle() -> Program:
    yield Load(Gpa(0), 1)


async def test_memory_that_is_being_converted_is_not_asked_for(new_vm: NewVm) -> None:
    """The store would allocate it again, after the conversion, on the side that it has left."""
    async with new_vm() as (vm, store), trio.open_nursery() as nursery:
        shared, private = store.file(), store.file(guest=True)
        ids = store.by_fd(shared).id, store.by_fd(private).id
        await vm.set_user_memory_region(region(shared, private))
        await store.notify(ConvertBegin(*ids, True, RANGES))
        nursery.start_soon(vm.fault, Access(Gfn(8), write=True, side=Side.SHARED))
        await wait_all_tasks_blocked()
        assert not any(isinstance(message, GetPfn) for message in store.requests)
        store.allocate(private, one(8))
        await store.notify(ConvertEnd(*ids, True, PageRanges.of([one(8)])))
        await wait_all_tasks_blocked()
        assert not any(isinstance(each, GetPfn) and each.alloc for each in store.requests)
