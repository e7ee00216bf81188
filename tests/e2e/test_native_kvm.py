"""Native code on the real KVM, its memory on a memfs: what `selftest.c` does, and what is done to it meanwhile."""

from __future__ import annotations

import errno
import random
import signal
import struct
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import trio

from kvmsim.backing import Notification, StoreGone
from kvmsim.engines.kvm.machine import KvmMachine, open_kvm_machine
from kvmsim.engines.user_mode import IDT, PORT_EXCEPTION, ExceptionFrame, tables
from kvmsim.exits import (
    HaltExit,
    HypercallExit,
    InterruptExit,
    IoExit,
    MemoryErrorExit,
    MmioExit,
    ShutdownExit,
)
from kvmsim.side import Side
from kvmsim.slots.dirty import pages_in
from kvmsim.slots.memslots import Memslot
from kvmsim.uapi import KVM_MEM_FD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, UserspaceMemoryRegion
from kvmsim.vm import create_vm
from kvmsim.vm_type import VmType
from kvmsim.vmm.vmm import Vmm
from memfs.contract.protocol.messages import InvalidateBegin
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gfn, GfnRange, Gpa
from tests.helpers import raises

from .conftest import Memfs, MountMemfs, run
from .native import AREA, SIZE, NativeGuest, NewGuest, kvm_or_skip, native_guest
from .tools import needs

__all__ = ["native_guest"]

AREA_GFN = AREA // PAGE_SIZE
PAGES = (SIZE - AREA) // PAGE_SIZE


async def to_shared(guest: NativeGuest, first: int, pages: int) -> None:
    """Take private pages of the area away."""
    await guest.vmm.convert(Gpa(AREA + first * PAGE_SIZE), pages * PAGE_SIZE, Side.SHARED)


@pytest.mark.parametrize("pages_a_fault", [1, 64, 512])
async def test_guest_finds_what_it_may_rely_on(native_guest: NewGuest, pages_a_fault: int) -> None:
    async with native_guest(pages_a_fault=pages_a_fault) as guest:
        await guest.run("c")
        assert guest.text == b"hello from native code\n"
        assert guest.vm.vcpus[0].exits == {"HYPERCALL": 7, "MAP_PRIVATE": 2, "MAP_SHARED": 1, "HLT": 1}
        before = guest.machine.events
        assert (await guest.run("w", AREA + 512 * PAGE_SIZE, 1024, 1, 2)).rbx == 3 * 1024
        assert guest.machine.events - before <= 1024 // pages_a_fault + 8  # and the program's own pages


@pytest.mark.parametrize("options", ["size=64m,passthrough=off", "size=64m,backing=memfd", "size=64m,huge=always"])
async def test_any_mount_will_do(mount_memfs: MountMemfs, native_guest: NewGuest, options: str) -> None:
    async with native_guest(on=mount_memfs(options)) as guest:
        await guest.run("c")


async def test_two_vcpus_at_random_while_the_shell_takes_pages_away(memfs: Memfs, native_guest: NewGuest) -> None:
    lots, taken = random.Random(1), 0

    async with native_guest() as guest:
        vcpus = [guest.create("x", 2, PAGES, 5000, (1 << 32) | number) for number in range(2)]
        ended: list[HaltExit | InterruptExit] = []

        async def run_vcpu(number: int) -> None:
            ended.append(await guest.vmm.run(vcpus[number]))
            assert guest.engines[number].registers.rbx <= 8 * taken

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(run_vcpu, number)
            while len(ended) < 2:
                first, pages = lots.randrange(PAGES), lots.randint(1, 4)
                at, size = AREA + first * PAGE_SIZE, pages * PAGE_SIZE
                punch = ("fallocate", "--punch-hole", "--offset", str(at), "--length", str(size), "private")
                taken += pages
                result = await trio.to_thread.run_sync(memfs.run, *punch)
                assert result.returncode == 0, result.stderr
                guest.check_windows()
        assert ended == [HaltExit(0)] * 2
        assert taken


@pytest.mark.parametrize("seed", range(3))
async def test_one_vcpu_at_random_loses_nothing(native_guest: NewGuest, seed: int) -> None:
    async with native_guest() as guest:
        registers = await guest.run("x", 1, 64, 2000, seed)
        assert registers.rbx == 0
        assert registers.rcx > 0


# -- stopping it -----------------------------------------------------------------------------------------------------


async def test_kick_stops_a_guest_that_spins_until_it_is_run_again(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        vcpu, counts = guest.create("s"), [0]
        await to_shared(guest, 1, 1)
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.vmm.run, vcpu)
                while await guest.load_page(0) < counts[-1] + 2:  # noqa: ASYNC110 - the guest sets no events
                    await trio.sleep(0.001)
                vcpu.kick()
            counts.append(await guest.load_page(0))
            await trio.sleep(0.002)
            assert await guest.load_page(0) == counts[-1], "it runs although nobody runs it"
            shared = await guest.load_page(1, Side.SHARED)
            assert 0 <= counts[-1] - shared <= 1
            assert 0x40_0000 <= guest.engines[0].registers.rip < 0x50_0000
        assert counts == sorted(set(counts))


async def test_cancelled_anywhere_it_does_everything_once(native_guest: NewGuest) -> None:
    lots, cancelled = random.Random(2), 0
    async with native_guest(pages_a_fault=1) as guest:
        await to_shared(guest, 0, 256)
        vcpu = guest.create("w", AREA, 256, 1, 3)
        exit_: HaltExit | InterruptExit | None = None
        while not isinstance(exit_, HaltExit):
            with trio.move_on_after(lots.random() * 0.004) as scope:
                exit_ = await guest.vmm.run(vcpu)
            cancelled += scope.cancelled_caught
            guest.check_windows()
        assert exit_ == HaltExit(0)
        assert guest.engines[0].registers.rbx == 256 * (1 + 2 + 3)
        assert cancelled > 10


async def test_kicked_where_it_is_parked_it_goes_on_from_there(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        await to_shared(guest, 0, 1)
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


async def test_closed_where_it_is_parked_it_allocates_nothing(memfs: Memfs, native_guest: NewGuest) -> None:
    def blocks() -> str:
        return memfs.run("stat", "--format", "%b", "private", "shared").stdout

    async with native_guest() as guest:
        await to_shared(guest, 0, 2)
        vcpus = [guest.create("w", AREA + number * PAGE_SIZE, 1, 1, 1) for number in range(2)]
        for vcpu in vcpus:
            assert isinstance(await vcpu.run(), MemoryErrorExit)
        before = await trio.to_thread.run_sync(blocks)
    assert blocks() == before


async def test_those_parked_at_one_page_go_on_when_they_are_run(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        await to_shared(guest, 0, 1)
        vcpus = [guest.create("w", AREA, 1, 1, 1) for _ in range(2)]
        exits = [await vcpu.run() for vcpu in vcpus]
        await guest.vmm.answer(exits[0])
        assert await guest.vmm.run(vcpus[0]) == HaltExit(0)
        await trio.sleep(0.01)
        assert await guest.load_page(0) == 1, "the other one ran along"
        assert await guest.vmm.run(vcpus[1]) == HaltExit(0)
        assert await guest.load_page(0) == 2


async def test_projection_of_a_neighbour_wakes_nobody(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        await to_shared(guest, 0, 1)
        vcpus = [guest.create("w", AREA, 1, 1, 1), guest.create("w", AREA + PAGE_SIZE, 1, 1, 1)]
        exit_ = await vcpus[0].run()
        assert isinstance(exit_, MemoryErrorExit)
        await guest.vmm.answer(exit_)
        assert await guest.vmm.run(vcpus[1]) == HaltExit(0)
        await trio.sleep(0.01)
        assert await guest.load_page(0) == 0, "it went on although nobody ran it"
        assert await guest.vmm.run(vcpus[0]) == HaltExit(0)
        assert await guest.load_page(0) == 1


# -- memory ----------------------------------------------------------------------------------------------------------


async def test_invalidation_is_acknowledged_when_no_window_maps_the_pages(memfs: Memfs, native_guest: NewGuest) -> None:
    seen: list[list[int]] = []

    async with native_guest() as guest:

        def notified(message: Notification, _: Memslot, gfns: GfnRange, side: Side) -> None:
            if isinstance(message, InvalidateBegin) and side is Side.PRIVATE:
                present = np.concatenate([window.present()[0] for window in guest.machine.windows])
                seen.append([gfn for gfn in present.tolist() if gfn in gfns])

        guest.vm.listeners.append(notified)
        vcpu = guest.create("s")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.vmm.run, vcpu)
            for _ in range(20):
                while not await guest.load_page(0):  # noqa: ASYNC110 - the guest sets no events
                    await trio.sleep(0.001)
                punch = ("fallocate", "--punch-hole", "--offset", str(AREA), "--length", "4096", "private")
                result = await trio.to_thread.run_sync(memfs.run, *punch)
                assert result.returncode == 0
            vcpu.kick()
        assert len(seen) >= 20
        assert not any(seen)


async def test_check_finds_what_a_window_maps_and_the_page_table_does_not(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        await guest.run("w", AREA, 8, 1, 1)
        table, gfn = guest.vm.mmu.table, Gfn(AREA_GFN + 3)
        pte = table.lookup(gfn)
        table.unmap_range(GfnRange(gfn, Gfn(gfn + 1)))  # without a flush
        with pytest.raises(AssertionError, match=f"{gfn:#x} as private"):
            guest.machine.check(table)
        guest.machine.flush(GfnRange(gfn, Gfn(gfn + 1)))
        guest.machine.check(table)
        assert pte
        guest.vm.mmu.ownership.release_run(guest.vm.mmu.slots.find(gfn).private.pfn_of(gfn), 1)  # type: ignore[union-attr, arg-type]  # fmt: skip


async def test_changed_code_runs_as_it_is(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        assert (await guest.run("m")).rbx == 123
        vcpu, digits = guest.create("j", 4), []
        for digit in (7, 3, 9, 4):
            await guest.memory.write(Gpa(AREA), b"\xb8" + struct.pack("=I", digit) + b"\xc3")  # mov eax, digit; ret
            if digit == 9:
                guest.vm.mmu.flush_tlbs(GfnRange(Gfn(AREA_GFN), Gfn(AREA_GFN + 1)))
            exit_ = await vcpu.run()
            assert isinstance(exit_, HypercallExit)
            digits.append(exit_.args[0])
        assert digits == [7, 73, 739, 7394]


def beside(vmm: Vmm) -> Sequence[UserspaceMemoryRegion]:
    """Slots of shared memory behind the guest's: one of which dirty pages are logged, one that is read-only."""
    return [
        UserspaceMemoryRegion(
            *(number, KVM_MEM_FD | flag, Gpa(SIZE + at), 1 << 20, ByteOffset(at), vmm.shared),
        )
        for number, (flag, at) in enumerate(((KVM_MEM_LOG_DIRTY_PAGES, 0), (KVM_MEM_READONLY, 1 << 20)), start=10)
    ]


async def test_dirty_log_has_what_the_guest_stored_to(native_guest: NewGuest) -> None:
    def dirty(guest: NativeGuest) -> list[int]:
        return pages_in(guest.vm.get_dirty_log(10)).tolist()  # type: ignore[no-any-return]

    async with native_guest(beside) as guest:
        bit = guest.vm.type.shared_bit
        await guest.memory.write(Gpa(0x1000), tables(2 * SIZE, bit)[0x1000:])
        await guest.run("w", SIZE + 3 * PAGE_SIZE, 4, 0, 1)
        assert dirty(guest) == [3, 4, 5, 6]
        assert dirty(guest) == []
        guest.vm.check()
        await guest.run("w", SIZE + 5 * PAGE_SIZE, 1, 0, 2)
        assert dirty(guest) == [5]
        with raises(errno.EBUSY):
            await guest.vm.set_user_memory_region(UserspaceMemoryRegion(10, 0, Gpa(0), 0, ByteOffset(0)))


async def test_store_to_a_readonly_slot_and_access_to_no_slot_are_mmio(native_guest: NewGuest) -> None:
    async with native_guest(beside) as guest:
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


async def test_exception_is_reported_and_a_triple_fault_is_a_shutdown(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        exit_ = await guest.create("u").run()
        assert exit_ == IoExit(PORT_EXCEPTION, 1, True)
        frame = ExceptionFrame.unpack(await guest.memory.read(Gpa(guest.engines[0].registers.rsp), ExceptionFrame.SIZE))
        assert frame.name == "invalid opcode"
        assert await guest.memory.read(Gpa(frame.rip), 2) == b"\x0f\x0b"
        await guest.memory.write(Gpa(IDT), bytes(4096))
        guest.vm.mmu.flush_tlbs(GfnRange(Gfn(0), Gfn(16)))
        assert await guest.create("u").run() == ShutdownExit()


async def test_memfs_that_dies_ends_the_run(memfs: Memfs, native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        await to_shared(guest, 1, 1)
        vcpu = guest.create("s")
        with pytest.RaisesGroup(StoreGone):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.vmm.run, vcpu)
                while not await guest.load_page(0):  # noqa: ASYNC110 - the guest sets no events
                    await trio.sleep(0.001)
                memfs.process.send_signal(signal.SIGKILL)
    memfs.process.wait()


async def test_vm_of_another_type_is_refused(memfs: Memfs) -> None:
    kvm_or_skip()
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
