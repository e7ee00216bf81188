"""A guest of kvmsim on a mounted memfs: the VM runs in the process of the test, memfs in its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from kvmsim.backing import GuestFile
from kvmsim.engines.program import Program, ProgramEngine
from kvmsim.vm import VM, create_vm
from kvmsim.vm_type import VmType
from kvmsim.vmm.vmm import Vmm, open_memory
from memfs.contract.units import PAGE_SIZE
from tests.helpers import not_none

from .conftest import Memfs, memfs_command

SIZE = 8 << 20

#: `guest_on` a memfs
Guest = Callable[..., AbstractAsyncContextManager[tuple[VM, Vmm]]]


@asynccontextmanager
async def guest_on(
    memfs: Memfs, granule: int = PAGE_SIZE, *, vm_type: VmType = VmType.SNP, size: int = SIZE
) -> AsyncIterator[tuple[VM, Vmm]]:
    """Make a VM of `size` bytes on two files of a memfs, and its VMM that converts `granule` bytes at a time."""
    shared, private = memfs.path / "shared", memfs.path / "private"
    memfs.run("touch", "shared")
    memfs.run(*memfs_command("create", "--seals", "guest", private))
    memory = open_memory(str(shared), str(private), size, granule)
    vmm = await trio.to_thread.run_sync(memory.__enter__)
    try:
        async with create_vm(str(memfs.socket), vm_type=vm_type) as vm:
            await vmm.add_memory(vm)
            yield vm, vmm
            vm.check()
    finally:
        await trio.to_thread.run_sync(memory.__exit__, None, None, None)


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
