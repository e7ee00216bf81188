"""Guests of kvmsim on a mounted memfs: classic memory beside files, dirty pages, huge pages, other slots.

The VM runs in the process of the test, memfs in its own; what the VMM does to files it does in threads.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import mmap
import os
import threading

import numpy as np
import pytest
import trio

from kvmsim.backing import StoreGone
from kvmsim.engines.program import Hypercall, Load, Program, ProgramEngine, Store, convert
from kvmsim.exits import HypercallExit
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import PG_LEVEL_2M
from kvmsim.side import Side
from kvmsim.uapi import (
    KVM_MEM_FD,
    KVM_MEM_LOG_DIRTY_PAGES,
    UserspaceMemoryRegion,
)
from kvmsim.vm import VM, create_vm
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gfn, GfnRange, Gpa, PageRange
from tests.helpers import raises

from .conftest import Memfs, MountMemfs, memfs_command
from .guests import SIZE, Guest, blocks, guest_on, run

PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@pytest.fixture
def guest(memfs: Memfs) -> Guest:
    return functools.partial(guest_on, memfs)


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
    memfs.expected.append("of its own process")
    memfs.run("truncate", "-s", str(SIZE), "shared")
    fd = await trio.to_thread.run_sync(lambda: os.open(memfs.path / "shared", os.O_RDWR))
    try:
        async with create_vm(str(memfs.socket)) as vm:
            await vm.set_user_memory_region(UserspaceMemoryRegion(0, KVM_MEM_FD, Gpa(0), SIZE, ByteOffset(0), fd))
            assert await vm.fault(Access(Gfn(0), write=True, side=Side.SHARED)) is None
            fallocate(fd, PUNCH, 0, PAGE_SIZE)
            await vm.backing.ended.wait()
            with pytest.raises(StoreGone, match=f"is made by thread {threading.get_native_id()} of its own process"):
                vm.check_alive()
    finally:
        await trio.to_thread.run_sync(os.close, fd)
