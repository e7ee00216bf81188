"""Many faults at once do what as many faults would have done, one after the other, and say what is left."""

from __future__ import annotations

import errno
import random

import numpy as np
import pytest

from kvmsim.mmu.ownership import OwnershipViolation
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import PTE_A, PTE_D, is_private, pte_pfn
from kvmsim.side import Side
from kvmsim.uapi import KVM_MEM_FD
from kvmsim.vm import VM
from memfs.contract.protocol.messages import GetPfn
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange, PageIndex, PageRange
from tests.helpers import raises

from .conftest import NewVm, ScriptedStore, region

PAGES = 2048


async def with_memory(
    vm: VM, store: ScriptedStore, allocated: list[PageRange], *, gpa: int = 0, flags: int = KVM_MEM_FD
) -> None:
    """A slot of PAGES pages at a gpa, some of them private, whose frames are known."""
    shared, private = store.file(PAGES), store.file(PAGES, guest=True)
    await vm.set_user_memory_region(region(shared, private, size=PAGES * PAGE_SIZE, gpa=gpa, flags=flags))
    first = PageRange(PageIndex(0), PageIndex(1))
    store.allocate(private, first)
    assert await vm.fault(Access(Gfn(gpa // PAGE_SIZE), False, Side.PRIVATE)) is None
    vm.mmu.unmap(GfnRange(Gfn(0), Gfn(1 << 20)))
    store.free(private, first)
    for pages in allocated:
        store.allocate(private, pages)


def ranges(rng: random.Random) -> list[PageRange]:
    starts = [rng.randrange(PAGES) for _ in range(rng.randrange(12))]
    found = [PageRange(PageIndex(at), PageIndex(min(PAGES, at + rng.choice([1, 3, 700])))) for at in starts]
    return [*found, PageRange(PageIndex(512), PageIndex(rng.choice([1023, 1024, 1536])))]


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("gpa", [0, 3 * PAGE_SIZE], ids=["aligned", "out of step"])
@pytest.mark.parametrize("seed", range(5))
async def test_as_one_after_the_other(new_vm: NewVm, seed: int, gpa: int, write: bool) -> None:
    rng = random.Random(seed)
    allocated, first = ranges(rng), gpa // PAGE_SIZE
    gfns = np.array([first + rng.randrange(PAGES) for _ in range(3000)])
    async with new_vm() as (vm, store), new_vm() as (other, other_store):
        await with_memory(vm, store, allocated, gpa=gpa)
        await with_memory(other, other_store, allocated, gpa=gpa)
        served = vm.fault_in(gfns, write=write)
        one_by_one = [await other.fault(Access(Gfn(gfn), write, Side.PRIVATE)) is None for gfn in gfns.tolist()]
        assert served.tolist() == one_by_one
        everything = np.arange(first, first + PAGES)
        hardware = ~(PTE_A | PTE_D)
        assert np.array_equal(
            vm.mmu.table.translate(everything) & hardware, other.mmu.table.translate(everything) & hardware
        )
        assert (vm.mmu.table.mapped, vm.mmu.table.huge) == (other.mmu.table.mapped, other.mmu.table.huge)
        assert vm.mmu.ownership.owned == other.mmu.ownership.owned == vm.mmu.table.mapped
        vm.check()
        asked = len(store.requests)
        assert vm.fault_in(gfns, write=write).tolist() == one_by_one
        assert len(store.requests) == asked


async def test_what_needs_a_decision_is_left_alone(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        await with_memory(vm, store, [PageRange(PageIndex(0), PageIndex(PAGES))])
        private = next(slot.private for slot in vm.mmu.slots)
        vm.mmu.invalidations.begin("test", [GfnRange(Gfn(600), Gfn(601))])
        gfns = np.array([PAGES + 5, 600, 5, 700, 5])
        assert vm.fault_in(gfns).tolist() == [False, False, True, True, True]
        assert vm.mmu.table.lookup(Gfn(600)) == 0
        assert vm.mmu.table.huge == {2: 1, 3: 0}, "a huge leaf over what is being invalidated"
        vm.mmu.invalidations.end("test")
        assert vm.fault_in(gfns).tolist() == [False, True, True, True, True]
        assert private is not None


@pytest.mark.parametrize("seed", range(2))
async def test_shared_pages_are_asked_for_in_ranges(new_vm: NewVm, seed: int) -> None:
    rng = random.Random(seed)
    allocated = ranges(rng)
    gfns = np.array([rng.randrange(PAGES + 9) for _ in range(300)])
    async with new_vm(fault_around=8) as (vm, store):
        await with_memory(vm, store, allocated)
        slot = next(iter(vm.mmu.slots))
        before = len(store.requests)
        served = await vm.fault_in_shared(gfns, write=True)
        expected = [gfn < PAGES and not slot.private.is_private(gfn) for gfn in gfns.tolist()]  # type: ignore[union-attr]
        assert served.tolist() == expected
        assert len(store.requests) - before < len(set(gfns.tolist())), "a question for each page"
        for gfn in gfns[served].tolist():
            pte = vm.mmu.table.lookup(Gfn(gfn))
            assert not is_private(pte)
            assert pte_pfn(pte) == (slot.shared.id << 18) + gfn  # type: ignore[union-attr]
        windows = {gfn // 8 for gfn in gfns.tolist()}
        everything = vm.mmu.table.translate(np.arange(PAGES))
        assert {gfn // 8 for gfn in np.flatnonzero(everything).tolist()} <= windows, "more than the windows"


async def test_refusal_of_the_store_comes_through(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        await with_memory(vm, store, [])
        store.refuse[GetPfn] = errno.ENOSPC
        with raises(errno.ENOSPC):
            await vm.fault_in_shared(np.arange(600))
        assert vm.mmu.table.mapped == 0


async def test_foreign_frame_is_refused_and_nothing_is_mapped(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        await with_memory(vm, store, [PageRange(PageIndex(0), PageIndex(8))])
        slot = next(iter(vm.mmu.slots))
        assert slot.private is not None
        pfn = slot.private.pfn_of(PageIndex(3))
        assert pfn is not None
        vm.mmu.ownership.assign(vm.mmu.ownership.new_vm(), GfnRange(Gfn(77), Gfn(78)), pfn)
        with pytest.raises(OwnershipViolation):
            vm.fault_in(np.arange(8))
        assert (vm.mmu.table.mapped, vm.mmu.ownership.owned) == (0, 1)
        vm.mmu.ownership.release_frames(np.array([pfn]))


async def test_mapped_shared_stays_so(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        await with_memory(vm, store, [])
        assert await vm.fault(Access(Gfn(4), False, Side.SHARED)) is None
        assert vm.fault_in(np.array([4])).tolist() == [False]
        assert not is_private(vm.mmu.table.lookup(Gfn(4)))
