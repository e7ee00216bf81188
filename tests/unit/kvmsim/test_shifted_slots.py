"""Slots that begin in the middle of their files, and of guest memory: what is computed from one end or the other."""

from __future__ import annotations

import numpy as np

from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import PG_LEVEL_2M
from kvmsim.side import Side
from memfs.contract.protocol.messages import GetPfn, InvalidateBegin, InvalidateEnd
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange
from tests.helpers import one, pages

from .conftest import NewVm, region

BLOCK = 512


async def test_batch_maps_whole_blocks_of_a_shifted_slot(new_vm: NewVm) -> None:
    """A block is whole where its pages are, which is not where its gfns are."""
    async with new_vm() as (vm, store):
        shared, private = store.file(8 * BLOCK), store.file(8 * BLOCK, guest=True)
        size, offset = 4 * BLOCK * PAGE_SIZE, 3 * BLOCK * PAGE_SIZE
        await vm.set_user_memory_region(region(shared, private, gpa=16 * BLOCK * PAGE_SIZE, size=size, offset=offset))
        store.allocate(private, pages(3 * BLOCK, 5 * BLOCK))
        store.allocate(private, one(5 * BLOCK))
        assert await vm.fault(Access(Gfn(18 * BLOCK), False, Side.PRIVATE)) is None  # tells where the gibibyte is
        vm.mmu.unmap(vm.mmu.table.everything)
        assert vm.fault_in(np.arange(16 * BLOCK, 18 * BLOCK + 1)).all()
        assert (vm.mmu.table.huge[PG_LEVEL_2M], vm.mmu.table.mapped) == (2, 2 * BLOCK + 1)
        vm.check()


async def test_punch_inside_a_huge_page_releases_the_frames_that_go(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared, private = store.file(2 * BLOCK), store.file(2 * BLOCK, guest=True)
        await vm.set_user_memory_region(region(shared, private, size=2 * BLOCK * PAGE_SIZE))
        store.allocate(private, pages(0, 2 * BLOCK))
        assert await vm.fault(Access(Gfn(0), False, Side.PRIVATE)) is None
        vm.mmu.unmap(vm.mmu.table.everything)
        assert vm.fault_in(np.arange(2 * BLOCK)).all()
        assert vm.mmu.table.huge[PG_LEVEL_2M] == 2
        gone, file = pages(BLOCK + 7, BLOCK + 12), store.by_fd(private).id
        await store.notify(InvalidateBegin(file, gone))
        store.free(private, gone)
        await store.notify(InvalidateEnd(file, gone))
        assert vm.mmu.ownership.owned == vm.mmu.table.mapped == 2 * BLOCK - 5
        first = (file << 18) + BLOCK
        owned = [vm.mmu.ownership.owner(first + number) is not None for number in range(20)]  # type: ignore[arg-type]
        assert [number for number in range(20) if not owned[number]] == [7, 8, 9, 10, 11]
        assert not vm.mmu.table.count(GfnRange(Gfn(BLOCK + 7), Gfn(BLOCK + 12)))
        vm.check()


async def test_window_around_a_fault_ends_at_private_pages_of_a_shifted_slot(new_vm: NewVm) -> None:
    async with new_vm(fault_around=16) as (vm, store):
        shared, private = store.file(128), store.file(128, guest=True)
        offset, size = 32 * PAGE_SIZE, 64 * PAGE_SIZE
        await vm.set_user_memory_region(region(shared, private, gpa=64 * PAGE_SIZE, size=size, offset=offset))
        for page in (50, 59, 70):  # gfns 82, 91 and 102; the window around gfn 85 is [80, 96)
            store.allocate(private, one(page))
        assert await vm.fault(Access(Gfn(85), True, Side.SHARED)) is None
        asked = [message.pages for message in store.requests if isinstance(message, GetPfn) and message.alloc]
        assert asked == [pages(51, 59)]
