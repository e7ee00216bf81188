"""Guests of kvmsim on real huge pages: mapped by huge leaves, converted whole, and nothing that they keep is lost."""

from __future__ import annotations

import errno
import os

import pytest
import trio

from kvmsim.engines.program import Load, Program, Store, convert
from kvmsim.exits import Exit
from kvmsim.mmu.pte import PG_LEVEL_1G, PG_LEVEL_2M
from kvmsim.side import Side
from kvmsim.slots.dirty import pages_in
from kvmsim.uapi import KVM_MEM_FD, KVM_MEM_LOG_DIRTY_PAGES, PreFaultMemory, UserspaceMemoryRegion
from kvmsim.vcpu import VCPU
from kvmsim.vm import create_vm
from memfs.contract.sys.hugetlb import Pool
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gpa
from tests.helpers import raises
from tests.huge_pages import SIZE_1G, SIZE_2M, huge_pages

from .conftest import Memfs, MountMemfs, memfs_command
from .guests import blocks, guest_on, private_of, run
from .test_kvmsim import KVMSIM, number

HUGE = SIZE_2M // PAGE_SIZE


@pytest.fixture
def memfs(pool: Pool, mount_memfs: MountMemfs) -> Memfs:
    return mount_memfs("size=64m,pagesize=2M")


# -- the command -------------------------------------------------------------------------------------------------------


def command(memfs: Memfs, *options: str) -> list[str]:
    memfs.run("touch", "shared")
    memfs.run(*memfs_command("create", "--seals", "guest", "private"))
    return [*KVMSIM, "run", "--shared", "shared", "--private", "private", "--mem", "8M", *options]


def test_trace_runs_on_huge_pages(memfs: Memfs) -> None:
    """One conversion, one fault and one walk for what takes hundreds of each on small pages."""
    result = memfs.run(*command(memfs))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every byte was as stored" in result.stdout
    assert number(result.stdout, "to private") == 1
    assert number(result.stdout, "misses") < 10
    assert number(result.stdout, "private, 0 shared, in") == HUGE
    assert (memfs.path / "private").stat().st_blocks == SIZE_2M // 512


@pytest.mark.parametrize("options", [("--prefault",), ("--vcpus", "3", "--slots", "3"), ("--no-map-on-fallocate",)])
def test_trace_runs_in_every_way(memfs: Memfs, options: tuple[str, ...]) -> None:
    assert memfs.run("sh", "-c", "touch shared").returncode == 0
    result = memfs.run(*command(memfs, *options))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every byte was as stored" in result.stdout
    again = memfs.run(*command(memfs, *options))
    assert again.returncode == 0, again.stdout + again.stderr
    assert number(again.stdout, "to private") == 0


def test_guest_that_needs_both_sides_of_a_huge_page_is_told(memfs: Memfs) -> None:
    result = memfs.run(*command(memfs, "--private-ranges", "0-64k"))
    assert result.returncode == 1
    assert "part of a huge page of 2M, which is converted whole" in result.stderr


def test_guest_runs_on_one_page_of_a_gibibyte(mount_memfs: MountMemfs) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root mounts a hugetlbfs")
    with huge_pages(1, SIZE_1G):
        memfs = mount_memfs("size=3g,pagesize=1G")
        result = memfs.run(*command(memfs, "--mem", "1G"))
        assert result.returncode == 0, result.stdout + result.stderr
        assert number(result.stdout, "private, 0 shared, in") == 1 << 18
        assert number(result.stdout, "misses") < 10
        memfs.stop()


# -- conversions -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pool")
async def test_a_part_of_a_huge_page_becomes_private_with_all_of_it_or_not_at_all(mount_memfs: MountMemfs) -> None:
    seen: list[object] = []

    def program() -> Program:
        seen.append((yield convert(Gpa(0x3000), 2, Side.PRIVATE)))  # in memory that nothing is in
        yield Store(Gpa(SIZE_2M - 8), b"other end", encrypted=True)  # of which this makes the next one private
        yield Store(Gpa(2 * SIZE_2M + 0x5000), b"shared")
        seen.append((yield convert(Gpa(2 * SIZE_2M), 1, Side.PRIVATE)))
        seen.append((yield Load(Gpa(2 * SIZE_2M + 0x5000), 6)))
        seen.append((yield convert(Gpa(2 * SIZE_2M + 0x5000), 1, Side.PRIVATE)))  # it asks for what is lost itself

    async with guest_on(mount_memfs("size=64m,pagesize=2M,huge=never")) as (vm, vmm):
        await run(vm, vmm, program())
        assert seen == [0, -errno.EINVAL, b"shared", 0]
        assert await trio.to_thread.run_sync(blocks, vmm.private, vmm.shared) == [3 * HUGE, 0]
        assert vm.mmu.table.huge[PG_LEVEL_2M] == 3


async def test_a_part_of_a_huge_page_does_not_become_shared(memfs: Memfs) -> None:
    seen: list[object] = []

    def program() -> Program:
        yield Store(Gpa(0x1000), b"private", encrypted=True)
        seen.append((yield convert(Gpa(0x5000), 1, Side.SHARED)))
        seen.append((yield convert(Gpa(SIZE_2M - PAGE_SIZE), 2, Side.SHARED)))
        seen.append((yield Load(Gpa(0x1000), 7, encrypted=True)))
        seen.append((yield convert(Gpa(SIZE_2M), 1, Side.SHARED)))  # which it is
        seen.append((yield convert(Gpa(0), HUGE, Side.SHARED)))
        seen.append((yield Load(Gpa(0x1000), 7)))

    async with guest_on(memfs) as (vm, vmm):
        await run(vm, vmm, program())
        assert seen == [-errno.EINVAL, -errno.EINVAL, b"private", 0, 0, bytes(7)]
        assert blocks(vmm.private) == [0]
        with raises(errno.EINVAL, match="part of a huge page of 2M"):
            await vmm.convert(Gpa(0), SIZE_2M, Side.PRIVATE)
            await vmm.convert(Gpa(0), PAGE_SIZE, Side.SHARED)


async def test_of_a_huge_page_on_tmpfs_a_part_is_converted(mount_memfs: MountMemfs) -> None:
    """There it can be split."""
    seen: list[object] = []

    def program() -> Program:
        seen.append((yield convert(Gpa(0), HUGE, Side.PRIVATE)))
        yield Store(Gpa(0x1000), b"private", encrypted=True)
        seen.append((yield convert(Gpa(0x5000), 1, Side.SHARED)))
        seen.append((yield Load(Gpa(0x1000), 7, encrypted=True)))

    async with guest_on(mount_memfs("size=64m,huge=always")) as (vm, vmm):
        await run(vm, vmm, program())
        assert seen == [0, 0, b"private"]
        assert blocks(vmm.private) == [HUGE - 1]


# -- how it is mapped --------------------------------------------------------------------------------------------------


async def test_prefaulted_memory_is_mapped_by_huge_leaves(memfs: Memfs) -> None:
    async with guest_on(memfs) as (vm, vmm):
        await vmm.convert(Gpa(0), 2 * SIZE_2M, Side.PRIVATE)
        vm.mmu.unmap(vm.mmu.table.everything)
        left = PreFaultMemory(Gpa(0), 2 * SIZE_2M)
        while left.size:
            await vm.create_vcpu(len(vm.vcpus), NoGuest()).pre_fault_memory(left)
        assert (vm.mmu.table.huge[PG_LEVEL_2M], vm.mmu.table.mapped) == (2, 2 * HUGE)


async def test_pages_of_2_mib_are_mapped_by_leaves_of_2_mib(pool: Pool, mount_memfs: MountMemfs) -> None:
    """Also where a whole gibibyte is private: the host has no larger pages to map."""
    with huge_pages(512):
        memfs = mount_memfs("size=3g,pagesize=2M")
        async with guest_on(memfs, size=SIZE_1G) as (vm, vmm):
            await vmm.convert(Gpa(0), SIZE_1G, Side.PRIVATE)
            while not vm.mmu.table.mapped:  # by a task that asks where it is
                await trio.lowlevel.checkpoint()
            assert vm.mmu.table.huge == {PG_LEVEL_2M: 512, PG_LEVEL_1G: 0}
            assert private_of(vm).largest_order == 9
        await trio.to_thread.run_sync(memfs.stop)


class NoGuest:
    async def run(self, vcpu: VCPU) -> Exit:
        raise AssertionError(f"vCPU {vcpu.id} is not to run")


async def test_dirty_log_of_memory_on_huge_pages(mount_memfs: MountMemfs) -> None:
    """A slot with private memory logs nothing; one without splits its leaves, and each page counts."""
    memfs = mount_memfs("size=64m,huge=always")

    def make() -> int:
        fd = os.open(memfs.path / "shared", os.O_RDWR | os.O_CREAT)
        os.truncate(fd, 2 * SIZE_2M)
        return fd

    fd = await trio.to_thread.run_sync(make)
    async with create_vm(str(memfs.socket)) as vm:

        def region(flags: int) -> UserspaceMemoryRegion:
            return UserspaceMemoryRegion(0, KVM_MEM_FD | flags, Gpa(0), 2 * SIZE_2M, ByteOffset(0), fd, -1)

        await vm.set_user_memory_region(region(0))
        vcpu = vm.create_vcpu(0, NoGuest())
        left = PreFaultMemory(Gpa(0), 2 * SIZE_2M)
        while left.size:
            await vcpu.pre_fault_memory(left)
        await vm.set_user_memory_region(region(KVM_MEM_LOG_DIRTY_PAGES))
        for gfn in (3, HUGE + 7):
            assert await vm.fault(vm.decode(Gpa(gfn * PAGE_SIZE), write=True)) is None
        assert list(pages_in(vm.get_dirty_log(0))) == [3, HUGE + 7]
        vm.check()
        assert not any(vm.get_dirty_log(0))
    await trio.to_thread.run_sync(os.close, fd)
