"""Memslots of kvmsim against those of the real KVM: the same random calls, and each time the same answer.

Classic slots, since the real KVM knows nothing of the RFC's. Where there is no /dev/kvm, the sequences still run
against kvmsim alone, which must then keep its own invariants: a refused call changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from kvmsim.backing import Backing
from kvmsim.uapi import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, UserspaceMemoryRegion
from kvmsim.vm import VM
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gpa

from .real_kvm import RealKvm, real_kvm_or_skip

K4 = PAGE_SIZE
GIB = 1 << 30
SLOTS = [0, 1, 2, 3, 32763, 32764, 65535, 65536, (1 << 32) - 1]
GPAS = [0, K4, 2 * K4, 3 * K4, 8 * K4, 64 * K4, GIB, GIB + K4, 100, (1 << 52) - K4, 1 << 52, (1 << 64) - K4, 1 << 40]
SIZES = [0, 0, 0, K4, K4, 2 * K4, 4 * K4, 64 * K4, 100, (1 << 64) - K4]
HVAS = [0, 0x10000000, 0x10000000, 0x20000000, 0x10000001, 0x7FFFFFFFF000 - K4, 0x7FFFFFFFF000, 1 << 63]
FLAGS = [0, 0, 0, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY, 1 << 5]


@asynccontextmanager
async def vm_without_backing() -> AsyncIterator[VM]:
    """A VM whose slots are all classic never talks to a store."""
    async with trio.open_nursery() as nursery:
        backing: Backing = None  # type: ignore[assignment]
        yield VM(backing, nursery)
        nursery.cancel_scope.cancel()


async def ours(vm: VM, call: tuple[int, int, int, int, int]) -> int:
    slot, flags, gpa, size, hva = call
    before = [(each.id, each.gfns, each.flags) for each in vm.mmu.slots]
    try:
        await vm.set_user_memory_region(UserspaceMemoryRegion(slot, flags, Gpa(gpa), size, ByteOffset(hva)))
    except OSError as error:
        assert [(each.id, each.gfns, each.flags) for each in vm.mmu.slots] == before, "refused, and changed something"
        return error.errno or 0
    finally:
        vm.check()
    return 0


def some_call(random_: random.Random, vm: VM) -> tuple[int, int, int, int, int]:
    """Any call; every other time one that is nearly what a slot is already."""
    call = tuple(random_.choice(values) for values in (SLOTS, FLAGS, GPAS, SIZES, HVAS))
    existing = list(vm.mmu.slots)
    if existing and random_.random() < 0.5:
        slot = random_.choice(existing)
        same = (slot.id, slot.flags, slot.gfns.start * K4, len(slot.gfns) * K4, slot.userspace_addr)
        changed = random_.sample(range(1, 5), random_.choice([0, 1, 1, 2]))
        call = tuple(call[field] if field in changed else same[field] for field in range(5))
    return call  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(8))
async def test_same_answers_as_the_real_kvm(seed: int) -> None:
    real = real_kvm_or_skip()
    try:
        await compare(real, seed, 1500)
    finally:
        real.close()


async def compare(real: RealKvm, seed: int, calls: int) -> None:
    random_ = random.Random(seed)
    answers = set()
    async with vm_without_backing() as vm:
        for number in range(calls):
            call = some_call(random_, vm)
            expected, got = real.set_region(*call), await ours(vm, call)
            assert got == expected, f"call {number}: slot, flags, gpa, size, hva = {[hex(value) for value in call]}"
            answers.add(got)
    assert len(answers) >= 3, "the calls were all alike"


async def test_all_slots_at_once() -> None:
    async with vm_without_backing() as vm:
        for slot in range(32764):
            await vm.set_user_memory_region(
                UserspaceMemoryRegion(slot, 0, Gpa(slot * 2 * K4), K4, ByteOffset(0x10000000))
            )
        assert len(vm.mmu.slots) == 32764
        with pytest.raises(OSError, match="below 32764"):
            await vm.set_user_memory_region(UserspaceMemoryRegion(32764, 0, Gpa(1 << 40), K4, ByteOffset(0)))
        vm.check()
