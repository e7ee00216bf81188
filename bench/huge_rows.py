"""Guest-sealed files on huge pages of 2 MiB, beside a hugetlbfs and a memfd of such pages; what a guest has of them.

All take pages from one pool, which is made larger for as long as this runs. What leaves of 2 MiB save a guest is seen
on the same memory, once as it is, and once with the memslot a page off, so that no leaf fits and each page has its own.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import trio

from bench.conversion_rows import owner
from bench.harness import BenchError, Row, Run, Sample, compare, measure, memfs, now, placements, tmpfs, work
from kvmsim.engines.trace import TraceEngine
from kvmsim.engines.trace_file import RECORD, Trace
from kvmsim.mmu.tlb import Tlb
from kvmsim.uapi import KVM_MEM_FD, UserspaceMemoryRegion
from kvmsim.vm import VM, create_vm
from memfs.contract.sys.hugetlb import Pool, PoolError
from memfs.contract.sys.libc import MAP_NORESERVE, PUNCH_HOLE, fallocate, mount_detached
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gfn, GfnRange, Gpa

_SIZE: Final = 2 << 20
_PAGES: Final = 512  # of the pool
_GIB: Final = 1 << 30
_ACCESSES: Final = 150_000
_SEAL: Final = "user.memfs.seals"


def rows(run: Run) -> Iterator[Row]:
    """All rows about huge pages."""
    groups = {"huge pages: allocate": _files, "huge pages: convert": _conversions, "huge pages: guest": _guests}
    wanted = [group for name, group in groups.items() if run.wants(name) or (run.only or "") in name]
    if wanted:
        with _pool():
            for group in wanted:
                yield from group(run)


@contextmanager
def _pool() -> Iterator[None]:
    """Have a gibibyte of huge pages. Raises BenchError."""
    try:
        with Pool(_SIZE).larger(_PAGES):
            yield
    except PoolError as error:
        raise BenchError(str(error)) from error


def _make_private(directory: Path, size: int = _GIB) -> int:
    """Create a guest-sealed file and return a descriptor of it."""
    path = directory / "private"
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    os.setxattr(path, _SEAL, b"guest")
    fd = os.open(path, os.O_RDWR)
    os.ftruncate(fd, size)
    return fd


# -- files ----------------------------------------------------------------------------------------------------------


def _files(run: Run) -> Iterator[Row]:
    """Measure allocating and freeing, all of it and one page, and touching what is allocated."""
    with memfs(run, "size=2g,pagesize=2M") as ours:
        fds = {"memfs": _make_private(ours.path)}
        try:
            fds["memfd"] = os.memfd_create("bench", os.MFD_HUGETLB)
            root = mount_detached("hugetlbfs", {"pagesize": "2M"})
            try:
                fds["hugetlbfs"] = os.open("file", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=root)
            finally:
                os.close(root)
            for name in ("memfd", "hugetlbfs"):
                os.ftruncate(fds[name], _GIB)
            for placement, (cpu, daemon_cpu) in placements().items():
                ours.pin(daemon_cpu)
                before = os.sched_getaffinity(0)
                os.sched_setaffinity(0, {cpu})
                try:
                    yield from _calls(run, placement, fds)
                finally:
                    os.sched_setaffinity(0, before)
            yield from _touches(run, ours.path, fds)
        finally:
            for fd in fds.values():
                os.close(fd)


def _calls(run: Run, placement: str, fds: dict[str, int]) -> Iterator[Row]:
    for what, size, count, unit in (("1 GiB", _GIB, 1, "ms"), ("a page of 2 MiB", _SIZE, run.count(400), "us")):
        taken: dict[str, dict[str, list[float]]] = {"allocate": {}, "punch": {}}

        def both(fd: int, name: str, size: int = size, count: int = count, unit: str = unit) -> float:
            allocated, freed = _allocate_and_punch(fd, size, count)
            for call, seconds in (("allocate", allocated), ("punch", freed)):
                taken[call].setdefault(name, []).append(seconds * {"ms": 1e3, "us": 1e6}[unit])  # noqa: B023
            return allocated

        measure({name: partial(both, fd, name) for name, fd in fds.items()}, max(3, run.repetitions // 2))
        for call, values in taken.items():
            samples = {name: Sample(each[1:]) for name, each in values.items()}  # the first does not count
            for against in ("hugetlbfs", "memfd"):
                row = f"huge pages: {call} {what}"
                yield compare(row, placement, samples["memfs"], unit, against, samples[against])


def _allocate_and_punch(fd: int, size: int, count: int) -> tuple[float, float]:
    """Return the seconds that each takes."""
    allocated = freed = 0.0
    for _ in range(count):
        started = now()
        fallocate(fd, 0, 0, size)
        between = now()
        fallocate(fd, PUNCH_HOLE, 0, size)
        allocated, freed = allocated + between - started, freed + now() - between
    return allocated / count, freed / count


def _touches(run: Run, path: Path, fds: dict[str, int]) -> Iterator[Row]:
    """Measure how long an owner takes to touch each page for the first time since it has mapped the file."""

    async def main() -> dict[str, Sample]:
        private = await trio.to_thread.run_sync(os.open, path / "private", os.O_RDWR)
        async with create_vm((await trio.to_thread.run_sync(os.getxattr, path, "user.memfs.socket")).decode()) as vm:
            file = await vm.backing.register(private)
            try:
                return {
                    name: await _touch(run, fds[name], file.fd if name == "memfs" else fds[name])
                    for name in ("memfs", "memfd", "hugetlbfs")
                }
            finally:
                await vm.backing.unregister(file)
                await trio.to_thread.run_sync(os.close, private)

    samples = trio.run(main)
    for against in ("hugetlbfs", "memfd"):
        row = "huge pages: first touch of an allocated page by its owner"
        yield compare(row, "in process", samples["memfs"], "us", against, samples[against])


async def _touch(run: Run, fd: int, mapped: int) -> Sample:
    """Return microseconds a page."""
    await trio.to_thread.run_sync(fallocate, fd, 0, 0, _GIB)
    try:
        values = []
        for _ in range(run.repetitions + 1):
            with closing(mmap.mmap(mapped, _GIB, mmap.MAP_SHARED | MAP_NORESERVE)) as memory:
                started = now()
                for at in range(0, _GIB, _SIZE):
                    memory[at] = 1
                values.append((now() - started) / _PAGES * 1e6)
        return Sample(values[1:])
    finally:
        await trio.to_thread.run_sync(fallocate, fd, PUNCH_HOLE, 0, _GIB)


# -- conversions ----------------------------------------------------------------------------------------------------


def _conversions(run: Run) -> Iterator[Row]:
    """Measure what a conversion of a huge page takes, owner and all, beside the calls alone on a tmpfs."""
    with (
        memfs(run, "size=2g,pagesize=2M") as ours,
        tmpfs(run, "size=2g") as theirs,
        owner(ours.path, 1, 1, 64 * _SIZE // PAGE_SIZE) as process,
    ):
        for name in ("shared", "private"):
            (theirs.path / name).touch()
        for placement, (cpu, daemon_cpu) in placements().items():
            ours.pin(daemon_cpu)
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), {cpu})
            count = run.count(200)

            def there_and_back(directory: Path, cpu: int = cpu, count: int = count) -> float:
                """Microseconds for one conversion, of two."""
                return work(f"convert:{_SIZE // PAGE_SIZE}", directory, count, cpu) / count / 2e3

            samples = measure(
                {"memfs": partial(there_and_back, ours.path), "tmpfs": partial(there_and_back, theirs.path)},
                max(3, run.repetitions // 2),
            )
            yield compare(
                *("huge pages: convert 2 MiB", placement, samples["memfs"], "us", "tmpfs, the same calls"),
                samples["tmpfs"],
                at_least=1 / 1.1,
            )


# -- guests ---------------------------------------------------------------------------------------------------------


def _guests(run: Run) -> Iterator[Row]:
    """Measure faults, tables and TLB misses of a gibibyte of private memory, with leaves of 2 MiB and of 4 KiB."""
    with memfs(run, "size=2g,pagesize=2M") as ours:
        fd = _make_private(ours.path, _GIB)
        (ours.path / "shared").touch()
        os.truncate(ours.path / "shared", _GIB)
        shared = os.open(ours.path / "shared", os.O_RDWR)
        fallocate(fd, 0, 0, _GIB)
        socket = os.fsdecode(os.getxattr(ours.path, "user.memfs.socket"))
        try:
            huge, small = (trio.run(_guest, run, socket, shared, fd, gpa) for gpa in (Gpa(0), Gpa(PAGE_SIZE)))
        finally:
            os.close(fd)
            os.close(shared)
    against = "4 KiB leaves"
    yield compare(
        *("huge pages: guest faults on 1 GiB of private memory", "in process", huge["faults"], "ms", against),
        small["faults"],
    )
    yield compare(
        *("huge pages: guest tables for 1 GiB", "in process", huge["tables"], "bytes", against), small["tables"]
    )
    yield compare(
        *("huge pages: guest TLB misses of a trace over 1 GiB", "in process", huge["misses"], "misses", against),
        small["misses"],
        at_least=100,
    )
    yield compare(
        *("huge pages: guest trace over 1 GiB", "in process", huge["rate"], "M accesses/s", against),
        small["rate"],
        more_is_better=True,
    )


async def _guest(run: Run, socket: str, shared: int, private: int, gpa: Gpa) -> dict[str, Sample]:
    """Measure with memory from a gpa on."""
    records = np.zeros(_ACCESSES, RECORD)
    records["gpa"] = np.random.default_rng(0).integers(0, _GIB // 8, len(records)) * 8 + gpa
    records["size"], records["write"] = 8, np.arange(len(records)) % 2 == 0
    trace, gfns = Trace(records, "at random"), GfnRange(Gfn(gpa // PAGE_SIZE), Gfn((gpa + _GIB) // PAGE_SIZE))
    values: dict[str, list[float]] = {"faults": [], "tables": [], "misses": [], "rate": []}
    async with create_vm(socket, map_on_fallocate=False) as vm:
        region = UserspaceMemoryRegion(0, KVM_MEM_FD, gpa, _GIB, ByteOffset(0), shared, private)
        await vm.set_user_memory_region(region)
        assert await vm.fault(vm.decode(gpa, write=False, encrypted=True)) is None  # its frames are known from now on
        for number in range(1 if run.quick else 2):
            values["faults"].append(_fault_in(vm, gfns))
            values["tables"].append(vm.mmu.table.nbytes)
            seconds, tlb = await _replay(vm, number, TraceEngine(vm, trace, [gfns]))
            values["misses"].append(tlb.misses)
            values["rate"].append(len(records) / seconds / 1e6)
            vm.listeners.clear()
    return {name: Sample(each) for name, each in values.items()}


def _fault_in(vm: VM, gfns: GfnRange) -> float:
    """Return milliseconds."""
    vm.mmu.unmap(gfns)
    wanted = np.arange(gfns.start, gfns.end)
    started = now()
    served = vm.fault_in(wanted, write=True)
    taken = now() - started
    assert served.all()
    return taken * 1e3


async def _replay(vm: VM, number: int, engine: TraceEngine) -> tuple[float, Tlb]:
    vcpu = vm.create_vcpu(number, engine)
    started = now()
    await vcpu.run()
    return now() - started, vcpu.tlb
