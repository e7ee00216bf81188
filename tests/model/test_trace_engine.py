"""The trace engine in blocks against one access at a time: whatever happens, both do and count the same.

Two VMs, each with files, engine and VMM of its own, run the same trace, and the same things happen to both at the same
places: between two blocks the store takes or gives pages, or somebody changes a byte that is none of his. Compared is
everything that can be seen afterwards: exits in order, counters, the TLB, page table, memory, shadows, and the error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from kvmsim.backing import GuestFile
from kvmsim.engines.trace import IntegrityError, TraceEngine
from kvmsim.engines.trace_file import RECORD, Trace
from kvmsim.exits import HaltExit, MemoryErrorExit
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.tlb import Tlb
from kvmsim.uapi import KVM_EXIT_MEM_MAP_PRIVATE, KVM_MEM_FD, UserspaceMemoryRegion
from kvmsim.vm import VM, VmConfig
from memfs.contract.page_map import ABSENT, ALLOCATED, MapMemfds
from memfs.contract.protocol.messages import (
    Fallocate,
    FileId,
    InvalidateBegin,
    InvalidateEnd,
    PfnReply,
    PfnRun,
    Registered,
)
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gfn, GfnRange, Gpa, PageIndex, PageRange, Pfn
from tests.helpers import one

PAGES = 6
SHARED, PRIVATE = 1, 2


class OneAtATime(TraceEngine):
    """The reference."""

    def _run_whole(self, end: int, tlb: Tlb) -> bool:
        del end, tlb
        return False


class DirectStore:
    """memfs without a mount and without messages: memory in memfds, and a page map."""

    def __init__(self, resources: ExitStack) -> None:
        self.gone: str | None = None
        self.page_map = MapMemfds().open("test")
        resources.callback(self.page_map.close)
        self.files: dict[int, GuestFile] = {}
        for number in (SHARED, PRIVATE):
            fds = [os.memfd_create("test")]
            os.ftruncate(fds[0], PAGES * PAGE_SIZE)
            if number == PRIVATE:
                fds.append(os.dup(self.page_map.fd))
            self.files[number] = GuestFile(Registered(FileId(number), number, PAGES * PAGE_SIZE, 0), tuple(fds))
            resources.callback(self.files[number].close)

    async def register(self, fd: int) -> GuestFile:
        return self.files[fd]

    async def get_pfn(self, file: GuestFile, pages: PageRange, *, alloc: bool) -> PfnReply:
        await trio.lowlevel.checkpoint()
        runs = [
            PfnRun(one(index), Pfn((file.id << 18) + index) if alloc or file.is_private(PageIndex(index)) else None)
            for index in range(pages.start, pages.end)
        ]
        return PfnReply(file.id, pages, tuple(runs))

    async def launch(self, file: GuestFile) -> None:
        """Nothing was populated."""


@dataclass(frozen=True)
class Happening:
    """What happens at a turn of the event loop: punch, convert, give, spoil."""

    turn: int
    what: str
    page: int
    file: int


class World:
    """A VM, its VMM, and what happens to them."""

    def __init__(self, vm: VM, store: DirectStore, happenings: list[Happening]) -> None:
        self.vm, self.store, self.happenings = vm, store, happenings
        self.turns = 0
        self.seen: list[object] = []

    def turn(self) -> None:
        """In the place of VM.check_alive, which an engine calls after every turn of the event loop."""
        for happening in self.happenings:
            if happening.turn == self.turns:
                getattr(self, happening.what)(happening.page, happening.file)
        self.turns += 1

    def punch(self, page: int, file: int) -> None:
        self.vm._notified(InvalidateBegin(FileId(file), one(page)))
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        fallocate(self.store.files[file].fd, mode, ByteOffset(page * PAGE_SIZE), PAGE_SIZE)
        if file == PRIVATE:
            self.store.page_map.set(one(page), ABSENT)
        self.vm._notified(InvalidateEnd(FileId(file), one(page)))

    def give(self, page: int, file: int) -> None:
        del file
        if not self.store.page_map.is_allocated(PageIndex(page)):
            self.store.page_map.set(one(page), ALLOCATED)
            self.vm._notified(Fallocate(FileId(PRIVATE), one(page)))

    def spoil(self, page: int, file: int) -> None:
        memory = self.store.files[file].memory
        memory[page * PAGE_SIZE + 8] ^= 1

    async def run(self, engine: TraceEngine, capacity: int) -> None:
        vcpu = self.vm.create_vcpu(0, engine)
        tlb = Tlb(capacity)
        vcpu.tlb = tlb  # type: ignore[misc]
        self.vm.mmu.tlbs[:] = [tlb]
        fault = self.vm.fault

        async def seen_fault(access: Access) -> object:
            self.seen.append(access)
            return await fault(access)

        self.vm.fault = seen_fault  # type: ignore[assignment, method-assign]
        self.vm.check_alive = self.turn  # type: ignore[method-assign]
        try:
            while not isinstance(exit_ := await vcpu.run(), HaltExit):
                self.seen.append(exit_)
                assert isinstance(exit_, MemoryErrorExit)
                page = exit_.gpa // PAGE_SIZE
                if exit_.type == KVM_EXIT_MEM_MAP_PRIVATE:
                    self.punch(page, SHARED)
                    self.give(page, PRIVATE)
                else:
                    self.punch(page, PRIVATE)
        except IntegrityError as error:
            self.seen.append(str(error))
        self.seen.append((self.vm.faults, vcpu.exits, self.turns))
        self.seen.append((tlb.hits, tlb.misses, tlb.flushes, tlb.flushed))
        self.seen.append([(gfn, hit.side, hit.dirty) for gfn, hit in tlb.entries.items()])
        self.seen.append((engine.accesses, engine.passes, engine.progress, engine._stored))
        self.seen.append(self.vm.mmu.table.translate(np.arange(PAGES)).tolist())
        self.seen.append([bytes(self.store.files[file].memory[:]) for file in (SHARED, PRIVATE)])
        self.seen.append([bytes(shadow[:]) for shadow in engine._shadows.values()])
        self.vm.check()


async def play(
    kind: Callable[..., TraceEngine],
    trace: Trace,
    private: list[GfnRange],
    happenings: list[Happening],
    capacity: int = 1536,
    block: int = 32,
) -> list[object]:
    with ExitStack() as resources:
        store = DirectStore(resources)
        async with trio.open_nursery() as nursery:
            vm = VM(store, nursery, VmConfig(map_on_fallocate=False))  # type: ignore[arg-type]
            await vm.set_user_memory_region(
                UserspaceMemoryRegion(0, KVM_MEM_FD, Gpa(0), PAGES * PAGE_SIZE, ByteOffset(0), SHARED, PRIVATE)
            )
            store.files[SHARED].memory[100:108] = b"was here"
            world = World(vm, store, happenings)
            # Three passes: the clock stands still, so that time cannot decide.
            engine = kind(vm, trace, private, repeat_for=1e9, block=block)
            engine._deadline = _AfterPasses(engine, 3)  # type: ignore[assignment, misc]
            await world.run(engine, capacity)
        seen = world.seen
        del vm, world, engine
    return seen


class _AfterPasses:
    """A deadline that has come once so many passes are done."""

    def __init__(self, engine: TraceEngine, passes: int) -> None:
        self.engine, self.passes = engine, passes

    def __le__(self, now: object) -> bool:
        return self.engine.passes >= self.passes


ACCESSES = st.lists(
    st.tuples(
        st.integers(0, PAGES - 1),
        st.sampled_from([0, 1, 6, 8, 9, 96, 100, PAGE_SIZE - 40]),
        st.sampled_from([1, 2, 4, 8, 11, 32]),
        st.booleans(),
    ),
    min_size=1,
    max_size=150,
)
HAPPENINGS = st.lists(
    st.builds(
        Happening,
        st.integers(0, 20),
        st.sampled_from(["punch", "punch", "give", "spoil"]),
        st.integers(0, PAGES - 1),
        st.sampled_from([SHARED, PRIVATE]),
    ),
    max_size=4,
)


def trace_of(accesses: list[tuple[int, int, int, bool]]) -> Trace:
    records = np.array([(page * PAGE_SIZE + at, size, write) for page, at, size, write in accesses], RECORD)
    return Trace(records, "made up")


LOOP = [(page, at, 8, at == 8) for page in range(3) for at in (0, 8, 8, 96)] * 12


@settings(max_examples=150, deadline=None)
@given(
    ACCESSES, HAPPENINGS, st.sets(st.integers(0, PAGES - 1)), st.sampled_from([2, 4, 1536]), st.sampled_from([7, 64])
)
@example(LOOP, [], set(), 1536, 32)
@example(LOOP, [Happening(6, "punch", 1, SHARED)], {0}, 1536, 32)
@example(LOOP, [Happening(3, "punch", 1, SHARED)], {0}, 1536, 128)
@example(LOOP, [Happening(7, "spoil", 1, SHARED)], {0}, 1536, 32)
@example(LOOP, [Happening(7, "spoil", 0, PRIVATE), Happening(9, "give", 2, PRIVATE)], {0}, 2, 32)
def test_in_blocks_as_one_at_a_time(
    accesses: list[tuple[int, int, int, bool]],
    happenings: list[Happening],
    private: set[int],
    capacity: int,
    block: int,
) -> None:
    trace = trace_of(accesses)
    ranges = [GfnRange(Gfn(gfn), Gfn(gfn + 1)) for gfn in sorted(private)]
    whole: list[int] = []

    class Counted(TraceEngine):
        def _run_whole(self, end: int, tlb: Tlb) -> bool:
            done = super()._run_whole(end, tlb)
            whole.append(done)
            return done

    blocks = trio.run(play, Counted, trace, ranges, happenings, capacity, block)
    singly = trio.run(play, OneAtATime, trace, ranges, happenings, capacity, block)
    assert blocks == singly
    event("some blocks were run as a whole" if any(whole) else "no block was run as a whole")
    if accesses == LOOP and capacity > PAGES:
        assert any(whole), "what was compared is the reference with itself"


def test_two_gfns_in_one_frame_are_noticed_as_by_one_access_at_a_time() -> None:
    """A table that maps two gfns to one frame breaks what a plan relies on: it must see that and leave no trace."""

    def broken(vm: VM, *arguments: Any, **options: Any) -> TraceEngine:
        locate = vm.mmu.frames.locate
        vm.mmu.frames.locate = lambda pfn: locate(Pfn(pfn & ~1))  # type: ignore[method-assign]
        return options.pop("kind")(vm, *arguments, **options)  # type: ignore[no-any-return]

    before = [(0, 400, 8, True), (0, 0, 8, False), (1, 0, 8, False), (1, 8, 8, False)] * 16
    trace = trace_of([*before, (0, 0, 8, True), (1, 0, 8, False), (0, 96, 8, True)])
    seen = [
        trio.run(play, lambda *a, kind=kind, **o: broken(*a, kind=kind, **o), trace, [], [])
        for kind in (TraceEngine, OneAtATime)
    ]
    assert seen[0] == seen[1]
    assert any("shared memory at gpa 0x1000" in each for each in seen[0] if isinstance(each, str))
