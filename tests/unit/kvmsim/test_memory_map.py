"""The picture of guest memory, by gfn: what the private files have, and what is mapped as shared."""

from __future__ import annotations

from kvmsim.memory_map import memory_of
from kvmsim.mmu.page_fault import Access
from kvmsim.side import Side
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange
from tests.helpers import pages

from .conftest import NewVm, region

BLOCK = 512


async def test_pages_are_shown_at_their_gfns(new_vm: NewVm) -> None:
    async with new_vm(fault_around=1) as (vm, store):
        shared, private = store.file(8 * BLOCK), store.file(8 * BLOCK, guest=True)
        size, offset = 4 * BLOCK * PAGE_SIZE, 3 * BLOCK * PAGE_SIZE
        await vm.set_user_memory_region(region(shared, private, gpa=16 * BLOCK * PAGE_SIZE, size=size, offset=offset))
        store.allocate(private, pages(2 * BLOCK, 4 * BLOCK))  # half of it before the slot
        store.allocate(private, pages(7 * BLOCK - 2, 8 * BLOCK))
        for gfn in (17 * BLOCK + 5, 17 * BLOCK + 6, 18 * BLOCK):
            assert await vm.fault(Access(Gfn(gfn), True, Side.SHARED)) is None
        memory = memory_of(vm, GfnRange(Gfn(0), Gfn(32 * BLOCK)))
        assert memory.private.tolist() == [[16 * BLOCK, 17 * BLOCK], [20 * BLOCK - 2, 20 * BLOCK]]
        assert memory.shared.tolist() == [[17 * BLOCK + 5, 17 * BLOCK + 7], [18 * BLOCK, 18 * BLOCK + 1]]
        assert memory.totals == {
            "private": BLOCK + 2,
            "shared": 3,
            "absent": 31 * BLOCK - 5,
            "huge": BLOCK,
            "locked": 0,
        }
        assert memory_of(vm, GfnRange(Gfn(0), Gfn(16))).totals["absent"] == 16
