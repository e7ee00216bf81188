"""The engine `kvm` alone: vCPUs that are parked at a page, windows, and the exits that only a real KVM has."""

from __future__ import annotations

import errno
import struct
import sys

import numpy as np
import pytest
import trio

from kvmsim.backing import Notification, StoreGone
from kvmsim.engines.kvm.machine import KvmMachine, open_kvm_machine
from kvmsim.engines.user_mode import IDT, PML4, tables
from kvmsim.exits import HaltExit, InterruptExit, MemoryErrorExit, MmioExit, ShutdownExit
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from kvmsim.uapi import KVM_MEM_FD, UserspaceMemoryRegion
from kvmsim.vm import VM, create_vm
from kvmsim.vm_type import VmType
from memfs.contract.protocol.messages import InvalidateBegin
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gfn, GfnRange, Gpa
from tests.helpers import raises

from .conftest import Memfs, MountMemfs, run
from .native import AREA, AREA_GFN, SIZE, NewGuest, beside, choice_or_skip, kvm_guest, machine_of
from .tools import needs

__all__ = ["kvm_guest"]


@pytest.mark.parametrize("pages_a_fault", [1, 64, 512])
async def test_pages_are_projected_in_blocks(kvm_guest: NewGuest, pages_a_fault: int) -> None:
    async with kvm_guest(pages_a_fault=pages_a_fault) as guest:
        await guest.run("c")
        machine = machine_of(guest)
        before = machine.events
        assert (await guest.run("w", AREA + 512 * PAGE_SIZE, 1024, 1, 2)).rbx == 3 * 1024
        assert machine.events - before <= 1024 // pages_a_fault + 8  # and the program's own pages


async def test_cut_off_before_it_misses_a_page_it_says_so(
    mount_memfs: MountMemfs, kvm_guest: NewGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had been stopped: what memfs says is not read before the guest has missed its page."""
    memfs = mount_memfs("size=64m,notify_timeout=1")
    memfs.expected.append("fenced")
    punch = ("fallocate", "--punch-hole", "--offset", str(AREA), "--length", "4K")
    async with kvm_guest(on=memfs) as guest:
        await guest.run("w", AREA, 1, 1, 5)
        peer, asked = guest.vm.backing._client._peer, list[bool]()

        async def catch_up() -> None:
            asked.append(True)
            peer._read_on()
            await VM.catch_up(guest.vm)

        monkeypatch.setattr(guest.vm, "catch_up", catch_up)
        peer._datagrams.pause()
        result = await trio.to_thread.run_sync(memfs.run, *punch, guest.private)
        assert result.returncode == 0, result.stderr
        with pytest.raises(StoreGone, match="memfs has cut us off: "):
            await guest.run("w", AREA, 1, 1, 5)
        assert asked


# -- stopping it -----------------------------------------------------------------------------------------------------


async def test_kicked_where_it_is_parked_it_goes_on_from_there(kvm_guest: NewGuest) -> None:
    async with kvm_guest() as guest:
        await guest.to_shared(0, 1)
        vcpu = guest.create("w", AREA, 1, 1, 5)
        exit_ = await vcpu.run()
        assert isinstance(exit_, MemoryErrorExit)
        with raises(errno.EBUSY):
            assert guest.engines[0].registers
        vcpu.kick()
        assert isinstance(await vcpu.run(), InterruptExit)
        assert isinstance(await vcpu.run(), MemoryErrorExit)
        await guest.vmm.answer(exit_)
        assert await guest.vmm.run(vcpu) == HaltExit(0)
        assert await guest.load_page(0) == 5


async def test_closed_where_it_is_parked_it_allocates_nothing(memfs: Memfs, kvm_guest: NewGuest) -> None:
    def blocks(*names: str) -> str:
        return memfs.run("stat", "--format", "%b", *names).stdout

    async with kvm_guest() as guest:
        await guest.to_shared(0, 2)
        vcpus = [guest.create("w", AREA + number * PAGE_SIZE, 1, 1, 1) for number in range(2)]
        for vcpu in vcpus:
            assert isinstance(await vcpu.run(), MemoryErrorExit)
        before = await trio.to_thread.run_sync(blocks, guest.private, guest.shared)
    assert blocks(guest.private, guest.shared) == before


async def test_those_parked_at_one_page_go_on_when_they_are_run(kvm_guest: NewGuest) -> None:
    async with kvm_guest() as guest:
        await guest.to_shared(0, 1)
        vcpus = [guest.create("w", AREA, 1, 1, 1) for _ in range(2)]
        exits = [await vcpu.run() for vcpu in vcpus]
        await guest.vmm.answer(exits[0])
        assert await guest.vmm.run(vcpus[0]) == HaltExit(0)
        await trio.sleep(0.01)
        assert await guest.load_page(0) == 1, "the other one ran along"
        assert await guest.vmm.run(vcpus[1]) == HaltExit(0)
        assert await guest.load_page(0) == 2


async def test_projection_of_a_neighbour_wakes_nobody(kvm_guest: NewGuest) -> None:
    async with kvm_guest() as guest:
        await guest.to_shared(0, 1)
        vcpus = [guest.create("w", AREA, 1, 1, 1), guest.create("w", AREA + PAGE_SIZE, 1, 1, 1)]
        exit_ = await vcpus[0].run()
        assert isinstance(exit_, MemoryErrorExit)
        await guest.vmm.answer(exit_)
        assert await guest.vmm.run(vcpus[1]) == HaltExit(0)
        await trio.sleep(0.01)
        assert await guest.load_page(0) == 0, "it went on although nobody ran it"
        assert await guest.vmm.run(vcpus[0]) == HaltExit(0)
        assert await guest.load_page(0) == 1


async def test_slot_comes_and_goes_while_vcpus_are_parked(kvm_guest: NewGuest) -> None:
    """The one that waits for its page touches it again, and has exited with nothing in between."""
    async with kvm_guest() as guest:
        await guest.to_shared(0, 1)
        vcpu = guest.create("w", AREA, 1, 1, 5)
        exit_ = await vcpu.run()
        assert isinstance(exit_, MemoryErrorExit)
        for size in (1 << 20, 0):
            region = UserspaceMemoryRegion(7, KVM_MEM_FD, Gpa(SIZE), size, ByteOffset(0), guest.vmm.shared)
            await guest.vm.set_user_memory_region(region)
        await guest.vmm.answer(exit_)
        assert await guest.vmm.run(vcpu) == HaltExit(0)
        assert await guest.load_page(0) == 5
        assert vcpu.exits == {"MAP_PRIVATE": 1, "HLT": 1}


async def test_slot_does_not_change_while_kvm_itself_waits_for_guest_memory(kvm_guest: NewGuest) -> None:
    """Page tables are read by KVM; where a signal gets it out of that, the change is made instead."""
    async with kvm_guest() as guest:
        await guest.vmm.convert(Gpa(PML4), PAGE_SIZE, Side.SHARED)
        vcpu = guest.create("w", AREA, 1, 1, 5)
        exit_ = await vcpu.run()
        assert isinstance(exit_, MemoryErrorExit)
        region = UserspaceMemoryRegion(7, KVM_MEM_FD, Gpa(SIZE), 1 << 20, ByteOffset(0), guest.vmm.shared)
        refused: list[str] = []
        try:
            await guest.vm.set_user_memory_region(region)
        except OSError as error:
            refused.append(str(error))
        await guest.vmm.answer(exit_)
        await guest.memory.write(Gpa(PML4), tables(SIZE, guest.vm.type.shared_bit)[PML4 : PML4 + PAGE_SIZE])
        assert await guest.vmm.run(vcpu) == HaltExit(0)
        if refused:
            assert "convert it, and run the vCPU first" in refused[0]
            assert [slot.id for slot in guest.vm.mmu.slots] == [0]
            await guest.vm.set_user_memory_region(region)


async def test_page_that_the_kernel_waits_for_is_found(kvm_guest: NewGuest) -> None:
    """With KVM's interrupt controllers and interrupts on, one of its threads touches it (asynchronous page fault)."""
    async with kvm_guest(pages_a_fault=1) as guest:
        machine_of(guest).kvm.create_irqchip()
        await guest.to_shared(0, 4)
        vcpu = guest.create("w", AREA, 8, 1, 3)
        registers = guest.engines[0].registers
        registers.rflags |= 1 << 9
        guest.engines[0].registers = registers
        with trio.fail_after(20):
            assert await guest.vmm.run(vcpu) == HaltExit(0)
        assert guest.engines[0].registers.rbx == 8 * (1 + 2 + 3)
        assert vcpu.exits == {"MAP_PRIVATE": 4, "HLT": 1}


# -- memory ----------------------------------------------------------------------------------------------------------


async def test_invalidation_is_acknowledged_when_no_window_maps_the_pages(memfs: Memfs, kvm_guest: NewGuest) -> None:
    seen: list[list[int]] = []

    async with kvm_guest() as guest:

        def notified(message: Notification, _: Memslot, gfns: GfnRange, side: Side) -> None:
            if isinstance(message, InvalidateBegin) and side is Side.PRIVATE:
                present = np.concatenate([window.present()[0] for window in machine_of(guest).windows])
                seen.append([gfn for gfn in present.tolist() if gfn in gfns])

        guest.vm.listeners.append(notified)
        vcpu = guest.create("s")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.vmm.run, vcpu)
            for _ in range(20):
                while not await guest.load_page(0):  # noqa: ASYNC110 - the guest sets no events
                    await trio.sleep(0.001)
                punch = ("fallocate", "--punch-hole", "--offset", str(AREA), "--length", "4096", guest.private)
                result = await trio.to_thread.run_sync(memfs.run, *punch)
                assert result.returncode == 0
            vcpu.kick()
        assert len(seen) >= 20
        assert not any(seen)


async def test_check_finds_what_a_window_maps_and_the_page_table_does_not(kvm_guest: NewGuest) -> None:
    async with kvm_guest() as guest:
        await guest.run("w", AREA, 8, 1, 1)
        table, gfn = guest.vm.mmu.table, Gfn(AREA_GFN + 3)
        pte = table.lookup(gfn)
        table.unmap_range(GfnRange(gfn, Gfn(gfn + 1)))  # without a flush
        with pytest.raises(AssertionError, match=f"{gfn:#x} as private"):
            machine_of(guest).check(table)
        machine_of(guest).flush(GfnRange(gfn, Gfn(gfn + 1)))
        machine_of(guest).check(table)
        assert pte
        guest.vm.mmu.ownership.release_run(guest.vm.mmu.slots.find(gfn).private.pfn_of(gfn), 1)  # type: ignore[union-attr, arg-type]  # fmt: skip


async def test_store_to_a_readonly_slot_and_access_to_no_slot_are_mmio(kvm_guest: NewGuest) -> None:
    async with kvm_guest(beside) as guest:
        await guest.memory.write(Gpa(0x1000), tables(2 * SIZE, guest.vm.type.shared_bit)[0x1000:])
        vcpu = guest.create("w", SIZE + (1 << 20) + 16, 1, 0, 1)
        exit_ = await vcpu.run()
        assert exit_ == MmioExit(Gpa(SIZE + (1 << 20) + 16), 8, True)
        assert isinstance(exit_, MmioExit)
        assert exit_.data == struct.pack("=Q", 1)  # what it loaded is memory, and was 0
        vcpu = guest.create("w", SIZE + (3 << 20), 1, 0, 1)
        exit_ = await vcpu.run()
        assert exit_ == MmioExit(Gpa(SIZE + (3 << 20)), 8, False)
        assert isinstance(exit_, MmioExit)
        exit_.data = struct.pack("=Q", 41)
        exit_ = await vcpu.run()
        assert isinstance(exit_, MmioExit)
        assert (exit_.is_write, exit_.data) == (True, struct.pack("=Q", 42))


# -- the other exits -------------------------------------------------------------------------------------------------


async def test_triple_fault_is_a_shutdown(kvm_guest: NewGuest) -> None:
    async with kvm_guest() as guest:
        await guest.memory.write(Gpa(IDT), bytes(4096))
        guest.vm.mmu.flush_tlbs(GfnRange(Gfn(0), Gfn(16)))
        assert await guest.create("u").run() == ShutdownExit()


async def test_vm_of_another_type_is_refused(memfs: Memfs) -> None:
    choice_or_skip("kvm")
    async with create_vm(str(memfs.socket), vm_type=VmType.SNP) as vm:
        with raises(errno.EINVAL, match="VM type snp: on this KVM a gpa says its side as tdx-"):
            async with open_kvm_machine(vm):
                pass
        assert vm.mmu.tlbs == []
        with pytest.raises(ValueError, match="power of two"):
            KvmMachine(vm, 3)


@needs("setpriv")
def test_without_the_right_to_serve_the_kernels_faults_it_says_which_is_missing() -> None:
    program = "from kvmsim.engines.kvm.userfaultfd import Userfaultfd; Userfaultfd()"
    result = run("setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-c", program)
    if "UserfaultfdUnavailable" not in result.stderr:
        pytest.skip(f"everybody may serve them here, or run nothing: {result.stderr.strip()[-80:]}")
    for way in ("root", "CAP_SYS_PTRACE", "/dev/userfaultfd", "vm.unprivileged_userfaultfd=1"):
        assert way in result.stderr
