"""Slots that come and go while something else is under way: invalidations, faults, cancellation; and kicked vCPUs."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kvmsim.engines.program import Hypercall, Load, Program, ProgramEngine, Store
from kvmsim.exits import HALT, INTERRUPTED, HypercallExit, MemoryErrorExit, MmioExit
from kvmsim.mmu.page_fault import Access
from kvmsim.side import Side
from kvmsim.uapi import KVM_MEM_FD
from kvmsim.vm import VM
from kvmsim.vmm.vmm import Vmm
from memfs.contract.protocol.messages import InvalidateBegin, InvalidateEnd, Launch, Unregister
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange, Gpa, PageRange
from tests.helpers import one, pages, raises

from .conftest import FakeFile, NewVm, ScriptedStore, region

HALF = 32 * PAGE_SIZE
SECOND = Gfn(1 << 20)  # the first gfn of the second slot


def access(gfn: int, *, write: bool = False, private: bool = True) -> Access:
    return Access(Gfn(gfn), write, Side.of(private))


def beginning(store: ScriptedStore, of: int, what: PageRange) -> Callable[[FakeFile], Awaitable[None]]:
    """Begin an invalidation of pages of a file, which was registered before, as soon as the next file is."""

    async def begin(_: FakeFile) -> None:
        await store.notify(InvalidateBegin(store.by_fd(of).id, what))

    return begin


# -- invalidations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guest", [True, False])
async def test_new_slot_takes_over_an_invalidation_that_began_while_it_was_registered(
    new_vm: NewVm, guest: bool
) -> None:
    """Memory below and above 4 GiB on the same files. Otherwise the guest goes on with memory that has been freed."""
    async with new_vm(map_on_fallocate=False) as (vm, store), trio.open_nursery() as nursery:
        shared, private = store.file(), store.file(guest=True)
        store.allocate(private, pages(0, 64) if guest else one(0))
        await vm.set_user_memory_region(region(shared, private, size=HALF))
        assert await vm.fault(access(0)) is None  # from now on it is known where the frames are
        going = private if guest else shared
        store.before_registered = beginning(store, going, pages(40, 64))
        await vm.set_user_memory_region(region(shared, private, slot=1, gpa=SECOND << 12, size=HALF, offset=HALF))
        outcome: list[object] = []

        async def fault() -> None:
            outcome.append(await vm.fault(access(SECOND + 8, write=True, private=guest)))

        assert await vm.fault(access(SECOND + 7, private=guest)) is None, "it is not being invalidated"
        nursery.start_soon(fault)
        await wait_all_tasks_blocked()
        assert outcome == []
        if guest:
            store.free(private, pages(40, 64))
        await store.notify(InvalidateEnd(store.by_fd(going).id, pages(40, 64)))
        await wait_all_tasks_blocked()
        assert outcome == [MemoryErrorExit(2, Gpa((SECOND + 8) << 12), PAGE_SIZE) if guest else None]
        vm.check()


async def test_moved_slot_takes_over_invalidations(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared = store.file()
        await vm.set_user_memory_region(region(shared))
        store.before_registered = beginning(store, shared, one(3))
        await vm.set_user_memory_region(region(shared, gpa=SECOND << 12))
        await vm.fault(access(SECOND + 4, private=False))
        assert vm.mmu.invalidations.is_active(GfnRange(Gfn(SECOND + 3), Gfn(SECOND + 4)))
        await store.notify(InvalidateEnd(store.by_fd(shared).id, one(3)))
        assert not vm.mmu.invalidations.in_progress


# -- files and descriptors -------------------------------------------------------------------------------


async def test_closed_descriptor_is_ebadf_and_the_vm_goes_on(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        shared = store.file()
        await vm.set_user_memory_region(region(shared))
        closed = os.dup(shared)
        os.close(closed)
        for fds in ((closed, -1), (shared, closed)):
            with raises(errno.EBADF):
                await vm.set_user_memory_region(region(*fds, slot=1, gpa=1 << 30))
        assert store.by_fd(shared).registered == 1
        assert await vm.fault(access(0, private=False)) is None


async def test_fault_finds_that_its_slot_was_deleted_while_memfs_was_asked(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store), trio.open_nursery() as nursery:
        shared = store.file()
        await vm.set_user_memory_region(region(shared))
        outcome: list[object] = []

        async def fault(gfn: int) -> None:
            outcome.append(await vm.fault(access(gfn, private=False)))

        store.held = trio.Event()
        nursery.start_soon(fault, 1)
        await wait_all_tasks_blocked()
        await vm.set_user_memory_region(region(-1, size=0))
        store.held.set()
        await wait_all_tasks_blocked()
        assert outcome == [MmioExit(Gpa(PAGE_SIZE), PAGE_SIZE, False)]
        # And with a new slot in its place, on another file, that one is what it gets.
        await vm.set_user_memory_region(region(shared))
        store.held = trio.Event()
        nursery.start_soon(fault, 2)
        await wait_all_tasks_blocked()
        await vm.set_user_memory_region(region(-1, size=0))
        await vm.set_user_memory_region(region(store.file()))
        store.held.set()
        await wait_all_tasks_blocked()
        assert outcome[1:] == [None]
        assert vm.mmu.table.mapped == 1


@pytest.mark.parametrize("number", [1, 2])
async def test_cancelled_region_leaves_nothing_registered(new_vm: NewVm, number: int) -> None:
    """While the first or the second file is being registered, which memfs does all the same."""
    async with new_vm() as (vm, store), trio.open_nursery() as nursery:
        shared, private = store.file(), store.file(guest=True)
        fds = os.listdir("/proc/self/fd")

        async def wait(_: FakeFile) -> None:
            store.registering = trio.Event()

        if number == 1:
            store.registering = trio.Event()
        else:
            store.before_registered = wait
        scope = trio.CancelScope()

        async def set_region() -> None:
            with scope:
                await vm.set_user_memory_region(region(shared, private))

        nursery.start_soon(set_region)
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        assert len(vm.mmu.slots) == 0
        store.registering.set()
        await wait_all_tasks_blocked()
        assert [store.by_fd(fd).registered for fd in (shared, private)] == [0, 0]
        assert sum(isinstance(each, Unregister) for each in store.requests) == number
        assert os.listdir("/proc/self/fd") == fds
        await vm.set_user_memory_region(region(shared, private))
        assert [store.by_fd(fd).registered for fd in (shared, private)] == [1, 1]


# -- kicks -----------------------------------------------------------------------------------------------


def program(seen: list[bytes]) -> Program:
    yield Store(Gpa(0), b"one")
    seen.append((yield Load(Gpa(0), 3)))
    yield Hypercall(0, ())
    yield Store(Gpa(PAGE_SIZE), b"two")
    seen.append((yield Load(Gpa(PAGE_SIZE), 3)))


async def with_program(vm: VM, store: ScriptedStore, seen: list[bytes]) -> ProgramEngine:
    await vm.set_user_memory_region(region(store.file(), store.file(guest=True), flags=KVM_MEM_FD))
    return ProgramEngine(program(seen))


async def test_kicked_vcpu_stops_waiting_for_memfs_and_goes_on_there(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store), trio.open_nursery() as nursery:
        seen: list[bytes] = []
        vcpu = vm.create_vcpu(0, await with_program(vm, store, seen))
        exits: list[object] = []

        async def run() -> None:
            exits.append(await vcpu.run())

        store.held = trio.Event()
        nursery.start_soon(run)
        await wait_all_tasks_blocked()
        assert exits == []
        vcpu.kick()
        await wait_all_tasks_blocked()
        assert exits == [INTERRUPTED]
        assert vcpu.exits == {"INTR": 1}
        store.held.set()
        assert isinstance(await vcpu.run(), HypercallExit)
        assert seen == [b"one"]
        vcpu.kick()  # it does not run: the next time
        vcpu.kick()
        assert await vcpu.run() == INTERRUPTED
        assert await vcpu.run() == HALT
        assert seen == [b"one", b"two"]


async def test_vcpu_that_is_kicked_between_any_two_steps_loses_nothing(
    new_vm: NewVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmsim.engines.program.STEPS", 2)
    async with new_vm() as (vm, store), trio.open_nursery() as nursery:
        seen: list[bytes] = []
        vcpu = vm.create_vcpu(0, await with_program(vm, store, seen))
        done = trio.Event()

        async def kick() -> None:
            while not done.is_set():
                vcpu.kick()
                await trio.lowlevel.checkpoint()

        nursery.start_soon(kick)
        while (exit_ := await vcpu.run()) != HALT:
            await trio.lowlevel.checkpoint()
            if isinstance(exit_, HypercallExit):
                exit_.ret = 0
        done.set()
        assert seen == [b"one", b"two"]


async def test_vcpu_that_is_kicked_in_its_first_run_is_launched_in_its_second(new_vm: NewVm) -> None:
    async with new_vm() as (vm, store):
        vcpu = vm.create_vcpu(0, await with_program(vm, store, []))
        with trio.CancelScope() as scope:
            scope.cancel()
            await vcpu.run()
        assert not any(isinstance(each, Launch) for each in store.requests)
        await vcpu.run()
        assert sum(isinstance(each, Launch) for each in store.requests) == 1


async def test_vcpu_that_does_nothing_but_exit_can_be_kicked(new_vm: NewVm) -> None:
    """Nor does it stop what else runs here."""

    def program() -> Program:
        while True:
            yield Hypercall(99, ())

    async with new_vm() as (vm, store):
        vmm = Vmm(store.file(), store.file(guest=True), PAGE_SIZE)
        vcpu = vm.create_vcpu(0, ProgramEngine(program()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vmm.run, vcpu)
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            vcpu.kick()
        assert vcpu.exits["HYPERCALL"] > 10
