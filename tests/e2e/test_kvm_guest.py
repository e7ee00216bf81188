"""Guests of kvmsim on a mounted memfs: conversions they ask for, classic memory beside files, dirty pages, huge pages.

The VM runs in the process of the test, memfs in its own; what the VMM does to files it does in threads.
"""

from __future__ import annotations

import dataclasses
import errno
import mmap
import os
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import numpy as np
import pytest
import trio

from kvmsim.backing import GuestFile, StoreGone
from kvmsim.engines.program import Hypercall, Load, Program, ProgramEngine, Store, convert
from kvmsim.exits import HypercallExit, MemoryErrorExit
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import PG_LEVEL_2M
from kvmsim.side import Side
from kvmsim.uapi import (
    KVM_MEM_FD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    UserspaceMemoryRegion,
)
from kvmsim.vm import VM, create_vm
from kvmsim.vm_type import VmType
from kvmsim.vmm.vmm import UnhandledExit, Vmm, open_memory
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gfn, GfnRange, Gpa, PageIndex, PageRange
from tests.helpers import not_none, raises

from .conftest import Memfs, MountMemfs, memfs_command

SIZE = 8 << 20
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


class Guest(Protocol):
    """The fixture `guest`."""

    def __call__(
        self, granule: int = PAGE_SIZE, *, vm_type: VmType = VmType.SNP
    ) -> AbstractAsyncContextManager[tuple[VM, Vmm]]:
        """Make a VM, and its VMM that converts `granule` bytes at a time."""


@pytest.fixture
def guest(memfs: Memfs) -> Guest:
    """A context manager: a VM of 8 MiB on two files of a memfs, and its VMM."""

    @asynccontextmanager
    async def make(granule: int = PAGE_SIZE, *, vm_type: VmType = VmType.SNP) -> AsyncIterator[tuple[VM, Vmm]]:
        shared, private = memfs.path / "shared", memfs.path / "private"
        memfs.run("touch", "shared")
        memfs.run(*memfs_command("create", "--seals", "guest", private))
        memory = open_memory(str(shared), str(private), SIZE, granule)
        vmm = await trio.to_thread.run_sync(memory.__enter__)
        try:
            async with create_vm(str(memfs.socket), vm_type=vm_type) as vm:
                await vmm.add_memory(vm)
                yield vm, vmm
                vm.check()
        finally:
            await trio.to_thread.run_sync(memory.__exit__, None, None, None)

    return make


async def run(vm: VM, vmm: Vmm, program: Program, vcpu_id: int = 0) -> dict[str, int]:
    """Run a guest to its end; its exits by name."""
    vcpu = vm.create_vcpu(vcpu_id, ProgramEngine(program))
    await vmm.run(vcpu)
    return dict(vcpu.exits)


def shared_of(vm: VM) -> GuestFile:
    """The shared file of slot 0."""
    file = not_none(vm.mmu.slots.get(0)).shared
    assert isinstance(file, GuestFile)
    return file


def private_of(vm: VM) -> GuestFile:
    """The private file of slot 0."""
    return not_none(not_none(vm.mmu.slots.get(0)).private)


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


# -- sizes of mappings -----------------------------------------------------------------------------------


async def test_conversion_inside_a_huge_page_splits_it_and_back_again_it_is_one(guest: Guest) -> None:
    async with guest() as (vm, vmm):
        private, huge = vmm.private, vm.mmu.table.huge
        await trio.to_thread.run_sync(fallocate, private, 0, 0, 4 << 20)
        assert await vm.fault(Access(Gfn(700), write=True, side=Side.PRIVATE)) is None
        assert huge[PG_LEVEL_2M] >= 1
        await trio.to_thread.run_sync(fallocate, private, PUNCH, 700 * PAGE_SIZE, PAGE_SIZE)
        assert huge[PG_LEVEL_2M] <= 1
        assert not vm.mmu.table.lookup(Gfn(700))
        vm.check()
        await trio.to_thread.run_sync(fallocate, private, 0, 700 * PAGE_SIZE, PAGE_SIZE)
        vm.mmu.unmap(GfnRange(Gfn(512), Gfn(1024)))
        assert await vm.fault(Access(Gfn(701), write=True, side=Side.PRIVATE)) is None
        assert vm.mmu.table.walk(Gfn(700)).level == PG_LEVEL_2M


async def test_slots_that_exist_are_adopted(guest: Guest, memfs: Memfs) -> None:
    """Memory above 4 GiB on the same files, and more on others."""
    second, third = Gpa(1 << 32), Gpa(1 << 33)
    seen: list[object] = []

    def program() -> Program:
        for gpa in (Gpa(0), second, third):
            yield Store(gpa, b"secret", encrypted=True)
            seen.append((yield Load(gpa, 6, encrypted=True)))
        seen.append((yield convert(Gpa(second - PAGE_SIZE), 2, Side.SHARED)))  # begins where no memory is
        seen.append((yield convert(second, 1, Side.SHARED)))
        seen.append((yield Load(second, 6)))

    def others() -> list[int]:
        memfs.run("truncate", "-s", str(SIZE), "shared2")
        memfs.run(*memfs_command("create", "--seals", "guest", "--size", str(SIZE), "private2"))
        for name in ("shared", "private"):
            memfs.run("truncate", "-s", str(2 * SIZE), name)
        return [os.open(memfs.path / name, os.O_RDWR) for name in ("shared2", "private2")]

    async with guest() as (vm, vmm):
        with pytest.raises(ValueError, match="slot 1"):
            vmm.adopt(vm, 1)
        shared, private = await trio.to_thread.run_sync(others)
        high = dataclasses.replace(vmm.region, slot=1, guest_phys_addr=second, userspace_addr=ByteOffset(SIZE))
        await vm.set_user_memory_region(high)
        more = dataclasses.replace(vmm.region, slot=2, guest_phys_addr=third, fd=shared, private_fd=private)
        await vm.set_user_memory_region(more)
        vmm.adopt(vm, 1)
        vmm.adopt(vm, 2, shared, private)
        await run(vm, vmm, program())
        assert await trio.to_thread.run_sync(blocks, vmm.private, private) == [1, 1]
        for fd in (shared, private):
            await trio.to_thread.run_sync(os.close, fd)
    assert seen == [b"secret", b"secret", b"secret", -errno.EINVAL, 0, bytes(6)]


# -- conversions for which there is hardly any space -----------------------------------------------------


def blocks(*fds: int) -> list[int]:
    """How many pages files have."""
    return [os.fstat(fd).st_blocks * 512 // PAGE_SIZE for fd in fds]


async def fill(memfs: Memfs, *, but: int) -> None:
    """Leave so many pages free."""

    def allocate() -> None:
        status = os.statvfs(memfs.path)
        free = status.f_bavail * status.f_frsize - but * PAGE_SIZE
        assert memfs.run("fallocate", "-l", str(free), "filler").returncode == 0

    await trio.to_thread.run_sync(allocate)


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


# -- classic memory --------------------------------------------------------------------------------------


def address_of(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def classic(memory: mmap.mmap, slot: int, gpa: int, flags: int = 0) -> UserspaceMemoryRegion:
    return UserspaceMemoryRegion(slot, flags, Gpa(gpa), len(memory), ByteOffset(address_of(memory)))


async def test_classic_slot_over_a_mapping_hears_of_punches_of_its_file(guest: Guest, memfs: Memfs) -> None:
    seen: list[object] = []

    def program() -> Program:
        yield Store(Gpa((1 << 30) + 0x2345), b"here")
        seen.append((yield Load(Gpa((1 << 30) + 0x2345), 4)))
        seen.append((yield Hypercall(99, ())))  # the host punches meanwhile
        seen.append((yield Load(Gpa((1 << 30) + 0x2345), 4)))

    def map_file() -> mmap.mmap:
        memfs.run("truncate", "-s", "1M", "classic")
        fd = os.open(memfs.path / "classic", os.O_RDWR)
        try:
            return mmap.mmap(fd, 1 << 19, offset=1 << 18)
        finally:
            os.close(fd)

    async with guest() as (vm, vmm):
        memory = await trio.to_thread.run_sync(map_file)
        await vm.set_user_memory_region(classic(memory, 1, 1 << 30))
        vcpu = vm.create_vcpu(0, ProgramEngine(program()))
        exit_ = await vcpu.run()
        assert isinstance(exit_, HypercallExit)
        assert memory[0x2345:0x2349] == b"here", "the guest stores into the VMM's own memory"
        gfn = Gfn((1 << 18) + 2)
        assert vm.mmu.table.lookup(gfn)
        punch = ["fallocate", "-p", "-o", str((1 << 18) + 0x2000), "-l", "4096", "classic"]
        assert (await trio.to_thread.run_sync(lambda: memfs.run(*punch))).returncode == 0
        assert not vm.mmu.table.lookup(gfn)
        assert vm.backing.counters.invalidate_begin == 1
        await vmm.run(vcpu)
        await vm.set_user_memory_region(UserspaceMemoryRegion(1, 0, Gpa(0), 0, ByteOffset(0)))
        assert len(vm.backing.files) == 2, "the file behind the mapping is let go of with the slot"
    assert seen == [b"here", 0, bytes(4)]


async def test_classic_slot_over_ordinary_memory(guest: Guest) -> None:
    seen: list[object] = []

    def program() -> Program:
        yield Store(Gpa((1 << 30) + 100), b"here")
        seen.append((yield Load(Gpa((1 << 30) + 100), 4)))

    async with guest() as (vm, vmm):
        memory = mmap.mmap(-1, 1 << 16)
        await vm.set_user_memory_region(classic(memory, 1, 1 << 30))
        await run(vm, vmm, program())
        assert memory[100:104] == b"here"
        assert vm.mmu.table.lookup(Gfn(1 << 18))
        vm.invalidate_hva(PageRange.covering(ByteOffset(address_of(memory)), len(memory)))
        assert not vm.mmu.table.lookup(Gfn(1 << 18))
        hole = UserspaceMemoryRegion(2, 0, Gpa(2 << 30), PAGE_SIZE, ByteOffset(PAGE_SIZE))
        await vm.set_user_memory_region(hole)
        with raises(errno.EFAULT):
            await vm.fault(Access(Gfn(2 << 18), write=False, side=Side.SHARED))
    assert seen == [b"here"]


async def test_dirty_log_has_what_was_written_since_it_was_taken(guest: Guest) -> None:
    def program(*pages: int) -> Program:
        for page in pages:
            yield Load(Gpa((1 << 30) + (page + 1) * PAGE_SIZE), 1)
            yield Store(Gpa((1 << 30) + page * PAGE_SIZE), b"x")

    def dirty(vm: VM) -> list[int]:
        return np.flatnonzero(np.unpackbits(vm.get_dirty_log(1), bitorder="little")).tolist()

    async with guest() as (vm, vmm):
        memory = mmap.mmap(-1, 100 * PAGE_SIZE)
        await vm.set_user_memory_region(classic(memory, 1, 1 << 30))
        await run(vm, vmm, program(1, 5), 0)
        for slot, number in ((1, errno.ENOENT), (7, errno.ENOENT), (32764, errno.EINVAL)):
            with raises(number):
                vm.get_dirty_log(slot)
        await vm.set_user_memory_region(classic(memory, 1, 1 << 30, KVM_MEM_LOG_DIRTY_PAGES))
        assert dirty(vm) == []
        await run(vm, vmm, program(5, 6, 70), 1)
        assert dirty(vm) == [5, 6, 70]
        assert dirty(vm) == []
        await run(vm, vmm, program(6), 2)
        vm.manual_dirty_log_protect = True
        assert dirty(vm) == dirty(vm) == [6]
        for first, count in ((1, 64), (0, 65), (0, 0), (64, 64)):
            with raises(errno.EINVAL):
                vm.clear_dirty_log(1, first, count, np.full(64, 255, np.uint8))
        assert dirty(vm) == [6]
        vm.clear_dirty_log(1, 0, 64, np.full(8, 255, np.uint8))
        assert dirty(vm) == []
        await run(vm, vmm, program(6), 3)
        assert dirty(vm) == [6]


async def test_age_is_what_was_accessed_since(guest: Guest) -> None:
    def program() -> Program:
        yield Load(Gpa(0x3000), 1)

    async with guest() as (vm, vmm):
        gfns = GfnRange(Gfn(0), Gfn(16))
        await run(vm, vmm, program(), 0)
        assert vm.test_age(gfns)
        assert vm.age(gfns)
        assert not vm.age(gfns)
        await run(vm, vmm, program(), 1)
        assert vm.test_age(gfns)
        assert not vm.test_age(GfnRange(Gfn(4), Gfn(16)))


async def test_file_call_in_the_loop_of_the_vm_ends_with_the_reason(mount_memfs: MountMemfs) -> None:
    """It would wait for ever for what only this loop can do; memfs ends it, and says whose fault it is."""
    memfs = mount_memfs("size=64m,notify_timeout=1")
    memfs.expected.append("its own thread")
    memfs.run("truncate", "-s", str(SIZE), "shared")
    fd = await trio.to_thread.run_sync(lambda: os.open(memfs.path / "shared", os.O_RDWR))
    try:
        async with create_vm(str(memfs.socket)) as vm:
            await vm.set_user_memory_region(UserspaceMemoryRegion(0, KVM_MEM_FD, Gpa(0), SIZE, ByteOffset(0), fd))
            assert await vm.fault(Access(Gfn(0), write=True, side=Side.SHARED)) is None
            fallocate(fd, PUNCH, 0, PAGE_SIZE)
            await vm.backing.ended.wait()
            with pytest.raises(StoreGone, match=f"its own thread {threading.get_native_id()} waits in the file call"):
                vm.check_alive()
    finally:
        await trio.to_thread.run_sync(os.close, fd)
