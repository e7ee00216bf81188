"""kvmsim's page table and memslots: how fast, how large, and beside what.

Speed of the page table is measured beside one flat numpy array of as many entries, which is what a table would be if
memory cost nothing; slots beside those of the real KVM, if this machine has one. Sizes are what the kernel says that a
fresh process has more in memory than before, so book-keeping and slack count.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import trio

from bench.harness import Row, Run, Sample, measure, now
from kvmsim import ioctls
from kvmsim.mmu.page_table import PageTable
from kvmsim.mmu.pte import PTE_RWX
from kvmsim.slots.memslots import Memslot
from kvmsim.uapi import KVM_MEM_FD, KVM_USER_MEM_SLOTS, UserspaceMemoryRegion
from kvmsim.vm import VM
from memfs.contract.protocol.messages import FileId, InvalidateBegin, InvalidateEnd
from memfs.contract.units import ORDER_1G, PAGE_SIZE, ByteOffset, Gfn, GfnRange, Gpa, PageIndex, PageRange, Pfn

_GIB: Final = 1 << ORDER_1G  # in pages
_RESIDENT: Final = 16 * _GIB


def _row(
    name: str, sample: Sample, unit: str, against: str, reference: float, ratio: float, target: str, met: bool
) -> Row:
    values = sample.values
    return Row(
        name, "in process", sample.median, min(values), max(values), unit, against, reference, ratio, target, met
    )


def rows(run: Run) -> Iterator[Row]:
    """All rows about kvmsim."""
    for group in (_translate, _ranges, _sizes, _notifications, _slots):
        if run.wants(f"kvmsim {group.__name__.strip('_')}"):
            yield from group(run)


def _timed(work: Callable[[], object]) -> float:
    started = now()
    work()
    return now() - started


def _translate(run: Run) -> Iterator[Row]:
    table = PageTable()
    table.map_range(GfnRange(Gfn(0), Gfn(_RESIDENT)), Pfn(_GIB), PTE_RWX)
    flat = table.translate(np.arange(_RESIDENT))
    asked = np.random.default_rng(0).integers(0, _RESIDENT, run.count(4_000_000))
    samples = measure(
        {
            "table": lambda: len(asked) / _timed(lambda: table.translate(asked)) / 1e6,
            "flat": lambda: len(asked) / _timed(lambda: flat[asked]) / 1e6,
        },
        run.repetitions,
    )
    ours, theirs = samples["table"].median, samples["flat"].median
    met = ours >= 20 and ours / theirs >= 0.25
    target = ">= 20 M/s, ratio >= 0.25"
    name = "kvmsim translate, at random in 16 GiB"
    yield _row(name, samples["table"], "M/s", "flat numpy gather", theirs, ours / theirs, target, met)


def _ranges(run: Run) -> Iterator[Row]:
    table, gfns = PageTable(), GfnRange(Gfn(0), Gfn(_GIB))
    flat = np.empty(_GIB, np.int64)

    def fill() -> None:
        flat[:] = np.arange(_GIB) << 12 | PTE_RWX

    samples = measure(
        {
            "map_range": lambda: _timed(lambda: table.map_range(gfns, Pfn(_GIB), PTE_RWX)) * 1e3,
            "unmap_range": lambda: _timed(lambda: table.unmap_range(gfns)) * 1e3,
            "flat map": lambda: _timed(fill) * 1e3,
            "flat unmap": lambda: _timed(lambda: flat.fill(0)) * 1e3,
        },
        run.repetitions,
    )
    for what, reference in (("map_range", "flat map"), ("unmap_range", "flat unmap")):
        ours, theirs = samples[what].median, samples[reference].median
        name = f"kvmsim {what} of 1 GiB in 4 KiB leaves"
        yield _row(name, samples[what], "ms", "one flat array", theirs, theirs / ours, "<= 5 ms", ours <= 5)


_SIZE_PROGRAM: Final = """
import sys
from kvmsim import ioctls
from kvmsim.mmu.page_table import PageTable
from memfs.contract.units import GfnRange
def rss():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
pages, order = int(sys.argv[1]), int(sys.argv[2])
warm = PageTable()
for _ in range(3):  # until malloc keeps the scratch arrays that numpy needs, which are no tables
    warm.map_range(GfnRange(0, 1 << 18), 0, 7, 0)
    warm.unmap_range(GfnRange(0, 1 << 18))
before = rss()
table = PageTable()
if pages:
    table.map_range(GfnRange(0, pages), 0, 7, order)
print(rss() - before)
"""


def _resident(pages: int, order: int) -> float:
    """Return how many MiB a page table adds to a fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", _SIZE_PROGRAM, str(pages), str(order)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return int(result.stdout) / 1024


def _sizes(run: Run) -> Iterator[Row]:
    del run
    small = Sample([_resident(_RESIDENT, 0) * (1 << 20) / _RESIDENT for _ in range(3)])
    name = "kvmsim memory of tables, 16 GiB in 4 KiB leaves"
    yield _row(
        name, small, "bytes/page", "one PTE a page", 8.0, 8.0 / small.median, "<= 8.3 bytes", small.median <= 8.3
    )
    for name, pages, order, limit in (
        ("kvmsim memory of tables, 1 TiB in 2 MiB leaves", 1024 * _GIB, 9, 8.0),
        ("kvmsim memory of tables, idle", 0, 0, 1.0),
    ):
        sample = Sample([_resident(pages, order) for _ in range(3)])
        yield _row(name, sample, "MiB", "limit", limit, limit / max(sample.median, 0.001), f"<= {limit:g} MiB",
                   sample.median <= limit)  # fmt: skip


def _vm_with(slots: int, nursery: trio.Nursery) -> tuple[VM, FileId]:
    """Create a VM with slots of 16 pages, each on pages of its own of one file."""
    store: Any = None
    vm = VM(store, nursery)
    file: Any = SimpleNamespace(id=FileId(1))
    for number in range(slots):
        start = Gfn(number * 32)
        gfns, offset = GfnRange(start, Gfn(start + 16)), ByteOffset(number * 16 * PAGE_SIZE)
        vm.mmu.slots.add(Memslot(number, KVM_MEM_FD, gfns, offset, file, None))
    return vm, file.id


def _notifications(run: Run) -> Iterator[Row]:
    async def main() -> dict[str, Sample]:
        async with trio.open_nursery() as nursery:
            vms = {count: _vm_with(count, nursery) for count in (1, 10_000)}

            def notify(count: int) -> float:
                vm, file = vms[count]
                page = PageRange(PageIndex(5), PageIndex(6))
                gfn = GfnRange(Gfn(5), Gfn(6))
                begin, end = InvalidateBegin(file, page), InvalidateEnd(file, page)
                number, spent = run.count(4000), 0.0
                for _ in range(number):
                    vm.mmu.table.map_range(gfn, Pfn(77), PTE_RWX)
                    started = now()
                    vm._notified(begin)
                    vm._notified(end)
                    spent += now() - started
                return spent / number * 1e6

            return measure({"one": lambda: notify(1), "many": lambda: notify(10_000)}, run.repetitions)

    samples = trio.run(main)
    ours, theirs = samples["many"].median, samples["one"].median
    name = "kvmsim one-page notification, 10,000 slots"
    yield _row(name, samples["many"], "us", "one slot", theirs, theirs / ours, "<= 1.3 times", ours <= 1.3 * theirs)


def _slots(run: Run) -> Iterator[Row]:
    async def create() -> float:
        async with trio.open_nursery() as nursery:
            store: Any = None
            vm = VM(store, nursery)
            started = now()
            for slot in range(KVM_USER_MEM_SLOTS):
                region = UserspaceMemoryRegion(slot, 0, Gpa(slot * 2 * PAGE_SIZE), PAGE_SIZE, ByteOffset(1 << 20))
                await vm.set_user_memory_region(region)
            return now() - started

    subjects: dict[str, Callable[[], float]] = {"kvmsim": lambda: trio.run(create)}
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        subjects["kvm"] = _create_in_kvm
    samples = measure(subjects, min(run.repetitions, 3))
    ours = samples["kvmsim"]
    theirs = samples["kvm"].median if "kvm" in samples else 2.5
    against = "real KVM" if "kvm" in samples else "real KVM elsewhere"
    name = "kvmsim 32,764 slots created"
    yield _row(name, ours, "s", against, theirs, theirs / ours.median, "ratio >= 1", ours.median <= theirs)


def _create_in_kvm() -> float:
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        vm = fcntl.ioctl(kvm, ioctls.KVM_CREATE_VM, 0)
        try:
            started = now()
            for slot in range(KVM_USER_MEM_SLOTS):
                region = ioctls.REGION.pack(slot, 0, slot * 2 * PAGE_SIZE, PAGE_SIZE, 1 << 20)
                fcntl.ioctl(vm, ioctls.KVM_SET_USER_MEMORY_REGION, region)
            return now() - started
        finally:
            os.close(vm)
    finally:
        os.close(kvm)
