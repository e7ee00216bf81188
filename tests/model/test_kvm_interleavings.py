"""Every order in which faults, invalidations, slot changes and the VM's end can meet, one after the other.

A scheduler, not luck: each actor stops before each step at which something else could come in between (the question to
the store, its answer, begin, free, end), and exactly one is let go on at a time. All orders are tried,
depth first, each in a run of its own from the beginning. After every step the invariants are checked:

    a private mapping's page is allocated; a page that is shared is not mapped private, nor one private mapped shared
    (but between its allocation and the notification of that, which the allocation waits for)
    nothing is mapped outside of slots, or after the VM has ended; every leaf lies in its slot

The store is a model with the one promise that memfs gives, that it frees nothing before the begin was acted upon, and
without its lock on the file, so that more can happen here than in truth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kvmsim.backing import StoreGone
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import is_private, level_pages
from kvmsim.side import Side
from kvmsim.uapi import KVM_MEM_FD, UserspaceMemoryRegion
from kvmsim.vm import VM, VmConfig
from memfs.contract.page_map import ABSENT, ALLOCATED, MapMemfds
from memfs.contract.protocol.messages import Fallocate, FileId, InvalidateBegin, InvalidateEnd, PfnReply, PfnRun
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gfn, GfnRange, Gpa, PageIndex, PageRange, Pfn
from tests.helpers import one, pages

PAGES = 1024  # two huge pages
GFN = 5
SHARED, PRIVATE = FileId(1), FileId(2)


class Scheduler:
    """Lets one actor at a time go on; `choices` say which, and after them always the first."""

    def __init__(self, choices: list[int]) -> None:
        self.choices = choices
        self.taken: list[tuple[int, int]] = []  # which of how many
        self.waiting: dict[str, trio.Event] = {}

    async def step(self, name: str) -> None:
        assert name not in self.waiting
        event = self.waiting[name] = trio.Event()
        await event.wait()

    async def run(self, check: Callable[[], None]) -> None:
        while True:
            await wait_all_tasks_blocked()
            if len(self.taken) >= len(self.choices):  # up to there it is as it was in the order before, and was checked
                check()
            if not self.waiting:
                return
            names = sorted(self.waiting)
            at = len(self.taken)
            choice = self.choices[at] if at < len(self.choices) else 0
            self.taken.append((choice, len(names)))
            self.waiting.pop(names[choice]).set()


class ModelStore:
    """memfs as a VM sees it, with a stop before every answer."""

    def __init__(self, scheduler: Scheduler, *, told: bool) -> None:
        self.scheduler, self.told = scheduler, told
        self.page_map = MapMemfds().open("model")
        self.files: dict[FileId, Any] = {
            SHARED: SimpleNamespace(id=SHARED, ino=1, size=PAGES * PAGE_SIZE, page_map=None, registrations=0),
            PRIVATE: SimpleNamespace(
                id=PRIVATE, ino=2, size=PAGES * PAGE_SIZE, page_map=self.page_map, registrations=0
            ),
        }
        self.files[SHARED].is_private = lambda index: False
        self.files[PRIVATE].is_private = self.page_map.is_allocated
        self.files[PRIVATE].reaches = lambda end: True
        self.files[PRIVATE].known = self.known
        self.present: set[int] = set()  # pages of the shared file
        self.gone: str | None = None
        self.calls = 0

    def name(self, what: str) -> str:
        self.calls += 1
        return f"{trio.lowlevel.current_task().name} {what} {self.calls}"

    async def stop(self, what: str) -> None:
        await self.scheduler.step(self.name(what))
        if self.gone is not None:
            raise StoreGone(self.gone)

    async def register(self, fd: int) -> Any:
        self.files[FileId(fd)].registrations += 1
        return self.files[FileId(fd)]

    async def unregister(self, file: Any) -> None:
        await self.stop("unregister")
        file.registrations -= 1

    async def get_pfn(self, file: Any, asked: PageRange, *, alloc: bool) -> PfnReply:
        await self.stop("asks")
        reply = self.look_up(file, asked)
        await self.stop("hears")
        return reply

    def known(self, asked: PageRange) -> PfnReply | None:
        """As a GuestFile that has been told of the gibibyte, or has not."""
        if not self.told or self.page_map.count(asked) != len(asked):
            return None
        return PfnReply(PRIVATE, asked, (PfnRun(asked, Pfn((PRIVATE << 18) + asked.start), 18),))

    def look_up(self, file: Any, asked: PageRange) -> PfnReply:
        runs = []
        for index in range(asked.start, asked.end):
            page, block = one(index), pages(index & -512, (index & -512) + 512)
            if file.id == PRIVATE and not self.page_map.is_allocated(page.start):
                runs.append(PfnRun(page, None))
                continue
            order = 9 if file.id == PRIVATE and self.page_map.count(block) == 512 else 0
            runs.append(PfnRun(page, Pfn((file.id << 18) + index), order))
            if file.id == SHARED:
                self.present.add(index)
        return PfnReply(file.id, asked, tuple(runs))


class World:
    """A VM with one slot, and what may happen to it."""

    def __init__(self, scheduler: Scheduler, vm: VM, store: ModelStore) -> None:
        self.scheduler, self.vm, self.store = scheduler, vm, store
        self.in_transit: set[int] = set()  # pages allocated, of which the VM has not been told
        self.ended = False
        self.outcomes: list[object] = []

    def check(self) -> None:
        self.vm.mmu.table.check()
        self.vm.mmu.slots.check()
        table = self.vm.mmu.table
        assert not (self.ended and table.mapped), "mapped after the end"
        for leaves in table.leaves(table.everything):
            for position in leaves.ptes.nonzero()[0].tolist():
                size = level_pages(leaves.level)
                for gfn in range(leaves.gfns.start + position * size, leaves.gfns.start + (position + 1) * size):
                    assert self.vm.mmu.slots.find(Gfn(gfn)) is not None, "mapped without a slot"
                    allocated = self.store.page_map.is_allocated(PageIndex(gfn))
                    private = is_private(int(leaves.ptes[position]))
                    assert allocated or not private, f"gfn {gfn} is mapped private and its page is gone"
                    assert private or gfn in self.store.present, f"gfn {gfn} is mapped shared and its page is gone"
                    assert private or not allocated or gfn in self.in_transit, f"gfn {gfn} is private and mapped shared"

    # -- actors

    async def fault(self, gfn: int, *, private: bool) -> None:
        await self.scheduler.step(self.store.name("faults"))
        try:
            self.outcomes.append(await self.vm.fault(Access(Gfn(gfn), True, Side.of(private))))
        except StoreGone as gone:
            self.outcomes.append(gone)

    async def punch(self, index: int, file: FileId = PRIVATE, then_allocate: bool = False) -> None:
        await self.scheduler.step(self.store.name("begin"))
        self.notify(InvalidateBegin(file, one(index)))
        await self.scheduler.step(self.store.name("free"))
        if file == PRIVATE:
            self.store.page_map.set(one(index), ABSENT)
        else:
            self.store.present.discard(index)
        await self.scheduler.step(self.store.name("end"))
        self.notify(InvalidateEnd(file, one(index)))
        if then_allocate:
            await self.allocate(index)

    async def allocate(self, index: int) -> None:
        await self.scheduler.step(self.store.name("allocate"))
        self.store.page_map.set(one(index), ALLOCATED)
        self.in_transit.add(index)
        await self.scheduler.step(self.store.name("told"))
        self.notify(Fallocate(PRIVATE, one(index)))
        self.in_transit.discard(index)

    async def delete_slot(self) -> None:
        await self.scheduler.step(self.store.name("delete"))
        try:
            await self.vm.set_user_memory_region(UserspaceMemoryRegion(0, 0, Gpa(0), 0, ByteOffset(0)))
        except StoreGone as gone:
            self.outcomes.append(gone)

    async def end(self) -> None:
        await self.scheduler.step(self.store.name("end of the VM"))
        self.store.gone, self.ended = "over", True
        self.vm.close()

    def notify(self, message: Any) -> None:
        if not self.ended:
            self.vm._notified(message)


Actor = Callable[[World], Awaitable[None]]


def private_fault(world: World) -> Awaitable[None]:
    return world.fault(GFN, private=True)


def shared_fault(world: World) -> Awaitable[None]:
    return world.fault(GFN, private=False)


def fault_beside(world: World) -> Awaitable[None]:
    return world.fault(GFN + 7, private=True)


def punch(world: World) -> Awaitable[None]:
    return world.punch(GFN)


def punch_shared(world: World) -> Awaitable[None]:
    return world.punch(GFN, SHARED)


def punch_and_allocate(world: World) -> Awaitable[None]:
    return world.punch(GFN, then_allocate=True)


def allocate(world: World) -> Awaitable[None]:
    return world.allocate(GFN)


def delete_slot(world: World) -> Awaitable[None]:
    return world.delete_slot()


def end(world: World) -> Awaitable[None]:
    return world.end()


#: actors; pages that are allocated at first; whether what is allocated is mapped at once
SCENARIOS: dict[str, tuple[list[Actor], PageRange | None, bool]] = {
    "fault, punch": ([private_fault, punch], one(GFN), False),
    "two faults, punch": ([private_fault, private_fault, punch], one(GFN), False),
    "fault, punch and allocate": ([private_fault, punch_and_allocate], one(GFN), True),
    "shared fault, allocate": ([shared_fault, allocate], None, True),
    "both faults, allocate": ([shared_fault, private_fault, allocate], None, False),
    "shared fault, punch": ([shared_fault, private_fault, punch], one(GFN), False),
    "shared fault, punch of shared memory": ([shared_fault, punch_shared], None, False),
    "huge fault, punch inside": ([fault_beside, private_fault, punch], pages(0, 512), False),
    "fault, slot delete": ([private_fault, delete_slot], one(GFN), False),
    "fault, punch, slot delete": ([private_fault, punch, delete_slot], one(GFN), False),
    "allocate, slot delete": ([allocate, delete_slot, shared_fault], None, True),
    "fault, punch, end": ([private_fault, punch, end], one(GFN), False),
    "fault, slot delete, end": ([private_fault, delete_slot, end], one(GFN), False),
}


async def run_once(scenario: str, choices: list[int], fast: bool) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
    actors, allocated, eager = SCENARIOS[scenario]
    scheduler = Scheduler(choices)
    async with trio.open_nursery() as nursery:
        store = ModelStore(scheduler, told=fast)
        vm = VM(store, nursery, VmConfig(map_on_fallocate=eager, fault_around=4 if fast else 1))  # type: ignore[arg-type]
        await vm.set_user_memory_region(
            UserspaceMemoryRegion(0, KVM_MEM_FD, Gpa(0), PAGES * PAGE_SIZE, ByteOffset(0), SHARED, PRIVATE)
        )
        if allocated is not None:
            store.page_map.set(allocated, ALLOCATED)
        world = World(scheduler, vm, store)
        finished = 0

        async def play(actor: Actor) -> None:
            nonlocal finished
            await actor(world)
            finished += 1

        for number, actor in enumerate(actors):
            nursery.start_soon(play, actor, name=f"{number}")
        await scheduler.run(world.check)
        assert finished == len(actors), "somebody waits for ever"
        assert vm.mmu.invalidations.in_progress == 0
        mapped = vm.mmu.table.lookup(Gfn(GFN))
        vm.mmu.unmap(GfnRange(Gfn(0), Gfn(PAGES)))
        assert vm.mmu.ownership.owned == 0, "a frame has an owner that does not map it"
        assert vm.mmu.ownership.violations == 0
        store.page_map.close()
        state = "absent" if not mapped else "private" if is_private(mapped) else "shared"
        return scheduler.taken, (*sorted(type(outcome).__name__ for outcome in world.outcomes), state)


@pytest.mark.parametrize("fast", [False, True], ids=["asked", "known"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_order(scenario: str, fast: bool) -> None:
    """With the store asked for each page, and with frames known beforehand and shared pages asked for in windows."""
    endings: Counter[tuple[str, ...]] = Counter()
    choices: list[int] | None = []
    while choices is not None:
        try:
            taken, ending = trio.run(run_once, scenario, choices, fast)
        except BaseException as error:
            error.add_note(f"the order was {choices}, then always the first")
            raise
        endings[ending] += 1
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        choices = [choice for choice, _ in taken[:-1]] + [taken[-1][0] + 1] if taken else None
    assert endings.total() > 3, "there were hardly any orders"
    assert len(endings) > 1, f"all orders ended alike, so nothing met: {endings}"
