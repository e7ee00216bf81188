"""What an access of the guest is: a fetch is none of the others, aliases are no memory, and pages have an age."""

from __future__ import annotations

import errno

import pytest

from kvmsim.engines.program import Fetch, Program, ProgramEngine, Store
from kvmsim.exits import HALT, InternalErrorExit, MemoryErrorExit
from kvmsim.mmu.walk import translate
from kvmsim.side import Side
from kvmsim.uapi import KVM_EXIT_MEM_MAP_PRIVATE
from kvmsim.vm_type import VmType
from memfs.contract.units import PAGE_SIZE, Gpa
from tests.helpers import one, pages, raises

from .conftest import PAGES, NewVm, region


async def test_instruction_is_fetched_where_there_is_memory(new_vm: NewVm) -> None:
    """Elsewhere no device answers, as for a load: there is nothing that could be executed."""
    found: list[bytes | None] = []

    def program() -> Program:
        yield Store(Gpa(8), b"\x90\xc3")
        found.append((yield Fetch(Gpa(8), 2)))
        yield Fetch(Gpa(PAGES * PAGE_SIZE), 1)

    async with new_vm(vm_type=VmType.DEFAULT) as (vm, store):
        await vm.set_user_memory_region(region(store.file()))
        vcpu = vm.create_vcpu(0, ProgramEngine(program()))
        assert isinstance(exit_ := await vcpu.run(), InternalErrorExit)
        assert (exit_.gpa, found) == (PAGES * PAGE_SIZE, [b"\x90\xc3"])


async def test_snp_guest_fetches_from_private_memory(new_vm: NewVm) -> None:
    async with new_vm(vm_type=VmType.SNP) as (vm, store):
        await vm.set_user_memory_region(region(store.file(), store.file(guest=True)))
        access = vm.decode(Gpa(PAGE_SIZE), write=False, fetch=True)
        assert await vm.fault(access) == MemoryErrorExit(KVM_EXIT_MEM_MAP_PRIVATE, Gpa(PAGE_SIZE), PAGE_SIZE)


@pytest.mark.parametrize(("vm_type", "bit"), [(VmType.TDX_48, 47), (VmType.TDX_52, 51)])
async def test_slot_lies_on_no_alias_of_the_shared_bit(new_vm: NewVm, vm_type: VmType, bit: int) -> None:
    async with new_vm(vm_type=vm_type) as (vm, store):
        files = store.file(), store.file(guest=True)
        for gpa in (1 << bit, (1 << bit) - PAGE_SIZE):
            with raises(errno.EINVAL):
                await vm.set_user_memory_region(region(*files, gpa=gpa))
        assert not len(vm.mmu.slots)
        await vm.set_user_memory_region(region(*files, gpa=(1 << bit) - PAGES * PAGE_SIZE))


async def test_pages_of_a_file_are_young_if_they_are_in_any_slot(new_vm: NewVm) -> None:
    """kvm_age_hva, by pages of a file: those of all slots on it lose their age, and not only the first."""

    def program() -> Program:
        for gpa in (0, 1 << 30):
            yield Store(Gpa(gpa + 3 * PAGE_SIZE), b"x")

    async with new_vm() as (vm, store):
        shared = store.file()
        for number, gpa in enumerate((0, 1 << 30)):
            await vm.set_user_memory_region(region(shared, slot=number, gpa=gpa))
        file = store.by_fd(shared).id
        vcpu = vm.create_vcpu(0, ProgramEngine(program()))
        assert await vcpu.run() == HALT
        assert vm.test_age_pages(file, one(3))
        assert not vm.test_age_pages(file, pages(4, PAGES))
        assert vm.test_age_pages(file, pages(0, PAGES)), "to look does not change it"
        assert not vm.age_pages(file, pages(4, PAGES))
        assert vm.age_pages(file, one(3))
        assert not vm.test_age_pages(file, one(3))
        assert not vm.age_pages(file, pages(0, PAGES))
        access = vm.decode(Gpa((1 << 30) + 3 * PAGE_SIZE), write=False)
        assert access.side is Side.SHARED
        assert translate(vm.mmu, vcpu.tlb, access) is not None
        assert vm.age_pages(file, one(3)), "the TLB has not hidden it"
