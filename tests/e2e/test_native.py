"""Native code on each engine, its memory on a memfs: what `selftest.c` does, and what is done to it meanwhile."""

from __future__ import annotations

import ctypes
import errno
import mmap
import random
import signal
import struct

import pytest
import trio

from kvmsim.backing import StoreGone
from kvmsim.engines.user_mode import tables
from kvmsim.exits import ExceptionExit, HaltExit, HypercallExit, InternalErrorExit, InterruptExit, MmioExit
from kvmsim.side import Side
from kvmsim.slots.dirty import pages_in
from kvmsim.uapi import KVM_MEM_FD, UserspaceMemoryRegion
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gfn, GfnRange, Gpa
from tests.helpers import raises

from .conftest import Memfs, MountMemfs
from .native import AREA, AREA_GFN, PAGES, SIZE, NativeGuest, NewGuest, beside, kvm_guest, native_guest, unicorn_guest

__all__ = ["kvm_guest", "native_guest", "unicorn_guest"]


async def test_guest_finds_what_it_may_rely_on(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        assert (await guest.run("c")).rbx == 15
        assert guest.text == b"hello from native code\n"
        assert guest.vm.vcpus[0].exits == {"HYPERCALL": 7, "MAP_PRIVATE": 2, "MAP_SHARED": 1, "HLT": 1}


async def test_both_engines_come_to_the_same(kvm_guest: NewGuest, unicorn_guest: NewGuest) -> None:
    found = []
    for new in (kvm_guest, unicorn_guest):
        async with new() as guest:
            results = [await guest.run(*what) for what in (("x", 1, 64, 3000, 0, 7), ("w", AREA, 64, 0, 3), ("m",))]
            exits = [dict(vcpu.exits) for vcpu in guest.vm.vcpus.values()]
            found.append(([(each.rbx, each.rcx) for each in results], exits))
    assert found[0] == found[1]


async def test_exception_says_what_and_where(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        exit_ = await guest.create("u").run()
        assert isinstance(exit_, ExceptionExit)
        assert exit_.vector == 6
        assert await guest.memory.read(Gpa(exit_.rip), 2) == b"\x0f\x0b"
        for nowhere in (8, SIZE, 1 << 40 | SIZE, 1 << 45):
            exit_ = await guest.create("w", nowhere, 1, 1, 1).run()
            assert isinstance(exit_, ExceptionExit)
            assert exit_.vector == 14
            assert exit_.address in (nowhere, nowhere & -PAGE_SIZE)  # the emulator says the page
            assert str(exit_) == f"page fault at address {exit_.address:#x}, rip {exit_.rip:#x}"


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
                punch = ("fallocate", "--punch-hole", "--offset", str(at), "--length", str(size), guest.private)
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


async def test_kick_stops_a_guest_that_spins_until_it_is_run_again(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        vcpu, counts = guest.create("s"), [0]
        await guest.to_shared(1, 1)
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
        await guest.to_shared(0, 256)
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


async def test_changed_code_runs_as_it_is(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        assert (await guest.run("m")).rbx == 123
        vcpu, digits = guest.create("j", 4), []
        for digit in (7, 3, 9, 4):
            await guest.memory.write(Gpa(AREA), b"\xb8" + struct.pack("=I", digit) + b"\xc3")  # mov eax, digit; ret
            guest.vm.mmu.flush_tlbs(GfnRange(Gfn(AREA_GFN), Gfn(AREA_GFN + 1)))  # the emulator keeps what it translated
            exit_ = await vcpu.run()
            assert isinstance(exit_, HypercallExit)
            digits.append(exit_.args[0])
        assert digits == [7, 73, 739, 7394]


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


async def test_slots_come_move_and_go_while_the_guest_runs(native_guest: NewGuest) -> None:
    """A guest sees memory where its slot is now, and nothing where it was; one of another vCPU runs all the time."""

    def shared(guest: NativeGuest, gpa: int, size: int = 1 << 20) -> UserspaceMemoryRegion:
        return UserspaceMemoryRegion(7, KVM_MEM_FD, Gpa(gpa), size, ByteOffset(0), guest.vmm.shared)

    # The emulator does not know what was stored, and of page tables only how much memory there is.
    nothing = MmioExit | InternalErrorExit | ExceptionExit
    async with native_guest() as guest:
        await guest.memory.write(Gpa(0x1000), tables(2 * SIZE, guest.vm.type.shared_bit)[0x1000:])
        await guest.to_shared(1, 1)
        spinning = guest.create("s")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.vmm.run, spinning)
            for value, gpa in enumerate((SIZE, SIZE + PAGE_SIZE, SIZE + (2 << 20)), start=1):  # the second overlaps
                await guest.vm.set_user_memory_region(shared(guest, gpa))
                assert (await guest.run("w", gpa + 3 * PAGE_SIZE, 1, 0, 1)).rbx == value
                guest.vm.check()
                guest.check_windows()
            exit_ = await guest.create("w", SIZE + 3 * PAGE_SIZE, 1, 0, 1).run()
            assert isinstance(exit_, nothing)
            await guest.vm.set_user_memory_region(shared(guest, gpa, 0))
            exit_ = await guest.create("w", gpa, 1, 0, 1).run()
            assert isinstance(exit_, nothing)
            count = await guest.load_page(0)
            while await guest.load_page(0) < count + 2:  # noqa: ASYNC110 - the guest sets no events
                await trio.sleep(0.001)
            spinning.kick()


async def test_slot_that_native_code_cannot_have_changes_nothing(native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        memory = mmap.mmap(-1, PAGE_SIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with raises(errno.EINVAL, match="slot 7 lies on host virtual addresses"):
            await guest.vm.set_user_memory_region(
                UserspaceMemoryRegion(7, 0, Gpa(SIZE), PAGE_SIZE, ByteOffset(address))
            )
        assert [slot.id for slot in guest.vm.mmu.slots] == [0]
        await guest.run("c")


async def test_memfs_that_dies_ends_the_run(memfs: Memfs, native_guest: NewGuest) -> None:
    async with native_guest() as guest:
        await guest.to_shared(1, 1)
        vcpu = guest.create("s")
        with pytest.RaisesGroup(StoreGone):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.vmm.run, vcpu)
                while not await guest.load_page(0):  # noqa: ASYNC110 - the guest sets no events
                    await trio.sleep(0.001)
                memfs.process.send_signal(signal.SIGKILL)
    memfs.process.wait()
