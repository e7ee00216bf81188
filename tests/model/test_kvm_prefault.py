"""KVM_PRE_FAULT_MEMORY of kvmsim against that of the real KVM: errno, and what it says is left, for any range.

Classic slots on memory of this process, which is mapped in part, so that both stop in the middle of a range as well.
A KVM without two-dimensional paging refuses every range that it does not refuse as one; then only that is compared.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from kvmsim.uapi import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, PreFaultMemory, UserspaceMemoryRegion
from kvmsim.vm import VM
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gpa

from .real_kvm import KVM_CAP_PRE_FAULT_MEMORY, RealKvm, real_kvm_or_skip

PAGES = 64
HOLES = (20, 21, 40)  # pages at which nothing is mapped
#: slot, flags, gfn, page of the memory, pages
SLOTS = ((0, 0, 16, 0, 32), (1, KVM_MEM_READONLY, 48, 32, 8), (2, KVM_MEM_LOG_DIRTY_PAGES, 60, 36, 12))
GFNS = (0, 1, 15, 16, 17, 35, 36, 37, 47, 48, 50, 55, 56, 59, 60, 63, 64, 71, 72, 100, 1 << 39, (1 << 40) - 1, 1 << 41)


@pytest.fixture
def memory() -> Iterator[int]:
    """The address of PAGES pages, without those in HOLES."""
    mapping = mmap.mmap(-1, PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping[:] = b"x" * len(mapping)
    address = ctypes.addressof(view := ctypes.c_char.from_buffer(mapping))
    libc = ctypes.CDLL(None, use_errno=True)
    none_at_all, protection = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10, 0  # MAP_FIXED, PROT_NONE
    libc.mmap.restype = ctypes.c_void_p
    for page in HOLES:
        at = ctypes.c_void_p(address + page * PAGE_SIZE)
        assert libc.mmap(at, ctypes.c_size_t(PAGE_SIZE), protection, none_at_all, -1, ctypes.c_long(0)) == at.value
    yield address
    del view
    mapping.close()


@pytest.fixture
def real(memory: int) -> Iterator[RealKvm]:
    kvm = real_kvm_or_skip()
    try:
        yield kvm
    finally:
        kvm.close()


async def ours(vm: VM, vcpu: Any, gpa: int, size: int, flags: int) -> tuple[int, int, int]:
    left, number = PreFaultMemory(Gpa(gpa), size, flags), 0
    try:
        await vcpu.pre_fault_memory(left)
    except OSError as error:
        number = error.errno or 0
    vm.check()
    return number, left.gpa, left.size


async def test_same_answers_as_the_real_kvm(real: RealKvm, memory: int) -> None:
    store: Any = SimpleNamespace(gone=None)
    vcpu_fd = real.create_vcpu(0)
    answers, complete = set(), real.has(KVM_CAP_PRE_FAULT_MEMORY)
    try:
        async with trio.open_nursery() as nursery:
            vm = VM(store, nursery)
            vcpu = vm.create_vcpu(0, SimpleNamespace())
            for slot, flags, gfn, page, pages in SLOTS:
                where = (gfn * PAGE_SIZE, pages * PAGE_SIZE, memory + page * PAGE_SIZE)
                assert real.set_region(slot, flags, *where) == 0
                gpa, size, hva = where
                await vm.set_user_memory_region(UserspaceMemoryRegion(slot, flags, Gpa(gpa), size, ByteOffset(hva)))
            ranges = [(gfn * PAGE_SIZE, pages * PAGE_SIZE, 0) for gfn, pages in itertools.product(GFNS, (0, 1, 3, 32))]
            end = 1 << 64
            odd = [(100, 4096, 0), (65536, 100, 0), (65536, 4096, 1), (65536, 4096, 1 << 40), (end - 4096, 4096, 0)]
            odd += [(65536, end - 4096, 0), (65536, end - 65536, 0), (1 << 63, 1 << 63, 0)]
            calls = ranges + odd
            random.Random(0).shuffle(calls)
            for call in calls:
                expected, got = real.pre_fault_memory(vcpu_fd, *call), await ours(vm, vcpu, *call)
                if expected[0] == errno.ENOTTY:
                    pytest.skip("this KVM has no KVM_PRE_FAULT_MEMORY (Linux 6.11)")
                name = f"gpa, size, flags = {[hex(value) for value in call]}"
                if complete:
                    assert got == expected, name
                else:
                    assert (got[0] == errno.EINVAL) == (expected[0] == errno.EINVAL), name
                    assert expected[1:] == call[:2], name
                answers.add((got[0], got[2] > 0))
    finally:
        os.close(vcpu_fd)
    assert len(answers) >= 5, f"the calls were all alike: {answers}"
