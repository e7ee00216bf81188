"""Which pages are converted along: neighbours in neither file, and ever more of them for who goes on in order."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from kvmsim.vmm.around import GRANULES, Around, merged, without
from memfs.contract.units import PAGE_SIZE, PageIndex, PageRange
from tests.helpers import not_none, one

from .conftest import NewVm, region

PAGES = 4096
#: what makes windows with a granule in pages, a descriptor of shared memory, what makes pages private
Memory = tuple[Callable[[int], Around], int, Callable[[PageRange], None]]


def pages(start: int, end: int) -> PageRange:
    return PageRange(PageIndex(start), PageIndex(end))


@asynccontextmanager
async def memory(new_vm: NewVm, **changes: int) -> AsyncIterator[Memory]:
    """A slot of PAGES pages."""
    async with new_vm() as (vm, store):
        shared, private = store.file(PAGES), store.file(PAGES, guest=True)
        await vm.set_user_memory_region(region(shared, private, **{"size": PAGES * PAGE_SIZE, **changes}))
        slot = not_none(vm.mmu.slots.get(0))
        yield (lambda granule: Around(slot, granule * PAGE_SIZE)), shared, lambda taken: store.allocate(private, taken)


async def test_neighbours_with_content_stay_where_they_are(new_vm: NewVm) -> None:
    async with memory(new_vm) as (around, shared, allocate):
        os.pwrite(shared, b"x", 19 * PAGE_SIZE)
        allocate(pages(24, 26))
        assert around(16).empty_neighbours(one(21)) == [pages(16, 19), pages(20, 21), pages(22, 24), pages(26, 32)]
        assert around(1).empty_neighbours(one(21)) == []
        assert around(16).empty_neighbours(pages(14, 30)) == [], "who asks for a granule gets what was asked for"
        assert around(16).empty_neighbours(pages(30, 35)) == [
            *(pages(16, 19), pages(20, 24), pages(26, 30), pages(35, 48))
        ]
        assert os.fstat(shared).st_blocks == 8


async def test_window_doubles_for_who_goes_on_where_it_ended(new_vm: NewVm) -> None:
    async with memory(new_vm) as (around, _, allocate):
        windows, at, sizes = around(16), 0, []
        while at < PAGES:
            end = windows.empty_neighbours(one(at))[-1].end
            allocate(pages(at, end))
            sizes.append(end - at)
            at = end
        assert sizes == [16, 32, 64, 128, 256, *[512] * 7, 16]
        assert windows.empty_neighbours(one(PAGES - 1)) == []


async def test_window_of_who_does_not_is_the_granule(new_vm: NewVm) -> None:
    async with memory(new_vm) as (around, _, _):
        windows = around(16)
        for page in (0, 100, 17, 64, 48, 32):
            first = page // 16 * 16
            assert merged([one(page), *windows.empty_neighbours(one(page))]) == [pages(first, first + 16)]


async def test_window_ends_with_the_slot(new_vm: NewVm) -> None:
    async with memory(new_vm, offset=8 * PAGE_SIZE, size=64 * PAGE_SIZE) as (around, _, _):
        assert merged([one(9), *around(16).empty_neighbours(one(9))]) == [pages(8, 16)]


@pytest.mark.parametrize("granule", [0, 1, 2 * PAGE_SIZE, 2 * GRANULES[-1]])
async def test_other_granules_are_refused(new_vm: NewVm, granule: int) -> None:
    async with new_vm() as (vm, store):
        await vm.set_user_memory_region(region(store.file(), store.file(guest=True)))
        with pytest.raises(ValueError, match="a granule of"):
            Around(not_none(vm.mmu.slots.get(0)), granule)


def test_ranges_merge_and_leave_a_rest() -> None:
    taken = [pages(7, 9), pages(0, 2), pages(8, 12), pages(2, 3)]
    assert merged(taken) == [pages(0, 3), pages(7, 12)]
    assert without(pages(1, 10), taken) == [pages(3, 7)]
    assert without(pages(1, 20), taken) == [pages(3, 7), pages(12, 20)]
    assert without(pages(20, 30), []) == [pages(20, 30)]
