"""A process with a guest that converts its memory, for the benchmarks: KVM, VMM and guest, as `kvmsim run` has them.

    python -m bench.guest DIRECTORY

Makes DIRECTORY/page and DIRECTORY/sweep on a memfs, with a file of shared and one of private memory in each. Then, for
each line of standard input, a guest runs, and a line with a number of seconds says how long:

    implicit COUNT   store to a page as private, then as shared, in turn: two conversions, COUNT times, in page
    explicit COUNT   the same, but it asks for each conversion by a hypercall, and stores then
    sweep            store to 16 MiB of absent memory as private, page after page, in sweep, where neighbours of up to
                     64 KiB that are empty may be converted along
"""

from __future__ import annotations

import os
import sys
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import trio

from bench.harness import now
from bench.owner import make_files
from kvmsim.backing import socket_of
from kvmsim.engines.program import Program, ProgramEngine, Store, convert
from kvmsim.exits import HALT, Exit
from kvmsim.mmu.page_fault import Access
from kvmsim.mmu.pte import PTE_PRIVATE, PTE_W
from kvmsim.side import Side
from kvmsim.vcpu import VCPU, Engine
from kvmsim.vm import VM, create_vm
from kvmsim.vmm.vmm import Vmm, open_memory
from memfs.contract.sys.libc import PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, Gfn, Gpa

PAGES: Final = 4096  #: of each guest's memory
_LOOK_AHEAD: Final = 512  # pages


def _implicit(count: int) -> Program:
    for number in range(count):
        gpa = Gpa(number % PAGES * PAGE_SIZE)
        yield Store(gpa, b"private", encrypted=True)
        yield Store(gpa, b"shared")


def _explicit(count: int) -> Program:
    for number in range(count):
        gpa = Gpa(number % PAGES * PAGE_SIZE)
        for side in (Side.PRIVATE, Side.SHARED):
            assert (yield convert(gpa, 1, side)) == 0
            yield Store(gpa, b"x", encrypted=side is Side.PRIVATE)


class _Sweep:
    """An engine that stores to page after page. As for a processor, what is mapped costs next to nothing."""

    def __init__(self) -> None:
        self._gfn = Gfn(0)

    async def run(self, vcpu: VCPU) -> Exit:
        while self._gfn < PAGES:
            ptes = vcpu.vm.mmu.table.translate(np.arange(self._gfn, min(self._gfn + _LOOK_AHEAD, PAGES)))
            misses = np.flatnonzero((ptes & (PTE_PRIVATE | PTE_W)) != PTE_PRIVATE | PTE_W)
            self._gfn = Gfn(self._gfn + (int(misses[0]) if len(misses) else len(ptes)))
            if len(misses):
                exit_ = await vcpu.vm.fault(Access(self._gfn, True, Side.PRIVATE))
                if exit_ is not None:
                    return exit_
            await trio.lowlevel.checkpoint()
        return HALT


async def _seconds(vm: VM, vmm: Vmm, engine: Engine) -> float:
    vcpu = vm.create_vcpu(0, engine)
    started = now()
    await vmm.run(vcpu)
    taken = now() - started
    del vm.vcpus[0]
    vm.mmu.tlbs.clear()
    return taken


async def _serve(memory: dict[str, Vmm], socket_path: str) -> None:
    async with AsyncExitStack() as stack:
        vms = {}
        for name, vmm in memory.items():
            vms[name] = await stack.enter_async_context(create_vm(socket_path, name=f"bench-{name}"))
            await vmm.add_memory(vms[name])
        print("ready", flush=True)
        while line := await _next_line():
            what, *arguments = line.split()
            if what == "sweep":
                punch = partial(fallocate, memory["sweep"].private, PUNCH_HOLE, 0, PAGES * PAGE_SIZE)
                await trio.to_thread.run_sync(punch)
                seconds = await _seconds(vms["sweep"], memory["sweep"], _Sweep())
            else:
                program = {"implicit": _implicit, "explicit": _explicit}[what](*map(int, arguments))
                seconds = await _seconds(vms["page"], memory["page"], ProgramEngine(program))
            print(seconds, flush=True)


async def _next_line() -> str:
    await trio.lowlevel.wait_readable(sys.stdin)  # of which there is never more than a line
    return sys.stdin.readline()


def main(root: Path) -> None:
    """Serve."""
    with ExitStack() as stack:
        memory = {}
        for name, granule in (("page", PAGE_SIZE), ("sweep", 16 * PAGE_SIZE)):
            for fd in make_files(root / name, PAGES):
                os.close(fd)
            shared, private = (str(root / name / side) for side in ("shared", "private"))
            memory[name] = stack.enter_context(open_memory(shared, private, PAGES * PAGE_SIZE, granule))
        fallocate(memory["sweep"].shared, PUNCH_HOLE, 0, PAGES * PAGE_SIZE)
        trio.run(_serve, memory, socket_of(memory["page"].shared))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
