"""A process with virtual machines on a memfs, for the benchmarks: registers, acknowledges and maps, as kvmsim does.

    python -m bench.owner DIRECTORY VMS SLOTS PAGES [FIRST]

Each VM, numbered from FIRST on (default 0), has slots of so many pages on DIRECTORY/VM-SLOT/shared and .../private,
which it makes (for one VM with one slot directly in DIRECTORY), shared memory allocated. Says that it is ready with a
line, and ends with its standard input.
"""

from __future__ import annotations

import os
import sys
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import trio

from kvmsim.uapi import KVM_MEM_FD, UserspaceMemoryRegion
from kvmsim.vm import VM, create_vm
from memfs.contract.protocol.messages import FileId
from memfs.contract.sys.libc import fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gpa

SEAL = "user.memfs.seals"


def make_files(directory: Path, pages: int) -> tuple[int, int]:
    """Create the two files of a slot and return the VMM's descriptors of them."""
    directory.mkdir(exist_ok=True)
    shared = os.open(directory / "shared", os.O_CREAT | os.O_RDWR)
    os.close(os.open(directory / "private", os.O_CREAT | os.O_RDWR))
    os.setxattr(directory / "private", SEAL, b"guest")
    private = os.open(directory / "private", os.O_RDWR)
    os.ftruncate(private, pages * PAGE_SIZE)
    fallocate(shared, 0, 0, pages * PAGE_SIZE)
    return shared, private


async def add_slot(vm: VM, number: int, files: tuple[int, int], pages: int) -> None:
    """Add a slot behind the one before it."""
    size = pages * PAGE_SIZE
    shared, private = map(FileId, files)
    await vm.set_user_memory_region(
        UserspaceMemoryRegion(number, KVM_MEM_FD, Gpa(number * size), size, ByteOffset(0), shared, private)
    )
    for fd in files:
        await trio.to_thread.run_sync(os.close, fd)


async def run(root: Path, vms: int, slots: int, pages: int, first: int = 0) -> None:
    """Run the virtual machines until standard input ends."""
    socket_path = (await trio.to_thread.run_sync(os.getxattr, root, "user.memfs.socket")).decode()
    async with AsyncExitStack() as stack:
        for number in range(first, first + vms):
            vm = await stack.enter_async_context(create_vm(socket_path, name=f"bench-{number}"))
            for slot in range(slots):
                directory = root if vms == slots == 1 else root / f"{number}-{slot}"
                await add_slot(vm, slot, await trio.to_thread.run_sync(make_files, directory, pages), pages)
        print("ready", flush=True)
        await trio.lowlevel.wait_readable(sys.stdin)


if __name__ == "__main__":
    trio.run(partial(run, Path(sys.argv[1]), *map(int, sys.argv[2:])))
