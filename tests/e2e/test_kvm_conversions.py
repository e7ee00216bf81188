"""Conversions that guests of kvmsim ask for, on a mounted memfs: what the VMM does about them."""

from __future__ import annotations

import errno
import functools
import os
import threading

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kvmsim.engines.program import Hypercall, Load, Program, ProgramEngine, Store, convert
from kvmsim.exits import HypercallExit, MemoryErrorExit
from kvmsim.mmu.page_fault import Access
from kvmsim.side import Side
from kvmsim.uapi import (
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
)
from kvmsim.vm_type import VmType
from kvmsim.vmm.vmm import UnhandledExit
from memfs.contract.units import PAGE_SIZE, Gfn, Gpa, PageIndex, PageRange
from tests.helpers import not_none, one

from .conftest import Memfs
from .guests import SIZE, Guest, blocks, fill, guest_on, private_of, run, shared_of


@pytest.fixture
def guest(memfs: Memfs) -> Guest:
    return functools.partial(guest_on, memfs)


# -- conversions -----------------------------------------------------------------------------------------


async def test_guest_converts_by_hypercall_and_by_touching(guest: Guest) -> None:
    seen: list[object] = []

    def program() -> Program:
        yield Store(Gpa(0x1800), b"x" * PAGE_SIZE, encrypted=True)  # two pages, each converted by the fault
        seen.append((yield Load(Gpa(0x1FFE), 4, encrypted=True)))
        seen.append((yield convert(Gpa(0x1000), 2, Side.SHARED)))
        seen.append((yield Load(Gpa(0x1800), 4)))  # shared memory, and nothing of what was private
        seen.append((yield convert(Gpa(0x1000), 2, Side.PRIVATE)))
        seen.append((yield Load(Gpa(0x1800), 4, encrypted=True)))

    async with guest() as (vm, vmm):
        exits = await run(vm, vmm, program())
    assert seen == [b"xxxx", 0, bytes(4), 0, bytes(4)]
    assert exits == {"MAP_PRIVATE": 2, "HYPERCALL": 2, "HLT": 1}
    assert vmm.conversions == {Side.PRIVATE: 3, Side.SHARED: 1}


async def test_tdx_guest_says_shared_with_an_address_bit(guest: Guest) -> None:
    seen: list[object] = []
    shared = 1 << 47

    def program() -> Program:
        yield Store(Gpa(0x3000), b"secret")
        yield Store(Gpa(0x4000 | shared), b"public")
        seen.append((yield Load(Gpa(0x3000), 6)))
        seen.append((yield Load(Gpa(0x4000 | shared), 6)))
        seen.append((yield Load(Gpa(0x3000 | shared), 6)))  # the same page, converted by the access

    async with guest(vm_type=VmType.TDX_48) as (vm, vmm):
        exits = await run(vm, vmm, program())
        content = os.pread(shared_of(vm).fd, 6, 0x4000)
    assert seen == [b"secret", b"public", bytes(6)]
    assert content == b"public"
    assert exits == {"MAP_PRIVATE": 1, "MAP_SHARED": 1, "HLT": 1}


async def test_hypercalls_that_are_refused_change_nothing(guest: Guest) -> None:
    seen: list[object] = []

    def program() -> Program:
        seen.append((yield convert(Gpa(0x1001), 1, Side.PRIVATE)))
        seen.append((yield convert(Gpa(SIZE), 1, Side.PRIVATE)))
        seen.append((yield convert(Gpa(0), 0, Side.PRIVATE)))
        seen.append((yield Hypercall(99, ())))

    async with guest() as (vm, vmm):
        await run(vm, vmm, program())
        assert vm.mmu.table.mapped == 0
    assert seen == [-errno.EINVAL] * 3 + [-1000]
    assert not vmm.conversions


async def test_exit_for_who_knows_mainline_only(guest: Guest) -> None:
    async with guest() as (vm, vmm):
        exit_ = await vm.fault(Access(Gfn(3), write=False, side=Side.PRIVATE))
        assert isinstance(exit_, MemoryErrorExit)
        fault = exit_.memory_fault
        assert (fault.reason, fault.flags, fault.gpa, fault.size) == (
            *(39, KVM_MEMORY_EXIT_FLAG_PRIVATE),
            *(3 * PAGE_SIZE, PAGE_SIZE),
        )
        await vmm.answer(fault)
        assert await vm.fault(Access(Gfn(3), write=False, side=Side.PRIVATE)) is None


async def test_devices_answer_mmio_and_nothing_else_does(guest: Guest) -> None:
    seen: list[object] = []

    def device(offset: int, size: int, data: bytes | None) -> bytes:
        seen.append((offset, size, data))
        return b"\x2a" * size

    def program() -> Program:
        yield Store(Gpa(SIZE + 8), b"out")
        seen.append((yield Load(Gpa(SIZE + 16), 4)))
        yield Load(Gpa(SIZE + PAGE_SIZE), 1)

    async with guest() as (vm, vmm):
        vmm.add_device(Gpa(SIZE), PAGE_SIZE, device)
        with pytest.raises(UnhandledExit, match="nothing is at gpa"):
            await run(vm, vmm, program())
    assert seen == [(8, 3, b"out"), (16, 4, None), b"\x2a" * 4]


async def test_burst_of_neighbours_is_one_range(guest: Guest) -> None:
    def program(page: int) -> Program:
        yield Store(Gpa(page * PAGE_SIZE), b"x", encrypted=True)

    async with guest() as (vm, vmm), trio.open_nursery() as nursery:
        for page in range(8):
            nursery.start_soon(run, vm, vmm, program(page), page)
    assert vmm.conversions[Side.PRIVATE] == 8
    assert not_none(vmm.converter).ranges < 8, "each page was converted by itself"


async def test_granule_takes_empty_neighbours_along_and_loses_nothing(guest: Guest) -> None:
    seen: list[object] = []

    def program() -> Program:
        yield Store(Gpa(0x5000), b"mine")
        yield Store(Gpa(0x2000), b"x", encrypted=True)
        yield Store(Gpa(0xF000), b"x", encrypted=True)
        seen.append((yield Load(Gpa(0x5000), 4)))

    async with guest(granule=1 << 16) as (vm, vmm):
        exits = await run(vm, vmm, program())
        assert not_none(private_of(vm).page_map).count(PageRange(PageIndex(0), PageIndex(32))) == 15
    assert seen == [b"mine"]
    assert exits == {"MAP_PRIVATE": 1, "HLT": 1}
    assert not_none(vmm.converter).extra == 14


class Recorder:
    def __init__(self) -> None:
        self.populated: set[int] = set()
        self.calls: list[tuple[str, PageRange]] = []

    def populate(self, pages: PageRange) -> None:
        self.calls.append(("populate", pages))
        self.populated |= set(range(pages.start, pages.end))

    def discard(self, pages: PageRange) -> None:
        self.calls.append(("discard", pages))
        self.populated -= set(range(pages.start, pages.end))


async def test_listeners_hear_what_is_shared_from_the_beginning(guest: Guest) -> None:
    async with guest() as (_, vmm):
        converter, late, early = not_none(vmm.converter), Recorder(), Recorder()
        converter.register(early)
        assert early.populated == set(range(SIZE // PAGE_SIZE))
        await converter.convert(PageRange(PageIndex(3), PageIndex(5)), Side.PRIVATE)
        converter.register(late)
        assert late.populated == early.populated == set(range(SIZE // PAGE_SIZE)) - {3, 4}
        await converter.convert(PageRange(PageIndex(4), PageIndex(5)), Side.SHARED)
        assert late.calls[-1] == ("populate", PageRange(PageIndex(4), PageIndex(5)))
        converter.unregister(late)
        assert late.populated == set()
        with pytest.raises(OSError, match="not pages of this memory"):
            await converter.convert(PageRange(PageIndex(0), PageIndex(1 << 20)), Side.PRIVATE)
        assert 0 in early.populated


# -- conversions for which there is hardly any space -----------------------------------------------------


async def test_conversion_without_space_destroys_nothing(guest: Guest, memfs: Memfs) -> None:
    seen: list[object] = []

    def program() -> Program:
        yield Store(Gpa(7 * PAGE_SIZE), b"precious")
        seen.append((yield Hypercall(99, ())))  # the mount fills up
        seen.append((yield convert(Gpa(0), 512, Side.PRIVATE)))
        seen.append((yield Load(Gpa(7 * PAGE_SIZE), 8)))

    async with guest() as (vm, vmm):
        vcpu = vm.create_vcpu(0, ProgramEngine(program()))
        assert isinstance(await vcpu.run(), HypercallExit)
        await fill(memfs, but=100)
        before = await trio.to_thread.run_sync(blocks, vmm.private)
        await vmm.run(vcpu)
        assert await trio.to_thread.run_sync(blocks, vmm.private) == before
    assert seen == [0, -errno.ENOSPC, b"precious"]


async def test_conversion_that_needs_nothing_more_succeeds_on_a_full_mount(guest: Guest, memfs: Memfs) -> None:
    """A page on one side is taken for the page on the other, those that were never written to first."""
    seen: list[object] = []

    def program() -> Program:
        for page in (0, 3, 4, 40, 63):
            yield Store(Gpa(page * PAGE_SIZE), b"x")  # and the pages around each, to which nothing is written
        seen.append((yield Hypercall(99, ())))  # the mount fills up
        seen.append((yield convert(Gpa(0), 64, Side.PRIVATE)))
        yield Store(Gpa(3 * PAGE_SIZE), b"private", encrypted=True)

    async with guest() as (vm, vmm):
        vcpu = vm.create_vcpu(0, ProgramEngine(program()))
        assert isinstance(await vcpu.run(), HypercallExit)
        assert await trio.to_thread.run_sync(blocks, vmm.shared, vmm.private) == [48, 0]
        await fill(memfs, but=16)
        await vmm.run(vcpu)
        assert await trio.to_thread.run_sync(blocks, vmm.shared, vmm.private) == [0, 64]
    assert seen == [0, 0]


async def test_no_page_stays_paid_for_twice_when_neighbours_are_touched(guest: Guest) -> None:
    """One vCPU converts a page while another touches the next one, and asks for those around it."""
    vcpus = 2

    def program(first: int, private: bool) -> Program:
        for page in range(first, 2048, 16):
            yield Store(Gpa(page * PAGE_SIZE), b"x", encrypted=private)

    async with guest() as (vm, vmm):
        async with trio.open_nursery() as nursery:
            for number in range(vcpus):
                nursery.start_soon(run, vm, vmm, program(number, not number), number)
        slot = not_none(vm.mmu.slots.get(0))
        page_map = not_none(not_none(slot.private).page_map)
        shared, private = await trio.to_thread.run_sync(blocks, vmm.shared, vmm.private)
        assert private == 128 == page_map.count(slot.pages)
        assert shared + private <= 2048, "a page is in both files"


async def test_two_vcpus_that_want_one_page_pay_once(guest: Guest) -> None:
    def program(text: bytes) -> Program:
        for page in range(64):
            yield Store(Gpa(page * PAGE_SIZE), text, encrypted=True)
            assert (yield Load(Gpa(page * PAGE_SIZE + 100), 1, encrypted=True)) == b"\0"

    async with guest() as (vm, vmm):
        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(run, vm, vmm, program(b"%d" % number), number)
        assert await trio.to_thread.run_sync(blocks, vmm.shared, vmm.private) == [0, 64]
        assert not_none(vmm.converter).ranges <= 64


async def test_guest_that_goes_on_in_order_is_served_ever_more(guest: Guest) -> None:
    def program() -> Program:
        for page in range(SIZE // PAGE_SIZE):
            yield Store(Gpa(page * PAGE_SIZE), b"x", encrypted=True)

    async with guest(granule=1 << 16) as (vm, vmm):
        exits = await run(vm, vmm, program())
        assert await trio.to_thread.run_sync(blocks, vmm.shared, vmm.private) == [0, SIZE // PAGE_SIZE]
    assert exits["MAP_PRIVATE"] == not_none(vmm.converter).ranges == 9  # of 16, 32, ... 512 pages, and the rest


async def test_what_nobody_asked_for_is_not_what_a_conversion_fails_for(guest: Guest, memfs: Memfs) -> None:
    def program() -> Program:
        yield Store(Gpa(5 * PAGE_SIZE), b"x", encrypted=True)

    async with guest(granule=1 << 16) as (vm, vmm):
        await fill(memfs, but=2)
        await run(vm, vmm, program())
        assert await trio.to_thread.run_sync(blocks, vmm.private) == [1]
        assert not_none(vmm.converter).extra == 0


async def test_each_conversion_of_a_burst_fails_for_itself(guest: Guest, memfs: Memfs) -> None:
    """Two are worked on together, of which there is space for one."""
    seen: dict[int, int] = {}

    def program(first: int, pages: int) -> Program:
        seen[first] = yield convert(Gpa(first * PAGE_SIZE), pages, Side.PRIVATE)

    async with guest() as (vm, vmm):
        await fill(memfs, but=8)
        async with trio.open_nursery() as nursery:
            for number, (first, pages) in enumerate(((0, 1), (100, 64), (300, 4))):
                nursery.start_soon(run, vm, vmm, program(first, pages), number)
        assert await trio.to_thread.run_sync(blocks, vmm.private) == [5]
    assert seen == {0: 0, 100: -errno.ENOSPC, 300: 0}


async def test_conversion_that_is_given_up_while_it_waits_is_not_made(guest: Guest) -> None:
    async with guest() as (_, vmm):
        converter = not_none(vmm.converter)

        async def convert_page(page: int, done: list[int]) -> None:
            await converter.convert(one(page), Side.PRIVATE)
            done.append(page)

        done: list[int] = []
        may_go_on = threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vmm._calls.call, may_go_on.wait)  # which the first conversion then waits for
            await wait_all_tasks_blocked()
            try:
                nursery.start_soon(convert_page, 1, done)
                await wait_all_tasks_blocked()
                async with trio.open_nursery() as given_up:
                    given_up.start_soon(convert_page, 2, done)
                    await wait_all_tasks_blocked()
                    given_up.cancel_scope.cancel()
                nursery.start_soon(convert_page, 3, done)
                await wait_all_tasks_blocked()
            finally:
                may_go_on.set()
        assert sorted(done) == [1, 3]
        assert await trio.to_thread.run_sync(blocks, vmm.private) == [2]
