"""A VM of the real KVM that runs on the memory of one of ours.

Theory of operation
===================

kvmsim's page table decides; this is one more TLB of it. Each file of each slot is mapped as a window (window.py), a
KVM memslot each: the private file at the slot's gpa, the shared one at the same with the shared bit set. Nothing is
mapped in a window to begin with.

    the guest touches a page that is not mapped     KVM's thread falls asleep in the kernel ("parked"), an event comes
      its PTE allows that                           the page and mapped neighbours are projected, the thread is woken
      otherwise                                     its engine asks `vm.fault`, which may give an exit: the VMM converts
    kvmsim unmaps                                   `flush`: out of the windows, under the MMU lock, so before the
                                                    invalidation is acknowledged; the guest may run meanwhile

Mapping never wakes. A neighbour that is projected along may be what another vCPU is parked at, whose VMM has not run it
since; it goes on when its engine is run. Two that are parked at one page cannot be woken apart, so that one that nobody
runs is kicked as well: it leaves without having executed anything.

Slots come and go with the VM's while no thread is in KVM_RUN, since KVM waits for that (SRCU), and so would the event
loop. One that is parked at a page is kicked out, and comes back to it later.

With an interrupt controller in KVM, a page that a vCPU touches may be waited for by a thread of the kernel's own, and
not by the vCPU's, which KVM halts until then, except for interrupts ("asynchronous page faults"). Whose vCPU that is
the event does not say; so whichever is run asks for the page, and is kicked out if that is an exit.

Events are read by a task, or by an engine that is being cancelled; both do the same, which does not await.
"""

from __future__ import annotations

import bisect
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from itertools import count, pairwise
from typing import Final

import numpy as np
import trio

from kvmsim.backing import GuestFile
from kvmsim.engines.kvm.engine import KvmEngine
from kvmsim.engines.kvm.sregs import user_mode
from kvmsim.engines.kvm.thread import Bus, handle_kicks
from kvmsim.engines.kvm.uapi import Kvm
from kvmsim.engines.kvm.userfaultfd import FaultEvent, Userfaultfd
from kvmsim.engines.kvm.window import ParkedAt, Window
from kvmsim.engines.slot_files import files_of
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import PTE_A, PTE_D, PTE_PRIVATE, PTE_R, PTE_W, side_of
from kvmsim.mmu.radix import Radix
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from kvmsim.vm import VM
from memfs.contract.aio.busy_poll import BusyPoll
from memfs.contract.aio.nurseries import open_flat_nursery
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange, gfn_to_gpa

#: What `out` to some port does, given the bytes
Port = Callable[[bytes], None]

_LONGEST_POLL: Final = 100e-6  # seconds; a guest that goes through memory touches the next block as soon as that
PAGES_A_FAULT: Final = 64  #: as large as the aligned block that is projected around a page, by default


class KvmMachine:
    """The real KVM's side of a VM. Use `open_kvm_machine`.

    `pages_a_fault`: a power of two; that many pages, aligned, are looked at when one is touched.
    """

    def __init__(self, vm: VM, pages_a_fault: int = PAGES_A_FAULT) -> None:
        if pages_a_fault < 1 or pages_a_fault & (pages_a_fault - 1):
            raise ValueError("a power of two of pages is projected a fault")
        handle_kicks()
        self.vm: Final = vm
        self.events = 0  #: faults that came as events
        self._block: Final = pages_a_fault
        self._engines: dict[int, KvmEngine] = {}  # by native thread id
        self.windows: list[Window] = []  #: by address
        self._by_gfn: list[Window] = []
        self._of_slot: dict[int, list[Window]] = {}  # by slot id
        self._numbers: Final = count()  # of KVM memslots
        self._free_numbers: list[int] = []
        #: where threads of the kernel are parked
        self.parked_for_others: list[ParkedAt] = []
        self._may_run = trio.Event()  # another one while no vCPU may
        self._may_run.set()
        with ExitStack() as undo:
            self.kvm: Final = Kvm()
            undo.callback(self.kvm.close)
            shared_bit = vm.type.shared_bit
            if not shared_bit or shared_bit >> self.kvm.address_bits:
                kind = f"tdx-{self.kvm.address_bits}"
                raise OSError(errno.EINVAL, f"VM type {vm.type.name}: on this KVM a gpa says its side as {kind} does")
            self._uffd: Final = Userfaultfd()
            undo.callback(self._uffd.close)
            undo.callback(self._close_windows)
            for slot in vm.mmu.slots:
                self.replace(None, slot)
            vm.keep_in_step(self)
            vm.mmu.tlbs.append(self)
            undo.pop_all()

    # -- memslots -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """Have no thread in KVM_RUN within an async with statement. Raises OSError(EBUSY) as `KvmEngine.leave` does."""
        self._may_run = trio.Event()
        try:
            for engine in list(self._engines.values()):
                await engine.leave()
            yield
        finally:
            self._may_run.set()

    async def wait_until_allowed(self) -> None:
        """Wait while no vCPU may enter KVM_RUN."""
        while not self._may_run.is_set():
            await self._may_run.wait()

    def replace(self, old: Memslot | None, new: Memslot | None) -> None:
        """Have the windows of a slot in the place of another's. All or nothing. Raises OSError."""
        gone = [] if old is None else self._of_slot[old.id]
        come: list[Window] = []
        with ExitStack() as undo:
            if new is not None:
                for side, file in files_of(new):
                    come.append(window := self._open_window(new, side, file))
                    undo.callback(self._close_window, window)
            for window in gone:
                self._set_memory(window, 0)
                undo.callback(self._set_memory, window, window.size)
            for window in come:
                self._set_memory(window, window.size)
                undo.callback(self._set_memory, window, 0)
            undo.pop_all()
        for window in gone:
            self._close_window(window)
        self.parked_for_others = [parked for parked in self.parked_for_others if parked.window not in gone]
        if old is not None:
            del self._of_slot[old.id]
        if new is not None:
            self._of_slot[new.id] = come
        windows = [window for each in self._of_slot.values() for window in each]
        self.windows = sorted(windows, key=lambda window: window.address)
        self._by_gfn = sorted(windows, key=lambda window: window.gfns.start)

    def _open_window(self, slot: Memslot, side: Side, file: GuestFile) -> Window:
        number = self._free_numbers.pop() if self._free_numbers else next(self._numbers)
        try:
            return Window(number, slot, side, file, self._uffd)
        except BaseException:
            self._free_numbers.append(number)
            raise

    def _close_window(self, window: Window) -> None:
        window.close()
        self._free_numbers.append(window.number)

    def _set_memory(self, window: Window, size: int) -> None:
        """Have a window be a KVM memslot of so many bytes; 0: none."""
        shared_bit = self.vm.type.shared_bit if window.side is Side.SHARED else 0
        gpa = gfn_to_gpa(window.gfns.start) | shared_bit
        self.kvm.set_memory(window.number, gpa, size, window.address, readonly=window.readonly)

    def create(self, vcpu_id: int, ports: dict[int, Port] | None = None) -> KvmEngine:
        """Create the engine of a vCPU at CPL 3 (user_mode.py). Raises OSError.

        `ports`: what `out` to a port does, given the bytes; called in the vCPU's thread.
        """
        answers = ports or {}

        def bus(port: int, _: int, data: bytes | None) -> bytes | None:
            if data is None or port not in answers:
                return None
            answers[port](data)
            return b""

        return self.create_with(vcpu_id, bus, partial(user_mode, has_xsave=self.kvm.has_xsave))

    def create_with(
        self, vcpu_id: int, bus: Bus, sregs: Callable[[bytearray], bytearray], *, plain_ports: bool = False
    ) -> KvmEngine:
        """Create the engine of a vCPU with other registers, and with something on its I/O bus. Raises OSError.

        `plain_ports`: `out` is an IoExit, whatever the port; otherwise those of ports.py mean what is said there.
        """
        engine = KvmEngine(self, vcpu_id, bus, sregs, plain_ports=plain_ports)
        self._engines[engine.thread_id] = engine
        return engine

    # -- from kvmsim's page table to the windows ---------------------------------------------------------------------

    def flush(self, gfns: GfnRange) -> None:
        """Unmap a range from all windows."""
        first = bisect.bisect_right(self._by_gfn, gfns.start, key=lambda window: window.gfns.end)
        for window in self._by_gfn[first:]:
            part = window.gfns.intersect(gfns)
            if part is None:
                return
            window.flush(part)

    def check(self, table: Radix) -> None:
        """Raise AssertionError on the first page in a window that the page table does not map, so, or on that side."""
        for window in self.windows:
            gfns, writable = window.present()
            ptes = table.translate(gfns)
            wanted = PTE_R | PTE_PRIVATE if window.side is Side.PRIVATE else PTE_R
            wrong = (ptes & (PTE_R | PTE_PRIVATE)) != wanted
            assert not wrong.any(), f"the guest sees gfn {gfns[wrong][0]:#x} as {window.side} memory, which it is not"
            wrong = writable & ((ptes & PTE_W) == 0)
            assert not wrong.any(), f"the guest can store to gfn {gfns[wrong][0]:#x}, which is mapped read-only"

    def project(self, parked: ParkedAt) -> bool:
        """Map the page of an access, and neighbours, if its PTE allows that. Returns whether it does; wakes nobody.

        Raises OSError(EFAULT) if the file does not have the page.
        """
        window, access = parked.window, parked.access
        pte = self.vm.mmu.table.lookup(access.gfn)
        if not pte or side_of(pte) is not access.side or (access.write and not pte & PTE_W):
            return False
        is_new = window.is_absent(access.gfn)
        start = access.gfn & -self._block
        block = GfnRange(Gfn(start), Gfn(start + self._block)).intersect(window.gfns)
        assert block is not None
        self._project(window, block)
        if not is_new or window.is_absent(access.gfn):
            window.project(access.gfn, writable=bool(pte & PTE_W))
        return True

    def project_range(self, gfns: GfnRange) -> None:
        """Map all that the page table maps of a range, before the guest touches it."""
        for window in self._by_gfn:
            part = window.gfns.intersect(gfns)
            if part is not None:
                self._project(window, part)

    def _project(self, window: Window, gfns: GfnRange) -> None:
        """Map what the page table maps of a range of a window.

        It counts as accessed, and as dirty where it can be: nobody sees what the guest does with it.
        """
        wanted = PTE_R | PTE_PRIVATE if window.side is Side.PRIVATE else PTE_R
        for leaves in self.vm.mmu.table.leaves(gfns):
            kinds = leaves.ptes & (PTE_R | PTE_W | PTE_PRIVATE)
            edges = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist(), len(kinds)]
            for first, last in pairwise(edges):
                kind, writable = int(kinds[first]) & ~PTE_W, bool(kinds[first] & PTE_W)
                if kind == wanted:
                    window.project_range(leaves.part(first, last), writable=writable)
                    leaves.ptes[first:last] |= PTE_A | PTE_D if writable else PTE_A

    def wake(self, parked: ParkedAt) -> None:
        """Let those go on that are parked at a page."""
        self.parked_for_others = [other for other in self.parked_for_others if not other.is_at(parked)]
        address = parked.window.address + (parked.access.gfn - parked.window.gfns.start) * PAGE_SIZE
        for engine in self._engines.values():
            engine.woken(parked)
        self._uffd.wake(address, PAGE_SIZE)

    # -- from the guest's faults to kvmsim ----------------------------------------------------------------------------

    async def serve(self) -> None:
        """Take events as they come, for ever."""
        poll = BusyPoll(_LONGEST_POLL)
        try:
            while True:
                poll.start()
                while not self.take_events():
                    if not poll.goes_on():
                        await trio.lowlevel.wait_readable(self._uffd.fd)
                poll.stop()
                await trio.lowlevel.checkpoint()
        except OSError:
            await self.vm.catch_up()  # if memfs has taken the memory meanwhile, that is why
            raise

    def take_events(self) -> int:
        """Take the events that are there, and return how many. Does not await."""
        taken = 0
        for event in self._uffd.events():
            taken += 1
            parked = self._where(event)
            engine = self._engines.get(event.thread)
            if engine is not None:
                engine.parked(parked)
            else:
                self._parked_for_another(parked)
        self.events += taken
        return taken

    def _parked_for_another(self, parked: ParkedAt) -> None:
        if self.project(parked):
            self.wake(parked)
            return
        self.parked_for_others.append(parked)
        for engine in self._engines.values():
            engine.look()

    def _where(self, event: FaultEvent) -> ParkedAt:
        window = self.windows[bisect.bisect_right(self.windows, event.address, key=lambda each: each.address) - 1]
        return ParkedAt(window, Access(window.gfn_at(event.address), event.write, window.side))

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all threads, wherever they are, and unmap the windows. Nothing is allocated for one that is parked."""
        self.vm.keep_in_step(None)
        self.vm.mmu.tlbs.remove(self)
        for engine in self._engines.values():
            engine.refuse_to_run()
        self._close_windows()
        self._uffd.close()  # after the windows: whoever is parked is to find nothing, and not memory of its own
        for engine in self._engines.values():
            engine.close()
        self.kvm.close()

    def _close_windows(self) -> None:
        for window in self._by_gfn:
            window.close()


@asynccontextmanager
async def open_kvm_machine(vm: VM, pages_a_fault: int = PAGES_A_FAULT) -> AsyncIterator[KvmMachine]:
    """Give a VM, whose slots are set, to the real KVM for the block.

    Raises KvmUnavailable or UserfaultfdUnavailable, with a sentence, where that cannot be; OSError(EINVAL) if a slot
    lies on no files, or the VM's type does not fit the processor.
    """
    machine = KvmMachine(vm, pages_a_fault)
    try:
        async with open_flat_nursery() as nursery:
            nursery.start_soon(machine.serve)
            try:
                yield machine
            finally:
                nursery.cancel_scope.cancel()
    finally:
        machine.close()
